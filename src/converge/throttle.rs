//! The arithmetic of slowing one vCPU down: token buckets of pages, and duty cycles where pages cannot be told
//! apart by vCPU.
//!
//! Nothing waits here. [`Throttle::poll`] says whether the vCPU's gate is open or until when it is closed; the
//! gate itself, a futex on the vCPU's path, is `track::VcpuThrottle`, and the kick that sends an overdrawn vCPU
//! there is the VMM's. `fair_share` computes the quotas.

use std::time::Duration;

use super::units::{Pages, duration, sane};

/// Buckets are refilled this often.
pub const SLICE: Duration = Duration::from_millis(5);

/// No gate stays closed for longer at a stretch, whatever a vCPU has overdrawn: with the time that a busy host takes to
/// let the vCPU run again, its guest feels some 10 ms.
pub const LONGEST_STALL: Duration = Duration::from_millis(8);

/// Where a guest cannot be held within such stalls, they may become as long as this (and the controller says so).
pub const LONGEST_STALL_EVER: Duration = Duration::from_millis(160);

/// By this factor stalls may be longer for a vCPU that cannot help dirtying more pages than others that are held back.
pub const MOST_STRETCH: f64 = 1.25;

/// After a stall a vCPU has this long, from the first page on that it dirties, before its gate may close again, so that
/// two stalls are two to its guest: on a busy host it may have to wait for a CPU first.
pub(crate) const SHORTEST_RUN: Duration = Duration::from_micros(100);
/// And it dirties so many pages in it, unless that takes longer than this.
const PAGES_BETWEEN_STALLS: u64 = 16;
const SLOW_RUN: Duration = Duration::from_millis(1);
/// It is expected to have done so by then.
const USUAL_RUN: Duration = Duration::from_millis(2);

/// QEMU's auto-converge lets a vCPU run this long between two sleeps (`CPU_THROTTLE_TIMESLICE_NS`).
const QEMU_TIMESLICE: Duration = Duration::from_millis(10);

/// A bucket keeps what was not used, up to this many slices' worth: a vCPU that comes late is not punished, and
/// none saves up a burst.
const SLICES_KEPT: f64 = 2.0;

/// Newly dirtied pages per [`SLICE`]. A page that is dirty already is free to write.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
pub struct PagesPerSlice(pub f64);

impl PagesPerSlice {
    /// `pages` spread evenly over `seconds`.
    pub(crate) fn over(pages: f64, seconds: f64) -> Self {
        Self(sane(pages) * SLICE.as_secs_f64() / sane(seconds).max(SLICE.as_secs_f64()))
    }

    /// The same as pages per second.
    pub fn pages_per_s(self) -> f64 {
        sane(self.0) / SLICE.as_secs_f64()
    }
}

/// How a vCPU is slowed down.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Quota {
    /// By the pages that it dirties.
    Pages(PagesPerSlice),
    /// By its time, because the backend cannot tell who dirtied what: stopped for this share of it, 0 to 1, in
    /// stalls of at most [`LONGEST_STALL`].
    Time(f64),
    /// By its time as QEMU's auto-converge does it: 10 ms of running, then a sleep that makes up this share,
    /// 0 to 0.99, and is as long as that takes.
    QemuTime(f64),
}

/// Whether a vCPU may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GateState {
    /// It may.
    #[default]
    Open,
    /// Not before this time, on the caller's clock; then without being told.
    ClosedUntil(Duration),
}

/// A bucket of pages that one vCPU may still dirty.
#[derive(Clone, Copy, Debug)]
struct TokenBucket {
    per_slice: PagesPerSlice,
    /// Negative after an overdraft.
    tokens: f64,
    /// The slice that was last paid in.
    slice: u128,
    /// Pages that the vCPU had dirtied at the last poll.
    counted: Pages,
}

impl TokenBucket {
    fn slice_at(now: Duration) -> u128 {
        now.as_nanos() / SLICE.as_nanos()
    }

