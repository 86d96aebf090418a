//! What is known of the link: how fast rounds go, what it carries while the guest stands still, and how long a round trip is.
//!
//! The two rates differ under `max-bandwidth`, which holds rounds back and not the switchover. And they differ in what they
//! are asked: a plan goes by the mean; whether the rest fits is judged by the worse of the last moment and the last second,
//! since a link that has just become slower has to be believed.

use std::collections::VecDeque;
use std::time::Duration;

use super::LinkSample;
use super::bandwidth::Estimator;
use super::switchover::{self, MOST_IN_HAND_FOR_SPREAD};

/// A sample covers at least this long: acknowledgements come in bursts of whole socket buffers.
const SAMPLE_S: f64 = 0.1;
/// How fast old samples fade. Long enough to average a shared link's ripples, short enough to see a new rate
/// within a round of a few seconds.
const MEMORY_S: f64 = 3.0;
/// What fits is judged over so long, and over the last moment: this, or so many round trips where they are longer.
const SECOND_S: f64 = 1.0;
const MOMENT_S: f64 = 0.1;
const MOMENT_ROUND_TRIPS: f64 = 3.0;

/// The link of a migration. Times in seconds since its start.
#[derive(Clone, Debug)]
pub struct Link {
    estimator: Estimator,
    recent: Recent,
    unpaced: Option<f64>,
    round_trip: Duration,
    started_s: f64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            estimator: Estimator::new(SAMPLE_S, MEMORY_S),
            recent: Recent::default(),
            unpaced: None,
            round_trip: Duration::ZERO,
            started_s: 0.0,
        }
    }
}

impl Link {
    /// A round starts.
    pub fn start(&mut self, now: f64, bytes_acked: u64) {
        self.started_s = now;
        self.estimator.start(now, bytes_acked);
        self.recent.start(now, bytes_acked);
    }

    /// Something has been seen in the middle of a round. Call as often as you like.
    pub fn observe(&mut self, now: f64, seen: &LinkSample) {
        self.estimator.observe(now, seen.bytes_acked);
        self.recent.observe(now, seen.bytes_acked);
        self.take(seen);
    }

    /// A round has ended.
    pub fn stop(&mut self, now: f64, seen: &LinkSample) {
        // The last word of the destination is on its way for a round trip in which nothing is left to be sent; a round's
        // overhead has that.
        let since_start = (now - self.started_s).max(0.0);
        let now = now - self.round_trip_s().min(since_start / 2.0);
        self.estimator.stop(now, seen.bytes_acked);
        self.recent.stop(now, seen.bytes_acked);
        self.take(seen);
    }

    fn take(&mut self, seen: &LinkSample) {
        self.unpaced = seen.unpaced_bytes_per_s.filter(|rate| rate.is_finite() && *rate > 0.0);
        self.round_trip = seen.round_trip;
    }

    /// What rounds go by, in bytes per second; `None` before the first sample.
    pub fn mean(&self) -> Option<f64> {
        self.estimator.mean()
    }

    /// How much that varies, as a share of it.
    pub fn spread(&self) -> f64 {
        self.estimator.spread()
    }

    /// What to expect of the link while the guest stands still, where nothing holds it back.
    pub fn at_switchover(&self) -> Option<f64> {
        let mean = self.mean()?;
        Some(self.unpaced.map_or(mean, |unpaced| unpaced.max(mean)))
    }

    /// The same as of now, for the last check: no more than what the last moment and the last second carried.
    pub fn at_switchover_now(&self) -> f64 {
        let expected = self.at_switchover().unwrap_or(0.0);
        if self.unpaced.is_some() { expected } else { expected.min(self.worst_now()) }
    }

    /// What to promise of it, when the guest is about to be stopped.
    pub fn careful_at_switchover(&self, in_hand: f64) -> f64 {
        let expected = self.at_switchover().unwrap_or(0.0);
        if self.unpaced.is_some() {
            // A burst says less of a link than seconds of it.
            return switchover::careful(expected, MOST_IN_HAND_FOR_SPREAD, in_hand);
        }
        let by_the_mean = switchover::careful(expected, self.spread(), in_hand);
        // What is not known yet is infinite, and no bound.
        by_the_mean.min(switchover::careful(expected.min(self.worst_now()), 0.0, in_hand))
    }

    /// A round trip without the queues that we fill ourselves, in seconds; 0 while unknown.
    pub fn round_trip_s(&self) -> f64 {
        self.round_trip.as_secs_f64()
    }

