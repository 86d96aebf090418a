//! `ringferry bench track`: what tracking costs on this machine's KVM, ring against bitmap in one run.
//!
//! This file owns the cases and what is printed. `track/point.rs` measures one of them, `track/plot.rs` draws.

mod plot;
mod point;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use kvm_ioctls::Kvm;
use ringferry::PAGE_SIZE;
use ringferry::kvm::RingSize;
use ringferry_testvm::bare::DATA_PAGES_MAX;
use ringferry_testvm::workload::mailbox::MAX_VCPUS;
use serde::Serialize;

use crate::output::Output;
use crate::sizes::{Size, Time};
use point::{Case, Figures};

/// Measure dirty tracking: ring against bitmap, over memory size, dirty pages and pattern
///
/// A guest of its own writes exactly the pages it is told to, in memory that is sparse: only the pages that are
/// written take room on the host. Times are medians over the rounds.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry bench track
  ringferry bench track --memory 1GiB,256GiB --dirty-pages 4000 --pattern sparse --plot track.svg
  ringferry bench track --memory 1GiB --dirty-pages 7680 --pattern dense --vcpus 1,2
  ringferry bench track --backend ring --memory 1GiB --vcpus 4 --cross-check

What the columns mean:
  observe   looking at what was dirtied without protecting it, per page; the bitmap cannot
  harvest   ring: taking entries into the set; bitmap: KVM_GET_DIRTY_LOG and the scan; per page
  reset     KVM_RESET_DIRTY_RINGS or KVM_CLEAR_DIRTY_LOG, which protect the pages again, per page
  sync      all of it, until the pages may be read
  writes    page writes by the guest per second, rewriting the dirty pages over and over: untracked, and from the
            moment in which tracking is switched on, the first write to each page included; the ring is observed
            every millisecond meanwhile
  on, off   switching tracking on and off, and the longest stall of the guest meanwhile")]
pub struct Args {
    /// Memory sizes, one measurement each
    #[arg(long, value_delimiter = ',', value_name = "SIZE",
          default_values_t = [1, 16, 256].map(|gib: u64| Size { bytes: gib << 30 }))]
    memory: Vec<Size>,

    /// Pages dirtied between two harvests, over all vCPUs
    #[arg(long, value_delimiter = ',', default_values_t = [4_000, 60_000], value_name = "PAGES")]
    dirty_pages: Vec<u64>,

    /// Where they lie
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Pattern::Dense, Pattern::Sparse])]
    pattern: Vec<Pattern>,

    /// How many vCPUs write them, each on its own thread
    #[arg(long, value_delimiter = ',', default_values_t = [1], value_name = "N")]
    vcpus: Vec<usize>,

    /// By what they are tracked
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Ring, Backend::Bitmap])]
    backend: Vec<Backend>,

    /// Entries of each vCPU's ring: a power of two from 256 to 65536
    #[arg(long, default_value_t = RingSize::MAX.entries(), value_name = "N")]
    ring_entries: u32,

    /// Harvests of each measurement
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,

    /// How long the guest's rate is measured, each without and with tracking
    #[arg(long, default_value = "1s", value_name = "TIME")]
    guest_time: Time,

    /// Harvest this often while the tracked guest's rate is measured, as snapshots do; without, never
    #[arg(long, value_name = "TIME")]
    harvest_every: Option<Time>,

    /// Also draw the times of all measurements over memory size into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Run ringferry-profile beside each measurement of the ring, and compare what the kernel pushed with what the
    /// tracker took
    #[arg(long)]
    cross_check: bool,
}

/// Where the dirty pages lie.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
enum Pattern {
    /// One after the other
    Dense,
    /// At equal distances over all of memory
    Sparse,
}

/// What tracks.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
enum Backend {
    /// A dirty ring per vCPU
    Ring,
    /// A bitmap per slot, with manual protection
    Bitmap,
}

/// One measurement, as JSON.
#[derive(Serialize, Clone, Debug)]
struct Point {
    kind: &'static str,
    backend: Backend,
    memory_bytes: u64,
    vcpus: usize,
    dirty_pages: u64,
    pattern: Pattern,
    #[serde(flatten)]
    figures: Figures,
}

