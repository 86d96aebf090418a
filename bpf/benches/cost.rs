//! What the profiler costs a guest, at the highest push rate that this machine gives: vCPUs that do nothing but write
//! to protected pages, with and without the profiler in turns, in one run.
//!
//! `cargo bench -p ringferry-bpf --bench cost [-- ROUNDS]`. Each round is one window of each kind, in an order that
//! changes from round to round; the difference is taken within the round, so that a machine that gets slower or faster
//! meanwhile does not count, and the median of the rounds is told. Rates are per second of the vCPU threads' CPU time:
//! wall time on a shared machine says more about the neighbours.
#![allow(clippy::unwrap_used, reason = "a bench that cannot set up its guest fails")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use common::bare::{BareVm, DATA, Pages, Privilege, Work, kvm};
use nix::time::{ClockId, clock_gettime};
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, Session};
use ringferry::{PageIndex, PageSet};
use ringferry_bpf::{Counting, Options, Profiler};

const WINDOW: Duration = Duration::from_millis(80);
const PAGES_PER_VCPU: u64 = 8192;

fn cpu_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap())
}

/// vCPUs on threads of their own, each of which writes all of its pages once whenever it is told to.
struct Writers {
    vm: BareVm,
    session: Session,
    start: Vec<Sender<()>>,
    done: Receiver<()>,
    cpu_ns: Arc<AtomicU64>,
}

impl Writers {
    fn new(vcpus: u64) -> Option<Self> {
        let vm = BareVm::new(&kvm()?, &[PAGES_PER_VCPU * vcpus]).unwrap();
        let tracker = DirtyTracker::enable(vm.fd(), RingSize::default()).unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        let cpu_ns = Arc::new(AtomicU64::new(0));
        let (tell_done, done) = mpsc::channel();
        let start = (0..vcpus).map(|index| {
            let mut vcpu = vm.create_vcpu(usize::try_from(index).unwrap(), Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(usize::try_from(index).unwrap(), vcpu.fd()).unwrap();
            let first = PageIndex(DATA.0 + index * PAGES_PER_VCPU);
            let work = Work::Loop(Pages { first, pages: PAGES_PER_VCPU, stride: 1, passes: 1 });
            let (start, told) = mpsc::channel::<()>();
            let (cpu_ns, tell_done) = (cpu_ns.clone(), tell_done.clone());
            std::thread::spawn(move || {
                while told.recv().is_ok() {
                    vcpu.set_work(&work, 1).unwrap();
                    let before = cpu_time();
                    vcpu.run_to_end(Some(&handle)).unwrap();
                    let spent = u64::try_from((cpu_time() - before).as_nanos()).unwrap();
                    cpu_ns.fetch_add(spent, Ordering::Relaxed);
                    tell_done.send(()).unwrap();
                }
            });
            start
        });
        let start = start.collect();
        let session = tracker.start().unwrap();
        Some(Self { vm, session, start, done, cpu_ns })
    }

    /// Page writes per second of CPU time, each of them a fault and a push. Recycling is not counted in.
    fn window(&mut self) -> f64 {
        let (began, mut pages) = (Instant::now(), 0);
        let mut dirty = PageSet::new(self.vm.memory().end());
        self.cpu_ns.store(0, Ordering::Relaxed);
        while began.elapsed() < WINDOW {
            self.start.iter().for_each(|start| start.send(()).unwrap());
            self.start.iter().for_each(|_| self.done.recv().unwrap());
            dirty.clear();
            self.session.harvest(&mut dirty).unwrap();
            let written: u64 = dirty.runs().map(|run| run.pages).sum();
            assert_eq!(written, PAGES_PER_VCPU * self.start.len() as u64);
            pages += written;
        }
        pages as f64 / Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed)).as_secs_f64()
    }
}

/// The median, and the ends of its 95 % confidence interval by order statistics.
fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    // Half the width is 1.96 standard deviations of a fair coin tossed n times.
    let half = (1..n).take_while(|half| half * half <= n).last().unwrap_or(0);
    (values[n / 2], values[(n / 2).saturating_sub(half)], values[(n / 2 + half).min(n - 1)])
}

fn compare(name: &str, vcpus: u64, options: Options, rounds: usize) {
    let Some(mut writers) = Writers::new(vcpus) else { return };
    writers.window();
    let (mut without, mut lost) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let with = |writers: &mut Writers| {
            let _profiler = Profiler::attach_with(&options).unwrap();
            writers.window()
        };
        let (off, on) = if round % 2 == 0 {
            let off = writers.window();
            (off, with(&mut writers))
        } else {
            let on = with(&mut writers);
            (writers.window(), on)
        };
        without.push(off);
        lost.push((1.0 - on / off) * 100.0);
    }
    let ((rate, _, _), (loss, low, high)) = (median(without), median(lost));
    println!(
        "{name}, {vcpus} vCPU: {rate:.0} pushes per CPU second without; with the profiler lower by {loss:.2} % \
         ({low:.2} to {high:.2}), {:.0} ns per push; {rounds} rounds",
        loss / 100.0 * 1e9 / rate
    );
}

fn main() {
    if common::profiler(Options::default()).is_none() {
        return;
    }
    let rounds = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(60);
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    for vcpus in [1, cpus] {
        for (name, counting) in [
            ("by index", Counting::Indices),
            ("every push", Counting::EveryPush),
            ("every push and regions", Counting::EveryPushAndRegions),
        ] {
            compare(name, vcpus, Options { counting, ..Options::default() }, rounds);
        }
    }
}