    fn worst_now(&self) -> f64 {
        let moment = MOMENT_S.max(MOMENT_ROUND_TRIPS * self.round_trip_s());
        let over = |window| self.recent.rate(window).unwrap_or(f64::INFINITY);
        over(moment).min(over(SECOND_S))
    }
}

/// The counter is read so often that it moves in steps; between two points of it lies at least this.
const STEP_S: f64 = 0.01;
/// A counter that does not move for so long does not move because nothing arrives.
const STILL_S: f64 = 0.05;
/// Points that are kept: a second of steps, and a long pause.
const POINTS_MAX: usize = 160;
/// A stretch of sending that is shorter says nothing: it is latency for the most part.
const STRETCH_MIN_S: f64 = 0.025;

/// Bytes by time of the last second, idle time left out.
#[derive(Clone, Debug, Default)]
struct Recent {
    /// Where the counter moved: seconds of sending, and bytes in them.
    points: VecDeque<(f64, u64)>,
    /// Since when it sends, and what had been acknowledged then.
    since: Option<(f64, u64)>,
    /// Sending before that.
    before: (f64, u64),
    now_s: f64,
}

impl Recent {
    fn start(&mut self, now: f64, bytes: u64) {
        self.since = Some((now, bytes));
    }

    fn observe(&mut self, now: f64, bytes: u64) {
        let Some((since, bytes_before)) = self.since else { return self.start(now, bytes) };
        let elapsed = now - since;
        if !(elapsed >= 0.0 && elapsed.is_finite()) {
            return;
        }
        self.now_s = self.before.0 + elapsed;
        let sent = self.before.1.saturating_add(bytes.saturating_sub(bytes_before));
        let last = *self.points.back().unwrap_or(&(0.0, 0));
        if self.points.is_empty() || (sent > last.1 && self.now_s - last.0 >= STEP_S) {
            self.points.push_back((self.now_s, sent));
        }
        // One point older than the second has to stay.
        while self.points.len() > POINTS_MAX
            || self.points.get(1).is_some_and(|second| second.0 < self.now_s - SECOND_S)
        {
            self.points.pop_front();
        }
    }

    fn stop(&mut self, now: f64, bytes: u64) {
        self.observe(now, bytes);
        let Some((since, bytes_before)) = self.since.take() else { return };
        let elapsed = now - since;
        if elapsed >= STRETCH_MIN_S && elapsed.is_finite() {
            let sent = bytes.saturating_sub(bytes_before);
            self.before = (self.before.0 + elapsed, self.before.1.saturating_add(sent));
        } else {
            while self.points.back().is_some_and(|last| last.0 > self.before.0) {
                self.points.pop_back();
            }
        }
        self.now_s = self.before.0;
    }

