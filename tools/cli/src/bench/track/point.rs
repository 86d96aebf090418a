//! One measurement: a guest, a backend, so many dirty pages.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use kvm_ioctls::Kvm;
use ringferry::kvm::RingSize;
use ringferry::track::{self as tracked, DirtyTracker, Session, VcpuHandle};
use ringferry::{PAGE_SIZE, PageIndex, PageSet};
use ringferry_testvm::bare::{BareVcpu, BareVm, DATA, Pages, Privilege, Work};
use serde::Serialize;

use super::{Backend, Pattern};
use crate::cross_check::{CrossCheck, RunningProfiler};

/// How often the guest is looked at while its rate is measured.
const OBSERVE_EVERY: Duration = Duration::from_millis(1);
/// Quiet time around the switching of tracking, in which the guest's stalls belong to it.
const SETTLE: Duration = Duration::from_millis(50);

/// How long to wait for a guest that a busy host does not let run.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(10);

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub(super) backend: Backend,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: usize,
    pub(super) dirty_pages: u64,
    pub(super) pattern: Pattern,
    pub(super) ring_size: RingSize,
    pub(super) rounds: u32,
    pub(super) guest_time: Duration,
    pub(super) harvest_every: Option<Duration>,
    pub(super) cross_check: bool,
}

/// What was measured.
#[derive(Serialize, Clone, Debug)]
pub struct Figures {
    /// Nothing where the backend cannot look.
    pub observe_ns_per_page: Option<f64>,
    pub harvest_ns_per_page: f64,
    pub reset_ns_per_page: f64,
    pub sync_us_median: f64,
    pub sync_us_p99: f64,
    pub guest_page_writes_per_s: f64,
    pub untracked_page_writes_per_s: f64,
    pub start_us: f64,
    pub stop_us: f64,
    /// Between two writes of the guest while tracking was switched on, and off again.
    pub longest_stall_us: f64,
    /// The same for as long without switching: what the machine's noise is.
    pub longest_stall_before_us: f64,
}

/// A guest that is tracked, or will be.
struct Rig {
    vm: BareVm,
    tracker: DirtyTracker,
    session: Session,
    vcpus: Vec<(BareVcpu, VcpuHandle)>,
    /// What each vCPU writes.
    shares: Vec<Pages>,
}

fn us(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The value below which `share` of the values lie.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let rank = (0..=last).find(|rank| *rank as f64 >= share * last as f64).unwrap_or(0);
    sorted.get(rank).copied().unwrap_or(0.0)
}

