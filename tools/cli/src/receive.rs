//! `ringferry receive`: waits for VMs, takes them, runs them, and says how they are.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use ringferry::destination::{Destination, DestinationError, Incoming, ListenOptions};
use ringferry::wire::reason::Reason;

use crate::arrival::{Arrival, Reception};
use crate::guest::HostArgs;
use crate::interrupt;
use crate::memory_budget::MemoryBudget;
use crate::offload_vmm;
use crate::output::Output;
use crate::sizes::{Size, Time};
use crate::told::Told;

/// How often the ends of VMs are looked for.
const POLL: Duration = Duration::from_millis(20);

const EXAMPLES: &str = "\
Examples:
  ringferry receive                                            the next VM that comes, until Ctrl-C
  ringferry receive --listen 127.0.0.1:7000 --run-for 5s
  ringferry receive --vms 3 --memory-max 8GiB                  three VMs, at once or one after the other

RAM and vCPUs are as the source says. Ctrl-C ends it.";

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

    /// Wait here for `ringferry offload receive`, which brings one VM, instead of listening for sources
    #[arg(long, value_name = "PATH", conflicts_with_all = ["listen", "data_listen", "vms"])]
    offload: Option<PathBuf>,

    /// VMs to take, at once or one after the other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    vms: u16,

    /// Most RAM that all VMs together may have [default: what this host has available]
    #[arg(long, value_name = "SIZE")]
    memory_max: Option<Size>,

    /// How long to wait for a source [default: until Ctrl-C]
    #[arg(long, value_name = "TIME")]
    wait: Option<Time>,

    /// How long a source may give no sign of life [default: 5s]
    #[arg(long, value_name = "TIME")]
    peer_timeout: Option<Time>,

    /// How long a guest runs here before it is checked and ended [default: until Ctrl-C]
    #[arg(long, value_name = "TIME")]
    run_for: Option<Time>,

    #[command(flatten)]
    host: HostArgs,
}

/// A name is taken too, and of its addresses the first.
fn address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| {
        format!("{error}: write an address and a port, such as 127.0.0.1:7000 or [::1]:7000")
    })?;
    found.next().ok_or_else(|| "this name has no address".to_owned())
}

/// Runs the command.
pub fn run(args: &Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    interrupt::promise("no VM is taken; one that is on its way stays at the source");
    let reception = Reception {
        host: &args.host,
        budget: MemoryBudget::new(args.memory_max),
        run_for: args.run_for.map(|limit| limit.0),
        interrupted,
        output,
    };
    if let Some(path) = &args.offload {
        return offload_vmm::receive(path, &reception, args.wait.map(|limit| limit.0));
    }
    let ours = ListenOptions::new(args.listen);
    let destination = Destination::bind(ListenOptions {
        data_addresses: args.data_listen.clone(),
        insecure: args.insecure,
        vms: usize::from(args.vms),
        peer_timeout: args.peer_timeout.map_or(ours.peer_timeout, |time| time.0),
        ..ours
    })?;
    Told::Listening { address: destination.local_addr()? }.tell(output)?;
    let all_well = thread::scope(|scope| {
        let places = usize::from(args.vms);
        let mut vms =
            Vms { scope, reception: &reception, places, taken: Vec::new(), any: false, all_well: true };
        vms.receive(&destination, args.wait.map(|limit| limit.0))
    })?;
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The VMs that have come, each with a thread of its own.
struct Vms<'s, 'e, 'r> {
    scope: &'s Scope<'s, 'e>,
    reception: &'s Reception<'r>,
    /// VMs that may still come.
    places: usize,
    taken: Vec<(String, ScopedJoinHandle<'s, Arrival>)>,
    /// Whether one has come and not been refused.
    any: bool,
    all_well: bool,
}

impl<'s> Vms<'s, '_, '_> {
    /// Takes VMs until all that may come have come and gone; false if one of them did not fare well.
    fn receive(&mut self, destination: &Destination, wait: Option<Duration>) -> Result<bool> {
        let mut since = Instant::now();
        while self.places > 0 || !self.taken.is_empty() {
            match destination.accept(Some(POLL), self.reception.interrupted) {
                Ok(incoming) if self.places > 0 => {
                    self.take(incoming);
                    since = Instant::now();
                }
                Ok(incoming) => self.turn_away(incoming),
                Err(DestinationError::NobodyCame { address, .. }) => {
                    if let Some(waited) = wait.filter(|wait| self.places > 0 && since.elapsed() >= *wait) {
                        self.fail(&DestinationError::NobodyCame { address, waited }.into());
                        self.places = 0;
                    }
                }
                Err(DestinationError::Cancelled) => {
                    let handles = std::mem::take(&mut self.taken);
                    handles.into_iter().for_each(|(_, handle)| self.ended(handle));
                    return if self.any {
                        Ok(self.all_well)
                    } else {
                        Err(DestinationError::Cancelled.into())
                    };
                }
                Err(error) => return Err(error.into()),
            }
            self.collect();
        }
        Ok(self.all_well)
    }

    fn take(&mut self, incoming: Incoming) {
        let name = incoming.vm_id().to_owned();
        let reception = self.reception;
        let thread = thread::Builder::new().name("incoming VM".to_owned());
        match thread.spawn_scoped(self.scope, move || reception.take(incoming)) {
            Ok(handle) => {
                self.taken.push((name, handle));
                self.places -= 1;
            }
            Err(error) => {
                let error = anyhow::Error::new(error).context("there is no thread for a VM that came");
                self.fail(&error);
            }
        }
    }

    /// There is no place for this VM.
    fn turn_away(&self, incoming: Incoming) {
        let names = self.taken.iter().map(|(name, _)| match name.as_str() {
            "" => "a VM without a name",
            name => name,
        });
        let why = format!("busy with {}", names.collect::<Vec<_>>().join(", "));
        self.reception.refuse(incoming, Reason::Busy, why);
    }

    /// Looks which VMs have gone.
    fn collect(&mut self) {
        let gone: Vec<_> = self.taken.extract_if(.., |(_, handle)| handle.is_finished()).collect();
        gone.into_iter().for_each(|(_, handle)| self.ended(handle));
    }

    fn ended(&mut self, handle: ScopedJoinHandle<'s, Arrival>) {
        match handle.join() {
            Ok(Arrival::Refused) => self.places += 1,
            Ok(Arrival::Gone(Ok(()))) => self.any = true,
            Ok(Arrival::Gone(Err(error))) => self.fail(&error),
            Err(_) => self.fail(&anyhow!("the thread of a VM panicked: this is a bug of ringferry")),
        }
    }

    fn fail(&mut self, error: &anyhow::Error) {
        self.any = true;
        self.all_well = false;
        self.reception.output.error(error);
    }
}
