//! Wire bandwidth, measured: bytes that the peer's kernel took off our hands over time, and how far to trust it.

use super::units::sane;

/// A sample covers at least this long: acknowledgements come in bursts of whole socket buffers.
const SAMPLE_S: f64 = 0.1;
/// How fast old samples fade. Long enough to average a shared link's ripples, short enough to see a new rate
/// within a round of a few seconds.
const FADE_S: f64 = 3.0;

/// Bytes per second, with their mean and spread.
#[derive(Clone, Debug, Default)]
pub struct Bandwidth {
    mean: f64,
    variance: f64,
    /// Seconds that the mean stands for, at most [`FADE_S`].
    weight: f64,
    since: Option<(f64, u64)>,
}

impl Bandwidth {
    /// Sending starts, or starts again after a pause that says nothing about the link.
    pub fn start(&mut self, now: f64, bytes_acked: u64) {
        self.since = Some((now, bytes_acked));
    }

    /// `bytes_acked` since the migration's start. Call as often as you like.
    pub fn observe(&mut self, now: f64, bytes_acked: u64) {
        self.sample(now, bytes_acked, SAMPLE_S);
    }

    /// Sending stops: what has been seen since the last sample counts, however short.
    pub fn stop(&mut self, now: f64, bytes_acked: u64) {
        self.sample(now, bytes_acked, if self.weight == 0.0 { 0.0 } else { SAMPLE_S / 4.0 });
        self.since = None;
    }

    fn sample(&mut self, now: f64, bytes_acked: u64, shortest: f64) {
        let Some((since, bytes)) = self.since else { return self.start(now, bytes_acked) };
        let elapsed = now - since;
        if !(elapsed > 0.0 && elapsed >= shortest) {
            return;
        }
        let rate = bytes_acked.saturating_sub(bytes) as f64 / elapsed;
        self.since = Some((now, bytes_acked));
        if self.weight == 0.0 && rate == 0.0 {
            // Nothing has come back yet: that is latency, not bandwidth.
            return;
        }
        // The weighted mean of all samples until FADE_S of them have been seen, exponential fading from then on.
        let share = elapsed / (self.weight + elapsed).min(FADE_S.max(elapsed));
        let off = rate - self.mean;
        self.mean += share * off;
        self.variance = (1.0 - share) * (self.variance + share * off * off);
        self.weight = (self.weight + elapsed).min(FADE_S);
    }

    /// The mean, in bytes per second; `None` before the first sample.
    pub fn mean(&self) -> Option<f64> {
        (self.weight > 0.0).then_some(sane(self.mean))
    }

    /// Standard deviation of the samples over their mean, 0 to 1: how much the link varies, as a share.
    pub fn spread(&self) -> f64 {
        if self.mean > 0.0 { sane(self.variance.sqrt() / self.mean).min(1.0) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_steady_link_is_measured_exactly_and_a_new_rate_is_seen_within_seconds() {
        let mut link = Bandwidth::default();
        link.start(0.0, 0);
        let mut bytes = 0;
        for ms in 1..=5_000u64 {
            bytes += 100_000;
            link.observe(ms as f64 / 1e3, bytes);
        }
        assert!((link.mean().unwrap() - 1e8).abs() < 1e6);
        assert!(link.spread() < 0.01);
        for ms in 5_001..=10_000u64 {
            bytes += 50_000;
            link.observe(ms as f64 / 1e3, bytes);
        }
        assert!((link.mean().unwrap() - 5e7).abs() < 1.2e7, "{:?}", link.mean());
    }

    #[test]
    fn a_transfer_shorter_than_a_sample_is_still_measured() {
        let mut link = Bandwidth::default();
        link.start(0.0, 0);
        link.observe(0.02, 2_000_000);
        assert_eq!(link.mean(), None);
        link.stop(0.04, 4_000_000);
        assert!((link.mean().unwrap() - 1e8).abs() < 1.0);
    }

    proptest! {
        #[test]
        fn no_clock_and_no_counter_breaks_it(steps in prop::collection::vec((any::<f64>(), any::<u64>()), 0..50)) {
            let mut link = Bandwidth::default();
            for (now, bytes) in steps {
                link.observe(now, bytes);
                prop_assert!(link.mean().is_none_or(|mean| mean.is_finite() && mean >= 0.0));
                prop_assert!((0.0..=1.0).contains(&link.spread()));
            }
        }
    }
}