/// Measures one case, with the kernel's count beside the tracker's if that is asked for.
///
/// # Errors
///
/// What KVM refused; an `io::Error` with `ENOMEM` or `EINVAL` if it was the memory.
pub fn measure(kvm: &Kvm, case: &Case) -> anyhow::Result<(Figures, Option<CrossCheck>)> {
    let mut rig = Rig::new(kvm, case)?;
    let profiler = case.cross_check.then(RunningProfiler::start).transpose()?;
    let untracked_page_writes_per_s = rig.rate(case.guest_time, None)?;
    let longest_stall_before_us = rig.longest_stall(|_| Ok(()), |_| Ok(()))?;
    let (mut start_us, mut stop_us) = (0.0, 0.0);
    let longest_stall_us = rig.longest_stall(
        |session| {
            let started = Instant::now();
            session.start()?;
            start_us = us(started.elapsed());
            Ok(())
        },
        |session| {
            let stopped = Instant::now();
            session.stop()?;
            stop_us = us(stopped.elapsed());
            Ok(())
        },
    )?;
    let guest_page_writes_per_s =
        rig.rate(case.guest_time, Some(case.harvest_every.unwrap_or(Duration::MAX)))?;
    let mut dirty = PageSet::new(rig.vm.memory().end());
    rig.session.harvest(&mut dirty)?;
    let (mut observe, mut harvest, mut reset, mut sync) = (vec![], vec![], vec![], vec![]);
    for round in 0..case.rounds {
        rig.write_once(u64::from(round))?;
        let per_page = 1.0 / case.dirty_pages as f64;
        if case.backend == Backend::Ring {
            let looked = Instant::now();
            rig.session.observe()?;
            observe.push(looked.elapsed().as_nanos() as f64 * per_page);
        }
        dirty.clear();
        let before = rig.tracker.snapshot();
        let harvested = Instant::now();
        rig.session.harvest(&mut dirty)?;
        sync.push(us(harvested.elapsed()));
        let after = rig.tracker.snapshot();
        harvest.push((after.harvest_ns - before.harvest_ns) as f64 * per_page);
        let protecting = |figures: &tracked::Figures| figures.reset_ns + figures.protect_ns;
        reset.push((protecting(&after) - protecting(&before)) as f64 * per_page);
        anyhow::ensure!(
            dirty.len() == case.dirty_pages,
            "{} pages were harvested, the guest wrote {}",
            dirty.len(),
            case.dirty_pages
        );
    }
    rig.session.stop()?;
    let vcpus = rig.tracker.snapshot().vcpus;
    let taken = vcpus.iter().map(|vcpu| (vcpu.index, vcpu.pages + vcpu.duplicate_entries));
    let compared = profiler.map(|profiler| profiler.compare(taken)).transpose()?;
    let figures = Figures {
        observe_ns_per_page: (!observe.is_empty()).then(|| quantile(&observe, 0.5)),
        harvest_ns_per_page: quantile(&harvest, 0.5),
        reset_ns_per_page: quantile(&reset, 0.5),
        sync_us_median: quantile(&sync, 0.5),
        sync_us_p99: quantile(&sync, 0.99),
        guest_page_writes_per_s,
        untracked_page_writes_per_s,
        start_us,
        stop_us,
        longest_stall_us,
        longest_stall_before_us,
    };
    Ok((figures, compared))
}

impl Rig {
    fn new(kvm: &Kvm, case: &Case) -> anyhow::Result<Self> {
        let pages = case.memory_bytes / PAGE_SIZE as u64;
        let vm = BareVm::new(kvm, &[pages])?;
        let tracker = match case.backend {
            Backend::Ring => DirtyTracker::enable(vm.fd(), case.ring_size),
            Backend::Bitmap => DirtyTracker::enable_bitmap(vm.fd()),
        }?;
        tracker.add_memory(vm.memory())?;
        let stride = match case.pattern {
            Pattern::Dense => 1,
            Pattern::Sparse => pages / case.dirty_pages,
        };
        let (mut vcpus, mut shares) = (Vec::new(), Vec::new());
        let mut from = 0;
        for index in 0..case.vcpus {
            let vcpu = vm.create_vcpu(index, Privilege::User)?;
            let handle = tracker.attach_vcpu(index, vcpu.fd())?;
            vcpus.push((vcpu, handle));
            let to = case.dirty_pages * (index as u64 + 1) / case.vcpus as u64;
            let first = PageIndex(DATA.0 + from * stride);
            shares.push(Pages { first, pages: to - from, stride, passes: u64::MAX });
            from = to;
        }
        let mut rig = Self { vm, session: tracker.session(), tracker, vcpus, shares };
        // First touches cost the host a page each: not what is measured.
        rig.write_once(0)?;
        Ok(rig)
    }

    /// Every vCPU writes its pages once.
    fn write_once(&mut self, value: u64) -> anyhow::Result<()> {
        thread::scope(|scope| {
            let running: Vec<_> = self
                .vcpus
                .iter_mut()
                .zip(&self.shares)
                .map(|((vcpu, handle), share)| {
                    scope.spawn(move || {
                        vcpu.set_work(&Work::Loop(Pages { passes: 1, ..*share }), value)?;
                        vcpu.run_to_end(Some(handle))
                    })
                })
                .collect();
            running.into_iter().try_for_each(join)
        })
    }