    /// When the bucket will hold a page again.
    fn closed_until(&mut self, now: Duration, dirtied: Pages) -> Option<Duration> {
        let per_slice = sane(self.per_slice.0);
        let slice = Self::slice_at(now);
        let refills = slice.saturating_sub(self.slice) as f64;
        self.slice = self.slice.max(slice);
        self.tokens = (self.tokens + refills * per_slice).min((SLICES_KEPT * per_slice).max(1.0));
        let new = dirtied.0.saturating_sub(self.counted.0);
        self.counted = dirtied;
        self.tokens -= Pages(new).as_f64();
        if self.tokens > 0.0 {
            return None;
        }
        let slices = if per_slice > 0.0 { (-self.tokens / per_slice).floor() + 1.0 } else { f64::INFINITY };
        let into_slice = duration((now.as_nanos() % SLICE.as_nanos()) as f64 / 1e9);
        Some((now - into_slice.min(now)).saturating_add(duration(slices * SLICE.as_secs_f64())))
    }

    /// What a stall of this length does not pay back is given up: whoever sets the quotas knows the counts.
    fn forgive(&mut self, stall: Duration) {
        let slices = stall.as_secs_f64() / SLICE.as_secs_f64();
        self.tokens = self.tokens.max(-slices * sane(self.per_slice.0));
    }
}

/// The last time that a gate was closed.
#[derive(Clone, Copy, Debug)]
struct Stall {
    until: Duration,
    /// The pages dirtied when last seen in it.
    dirtied: Pages,
    /// When the vCPU was first seen to run again.
    over_since: Option<Duration>,
}

impl Stall {
    /// Whether the vCPU has run long enough for another one.
    fn is_past(&mut self, now: Duration, dirtied: Pages, by_pages: bool) -> bool {
        if !by_pages {
            return now >= self.until + SHORTEST_RUN;
        }
        let dirtied = dirtied.0.saturating_sub(self.dirtied.0);
        if dirtied == 0 {
            return false;
        }
        let ran = now.saturating_sub(*self.over_since.get_or_insert(now));
        ran >= if dirtied < PAGES_BETWEEN_STALLS { SLOW_RUN } else { SHORTEST_RUN }
    }
}

/// The throttle of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    quota: Option<Quota>,
    bucket: Option<TokenBucket>,
    stall: Option<Stall>,
    /// The pages dirtied when the last stall began, if it was as long as may be.
    full_stall: Option<Pages>,
    overrun: Option<Pages>,
}

impl Throttle {
    /// Sets or lifts the quota.
    pub fn set(&mut self, quota: Option<Quota>, now: Duration, dirtied: Pages) {
        if quota == self.quota {
            return;
        }
        self.quota = quota;
        let Some(Quota::Pages(per_slice)) = quota else {
            (self.bucket, self.full_stall) = (None, None);
            return;
        };
        match &mut self.bucket {
            Some(bucket) => bucket.per_slice = per_slice,
            None => {
                let slice = TokenBucket::slice_at(now);
                self.bucket =
                    Some(TokenBucket { per_slice, tokens: sane(per_slice.0), slice, counted: dirtied });
            }
        }
    }

    /// The pages were recycled: counting starts anew.
    pub(crate) fn recycled(&mut self) {
        self.full_stall = None;
        if let Some(bucket) = &mut self.bucket {
            bucket.counted = Pages(0);
        }
        if let Some(stall) = &mut self.stall {
            stall.dirtied = Pages(0);
        }
    }

    /// The quota in force.
    pub fn quota(&self) -> Option<Quota> {
        self.quota
    }

