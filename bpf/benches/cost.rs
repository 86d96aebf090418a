//! What the profiler costs a guest, at the highest push rate that this machine gives: a vCPU that does nothing but
//! write to protected pages, with and without the profiler in turns, in one run.
//!
//! `cargo bench -p ringferry-bpf --bench cost [-- ROUNDS]`. Each round is one window of each kind, in an order that
//! changes from round to round; the difference is taken within the round, so that a machine that gets slower or faster
//! meanwhile does not count. Rates are of the vCPU thread's CPU time and of wall time: on a shared machine the first is
//! the one to believe.
#![allow(clippy::unwrap_used, reason = "a bench that cannot set up its guest fails")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::Guest;
use common::bare::{DATA, Pages, Privilege, Work};
use nix::time::{ClockId, clock_gettime};
use ringferry::{DirtySource, PageIndex};
use ringferry_bpf::{Options, Profiler};

const WINDOW: Duration = Duration::from_millis(400);
const PAGES: u64 = 16384;

#[derive(Clone, Copy)]
struct Rates {
    per_cpu_s: f64,
    per_wall_s: f64,
}

fn cpu_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap())
}

/// Page writes per second, each of them a fault and a push. Recycling is not counted in.
fn window(guest: &mut Guest) -> Rates {
    let (mut pages, mut cpu, mut wall) = (0, Duration::ZERO, Duration::ZERO);
    while wall < WINDOW {
        let (cpu_before, wall_before) = (cpu_time(), Instant::now());
        guest.work(&Work::Loop(Pages { first: PageIndex(DATA.0), pages: PAGES, stride: 1, passes: 1 }), 1);
        cpu += cpu_time() - cpu_before;
        wall += wall_before.elapsed();
        pages += PAGES;
        assert_eq!(guest.harvest(), PAGES);
    }
    Rates { per_cpu_s: pages as f64 / cpu.as_secs_f64(), per_wall_s: pages as f64 / wall.as_secs_f64() }
}

/// Mean and half width of its 95 % confidence interval.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, 1.96 * (variance / n).sqrt())
}

fn compare(name: &str, options: Options, rounds: usize) {
    let Some(mut guest) = Guest::new(Some(65536), Privilege::User) else { return };
    guest.tracker.start().unwrap();
    window(&mut guest);
    let (mut off, mut lost_cpu, mut lost_wall) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let with = |guest: &mut Guest| {
            let profiler = Profiler::attach_with(&options).unwrap();
            let rates = window(guest);
            drop(profiler);
            rates
        };
        let (without, with) = if round % 2 == 0 {
            let without = window(&mut guest);
            (without, with(&mut guest))
        } else {
            let with = with(&mut guest);
            (window(&mut guest), with)
        };
        off.push(without.per_cpu_s);
        lost_cpu.push((1.0 - with.per_cpu_s / without.per_cpu_s) * 100.0);
        lost_wall.push((1.0 - with.per_wall_s / without.per_wall_s) * 100.0);
    }
    let ((rate, _), (cpu, cpu_error), (wall, wall_error)) = (mean(&off), mean(&lost_cpu), mean(&lost_wall));
    println!(
        "{name}: {rate:.0} pushes/s of CPU time without; lower with the profiler by {cpu:.2} ± {cpu_error:.2} % \
         ({:.0} ns per push), by wall clock {wall:.2} ± {wall_error:.2} %, {rounds} rounds",
        cpu / 100.0 * 1e9 / rate
    );
}

fn main() {
    if common::profiler(Options::default()).is_none() {
        return;
    }
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(20);
    compare("pushes", Options::default(), rounds);
    compare("pushes and regions", Options { regions: true, ..Options::default() }, rounds);
}
