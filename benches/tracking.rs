//! What taking entries out of a ring and looking at it cost, on a kernel in memory.
//!
//! `cargo bench -p ringferry --bench tracking`
#![expect(clippy::unwrap_used, reason = "a bench that cannot be set up ends")]
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringferry::kvm::RingSize;
use ringferry::testing::FakeKernel;
use ringferry::track::{DirtyTracker, Session, VcpuHandle};
use ringferry::{PageIndex, PageRun, PageSet, Redirtied, SlotId};

const ENTRIES: u64 = 60_000;
const SLOT: SlotId = SlotId(1);

struct Rig {
    kernel: FakeKernel,
    tracker: DirtyTracker,
    session: Session,
    dirty: PageSet,
    redirtied: Redirtied,
}

impl Rig {
    fn new(pages: u64) -> Self {
        let kernel = FakeKernel::new();
        let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MAX);
        let memory = kernel.create_slot(SLOT, PageRun { first: PageIndex(0), pages });
        tracker.add_memory(&memory).unwrap();
        tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
        let session = tracker.start().unwrap();
        let end = memory.end();
        Self { kernel, tracker, session, dirty: PageSet::new(end), redirtied: Redirtied::new(end) }
    }

    fn fill(&self, stride: u64) {
        (0..ENTRIES).for_each(|i| assert!(self.kernel.write(0, SLOT, i * stride)));
    }

    /// The time of an observation that reports every page.
    fn report(&mut self, stride: u64) -> Duration {
        self.dirty.clear();
        self.session.harvest(&mut self.dirty).unwrap();
        self.fill(stride);
        self.redirtied.clear();
        let started = Instant::now();
        self.session.observe_into(&mut self.redirtied).unwrap();
        let took = started.elapsed();
        assert_eq!(self.redirtied.len(), ENTRIES);
        took
    }

    /// The time that one harvest spends in taking, without the reset.
    fn take(&mut self, stride: u64) -> Duration {
        self.fill(stride);
        let before = self.tracker.snapshot().harvest_ns;
        self.dirty.clear();
        self.session.harvest(&mut self.dirty).unwrap();
        assert_eq!(self.dirty.len(), ENTRIES);
        Duration::from_nanos(self.tracker.snapshot().harvest_ns - before)
    }
}

fn tracking(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    group.throughput(Throughput::Elements(ENTRIES));
    for (pattern, stride) in [("dense", 1), ("sparse", 1021)] {
        let mut rig = Rig::new(ENTRIES * stride);
        group.bench_function(BenchmarkId::new("take", pattern), |b| {
            b.iter_custom(|times| (0..times).map(|_| rig.take(stride)).sum());
        });
        group.bench_function(BenchmarkId::new("report", pattern), |b| {
            b.iter_custom(|times| (0..times).map(|_| rig.report(stride)).sum());
        });
    }
    let rig = Rig::new(ENTRIES);
    rig.fill(1);
    group.bench_function("observe", |b| b.iter(|| rig.session.observe().unwrap()));
    group.finish();
}

/// What a look costs, and what a vCPU waits for, on the largest machines: 12 TiB, 1,024 vCPUs.
fn at_scale(c: &mut Criterion) {
    const VCPUS: u64 = 1_024;
    const PAGES: u64 = 12 << 28;
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::default());
    let memory = kernel.create_slot(SLOT, PageRun { first: PageIndex(0), pages: PAGES });
    tracker.add_memory(&memory).unwrap();
    let vcpus: Vec<_> = (0..usize::try_from(VCPUS).unwrap())
        .map(|index| tracker.attach_fake_vcpu(index, &kernel, 0, 0).unwrap())
        .collect();
    let sessions = [(); 3].map(|()| tracker.start().unwrap());
    let mut redirtied = Redirtied::new(memory.end());
    let mut dirty = PageSet::new(memory.end());
    let mut next = 0_u64;
    // Each vCPU in a working set of 256 MiB of its own, 12 GiB from the next one's.
    let page = |vcpu: u64, i: u64| vcpu * (PAGES / VCPUS) + i * 17 % 65_536;
    let mut write = |pages_per_vcpu: u64| {
        for vcpu in 0..VCPUS {
            for i in next..next + pages_per_vcpu {
                assert!(kernel.write(usize::try_from(vcpu).unwrap(), SLOT, page(vcpu, i)));
            }
        }
        next += pages_per_vcpu;
    };
    let harvest_all = |dirty: &mut PageSet| {
        for session in &sessions {
            dirty.clear();
            session.harvest(dirty).unwrap();
        }
    };
    // So that all sets have memory where pages will be.
    for round in 0..10 {
        write(8);
        if round == 0 {
            let started = Instant::now();
            sessions[0].observe_into(&mut redirtied).unwrap();
            println!("first look of the first of 3 sessions: {:?}", started.elapsed());
            let started = Instant::now();
            dirty.clear();
            sessions[0].harvest(&mut dirty).unwrap();
            println!("its first harvest: {:?}", started.elapsed());
        }
        sessions.iter().for_each(|session| drop(session.observe_into(&mut redirtied).unwrap()));
        redirtied.clear();
        harvest_all(&mut dirty);
    }
    let mut group = c.benchmark_group("12TiB-1024vcpus-3sessions");
    group.sample_size(10);
    group.bench_function("look, nothing new", |b| b.iter(|| sessions[0].observe().unwrap()));
    group.bench_function("look that tells of 8 pages per vCPU", |b| {
        b.iter_custom(|times| {
            (0..times)
                .map(|_| {
                    harvest_all(&mut dirty);
                    write(8);
                    redirtied.clear();
                    let started = Instant::now();
                    sessions[0].observe_into(&mut redirtied).unwrap();
                    started.elapsed()
                })
                .sum()
        });
    });
    group.bench_function("harvest of 8 pages per vCPU", |b| {
        b.iter_custom(|times| {
            (0..times)
                .map(|_| {
                    harvest_all(&mut dirty);
                    write(8);
                    dirty.clear();
                    let started = Instant::now();
                    sessions[0].harvest(&mut dirty).unwrap();
                    started.elapsed()
                })
                .sum()
        });
    });
    group.bench_function("a full ring of one vCPU", |b| {
        b.iter_custom(|times| {
            (0..times)
                .map(|i| {
                    harvest_all(&mut dirty);
                    (0..8_000).for_each(|n| assert!(kernel.write(0, SLOT, page(0, i * 8_000 + n))));
                    let started = Instant::now();
                    vcpus[0].ring_full().unwrap();
                    started.elapsed()
                })
                .sum()
        });
    });
    group.finish();
}