    /// Where the gate is to be now, given the pages that the vCPU has dirtied since the last recycle. Call after
    /// each observation; an answer already given is repeated until it is over. `longest_stall` is
    /// [`LONGEST_STALL`], unless that does not do.
    pub fn poll(&mut self, now: Duration, dirtied: Pages, longest_stall: Duration) -> GateState {
        let Some(quota) = self.quota else { return GateState::Open };
        let wanted = match (quota, &mut self.bucket) {
            (Quota::Pages(_), Some(bucket)) => bucket.closed_until(now, dirtied),
            (Quota::Pages(_), None) => None,
            (Quota::Time(share), _) => {
                let share = sane(share).min(0.99);
                duty_cycle(now, LONGEST_STALL.mul_f64((1.0 - share) / share.max(1e-3)), share)
            }
            (Quota::QemuTime(share), _) => duty_cycle(now, QEMU_TIMESLICE, sane(share).min(0.99)),
        };
        let bounded = !matches!(quota, Quota::QemuTime(_));
        if let Some(stall) = &mut self.stall {
            if now < stall.until {
                stall.dirtied = dirtied;
                return GateState::ClosedUntil(stall.until);
            }
            if !stall.is_past(now, dirtied, matches!(quota, Quota::Pages(_))) {
                return GateState::Open;
            }
        }
        match wanted {
            Some(wanted) if wanted > now => {
                let until = if bounded { wanted.min(now + longest_stall) } else { wanted };
                if let Some(bucket) = &mut self.bucket
                    && until < wanted
                {
                    bucket.forgive(until - now);
                }
                self.measure(dirtied, until < wanted);
                self.stall = Some(Stall { until, dirtied, over_since: None });
                GateState::ClosedUntil(until)
            }
            _ => {
                self.full_stall = None;
                GateState::Open
            }
        }
    }

    /// A stall begins. What the vCPU dirtied between two that were cut short, one after the other, it dirtied only
    /// because closing a gate takes time.
    fn measure(&mut self, dirtied: Pages, cut_short: bool) {
        self.overrun = self.full_stall.map(|before| Pages(dirtied.0.saturating_sub(before.0)));
        self.full_stall = cut_short.then_some(dirtied);
    }

    /// Whether it has come out of a stall a moment ago, and may have to go into the next one.
    pub fn is_between_stalls(&self, now: Duration) -> bool {
        self.stall.is_some_and(|stall| stall.until <= now && now < stall.until + USUAL_RUN)
    }

    /// Pages that the vCPU dirtied between its last two stalls, if it should not have dirtied any.
    pub fn take_overrun(&mut self) -> Option<Pages> {
        self.overrun.take()
    }
}