    /// Bytes per second over the last `window` seconds of sending; `None` if there were not so many.
    fn rate(&self, window: f64) -> Option<f64> {
        let newest = self.points.back()?;
        // From one step of the counter to another, because the time since the last one says nothing yet; unless it does.
        let end = if self.now_s - newest.0 > STILL_S { self.now_s } else { newest.0 };
        let oldest = self.points.iter().rev().find(|point| point.0 <= end - window)?;
        Some((newest.1 - oldest.1) as f64 / (end - oldest.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(bytes_acked: u64) -> LinkSample {
        LinkSample { bytes_acked, ..LinkSample::default() }
    }

    /// A link of so many bytes per millisecond whose counter is read fifty times a second.
    fn run(link: &mut Link, ms: std::ops::Range<u64>, bytes: &mut u64, bytes_per_ms: u64) {
        let mut seen = *bytes;
        for ms in ms {
            *bytes += bytes_per_ms;
            if ms % 20 == 0 {
                seen = *bytes;
            }
            link.observe(ms as f64 / 1e3, &sample(seen));
        }
    }

    #[test]
    fn what_fits_is_judged_by_the_last_moment_of_a_link_that_became_slower_and_by_the_last_second_of_one_that_recovers()
     {
        let (mut link, mut bytes) = (Link::default(), 0);
        link.start(0.0, 0);
        run(&mut link, 1..3_000, &mut bytes, 100_000);
        assert!((link.at_switchover_now() - 1e8).abs() < 2e6, "{}", link.at_switchover_now());
        assert!(
            (link.careful_at_switchover(0.05) - 0.95e8).abs() < 3e6,
            "{}",
            link.careful_at_switchover(0.05)
        );
        run(&mut link, 3_000..3_150, &mut bytes, 10_000);
        assert!(link.mean().unwrap() > 9e7);
        assert!(link.at_switchover_now() < 1.5e7, "{}", link.at_switchover_now());
        run(&mut link, 3_150..3_350, &mut bytes, 100_000);
        assert!(link.at_switchover_now() < 9.4e7, "{}", link.at_switchover_now());
    }

    #[test]
    fn a_link_that_stands_still_is_seen_to_although_its_counter_does_not_move() {
        let (mut link, mut bytes) = (Link::default(), 0);
        link.start(0.0, 0);
        run(&mut link, 1..2_000, &mut bytes, 100_000);
        run(&mut link, 2_000..2_200, &mut bytes, 0);
        assert!(link.at_switchover_now() < 1e6, "{}", link.at_switchover_now());
    }

    #[test]
    fn idle_time_between_rounds_and_rounds_of_a_few_milliseconds_lower_nothing() {
        let (mut link, mut bytes, mut now) = (Link::default(), 0, 0.0);
        for round in 0..40 {
            let ms = if round % 2 == 0 { 120 } else { 4 };
            link.start(now, bytes);
            for _ in 0..ms {
                now += 1e-3;
                // A short round is latency for the most part.
                bytes += if ms > 4 { 100_000 } else { 1_000 };
                link.observe(now, &sample(bytes));
            }
            link.stop(now, &sample(bytes));
            now += 0.3;
        }
        assert!((link.at_switchover_now() - 1e8).abs() < 3e6, "{}", link.at_switchover_now());
    }

    #[test]
    fn the_round_trip_at_the_end_of_each_round_is_no_slower_link() {
        let (mut link, mut bytes, mut now) = (Link::default(), 0, 0.0);
        let seen = |bytes| LinkSample { round_trip: Duration::from_millis(100), ..sample(bytes) };
        for _ in 0..20 {
            link.start(now, bytes);
            for ms in 0..300 {
                now += 1e-3;
                bytes += if ms < 200 { 100_000 } else { 0 };
                link.observe(now, &seen(bytes));
            }
            link.stop(now, &seen(bytes));
        }
        assert!((link.mean().unwrap() - 1e8).abs() < 5e6, "{:?}", link.mean());
    }

    #[test]
    fn a_link_that_was_seen_for_less_than_a_moment_is_judged_by_what_was_seen() {
        let (mut link, mut bytes) = (Link::default(), 0);
        link.start(0.0, 0);
        run(&mut link, 1..40, &mut bytes, 100_000);
        link.stop(0.04, &sample(bytes));
        assert!(link.careful_at_switchover(0.05) > 8e7, "{}", link.careful_at_switchover(0.05));
        assert!(link.at_switchover_now() > 8e7, "{}", link.at_switchover_now());
    }

    #[test]
    fn a_limit_of_bandwidth_holds_back_rounds_and_not_the_switchover() {
        let (mut link, mut bytes) = (Link::default(), 0);
        link.start(0.0, 0);
        for ms in 1..2_000 {
            bytes += 10_000;
            let unpaced_bytes_per_s = (ms > 500).then_some(1e8);
            link.observe(f64::from(ms) / 1e3, &LinkSample { unpaced_bytes_per_s, ..sample(bytes) });
        }
        assert!((link.mean().unwrap() - 1e7).abs() < 1e5);
        assert_eq!(link.at_switchover(), Some(1e8));
        assert!(
            (6e7..8e7).contains(&link.careful_at_switchover(0.05)),
            "{}",
            link.careful_at_switchover(0.05)
        );
    }

    proptest! {
        #[test]
        fn no_clock_and_no_counter_breaks_it(
            steps in prop::collection::vec((any::<f64>(), any::<u64>(), 0..3, any::<Option<f64>>()), 0..50)
        ) {
            let mut link = Link::default();
            for (now, bytes_acked, what, unpaced_bytes_per_s) in steps {
                let seen = LinkSample { bytes_acked, unpaced_bytes_per_s, ..LinkSample::default() };
                match what {
                    0 => link.start(now, bytes_acked),
                    1 => link.observe(now, &seen),
                    _ => link.stop(now, &seen),
                }
                prop_assert!(link.careful_at_switchover(0.05) >= 0.0 && link.at_switchover_now() >= 0.0);
                prop_assert!(link.careful_at_switchover(0.05).is_finite());
            }
        }
    }
}
