//! What a plan costs the thread that steers: nobody looks at the vCPUs meanwhile.
//!
//! `cargo bench -p ringferry --bench planning`
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ringferry::converge::{Action, Controller, LinkSample, Observation, Pages, Settings, VcpuSample};

/// 64 GiB of 256 in use and 200 Gbit/s for 1,024 vCPUs, and as much of that for fewer.
const PAGES_PER_VCPU: u64 = 16_384;
const PAGES_PER_S_PER_VCPU: u64 = 5_960;
const LOOK: Duration = Duration::from_millis(10);

/// One vCPU in eight writes 1 GiB over and over, the others 16 MiB at 5 MB/s.
fn dirtied(vcpu: u64, seconds: f64) -> Pages {
    let (pages, pages_per_s) = if vcpu.is_multiple_of(8) { (262_144, 150_000.0) } else { (4_096, 1_220.0) };
    Pages::floor(seconds * pages_per_s).min(Pages(pages))
}

struct Rig {
    controller: Controller,
    vcpus: u64,
    now: Duration,
    pages_sent: u64,
    samples: Vec<VcpuSample>,
}

impl Rig {
    /// In the middle of the second round, the first in which anybody may be held back.
    fn new(vcpus: u64) -> Self {
        let controller = Controller::new(Settings::new(Pages(vcpus * PAGES_PER_VCPU * 4)));
        let mut rig = Self { controller, vcpus, now: Duration::ZERO, pages_sent: 0, samples: Vec::new() };
        let populated = vcpus * PAGES_PER_VCPU;
        rig.controller.round_started(rig.now, Pages(populated));
        rig.run(Duration::from_secs(populated / (vcpus * PAGES_PER_S_PER_VCPU)));
        let left = rig.samples.iter().map(|sample| sample.dirtied.0).sum();
        let outcome = rig.look(|controller, now, seen| controller.round_ended(now, seen));
        assert_eq!(outcome, Action::Continue);
        rig.controller.round_started(rig.now, Pages(left));
        rig.pages_sent = 0;
        rig.run(Duration::from_millis(100));
        rig
    }

    /// The current round goes on for so long.
    fn run(&mut self, time: Duration) {
        let begin = self.now;
        while self.now < begin + time {
            self.now += LOOK;
            let seconds = (self.now - begin).as_secs_f64();
            let sample = |vcpu| VcpuSample { dirtied: dirtied(vcpu, seconds), ..VcpuSample::default() };
            self.samples = (0..self.vcpus).map(sample).collect();
            self.pages_sent += self.vcpus * PAGES_PER_S_PER_VCPU / 100;
            let action = self.look(|controller, now, seen| controller.observed(now, seen));
            assert_eq!(action, Action::Continue);
        }
    }

    fn look(&mut self, with: impl FnOnce(&mut Controller, Duration, &Observation<'_>) -> Action) -> Action {
        let all = self.now.as_secs_f64() * (self.vcpus * PAGES_PER_S_PER_VCPU) as f64;
        let seen = Observation {
            vcpus: &self.samples,
            pages_done: Pages(self.pages_sent),
            link: LinkSample { bytes_acked: Pages::floor(all).0 * 4096, ..LinkSample::default() },
            ..Observation::default()
        };
        with(&mut self.controller, self.now, &seen)
    }

    /// A look at the vCPUs that makes a plan.
    fn plan(&mut self) -> Action {
        // Settings that may be others ask for one.
        self.controller.change(self.now, |_| ());
        self.look(|controller, now, seen| controller.observed(now, seen))
    }
}

fn planning(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for vcpus in [8, 1024] {
        let mut rig = Rig::new(vcpus);
        assert!(rig.controller.prediction().is_some(), "nothing to plan with");
        group.bench_function(BenchmarkId::from_parameter(vcpus), |b| b.iter(|| rig.plan()));
    }
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);
