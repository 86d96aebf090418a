//! `ringferry run`: boots a guest and keeps it running until `ringferry send` moves it, or Ctrl-C ends it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ringferry::progress::Progress;
use serde::Serialize;

use crate::guest::{GuestArgs, Host, Marks};
use crate::interrupt;
use crate::monitor::{Answer, Line, Monitor, MonitorArg, Request};
use crate::output::Output;
use crate::report::{MigrationReport, rate};

/// How often the guest's progress is printed.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A client that comes during a migration asks at once or not at all.
const OTHERS_PATIENCE: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  ringferry run
  ringferry run --memory 2GiB --vcpus 8 --work each=pattern:random,ws:64MiB
  ringferry run --image kernel.elf --append 'console=ttyS0'

Then `ringferry receive` and `ringferry send` in other terminals move it.";

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
    let path = args.monitor.path();
    let monitor = Monitor::bind(&path)?;
    let mut host = args.guest.boot()?;
    if !output.json() {
        output.line(format_args!(
            "the guest runs; `ringferry send --to ADDRESS:PORT` moves it; Ctrl-C ends it"
        ))?;
    }
    let started = Instant::now();
    let mut last = host.marks()?;
    let mut next_report = REPORT_EVERY;
    let mut rates = Vec::new();
    while !interrupted.load(Ordering::Relaxed) {
        host.check_vcpus()?;
        if let Some(client) = monitor.accept()? {
            match serve(client, &monitor, &mut host, &rates, output)? {
                Some(report) => return finish(output, &report),
                None => {
                    last = host.marks()?;
                    next_report = started.elapsed() + REPORT_EVERY;
                }
            }
        }
        if started.elapsed() >= next_report {
            rates = progress_since(&host, &mut last)?;
            let t_ms = started.elapsed().as_millis();
            next_report = started.elapsed() + REPORT_EVERY;
            if output.json() {
                output.object(&ProgressObject { kind: "progress", t_ms, steps_per_s: rates.clone() })?;
            } else if !rates.is_empty() {
                let shown: Vec<String> = rates.iter().map(|per_s| format!("{}/s", rate(*per_s))).collect();
                output.line(format_args!(
                    "{:6.1} s  steps: {}",
                    started.elapsed().as_secs_f64(),
                    shown.join("  ")
                ))?;
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(ExitCode::SUCCESS)
}

fn progress_since(host: &Host, last: &mut Option<Marks>) -> Result<Vec<f64>> {
    let now = host.marks()?;
    let rates = now.as_ref().zip(last.as_ref()).map(|(now, last)| now.per_s_since(last));
    *last = now;
    Ok(rates.unwrap_or_default())
}

fn finish(output: Output, report: &MigrationReport) -> Result<ExitCode> {
    if output.json() {
        output.object(report)?;
    } else {
        output.line("the guest has moved away")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what a client asks; the report, if the guest is gone afterwards.
fn serve(
    mut client: Line,
    monitor: &Monitor,
    host: &mut Host,
    before_per_s: &[f64],
    output: Output,
) -> Result<Option<MigrationReport>> {
    let (to, args) = match client.receive() {
        Ok(Some(Request::Migrate { to, args })) => (to, args),
        Ok(Some(Request::Adjust(_))) => {
            let _ = client
                .send(&Answer::Failed("no migration is under way: start one with `ringferry send`".into()));
            return Ok(None);
        }
        // A client that asks nothing, or nonsense, changes nothing for the guest.
        Ok(_) => return Ok(None),
        Err(error) => {
            tracing::warn!(%error, "a client of the monitor socket was turned away");
            return Ok(None);
        }
    };
    let mut canceller = client.try_clone()?;
    let mut updates = client.try_clone()?;
    let progress = match args.progress() {
        Ok(progress) => progress,
        Err(wrong) => {
            let _ = client.send(&Answer::Failed(wrong.to_string()));
            return Ok(None);
        }
    };
    let ended = AtomicBool::new(false);
    if !output.json() {
        output.line(format_args!("migrating to {to}; `ringferry send` shows how it goes"))?;
    }
    let migrated = thread::scope(|scope| {
        let of_reader = progress.clone();
        scope.spawn(move || cancel_on_request(&mut client, &of_reader));
        scope.spawn(|| serve_others(monitor, &progress, &ended));
        let migrated = args.migrate(host, &to, &progress, before_per_s, |update| {
            // A client that has gone away does not stop the migration.
            let _ = updates.send(&Answer::Update(update.clone()));
        });
        let answer = match &migrated {
            Ok(report) => Answer::Report(Box::new(report.clone())),
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        let _ = canceller.send(&answer);
        // Ends the thread that waits for a cancellation, and the one that waits for others.
        canceller.close();
        ended.store(true, Ordering::Relaxed);
        migrated
    });
    match migrated {
        Ok(report) => Ok(Some(report)),
        Err(error) if host.vm.status().contains(&ringferry_testvm::VcpuStatus::Paused) => {
            bail!(error)
        }
        Err(error) => {
            tracing::warn!("the migration failed, the guest runs on here: {error:#}");
            Ok(None)
        }
    }
}

fn cancel_on_request(client: &mut Line, progress: &Progress) {
    if let Ok(Some(Request::Cancel)) = client.receive() {
        progress.parameters().cancel();
    }
}

/// Answers those who come while a migration is under way. One at a time, and each within a moment.
fn serve_others(monitor: &Monitor, progress: &Progress, ended: &AtomicBool) {
    // Relaxed: a flag without data, polled.
    while !ended.load(Ordering::Relaxed) {
        match monitor.accept() {
            Ok(Some(mut client)) => {
                let answer = match client.receive_within(OTHERS_PATIENCE) {
                    Ok(Some(Request::Adjust(terms))) => match terms.change(progress.parameters()) {
                        Ok(()) => Answer::Adjusted,
                        Err(wrong) => Answer::Failed(wrong.to_string()),
                    },
                    Ok(Some(Request::Migrate { .. })) => {
                        Answer::Failed("a migration is under way: wait for its end, or adjust it".into())
                    }
                    Ok(_) | Err(_) => continue,
                };
                // A client that has gone away has changed what it wanted to change.
                let _ = client.send(&answer);
            }
            Ok(None) => thread::sleep(Duration::from_millis(10)),
            Err(error) => {
                tracing::warn!(%error, "the monitor socket failed");
                return;
            }
        }
    }
}
