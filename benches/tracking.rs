//! What taking entries out of a ring and looking at it cost, on a kernel in memory.
//!
//! `cargo bench -p ringferry --bench tracking`
#![expect(clippy::unwrap_used, reason = "a bench that cannot be set up ends")]
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringferry::kvm::RingSize;
use ringferry::testing::FakeKernel;
use ringferry::track::{DirtyTracker, Session};
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

criterion_group!(benches, tracking);
criterion_main!(benches);