/// Measures everything that was asked for.
///
/// # Errors
///
/// Wrong sizes, no KVM, or no room for the smallest memory.
pub fn run(args: Args, output: Output) -> anyhow::Result<ExitCode> {
    let ring_size = RingSize::from_entries(args.ring_entries)?;
    let kvm = Kvm::new().map_err(|error| anyhow::anyhow!("{error}")).context(
        "/dev/kvm cannot be opened: tracking of guests needs KVM; `ringferry doctor` says what to do",
    )?;
    let cases = cases(&args, ring_size)?;
    ensure!(
        !args.cross_check || args.backend.contains(&Backend::Ring),
        "--cross-check compares entries of dirty rings: it takes --backend ring"
    );
    let mut points: Vec<Point> = Vec::new();
    let mut refused_bytes = u64::MAX;
    if !output.json() {
        HEADER.iter().try_for_each(|line| output.line(line))?;
    }
    for case in cases {
        if case.memory_bytes >= refused_bytes {
            continue;
        }
        match point::measure(&kvm, &case) {
            Ok((figures, compared)) => {
                let Case { backend, memory_bytes, vcpus, dirty_pages, pattern, .. } = case;
                let kind = "bench_track";
                let point = Point { kind, backend, memory_bytes, vcpus, dirty_pages, pattern, figures };
                if output.json() {
                    output.object(&point)?;
                } else {
                    output.line(row(&point))?;
                }
                points.push(point);
                compared.iter().try_for_each(|compared| compared.print(output))?;
            }
            // As much sparse memory as the kernel accepts.
            Err(error) if is_no_room(&error) && !points.is_empty() => {
                let size = Size { bytes: case.memory_bytes };
                output.note(format_args!("{size} is more than this kernel accepts: {error:#}"));
                refused_bytes = case.memory_bytes;
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(file) = &args.plot {
        plot::draw(file, &points).with_context(|| format!("{} cannot be drawn", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn is_no_room(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    matches!(code, Some(libc::ENOMEM | libc::EINVAL))
}

/// All combinations, smallest memory first, backends side by side.
fn cases(args: &Args, ring_size: RingSize) -> anyhow::Result<Vec<Case>> {
    let mut memory: Vec<u64> = args.memory.iter().map(|size| size.bytes).collect();
    memory.sort_unstable();
    let mut cases = Vec::new();
    for memory_bytes in memory {
        let pages = memory_bytes / PAGE_SIZE as u64;
        ensure!(pages <= DATA_PAGES_MAX, "--memory: {} at most", Size { bytes: 511 << 30 });
        for &vcpus in &args.vcpus {
            ensure!((1..=MAX_VCPUS).contains(&vcpus), "--vcpus: 1 to {MAX_VCPUS}");
            for &dirty_pages in &args.dirty_pages {
                ensure!(dirty_pages >= vcpus as u64, "--dirty-pages: {vcpus} at least with {vcpus} vCPUs");
                if dirty_pages > pages {
                    bail!(
                        "--dirty-pages {dirty_pages} do not fit into --memory {}",
                        Size { bytes: memory_bytes }
                    );
                }
                for &pattern in &args.pattern {
                    cases.extend(args.backend.iter().map(|&backend| Case {
                        backend,
                        memory_bytes,
                        vcpus,
                        dirty_pages,
                        pattern,
                        ring_size,
                        rounds: args.rounds,
                        guest_time: args.guest_time.0,
                        harvest_every: args.harvest_every.map(|time| time.0),
                        cross_check: args.cross_check && backend == Backend::Ring,
                    }));
                }
            }
        }
    }
    Ok(cases)
}

const HEADER: [&str; 2] = [
    " memory vCPUs dirty pages pattern backend | observe  harvest   reset |     sync   p99 |   writes untracked |     on    stall    off",
    "                                          |     ns per page, medians |           us   |    million per s   |            us          ",
];

fn row(point: &Point) -> String {
    let figures = &point.figures;
    let observe = figures.observe_ns_per_page.map_or("-".to_owned(), |ns| format!("{ns:.2}"));
    let name = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    format!(
        "{:>7} {:>5} {:>11} {:<7} {:<7} | {observe:>7} {:>8.1} {:>7.1} | {:>8.0} {:>5.0} | {:>8.1} {:>9.1} | {:>6.0} \
         {:>8.0} {:>6.0}",
        Size { bytes: point.memory_bytes }.to_string(),
        point.vcpus,
        point.dirty_pages,
        name(&point.pattern),
        name(&point.backend),
        figures.harvest_ns_per_page,
        figures.reset_ns_per_page,
        figures.sync_us_median,
        figures.sync_us_p99,
        figures.guest_page_writes_per_s / 1e6,
        figures.untracked_page_writes_per_s / 1e6,
        figures.start_us,
        figures.longest_stall_us,
        figures.stop_us,
    )
}
