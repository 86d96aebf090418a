//! One VM that arrives: it is built as its source describes it, received, watched while it runs, and checked at its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ringferry::destination::{DestinationError, DestinationOptions, Incoming};
use ringferry::wire::reason::Reason;

use crate::guest::{Host, HostArgs};
use crate::interrupt;
use crate::landing::Landing;
use crate::machine::Machine;
use crate::memory_budget::{MemoryBudget, Reserved};
use crate::output::Output;
use crate::told::Told;
use crate::vm_description::VmDescription;

/// How often the guest's vCPUs are looked at.
const POLL: Duration = Duration::from_millis(10);

/// What all VMs of one `ringferry receive` share.
#[derive(Debug)]
pub struct Reception<'a> {
    /// How this host holds VMs.
    pub host: &'a HostArgs,
    /// How much RAM they may have.
    pub budget: MemoryBudget,
    /// How long each runs here; `None`: until a signal.
    pub run_for: Option<Duration>,
    /// Raised by a signal.
    pub interrupted: &'a AtomicBool,
    /// Where it is told how they are.
    pub output: Output,
}

/// What became of an offered VM.
#[derive(Debug)]
pub enum Arrival {
    /// It was not wanted: its place is free.
    Refused,
    /// It has come and gone, or failed to come.
    Gone(Result<()>),
}

impl Reception<'_> {
    /// Receives the VM, runs it for as long as it may, and checks it.
    pub fn take(&self, incoming: Incoming) -> Arrival {
        let name = incoming.vm_id().to_owned();
        let (mut host, _reserved) = match self.build(incoming.vm_id(), incoming.description(), self.host) {
            Ok(built) => built,
            Err(why) => {
                self.refuse(incoming, Reason::Unbuildable, why);
                return Arrival::Refused;
            }
        };
        let memory = host.vm.memory().clone();
        let vcpus = u32::try_from(host.vm.vcpus()).unwrap_or(u32::MAX);
        let options = DestinationOptions::default();
        match incoming.receive(&mut Landing(&mut host), vcpus, &memory, &options, self.interrupted) {
            Ok(report) => {
                interrupt::promise(
                    "each guest that runs here is checked, and ends; a VM that is on its way stays at its source",
                );
                let run = Told::Received(report).tell(self.output).context("telling that the VM runs here");
                Arrival::Gone(run.and_then(|()| self.run(&mut host)))
            }
            Err(DestinationError::Refused { text, .. }) => {
                self.tell_refused(name, text);
                Arrival::Refused
            }
            Err(error) if name.is_empty() => Arrival::Gone(Err(error.into())),
            Err(error) => {
                Arrival::Gone(Err(anyhow::Error::new(error).context(format!("{name} was not received"))))
            }
        }
    }

    /// Refuses a VM, and says so on both sides.
    pub fn refuse(&self, incoming: Incoming, reason: Reason, why: String) {
        let name = incoming.vm_id().to_owned();
        let refused = incoming.refuse(reason, why.clone());
        tracing::info!("{refused}");
        self.tell_refused(name, why);
    }

    fn tell_refused(&self, vm_id: String, why: String) {
        if let Err(error) = (Told::Refused { vm_id, why }).tell(self.output) {
            tracing::warn!(%error, "a refusal could not be told");
        }
    }

    /// The VM that the source describes, or why there can be none.
    pub fn build(
        &self,
        vm_id: &str,
        description: &[u8],
        host: &HostArgs,
    ) -> Result<(Host, Reserved<'_>), String> {
        let description = VmDescription::parse(description).map_err(|error| error.to_string())?;
        let reserved = self.budget.reserve(description.memory_bytes)?;
        let vm = Machine::new(description.guest, description.config(host))
            .map_err(|error| format!("the destination cannot build the VM: {error:#}"))?;
        Ok((Host { name: vm_id.to_owned(), description, guest: None, vm }, reserved))
    }

    /// Runs it for as long as it may, and checks it.
    pub fn run(&self, host: &mut Host) -> Result<()> {
        let begin = host.seen();
        let since = Instant::now();
        // Relaxed: a flag without data, polled.
        while self.run_for.is_none_or(|limit| since.elapsed() < limit)
            && !self.interrupted.load(Ordering::Relaxed)
        {
            host.check_vcpus()?;
            std::thread::sleep(POLL);
        }
        let found = host.examine(begin)?;
        Told::Checked { vm_id: host.name.clone(), found: found.clone() }.tell(self.output)?;
        found.verdict()
    }
}