    /// Every vCPU rewrites its pages over and over while `watch` runs.
    fn meanwhile<T>(
        &mut self,
        clocked: bool,
        watch: impl FnOnce(&BareVm, &Session) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let Self { vm, session, vcpus, shares, .. } = self;
        let before: Vec<u64> = (0..vcpus.len()).map(|vcpu| vm.passes(vcpu)).collect();
        thread::scope(|scope| {
            let running: Vec<_> = vcpus
                .iter_mut()
                .zip(&*shares)
                .map(|((vcpu, handle), share)| {
                    scope.spawn(move || {
                        let work = if clocked { Work::ClockedLoop(*share) } else { Work::Loop(*share) };
                        vcpu.set_work(&work, 1)?;
                        vcpu.run_to_end(Some(handle))
                    })
                })
                .collect();
            wait_for_passes(vm, &before);
            let watched = watch(vm, session);
            (0..running.len()).for_each(|vcpu| vm.stop(vcpu));
            let outcome = running.into_iter().try_for_each(join);
            (0..shares.len()).for_each(|vcpu| vm.unstop(vcpu));
            outcome.and(watched)
        })
    }

    /// Page writes per second of all vCPUs together; tracked from the moment in which tracking is switched on, if it is to
    /// be harvested. It stays on.
    /// `harvest_every` so long.
    fn rate(&mut self, time: Duration, harvest_every: Option<Duration>) -> anyhow::Result<f64> {
        let shares = self.shares.clone();
        self.meanwhile(false, |vm, session| {
            let writes = || -> f64 {
                shares.iter().enumerate().map(|(i, share)| (vm.passes(i) * share.pages) as f64).sum()
            };
            let (started, before) = (Instant::now(), writes());
            let mut dirty = PageSet::new(vm.memory().end());
            if harvest_every.is_some() {
                session.start()?;
            }
            let mut harvested = started;
            // A busy host may let the guest wait.
            while started.elapsed() < time || (writes() <= before && started.elapsed() < GIVEN_UP_AFTER) {
                thread::sleep(OBSERVE_EVERY);
                let Some(harvest_every) = harvest_every else { continue };
                session.observe()?;
                if harvested.elapsed() >= harvest_every {
                    dirty.clear();
                    session.harvest(&mut dirty)?;
                    harvested = Instant::now();
                }
            }
            Ok((writes() - before) / started.elapsed().as_secs_f64())
        })
    }

    /// The longest time between two writes of any vCPU while one thing is done, and some time later another.
    fn longest_stall(
        &mut self,
        first: impl FnOnce(&Session) -> anyhow::Result<()>,
        second: impl FnOnce(&Session) -> anyhow::Result<()>,
    ) -> anyhow::Result<f64> {
        let tsc_khz = self.vcpus[0].0.tsc_khz();
        anyhow::ensure!(tsc_khz > 0, "KVM does not say how fast the guest's clock is");
        let vcpus = self.vcpus.len();
        self.meanwhile(true, |vm, session| {
            thread::sleep(SETTLE);
            (0..vcpus).for_each(|vcpu| vm.restart_longest_gap(vcpu));
            first(session).context("switching tracking on")?;
            thread::sleep(SETTLE);
            second(session).context("switching tracking off")?;
            thread::sleep(SETTLE);
            let longest = (0..vcpus).map(|vcpu| vm.longest_gap_ticks(vcpu)).max().unwrap_or(0);
            Ok(longest as f64 / f64::from(tsc_khz) * 1000.0)
        })
    }
}

/// Until every vCPU has begun, or is given up.
fn wait_for_passes(vm: &BareVm, before: &[u64]) {
    let given_up = Instant::now() + GIVEN_UP_AFTER;
    while before.iter().enumerate().any(|(vcpu, passes)| vm.passes(vcpu) == *passes)
        && Instant::now() < given_up
    {
        thread::sleep(OBSERVE_EVERY);
    }
}

fn join(thread: thread::ScopedJoinHandle<'_, std::io::Result<()>>) -> anyhow::Result<()> {
    let outcome = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    outcome.context("a vCPU stopped")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 0.5), 3.0);
        assert_eq!(quantile(&values, 0.99), 5.0);
        assert_eq!(quantile(&[7.0], 0.5), 7.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
