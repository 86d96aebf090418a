//! `ringferry demo`: a real guest, dirtying memory at full speed, moves to a second process and is proven whole.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::cross_check::RunningProfiler;
use crate::display::Display;
use crate::guest::{BackendArg, GuestArgs};
use crate::interrupt;
use crate::machine::GuestKind;
use crate::migrate::MigrateArgs;
use crate::output::Output;
use crate::receiving_process::Listen;
use crate::report::rate;
use crate::two_processes::Crossing;

const EXAMPLES: &str = "\
Examples:
  ringferry demo
  ringferry demo --memory 2GiB --vcpus 8 --channels 4 --work each=pattern:zipf,ws:64MiB
  ringferry demo --cross-check
  ringferry demo --max-bandwidth 100MB/s --downtime-limit 500ms --policy none

Ctrl-C cancels the migration; the guest goes on at the source.";

/// Migrate a real KVM guest between two processes on this machine, and prove that nothing was lost
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Run ringferry-profile beside, and compare what the kernel pushed with what the tracker took
    #[arg(long)]
    cross_check: bool,

    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    migrate: MigrateArgs,
}

/// Runs the command.
pub fn run(mut args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    let say = |text: String| if output.json() { Ok(()) } else { output.line(text) };
    let vm = &mut args.guest.vm;
    let kind = *vm.guest.get_or_insert_with(GuestKind::of_this_machine);
    ensure!(
        !args.cross_check || (kind == GuestKind::Kvm && args.guest.backend == BackendArg::Ring),
        "--cross-check compares entries of KVM's dirty rings, and this guest has none: it takes a KVM guest (/dev/kvm) \
         and --backend ring"
    );
    // Terms that contradict each other are told before a guest boots.
    args.migrate.terms.parameters()?;
    say(match kind {
        GuestKind::Kvm => format!("booting a KVM guest: {} vCPUs, {} of RAM", vm.vcpus, vm.memory),
        GuestKind::Threads => format!(
            "a simulated guest: {} host threads that write {} of RAM, tracked by pagemap, because there is no \
             /dev/kvm or because --guest threads asks for it",
            vm.vcpus, vm.memory
        ),
    })?;
    let mut crossing = Crossing::prepare(&args.guest, &Listen::default())?;
    let (steps, pid) = (rates(crossing.before_per_s()), crossing.receiver_pid());
    say(format!("it runs, at {steps} steps/s; migrating to process {pid}"))?;
    let profiler = args.cross_check.then(RunningProfiler::start).transpose()?;
    let mut display = Display::new(output);
    args.migrate.verify.get_or_insert(true);
    let migrated = crossing.migrate(&args.migrate, interrupted, |update| display.show(update));
    drop(display);
    if let (Some(profiler), Ok(report)) = (profiler, &migrated) {
        profiler.compare(report.vcpus.iter().map(|vcpu| (vcpu.index, vcpu.ring_entries)))?.print(output)?;
    }
    match migrated {
        Ok(report) => {
            report.print(output)?;
            report.verdict()?;
        }
        Err(error) => {
            // The promise of a failed migration is that the guest goes on here: show it.
            if let Ok(still_here) = crossing.still_here_per_s() {
                say(format!("the guest runs on at the source, at {} steps/s", rates(&still_here)))?;
            }
            return Err(error);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Rates of all vCPUs, for people.
fn rates(per_s: &[f64]) -> String {
    per_s.iter().map(|per_s| rate(*per_s)).collect::<Vec<_>>().join(" + ")
}
