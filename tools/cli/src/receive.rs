//! `ringferry receive`: waits for a VM, takes it, runs it, and says how it is.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ringferry::destination::{Destination, DestinationError, DestinationOptions, DestinationReport};
use ringferry::vm::VmError;
use ringferry::{Paused, Quiesced, Vm};
use ringferry_testvm::{Guest, check};
use serde::{Deserialize, Serialize};

use crate::guest::{AfterMigration, Host, Marks, VmArgs};
use crate::interrupt;
use crate::machine::Machine;
use crate::output::Output;
use crate::printable::printable;
use crate::sizes::Time;

const EXAMPLES: &str = "\
Examples:
  ringferry receive --listen 127.0.0.1:7000                    a guest of 1 GiB and 2 vCPUs
  ringferry receive --listen 127.0.0.1:7000 --memory 2GiB --vcpus 8 --run-for 5s

RAM and vCPUs must be those of the VM that comes. Ctrl-C ends it.";

/// Wait for a VM, take it over and run it here
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where to wait for the source
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7000", value_parser = address)]
    listen: SocketAddr,

    /// Where to wait for data connections, once per dedicated NIC [default: beside the control connection]
    #[arg(long, value_name = "ADDRESS:PORT")]
    data_listen: Vec<SocketAddr>,

    /// Listen on an address that other machines can reach, although nothing is encrypted or authenticated
    #[arg(long)]
    insecure: bool,

    /// How long to wait for a source [default: until Ctrl-C]
    #[arg(long, value_name = "TIME")]
    wait: Option<Time>,

    /// How long the guest runs here before it is checked and ended [default: until Ctrl-C]
    #[arg(long, value_name = "TIME")]
    run_for: Option<Time>,

    #[command(flatten)]
    vm: VmArgs,
}

/// A name is taken too, and of its addresses the first.
fn address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| {
        format!("{error}: write an address and a port, such as 127.0.0.1:7000 or [::1]:7000")
    })?;
    found.next().ok_or_else(|| "this name has no address".to_owned())
}

/// What `receive` prints, one object per line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Told {
    /// A source may connect.
    Listening { address: SocketAddr },
    /// The VM runs here.
    Received(DestinationReport),
    /// It has been checked and ended.
    Checked(AfterMigration),
}

/// Runs the command.
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    interrupt::promise("no VM is taken; one that is on its way stays at the source");
    // Said before a source has come.
    if let Some(exposed) = args.data_listen.iter().find(|at| !args.insecure && !at.ip().is_loopback()) {
        bail!(DestinationError::Exposed(*exposed));
    }
    // Built first: if this machine cannot hold the VM, nobody needs to connect.
    let vm = Machine::new(args.vm.kind(), args.vm.destination())?;
    let memory = vm.memory().clone();
    let mut landing = Landing(Host { guest: None, vm });
    let destination = Destination::bind(args.listen, args.insecure)?;
    let address = destination.local_addr()?;
    tell(output, &Told::Listening { address }, || format!("waiting for a VM on {address}"))?;
    let options = DestinationOptions { data_addresses: args.data_listen, ..DestinationOptions::default() };
    let incoming = destination.accept(args.wait.map(|limit| limit.0), interrupted)?;
    let received = incoming.receive(&mut landing, args.vm.vcpus, &memory, &options, interrupted);
    let report = received.map_err(printable_error)?;
    interrupt::promise("the guest is checked, and ends");
    tell(output, &Told::Received(report.clone()), || {
        let digest = if report.ram_digest_match == Some(true) { ", RAM digests equal" } else { "" };
        format!("the VM runs here: {} pages received{digest}", report.pages_received)
    })?;
    let Landing(mut host) = landing;
    let begin = host.seen();
    let since = Instant::now();
    while args.run_for.is_none_or(|limit| since.elapsed() < limit.0) && !interrupted.load(Ordering::Relaxed) {
        host.check_vcpus()?;
        std::thread::sleep(Duration::from_millis(10));
    }
    let after = examine(&mut host, begin)?;
    tell(output, &Told::Checked(after.clone()), || match after.guest_consistent {
        Some(true) => "the guest found every write of its own".to_owned(),
        Some(false) => format!("THE GUEST LOST WRITES: {}", after.inconsistency.as_deref().unwrap_or("")),
        None => "a foreign guest: nothing is known of its writes".to_owned(),
    })?;
    if after.guest_consistent == Some(false) {
        bail!("the guest is not consistent");
    }
    Ok(ExitCode::SUCCESS)
}

/// Of what the source said, what can be shown.
fn printable_error(error: DestinationError) -> DestinationError {
    match error {
        DestinationError::Aborted(why) => DestinationError::Aborted(printable(&why)),
        other => other,
    }
}

fn tell(output: Output, told: &Told, text: impl FnOnce() -> String) -> std::io::Result<()> {
    if output.json() { output.object(told) } else { output.line(text()) }
}

/// Stops the guest and proves its writes.
fn examine(host: &mut Host, begin: Option<Marks>) -> Result<AfterMigration> {
    let end = host.seen();
    let _paused = host.vm.pause().map_err(|error| anyhow::anyhow!(error))?;
    let Some(guest) = &host.guest else { return Ok(AfterMigration::default()) };
    let checked = check::check(host.vm.memory());
    let felt = |vcpu| guest.stats(vcpu).ok()?.pause_gap.map(|gap| gap.as_secs_f64() * 1e3);
    Ok(AfterMigration {
        guest_consistent: Some(checked.is_ok()),
        inconsistency: checked.err().map(|error| error.to_string()),
        progress_after_per_s: begin.zip(end).map_or_else(Vec::new, |(begin, end)| end.per_s_since(&begin)),
        pause_felt_ms: (0..host.vm.vcpus()).map(felt).collect(),
    })
}

/// A VM about to arrive: before it runs, its guest is told that the gap over the pause is no stall.
struct Landing(Host);

impl Vm for Landing {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.0.vm.pause()
    }

    fn resume(&mut self, paused: Paused) -> Result<(), VmError> {
        // A foreign guest has no mailbox, and nothing that could be told.
        self.0.guest =
            Guest::new(self.0.vm.memory(), self.0.vm.kvm_tracker()).ok().filter(|guest| guest.plan().is_ok());
        // The VM is this side's alone by now: a figure less is no reason not to run it.
        if let Some(Err(error)) = self.0.guest.as_mut().map(Guest::count_pause_apart) {
            tracing::warn!(%error, "the guest counts the pause as a stall");
        }
        self.0.vm.resume(paused)
    }

    fn save_state(&mut self, quiesced: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        self.0.vm.save_state(quiesced)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.0.vm.restore_state(state)
    }

    fn kick(&self, index: usize) {
        self.0.vm.kick(index);
    }
}
