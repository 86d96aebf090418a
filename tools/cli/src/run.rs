//! `ringferry run`: boots a guest and keeps it running until `ringferry send` moves it, or a signal ends it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use ringferry::offload::{Ended, Rings};
use ringferry::source::SourceError;
use ringferry::vm::Paused;
use ringferry_testvm::VcpuStatus;
use serde::Serialize;

use crate::clients::{Clients, LastAnswer, Order, Resolution};
use crate::guest::{GuestArgs, Host, Marks};
use crate::interrupt;
use crate::migrate::{Decision, Migrated};
use crate::monitor::{Answer, Monitor, MonitorArg};
use crate::offload_vmm::Lender;
use crate::output::Output;
use crate::report::{MigrationReport, rate};
use crate::told::Told;

/// How often the guest's progress is printed.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How often the guest's vCPUs are looked at.
const POLL: Duration = Duration::from_millis(10);

/// What a signal comes to, while no migration is under way.
const GUEST_ENDS: &str = "the guest is checked, and ends";
/// What it comes to while nobody knows whether the destination runs the VM.
const VM_IS_HELD: &str = "the VM is still held here, because it would be lost if the destination does not run it; \
                          `ringferry resolve` decides";

const EXAMPLES: &str = "\
Examples:
  ringferry run
  ringferry run --memory 2GiB --vcpus 8 --work each=pattern:random,ws:64MiB
  ringferry run --image kernel.elf --append 'console=ttyS0'

Then `ringferry receive` and `ringferry send` in other terminals move it. Ctrl-C during a migration cancels that first.";

/// Boot a guest and keep it running until `ringferry send` migrates it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    monitor: MonitorArg,

    /// Wait here for `ringferry offload send`, which moves the guest from a process of its own (RAM is a memfd then)
    #[arg(long, value_name = "PATH")]
    offload: Option<PathBuf>,

    /// Keep the dirty rings while the guest is lent: the offload process asks for dirty pages, and does not follow the rings
    #[arg(long, requires = "offload")]
    keep_rings: bool,

    #[command(flatten)]
    guest: GuestArgs,
}

#[derive(Serialize)]
struct ProgressObject {
    kind: &'static str,
    t_ms: u128,
    steps_per_s: Vec<f64>,
}

/// Runs the command.
pub fn run(mut args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    interrupt::promise(GUEST_ENDS);
    let clients = Clients::of(Monitor::bind(&args.monitor.path())?)?;
    let rings = if args.keep_rings { Rings::Keep } else { Rings::Lend };
    let lender = args.offload.as_deref().map(|path| Lender::bind(path, rings, &mut args.guest.vm.host));
    let lender = lender.transpose()?;
    let mut host = args.guest.boot()?;
    if !output.json() {
        output.line("the guest runs; `ringferry send --to ADDRESS:PORT` moves it; Ctrl-C ends it")?;
    }
    let mut pace = Pace::new(&host);
    let waiting = Waiting { clients: &clients, monitor: &args.monitor, interrupted, output };
    // Relaxed: a flag without data, polled.
    while !interrupted.load(Ordering::Relaxed) {
        host.check_vcpus()?;
        if let Some(order) = clients.order(POLL) {
            match waiting.serve(order, &mut host, &pace.steps_per_s)? {
                Served::StillHere => pace.skip(&host),
                Served::Moved(report, answer) => {
                    answer.delivered();
                    return finish(output, &report);
                }
                Served::Dropped => return Ok(ExitCode::SUCCESS),
            }
        }
        if let Some(lender) = &lender
            && let Some(connection) = lender.accept()?
        {
            match waiting.lend(lender, connection, &mut host)? {
                Served::StillHere => pace.skip(&host),
                Served::Moved(..) | Served::Dropped => return Ok(ExitCode::SUCCESS),
            }
        }
        pace.tell(&host, output)?;
    }
    let found = host.examine(None)?;
    Told::Checked { vm_id: host.name.clone(), found: found.clone() }.tell(output)?;
    found.verdict()?;
    Ok(ExitCode::SUCCESS)
}