/// The end of the stop if `now` is in one: `run`, then a stop that makes up `share` of the whole period.
fn duty_cycle(now: Duration, run: Duration, share: f64) -> Option<Duration> {
    if share <= 0.0 {
        return None;
    }
    let period = run.div_f64(1.0 - share).max(Duration::from_micros(1));
    let phase_ns = now.as_nanos() % period.as_nanos();
    let phase = Duration::from_nanos(u64::try_from(phase_ns).unwrap_or(u64::MAX));
    (phase >= run).then(|| now + (period - phase))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A vCPU that dirties `rate` pages a second while its gate is open, polled every `poll_us`.
    fn run(throttle: &mut Throttle, rate: f64, poll_us: u64, seconds: u64) -> (f64, Duration, Duration) {
        let (mut pages, mut stalled, mut longest) = (0.0, Duration::ZERO, Duration::ZERO);
        let mut closed_until = Duration::ZERO;
        let mut closed_since = Duration::ZERO;
        let step = Duration::from_micros(poll_us);
        let mut now = Duration::ZERO;
        while now < Duration::from_secs(seconds) {
            now += step;
            if now <= closed_until {
                stalled += step;
            } else {
                pages += rate * step.as_secs_f64();
            }
            if let GateState::ClosedUntil(until) = throttle.poll(now, Pages::floor(pages), LONGEST_STALL) {
                if closed_until < now {
                    closed_since = now;
                }
                closed_until = until;
                longest = longest.max(until - closed_since);
            }
        }
        (pages, stalled, longest)
    }

    fn bucket(pages_per_s: f64) -> Throttle {
        let mut throttle = Throttle::default();
        throttle.set(Some(Quota::Pages(PagesPerSlice::over(pages_per_s, 1.0))), Duration::ZERO, Pages(0));
        throttle
    }

    #[test]
    fn a_vcpu_within_its_quota_never_waits() {
        let (_, stalled, _) = run(&mut bucket(10_000.0), 9_000.0, 1000, 10);
        assert_eq!(stalled, Duration::ZERO);
    }

    #[test]
    fn a_writer_is_held_to_its_quota_without_a_long_stall() {
        let (pages, _, longest) = run(&mut bucket(10_000.0), 38_400.0, 1000, 10);
        assert!((pages - 100_000.0).abs() < 5_000.0, "{pages}");
        assert!(longest <= LONGEST_STALL, "{longest:?}");
    }

    #[test]
    fn what_is_dirtied_while_a_gate_closes_is_measured() {
        let mut throttle = bucket(100.0);
        run(&mut throttle, 150_000.0, 700, 1);
        // Two polls of 0.7 ms at most, at 150 pages a millisecond.
        assert!((1..=210).contains(&throttle.take_overrun().unwrap().0));
        assert_eq!(throttle.take_overrun(), None);
    }

    #[test]
    fn qemu_stops_a_vcpu_for_its_share_of_the_time() {
        let mut throttle = Throttle::default();
        throttle.set(Some(Quota::QemuTime(0.8)), Duration::ZERO, Pages(0));
        let (_, stalled, longest) = run(&mut throttle, 1000.0, 500, 10);
        assert!((stalled.as_secs_f64() - 8.0).abs() < 0.5, "{stalled:?}");
        assert!(longest >= Duration::from_millis(39), "{longest:?}");
    }

    #[test]
    fn a_quota_that_is_lifted_opens_the_gate() {
        let mut throttle = bucket(0.0);
        let now = Duration::from_millis(1);
        assert_ne!(throttle.poll(now, Pages(1000), LONGEST_STALL), GateState::Open);
        throttle.set(None, now, Pages(1000));
        assert_eq!(throttle.poll(now, Pages(2000), LONGEST_STALL), GateState::Open);
    }

    proptest! {
        #[test]
        fn no_stall_is_longer_than_the_longest(
            quota in 0.0..50_000.0f64, rate in 0.0..200_000.0f64, poll_us in 100..3000u64, share in 0.0..2.0f64,
        ) {
            let (pages, _, longest) = run(&mut bucket(quota), rate, poll_us, 2);
            prop_assert!(longest <= LONGEST_STALL);
            // What a vCPU overdraws before a poll may close its gate is all that goes beyond the quota, where the
            // stalls can make up for it.
            let in_run = rate * (poll_us as f64 / 1e6 + SHORTEST_RUN.as_secs_f64());
            let overdraft = in_run.max(PAGES_BETWEEN_STALLS as f64).min(in_run + rate * SLOW_RUN.as_secs_f64());
            let floor = overdraft.max(1.0) * 2.0 / LONGEST_STALL.as_secs_f64();
            prop_assert!(pages <= 2.1 * quota.max(floor) + 4.0 * overdraft + 10.0, "{} of {}", pages, quota);
            let mut timed = Throttle::default();
            timed.set(Some(Quota::Time(share)), Duration::ZERO, Pages(0));
            let (_, _, longest) = run(&mut timed, rate, poll_us, 1);
            prop_assert!(longest <= LONGEST_STALL);
        }

        #[test]
        fn nonsense_never_panics(per_slice in any::<f64>(), share in any::<f64>(), polls in prop::collection::vec((any::<u32>(), any::<u64>()), 0..30)) {
            for quota in [Quota::Pages(PagesPerSlice(per_slice)), Quota::Time(share), Quota::QemuTime(share)] {
                let mut throttle = Throttle::default();
                for (us, pages) in &polls {
                    let now = Duration::from_micros((*us).into());
                    throttle.set(Some(quota), now, Pages(*pages));
                    let _ = throttle.poll(now, Pages(*pages), LONGEST_STALL);
                }
            }
        }
    }
}