/// What a vCPU whose ring is full waits for, at worst, while another thread does `work` over and over.
fn longest_wait(vcpus: &Large, name: &str, work: impl Fn() + Sync) {
    let done = AtomicBool::new(false);
    let (mut waits, mut rounds) = (Vec::new(), 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Where one round takes long, one has to do.
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(1) {
                work();
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            for n in 0..6_000 {
                vcpus.kernel.write(0, SLOT, rounds * 6_000 % 60_000 + n);
            }
            let started = Instant::now();
            vcpus.handles[0].ring_full().unwrap();
            waits.push(started.elapsed());
            rounds += 1;
        }
    });
    waits.sort_unstable();
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!("ring_full beside {name}: median {median:?}, longest {longest:?}, of {}", waits.len());
}

struct Large {
    kernel: FakeKernel,
    handles: Vec<VcpuHandle>,
}

/// What a vCPU waits for beside what others do with the same tracker: 12 TiB in slots of 256 GiB, 1,024 vCPUs.
fn waits(_: &mut Criterion) {
    const VCPUS: usize = 1_024;
    const SLOT_PAGES: u64 = 1 << 26;
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::default());
    for slot in 0..48 {
        let first = PageIndex(u64::from(slot) * SLOT_PAGES);
        let memory = kernel.create_slot(SlotId(slot), PageRun { first, pages: SLOT_PAGES });
        tracker.add_memory(&memory).unwrap();
    }
    let attach = |index| tracker.attach_fake_vcpu(index, &kernel, 0, 0).unwrap();
    let large = Large { handles: (0..VCPUS).map(attach).collect(), kernel };
    let session = tracker.start().unwrap();
    let end = PageIndex(48 * SLOT_PAGES);
    let sets = Mutex::new((PageSet::new(end), Redirtied::new(end)));
    let write = |pages: u64| {
        for vcpu in 1..VCPUS {
            let slot = SlotId(u32::try_from(vcpu % 47 + 1).unwrap());
            (0..pages).for_each(|n| assert!(large.kernel.write(vcpu, slot, (vcpu as u64 * 61 + n) * 977)));
        }
    };
    let harvest = || {
        let dirty = &mut sets.lock().unwrap().0;
        dirty.clear();
        session.harvest(dirty).unwrap();
    };
    write(8);
    harvest();
    longest_wait(&large, "nothing", || thread::sleep(Duration::from_millis(1)));
    longest_wait(&large, "looks", || {
        let redirtied = &mut sets.lock().unwrap().1;
        redirtied.clear();
        session.observe_into(redirtied).unwrap();
    });
    longest_wait(&large, "harvests of 8 pages per vCPU", || {
        write(8);
        harvest();
    });
    longest_wait(&large, "protecting all of memory anew", || {
        large.kernel.emulate_writes(1, SlotId(47), (0..20_000).map(|n| n * 3));
        harvest();
    });
    assert!(tracker.snapshot().rearms > 0);
}

/// What a vCPU pays before each `KVM_RUN` when nobody throttles.
fn before_run(c: &mut Criterion) {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MIN);
    let vcpu = tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
    c.bench_function("before_run", |b| b.iter(|| vcpu.before_run()));
}

criterion_group!(benches, tracking, before_run, at_scale, waits);
criterion_main!(benches);
