//! The VMM's end of `ringferry offload`: `run` lends its VM, `receive` builds the one that comes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ringferry::destination::DestinationReport;
use ringferry::offload::{self, Ended, LentVm, Listener, Offer, RegionFile, Rings};
use ringferry::vm::VmError;
use serde::Serialize;

use crate::arrival::Reception;
use crate::guest::{BackingArg, Host, HostArgs};
use crate::interrupt;
use crate::landing::Landing;
use crate::machine::Machine;
use crate::told::Told;

/// How often a wait for an offload process looks at everything else.
const POLL: Duration = Duration::from_millis(20);

/// Where a VM waits for its offload process.
#[derive(Debug)]
pub struct Lender {
    listener: Listener,
    rings: Rings,
}

impl Lender {
    /// Waits on `path`. The VM's RAM has to be a file for that.
    pub fn bind(path: &Path, rings: Rings, host: &mut HostArgs) -> Result<Self> {
        ensure!(
            host.backing != Some(BackingArg::Anonymous),
            "an offload process maps guest RAM by its descriptor, and anonymous memory has none: say --backing memfd"
        );
        host.backing = Some(BackingArg::Memfd);
        let listener = Listener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        Ok(Self { listener, rings })
    }

    /// An offload process that has come.
    pub fn accept(&self) -> Result<Option<OwnedFd>> {
        self.listener.accept(Duration::ZERO).context("accepting an offload process")
    }

    /// Lends the VM of `host`, until its offload process is done.
    pub fn lend(&self, connection: OwnedFd, host: &mut Host, cancel: &AtomicBool) -> Result<Ended> {
        let memory = region_files(&host.vm)?;
        let vm = host.vm.kvm().context("a guest of threads has no rings")?;
        let tracker = vm.tracker().context("the VM has no dirty tracking")?.clone();
        let again = vm.vcpu_fds().iter().map(|vcpu| vcpu.try_clone());
        let vcpus: Vec<_> = again.collect::<Result<Vec<_>, _>>()?.into_iter().enumerate().collect();
        let description = host.description.to_bytes()?;
        let vm_id = host.name.clone();
        let lent = LentVm {
            tracker: &tracker,
            rings: self.rings,
            memory: &memory,
            vcpus: &vcpus,
            vm_id: &vm_id,
            description: &description,
        };
        Ok(offload::lend(connection, host.vm.as_vm(), &lent, cancel)?)
    }
}

/// Guest memory, as it is passed on.
fn region_files(machine: &Machine) -> Result<Vec<RegionFile>> {
    let vm = machine
        .kvm()
        .context("a guest of threads cannot be lent: its tracker follows this process's memory")?;
    let files = vm.ram_files().context("guest RAM is no file: say --backing memfd")?;
    let regions = vm.memory().regions().iter().zip(files);
    let passed = regions.map(|(region, file)| {
        Ok(RegionFile {
            slot: region.slot,
            pages: region.pages,
            file: file.as_fd().try_clone_to_owned()?,
            offset: 0,
            name: String::new(),
        })
    });
    passed.collect()
}

/// Where a destination waits for its offload process.
#[derive(Serialize)]
struct Waiting<'a> {
    kind: &'static str,
    path: &'a Path,
}

/// Waits on `path` for an offload process and the VM that it brings, and runs that.
pub fn receive(path: &Path, reception: &Reception<'_>, wait: Option<Duration>) -> Result<ExitCode> {
    let listener = Listener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    let output = reception.output;
    if output.json() {
        output.object(&Waiting { kind: "waiting", path })?;
    } else {
        output.line(format_args!("waiting for `ringferry offload receive` on {}", path.display()))?;
    }
    let since = Instant::now();
    let connection = loop {
        if let Some(connection) = listener.accept(POLL)? {
            break connection;
        }
        // Relaxed: a flag without data, polled.
        if reception.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        if let Some(waited) = wait.filter(|wait| since.elapsed() >= *wait) {
            bail!("no offload process came to {} within {} s", path.display(), waited.as_secs_f32());
        }
    };
    let host_args = HostArgs { backing: Some(BackingArg::Memfd), ..reception.host.clone() };
    let mut reserved = None;
    let build = |offer: &Offer| -> Result<(Landing<Host>, Vec<RegionFile>), VmError> {
        let (host, budget) = reception.build(&offer.vm_id, &offer.description, &host_args)?;
        let memory = region_files(&host.vm).map_err(|error| VmError::from(format!("{error:#}")))?;
        reserved = Some(budget);
        Ok((Landing(host), memory))
    };
    let arrived = offload::receive(connection, build, reception.interrupted)?;
    interrupt::promise("the guest that runs here is checked, and ends");
    let Landing(mut host) = arrived.vm;
    let mut report = DestinationReport::default();
    report.vm_id = host.name.clone();
    Told::Received(report)
        .tell(output)
        .map_err(|error| anyhow!(error).context("telling that the VM runs here"))?;
    reception.run(&mut host)?;
    Ok(ExitCode::SUCCESS)
}
