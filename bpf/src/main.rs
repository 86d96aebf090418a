//! The binary `ringferry-profile`: who dirties how much, per VM and vCPU, as the kernel counts it.
//!
//! Owns the arguments, the loop and the exit codes: 0 for success, 1 for failure, 2 for wrong usage. The library of
//! this package measures; the modules under `output` print.

use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use nix::errno::Errno;
use ringferry_bpf::{Inventory, Look, Session, SessionOptions, vm_name};

mod live;
mod output;
mod prometheus;

use output::{Choice, Output};

/// Shows which vCPU of which VM dirties how much memory, from the kernel's own tracepoints.
///
/// Works for VMs of any VMM while their memory is logged: exactly if they use dirty rings, by page-table changes if
/// they use bitmaps. A VM that logs nothing is shown as unobservable, or estimated with --sample.
#[derive(Parser, Debug)]
#[command(name = "ringferry-profile", version, max_term_width = 100, after_help = EXAMPLES)]
struct Args {
    /// Time between two looks: seconds, or with a unit, as 500ms
    #[arg(default_value = "1", value_parser = parse_interval)]
    interval: Duration,

    /// How many looks; without it, until Ctrl-C or until the process of -p has no VM any more
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Only the VMs of this process
    #[arg(short, long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,

    /// Only the vCPU of this number
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,

    /// One look, and no summary
    #[arg(short = '1', long, conflicts_with = "count")]
    once: bool,

    /// One JSON object per line
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Comma-separated values with one header
    #[arg(long)]
    csv: bool,

    /// Lines of text even on a terminal
    #[arg(long, conflicts_with_all = ["json", "csv"])]
    plain: bool,

    /// Only the N vCPUs that dirty most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top: Option<u32>,

    /// Count each push where it happens, also the last ones of a VM that ends: costs the guest about 0.1 µs a push
    #[arg(long)]
    every_push: bool,

    /// Also which guest-physical regions are pushed, and the unique working set of each interval; counts
    /// every push
    #[arg(long)]
    regions: bool,

    /// Estimate the dirty rate of VMs that log nothing by reading some of their pages
    #[arg(long)]
    sample: bool,

    /// Also serve http://ADDR:PORT/metrics
    #[arg(long, value_name = "ADDR:PORT")]
    prometheus: Option<SocketAddr>,
}

/// The kernel is looked at as often as this even if the interval is longer.
const KEEP_UP_EVERY: Duration = Duration::from_secs(10);

const EXAMPLES: &str = "\
Examples:
  ringferry-profile                      a live table; on a pipe, lines
  ringferry-profile 5 12 -p 4711         one process, a minute
  ringferry-profile -1 --json            one look, for a script
  ringferry-profile --regions --top 8    the eight hottest vCPUs, and where they write

Needs CAP_BPF and CAP_PERFMON (and CAP_SYS_PTRACE for --sample).
Exit codes: 0 success, 1 failure, 2 wrong usage.";

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read us has seen enough: `ringferry-profile | head`, or a terminal that was closed.
        Err(error) if nobody_reads(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(pid) = args.pid
        && !Path::new(&format!("/proc/{pid}")).exists()
    {
        bail!("there is no process {pid}");
    }
    let stop = stop_on_signals()?;
    let options = SessionOptions {
        pid: args.pid,
        regions: args.regions,
        every_push: args.every_push,
        sample: args.sample,
    };
    let mut session = Session::start(options)?;
    if let Some(pid) = args.pid {
        require_vm(pid, &session.profiler().inventory()?)?;
    }
    let metrics = args.prometheus.map(prometheus::serve).transpose()?;
    let choice = Choice { vcpu: args.vcpu, top: args.top };
    let mut output = if args.json {
        Output::json(choice)
    } else if args.csv {
        Output::csv(choice)
    } else {
        Output::plain(choice)
    };
    let live = io::stdout().is_terminal() && io::stdin().is_terminal();
    let mut table = match live && !(args.json || args.csv || args.plain || args.once) {
        true => Some(live::Table::open(choice)?),
        false => None,
    };
    output.attached(&session)?;
    let mut left = if args.once { Some(1) } else { args.count };
    let mut next = Instant::now();
    let end = loop {
        if left == Some(0) {
            break End::Counted;
        }
        next += args.interval;
        let asked_to_stop = loop {
            let until = next.min(Instant::now() + KEEP_UP_EVERY);
            let asked_to_stop = match &mut table {
                Some(table) => table.wait(until, &stop)?,
                None => wait(until, &stop),
            };
            if asked_to_stop || until == next {
                break asked_to_stop;
            }
            session.keep_up()?;
        };
        let look = session.look()?;
        if let Some(metrics) = &metrics {
            metrics.set(&look, &session);
        }
        if asked_to_stop {
            break End::Stopped;
        }
        match &mut table {
            Some(table) => table.show(&look)?,
            None => output.look(&look)?,
        }
        if args.pid.is_some() && look.vms.is_empty() {
            break End::VmGone;
        }
        left = left.map(|left| left - 1);
        // A look that took longer than the interval does not owe the ones it missed.
        next = next.max(Instant::now() - args.interval);
    };
    // Closes the alternate screen, so that the summary stays on the other one.
    drop(table);
    if let (End::VmGone, Some(pid)) = (end, args.pid) {
        eprintln!("the VM of process {pid} has ended");
    }
    if !args.once {
        output.summary(&session)?;
    }
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum End {
    Counted,
    Stopped,
    VmGone,
}

fn require_vm(pid: u32, inventory: &Inventory) -> anyhow::Result<()> {
    if inventory.of_process(pid).next().is_none() {
        let name = vm_name(pid).unwrap_or_else(|| "gone by now".to_owned());
        bail!("process {pid} ({name}) runs no KVM virtual machine");
    }
    Ok(())
}

/// A channel that tells of SIGINT, SIGTERM and SIGHUP.
fn stop_on_signals() -> anyhow::Result<Receiver<()>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // A second signal before the first is handled changes nothing.
    let tell = move || {
        let _ = sender.try_send(());
    };
    ctrlc::set_handler(tell).context("cannot handle signals")?;
    Ok(receiver)
}

/// Sleeps; returns whether a signal came first.
fn wait(until: Instant, stop: &Receiver<()>) -> bool {
    !matches!(
        stop.recv_timeout(until.saturating_duration_since(Instant::now())),
        Err(RecvTimeoutError::Timeout)
    )
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * unit);
    match seconds.filter(|seconds| (0.01..=86400.0).contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => {
            Err("expected seconds or milliseconds, as 2, 0.5 or 500ms; at least 10ms, at most a day"
                .to_owned())
        }
    }
}

fn nobody_reads(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(Errno::EIO as i32)
    })
}

/// The vCPUs of a look that were asked for, those that dirty most first if only some are, and how many are left out.
fn chosen(look: &Look, choice: Choice) -> (Vec<&ringferry_bpf::Row>, usize) {
    let mut rows: Vec<_> =
        look.rows.iter().filter(|row| choice.vcpu.is_none_or(|vcpu| vcpu == row.vcpu)).collect();
    let all = rows.len();
    if let Some(top) = choice.top {
        rows.sort_by_key(|row| std::cmp::Reverse(row.dirty_pages));
        rows.truncate(usize::try_from(top).unwrap_or(usize::MAX));
    }
    let left_out = all - rows.len();
    (rows, left_out)
}
