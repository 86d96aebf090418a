//! What the guest runs on: KVM, or ordinary host threads where there is none.

use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use ringferry::track::{DirtyTracker, VcpuFigures};
use ringferry::{DirtySource, GuestMemory, Vm};
use ringferry_testvm::{Config, TestVm, ThreadVm, VcpuStatus};
use serde::{Deserialize, Serialize};

/// Which kind of guest.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestKind {
    /// A guest under KVM
    Kvm,
    /// The same workload on host threads, tracked by pagemap: a simulation, for machines without KVM
    Threads,
}

impl GuestKind {
    /// KVM, or threads where there is no `/dev/kvm` at all. (One that may not be opened is an error to be told.)
    pub fn of_this_machine() -> Self {
        if Path::new("/dev/kvm").exists() { Self::Kvm } else { Self::Threads }
    }

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Threads => "threads",
        }
    }
}

/// A VM of either kind.
#[derive(Debug)]
pub enum Machine {
    Kvm(Box<TestVm>),
    Threads(Box<ThreadVm>),
}

impl Machine {
    /// Builds the VM; nothing runs yet.
    pub fn new(kind: GuestKind, config: Config) -> Result<Self> {
        Ok(match kind {
            GuestKind::Kvm => Self::Kvm(Box::new(TestVm::new(config)?)),
            GuestKind::Threads => Self::Threads(Box::new(ThreadVm::new(config)?)),
        })
    }

    /// Starts what is to be booted.
    pub fn start(&mut self) -> Result<()> {
        match self {
            Self::Kvm(vm) => vm.start()?,
            Self::Threads(vm) => vm.start()?,
        }
        Ok(())
    }

    pub fn kind(&self) -> GuestKind {
        match self {
            Self::Kvm(_) => GuestKind::Kvm,
            Self::Threads(_) => GuestKind::Threads,
        }
    }

    pub fn memory(&self) -> &GuestMemory {
        match self {
            Self::Kvm(vm) => vm.memory(),
            Self::Threads(vm) => vm.memory(),
        }
    }

    pub fn vcpus(&self) -> usize {
        match self {
            Self::Kvm(vm) => vm.vcpus(),
            Self::Threads(vm) => vm.vcpus(),
        }
    }

    pub fn status(&self) -> Vec<VcpuStatus> {
        match self {
            Self::Kvm(vm) => vm.status(),
            Self::Threads(vm) => vm.status(),
        }
    }

    /// What the guest said on its serial port.
    pub fn console(&self) -> String {
        match self {
            Self::Kvm(vm) => vm.console(),
            Self::Threads(_) => String::new(),
        }
    }

    /// The tracker that hears of the host's writes into the mailbox. (`pagemap` sees those by itself.)
    pub fn kvm_tracker(&self) -> Option<&DirtyTracker> {
        match self {
            Self::Kvm(vm) => vm.tracker(),
            Self::Threads(_) => None,
        }
    }

    /// Where dirty pages come from.
    pub fn dirty_source(&self) -> Result<Box<dyn DirtySource>> {
        Ok(match self {
            Self::Kvm(vm) => Box::new(vm.tracker().context("the VM has no dirty tracking")?.session()),
            Self::Threads(vm) => Box::new(vm.track()?),
        })
    }

    /// What is known of each vCPU's dirty pages; nothing of threads but that they are there.
    pub fn figures(&self) -> Vec<VcpuFigures> {
        let nothing = |index| {
            let mut figures = VcpuFigures::default();
            figures.index = index;
            figures
        };
        self.kvm_tracker()
            .map_or_else(|| (0..self.vcpus()).map(nothing).collect(), |kvm| kvm.snapshot().vcpus)
    }

    /// The VM under KVM, if it is one.
    pub fn kvm(&self) -> Option<&TestVm> {
        match self {
            Self::Kvm(vm) => Some(vm),
            Self::Threads(_) => None,
        }
    }

    /// What a migration asks.
    pub fn as_vm(&mut self) -> &mut (dyn Vm + 'static) {
        match self {
            Self::Kvm(vm) => vm.as_mut(),
            Self::Threads(vm) => vm.as_mut(),
        }
    }

    /// Forces vCPU `index` out of the guest.
    pub fn kick(&self, index: usize) {
        match self {
            Self::Kvm(vm) => vm.kick(index),
            Self::Threads(vm) => vm.kick(index),
        }
    }
}
