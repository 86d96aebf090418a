//! `ringferry demo`: a real guest, dirtying memory at full speed, moves to a second process and is proven whole.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ringferry::progress::Progress;

use crate::display::Display;
use crate::guest::{GuestArgs, Host};
use crate::interrupt;
use crate::migrate::MigrateArgs;
use crate::output::Output;
use crate::receive::Told;

/// How long the guest's rate is measured before and after.
const MEASURE: Duration = Duration::from_secs(1);

const EXAMPLES: &str = "\
Examples:
  ringferry demo
  ringferry demo --memory 2GiB --vcpus 8 --channels 4 --work each=pattern:zipf,ws:64MiB
  ringferry demo --max-bandwidth 100MB/s --downtime-limit 500ms --policy none

Ctrl-C cancels the migration; the guest goes on at the source.";

/// Migrate a real KVM guest between two processes on this machine, and prove that nothing was lost
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    migrate: MigrateArgs,
}

/// Runs the command.
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    let say = |text: String| if output.json() { Ok(()) } else { output.line(text) };
    let vm = &args.guest.vm;
    say(format!("booting a KVM guest: {} vCPUs, {} of RAM", vm.vcpus, vm.memory))?;
    let mut host = args.guest.boot()?;
    let mut destination = ReceivingProcess::start(&args.guest)?;
    let before = measure(&host)?;
    say(format!("it runs, at {} steps/s; migrating to process {}", steps(&before), destination.child.id()))?;

    let progress = args.migrate.progress()?;
    let done = AtomicBool::new(false);
    let mut display = Display::new(output);
    let migrated = thread::scope(|scope| {
        scope.spawn(|| cancel_on(interrupted, &progress, &done));
        let migrated = args.migrate.migrate(&mut host, &destination.address, &progress, &before, |update| {
            display.show(update);
        });
        done.store(true, Ordering::Relaxed);
        migrated
    });
    let mut report = match migrated {
        Ok(report) => report,
        Err(error) => {
            // The promise of a failed migration is that the guest goes on here: show it.
            let after = measure(&host)?;
            say(format!("the guest runs on at the source, at {} steps/s", steps(&after)))?;
            return Err(error);
        }
    };
    let after = destination.checked()?;
    report.guest_consistent = after.guest_consistent;
    for (vcpu, rate) in report.vcpus.iter_mut().zip(&after.progress_after_per_s) {
        vcpu.progress_after_per_s = Some(*rate);
    }
    if output.json() {
        output.object(&report)?;
    } else {
        output.write(report.text().as_bytes())?;
    }
    if let Some(what) = after.inconsistency {
        bail!("the guest lost writes: {what}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Steps per second of each vCPU over a second.
fn measure(host: &Host) -> Result<Vec<f64>> {
    let begin = host.marks()?;
    thread::sleep(MEASURE);
    host.check_vcpus()?;
    let marks = begin.zip(host.marks()?);
    Ok(marks.map_or_else(Vec::new, |(begin, end)| end.per_s_since(&begin)))
}

fn steps(per_s: &[f64]) -> String {
    let rates: Vec<String> = per_s.iter().map(|rate| crate::report::rate(*rate)).collect();
    rates.join(" + ")
}

fn cancel_on(interrupted: &AtomicBool, progress: &Progress, done: &AtomicBool) {
    // Relaxed: flags without data, polled.
    while !done.load(Ordering::Relaxed) {
        if interrupted.load(Ordering::Relaxed) {
            progress.parameters().cancel();
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A second process of this program that waits for the VM. It ends with this value.
struct ReceivingProcess {
    child: Child,
    lines: BufReader<ChildStdout>,
    address: String,
}

impl ReceivingProcess {
    fn start(guest: &GuestArgs) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program that runs")?;
        let vm = &guest.vm;
        let mut child = Command::new(program)
            .args(["receive", "--json", "--listen", "127.0.0.1:0", "--wait", "60s"])
            .args(["--memory", &vm.memory.to_string(), "--vcpus", &vm.vcpus.to_string()])
            .args(["--regions", &vm.regions.to_string()])
            .args(["--backing", &value_name(&vm.backing), "--huge-pages", &value_name(&vm.huge_pages)])
            .args(["--run-for", &format!("{}ms", MEASURE.as_millis())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Ctrl-C is for this process, which tells the other one.
            .process_group(0)
            .spawn()
            .context("cannot start the receiving process")?;
        let stdout = child.stdout.take().context("the receiving process has no output")?;
        let mut started = Self { child, lines: BufReader::new(stdout), address: String::new() };
        match started.next()? {
            Told::Listening { address } => started.address = address.to_string(),
            told => bail!("the receiving process said {told:?} before it listened"),
        }
        Ok(started)
    }

    fn next(&mut self) -> Result<Told> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the receiving process ended early: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the receiving process said {line:?}"))
    }

    /// Waits until the guest has run and been checked there.
    fn checked(&mut self) -> Result<crate::guest::AfterMigration> {
        loop {
            if let Told::Checked(after) = self.next()? {
                return Ok(after);
            }
        }
    }
}

impl Drop for ReceivingProcess {
    fn drop(&mut self) {
        // It ends by itself after a migration; after a failed one there is nothing to wait for.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn value_name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