/// How fast the guest is, told once a second.
struct Pace {
    started: Instant,
    next: Duration,
    last: Option<Marks>,
    steps_per_s: Vec<f64>,
}

impl Pace {
    fn new(host: &Host) -> Self {
        Self { started: Instant::now(), next: REPORT_EVERY, last: host.seen(), steps_per_s: Vec::new() }
    }

    /// The time until now does not count.
    fn skip(&mut self, host: &Host) {
        self.last = host.seen();
        self.next = self.started.elapsed() + REPORT_EVERY;
    }

    /// Tells it, if it is time.
    fn tell(&mut self, host: &Host, output: Output) -> Result<()> {
        let since = self.started.elapsed();
        if since < self.next {
            return Ok(());
        }
        let now = host.seen();
        let rates = now.as_ref().zip(self.last.as_ref()).map(|(now, last)| now.per_s_since(last));
        self.steps_per_s = rates.unwrap_or_default();
        self.last = now;
        self.next = since + REPORT_EVERY;
        let output = output.progress();
        if output.json() {
            let steps_per_s = self.steps_per_s.clone();
            output.object(&ProgressObject { kind: "progress", t_ms: since.as_millis(), steps_per_s })?;
        } else if !self.steps_per_s.is_empty() {
            let shown: Vec<String> =
                self.steps_per_s.iter().map(|per_s| format!("{}/s", rate(*per_s))).collect();
            output.line(format_args!("{:6.1} s  steps: {}", since.as_secs_f64(), shown.join("  ")))?;
        }
        Ok(())
    }
}

fn finish(output: Output, report: &MigrationReport) -> Result<ExitCode> {
    if output.json() {
        output.object(report)?;
    } else {
        output.line("the guest has moved away")?;
    }
    report.verdict()?;
    Ok(ExitCode::SUCCESS)
}

/// Where a client's order has left the VM.
enum Served {
    StillHere,
    /// Its client hears it.
    Moved(Box<MigrationReport>, LastAnswer),
    /// Somebody has decided that the destination runs it.
    Dropped,
}

/// A VM's side of its monitor socket.
struct Waiting<'a> {
    clients: &'a Clients,
    monitor: &'a MonitorArg,
    interrupted: &'a AtomicBool,
    output: Output,
}

