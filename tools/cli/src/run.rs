//! `ringferry run`: boots a guest and keeps it running until `ringferry send` moves it, or a signal ends it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ringferry_testvm::VcpuStatus;
use serde::Serialize;

use crate::clients::{Clients, LastAnswer, Order};
use crate::guest::{GuestArgs, Host, Marks};
use crate::interrupt;
use crate::monitor::{Answer, Monitor, MonitorArg};
use crate::output::Output;
use crate::report::{MigrationReport, rate};

/// How often the guest's progress is printed.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How often the guest's vCPUs are looked at.
const POLL: Duration = Duration::from_millis(10);

/// What a signal comes to, while no migration is under way.
const GUEST_ENDS: &str = "the guest ends";

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
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    interrupt::promise(GUEST_ENDS);
    let clients = Clients::of(Monitor::bind(&args.monitor.path())?)?;
    let mut host = args.guest.boot()?;
    if !output.json() {
        output.line("the guest runs; `ringferry send --to ADDRESS:PORT` moves it; Ctrl-C ends it")?;
    }
    let mut pace = Pace::new(&host);
    // Relaxed: a flag without data, polled.
    while !interrupted.load(Ordering::Relaxed) {
        host.check_vcpus()?;
        if let Some(order) = clients.order(POLL) {
            if let Some((report, answer)) = serve(order, &mut host, &pace.steps_per_s, interrupted, output)? {
                answer.delivered();
                return finish(output, &report);
            }
            pace.skip(&host);
        }
        pace.tell(&host, output)?;
    }
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
    Ok(ExitCode::SUCCESS)
}

/// Does what a client asks; the report, and the client's, if the guest is gone afterwards.
fn serve(
    order: Order,
    host: &mut Host,
    before_per_s: &[f64],
    interrupted: &AtomicBool,
    output: Output,
) -> Result<Option<(MigrationReport, LastAnswer)>> {
    let Order { to, args, progress, .. } = &order;
    if !output.json() {
        output.line(format_args!("migrating to {to}; `ringferry send` shows how it goes"))?;
    }
    interrupt::promise("the migration is cancelled, and the guest ends");
    let migrated = interrupt::cancelling(
        interrupted,
        || progress.parameters().cancel(),
        || args.migrate(host, to, progress, before_per_s, |update| order.update(update)),
    );
    interrupt::promise(GUEST_ENDS);
    match migrated {
        Ok(report) => {
            let answer = order.end(&Answer::Report(Box::new(report.clone())));
            Ok(Some((report, answer)))
        }
        Err(error) => {
            let answer = order.end(&Answer::Failed(format!("{error:#}")));
            if host.vm.status().contains(&VcpuStatus::Paused) {
                answer.delivered();
                bail!(error)
            }
            tracing::warn!("the migration failed, the guest runs on here: {error:#}");
            Ok(None)
        }
    }
}