impl Waiting<'_> {
    /// Does what a client asks.
    fn serve(&self, order: Order, host: &mut Host, before_per_s: &[f64]) -> Result<Served> {
        let Order { to, args, progress, .. } = &order;
        if !self.output.json() {
            self.output.line(format_args!("migrating to {to}; `ringferry send` shows how it goes"))?;
        }
        interrupt::promise("the migration is cancelled, and the guest ends");
        let vm_id = host.name.clone();
        let mut resolution: Option<Resolution> = None;
        let decide = |error: &SourceError| {
            match resolution.take() {
                None => self.announce_undecided(&order, &vm_id, error),
                Some(resolution) => resolution.failed(&error.to_string()),
            }
            resolution.insert(self.clients.resolution()).decision
        };
        let migrated = interrupt::cancelling(
            self.interrupted,
            || progress.parameters().cancel(),
            || args.migrate(host, to, progress, before_per_s, |update| order.update(update), decide),
        );
        if resolution.is_some() {
            // A signal that came while the VM was held was not about what it has become.
            interrupt::forget();
        }
        interrupt::promise(GUEST_ENDS);
        match migrated {
            Ok(Migrated::Moved(report)) => {
                let answer = order.end(&Answer::Report(report.clone()));
                Ok(Served::Moved(report, answer))
            }
            Ok(Migrated::Decided(decision)) => {
                Told::Resolved { vm_id, decision }.tell(self.output)?;
                if let Some(resolution) = resolution {
                    resolution.done().delivered();
                }
                Ok(match decision {
                    Decision::Keep => Served::StillHere,
                    Decision::Drop => Served::Dropped,
                })
            }
            Err(error) => {
                let answer = order.end(&Answer::Failed(format!("{error:#}")));
                if host.vm.status().contains(&VcpuStatus::Paused) {
                    answer.delivered();
                    bail!(error)
                }
                tracing::warn!("the migration failed, the guest runs on here: {error:#}");
                Ok(Served::StillHere)
            }
        }
    }

    /// Lends the VM to an offload process.
    fn lend(&self, lender: &Lender, connection: OwnedFd, host: &mut Host) -> Result<Served> {
        interrupt::promise("the migration is cancelled, and the guest ends");
        let vm_id = host.name.clone();
        let ended = lender.lend(connection, host, self.interrupted);
        interrupt::promise(GUEST_ENDS);
        let offloaded = |moved, why| Told::Offloaded { vm_id: vm_id.clone(), moved, why };
        match ended {
            Ok(Ended::Moved) => {
                offloaded(true, String::new()).tell(self.output)?;
                Ok(Served::Dropped)
            }
            Ok(Ended::StaysHere { why }) => {
                offloaded(false, why).tell(self.output)?;
                Ok(Served::StillHere)
            }
            Ok(Ended::Unconfirmed { paused, why }) => self.resolve_lent(paused, &why, host),
            Err(error) if host.vm.status().contains(&VcpuStatus::Paused) => bail!(error),
            Err(error) => {
                offloaded(false, format!("{error:#}")).tell(self.output)?;
                Ok(Served::StillHere)
            }
        }
    }

    /// Nobody knows whether the destination runs a VM that an offload process handed over.
    fn resolve_lent(&self, paused: Paused, why: &str, host: &mut Host) -> Result<Served> {
        interrupt::promise(VM_IS_HELD);
        interrupt::forget();
        let (vm_id, monitor) = (host.name.clone(), self.monitor.option());
        let message = format!(
            "the VM was handed over, and nobody confirmed that it runs ({why}). It stays here, stopped. Find out \
             whether it runs at the destination; if it does not, `ringferry resolve --keep{monitor}` lets it run on \
             here; if it does, `ringferry resolve --drop{monitor}` ends it here"
        );
        Told::Unconfirmed { vm_id: vm_id.clone(), destination: String::new(), message }.tell(self.output)?;
        self.clients.undecided();
        let resolution = self.clients.resolution();
        let decision = resolution.decision;
        if decision == Decision::Keep {
            host.vm.as_vm().resume(paused).map_err(|error| anyhow!(error))?;
        }
        Told::Resolved { vm_id, decision }.tell(self.output)?;
        resolution.done().delivered();
        interrupt::forget();
        interrupt::promise(GUEST_ENDS);
        Ok(if decision == Decision::Keep { Served::StillHere } else { Served::Dropped })
    }

    /// Says that nobody knows whether the destination runs the VM, and what can be done. From here on it is held until
    /// somebody has decided.
    fn announce_undecided(&self, order: &Order, vm_id: &str, cause: &SourceError) {
        interrupt::promise(VM_IS_HELD);
        interrupt::forget();
        let (destination, monitor) = (order.to.clone(), self.monitor.option());
        let message = format!(
            "the VM was handed over, and the destination did not confirm that it runs ({cause}). It stays here, \
             stopped. Find out whether it runs at {destination}; if it does not, `ringferry resolve --keep{monitor}` \
             lets it run on here; if it does, `ringferry resolve --drop{monitor}` ends it here"
        );
        order.undecided(&message);
        let told = Told::Unconfirmed { vm_id: vm_id.to_owned(), destination, message }.tell(self.output);
        if let Err(error) = told {
            tracing::warn!(%error, "the undecided end could not be told");
        }
    }
}
