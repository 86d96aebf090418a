//! Bandwidth, measured: bytes that the peer's kernel acknowledged, over the time in which there was something to
//! acknowledge, and how far to trust it.
//!
//! One measure for every use: of one connection, which sizes its frames by it; of all together, which the plan counts on
//! ([`link`](super::link)); and of the bursts that say what a link carries which `max-bandwidth` holds back.

use super::units::sane;

/// A pause in which nothing arrives is a pause between bursts, unless it lasts so long: then the link carries nothing.
const STILL_S: f64 = 1.0;

/// A bandwidth as measured, with how sure one can be.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Bandwidth {
    /// Bytes per second that arrived while there were bytes to send.
    pub bytes_per_s: f64,
    /// One standard error of it. As large as the value itself while there are too few samples to tell.
    pub uncertainty_bytes_per_s: f64,
    /// Samples behind it.
    pub samples: u64,
}

impl Bandwidth {
    /// Two links side by side: the values add up, their independent errors do in squares.
    #[must_use]
    pub fn beside(self, other: Self) -> Self {
        Self {
            bytes_per_s: self.bytes_per_s + other.bytes_per_s,
            uncertainty_bytes_per_s: self.uncertainty_bytes_per_s.hypot(other.uncertainty_bytes_per_s),
            samples: self.samples + other.samples,
        }
    }
}

/// Measures. Times in seconds since any beginning, bytes since any other.
#[derive(Clone, Debug)]
pub struct Estimator {
    /// A sample covers at least this.
    sample_s: f64,
    /// What is older than this fades.
    memory_s: f64,
    mean: f64,
    variance: f64,
    /// The sum of squared weights: the reciprocal of how many samples the mean is worth.
    concentration: f64,
    /// Seconds that the mean stands for, at most `memory_s`.
    weight_s: f64,
    samples: u64,
    since: Option<(f64, u64)>,
}

impl Estimator {
    /// Samples of at least `sample_s`, averaged over `memory_s`.
    pub const fn new(sample_s: f64, memory_s: f64) -> Self {
        Self {
            sample_s,
            memory_s,
            mean: 0.0,
            variance: 0.0,
            concentration: 0.0,
            weight_s: 0.0,
            samples: 0,
            since: None,
        }
    }

    /// Sending starts, or starts again after a pause that says nothing about the link.
    pub fn start(&mut self, now: f64, bytes_acked: u64) {
        self.since = Some((now, bytes_acked));
    }

    /// Whether [`observe`](Self::observe) could end a sample now.
    pub fn is_due(&self, now: f64) -> bool {
        self.since.is_none_or(|(since, _)| now - since >= self.sample_s)
    }

    /// So many bytes had been acknowledged at `now`, and more are under way. Call as often as you like.
    pub fn observe(&mut self, now: f64, bytes_acked: u64) {
        let Some((since, bytes)) = self.since else { return self.start(now, bytes_acked) };
        let elapsed = now - since;
        // On a long link, bytes arrive in bursts a round trip apart: the pauses count, too.
        if elapsed >= self.sample_s && (bytes_acked > bytes || elapsed >= STILL_S) {
            self.add(elapsed, bytes_acked.saturating_sub(bytes));
            self.since = Some((now, bytes_acked));
        }
    }

    /// Sending stops. What a short end brought says little, and says it too noisily, unless it is all there is.
    pub fn stop(&mut self, now: f64, bytes_acked: u64) {
        let Some((since, bytes)) = self.since.take() else { return };
        let shortest = if self.samples == 0 { 0.0 } else { self.sample_s / 4.0 };
        if now - since >= shortest && bytes_acked > bytes {
            self.add(now - since, bytes_acked - bytes);
        }
    }

    fn add(&mut self, elapsed: f64, bytes: u64) {
        // Nothing has come back yet: that is latency, not bandwidth.
        let says_nothing = self.samples == 0 && bytes == 0;
        if says_nothing || !(elapsed > 0.0 && elapsed.is_finite()) {
            return;
        }
        // The weighted mean of all samples until the memory is full, exponential fading from then on.
        let share = elapsed / (self.weight_s + elapsed).min(self.memory_s.max(elapsed));
        let off = bytes as f64 / elapsed - self.mean;
        self.mean += share * off;
        self.variance = (1.0 - share) * (self.variance + share * off * off);
        self.concentration = (1.0 - share) * (1.0 - share) * self.concentration + share * share;
        self.weight_s = (self.weight_s + elapsed).min(self.memory_s);
        self.samples += 1;
    }

    /// The mean, in bytes per second; `None` before the first sample.
    pub fn mean(&self) -> Option<f64> {
        (self.samples > 0).then_some(sane(self.mean))
    }

    /// Standard deviation of the samples over their mean, 0 to 1: how much the link varies, as a share.
    pub fn spread(&self) -> f64 {
        if self.mean > 0.0 { sane(self.variance.sqrt() / self.mean).min(1.0) } else { 0.0 }
    }

    /// The mean, with its uncertainty.
    pub fn bandwidth(&self) -> Bandwidth {
        let uncertainty_bytes_per_s = if self.samples < 3 {
            self.mean
        } else {
            // The weighted sample variance, unbiased, over the number of samples that the weights are worth.
            let unbiased = self.variance / (1.0 - self.concentration).max(f64::EPSILON);
            (unbiased * self.concentration).sqrt()
        };
        Bandwidth { bytes_per_s: sane(self.mean), uncertainty_bytes_per_s, samples: self.samples }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of_a_connection() -> Estimator {
        Estimator::new(0.02, 0.5)
    }

    fn of_the_plan() -> Estimator {
        Estimator::new(0.1, 3.0)
    }

    #[test]
    fn a_steady_link_is_measured_exactly_and_surely_and_a_new_rate_is_seen_within_seconds() {
        let mut link = of_the_plan();
        link.start(0.0, 0);
        let mut bytes = 0;
        for ms in 1..=5_000u64 {
            bytes += 100_000;
            link.observe(ms as f64 / 1e3, bytes);
        }
        assert!((link.mean().unwrap() - 1e8).abs() < 1e6);
        assert!(link.spread() < 0.01);
        assert!(link.bandwidth().uncertainty_bytes_per_s < 1e4, "{:?}", link.bandwidth());
        for ms in 5_001..=10_000u64 {
            bytes += 50_000;
            link.observe(ms as f64 / 1e3, bytes);
        }
        assert!((link.mean().unwrap() - 5e7).abs() < 1.2e7, "{:?}", link.mean());
    }

    #[test]
    fn a_transfer_shorter_than_a_sample_is_still_measured() {
        let mut link = of_the_plan();
        link.start(0.0, 0);
        link.observe(0.02, 2_000_000);
        assert_eq!(link.mean(), None);
        link.stop(0.04, 4_000_000);
        assert!((link.mean().unwrap() - 1e8).abs() < 1.0);
    }

    #[test]
    fn pauses_between_bursts_count_while_there_is_something_to_send_and_a_link_that_stands_still_carries_nothing()
     {
        let mut link = of_a_connection();
        // 2 MB at once, every 100 ms.
        for ms in 0..2000 {
            link.observe(ms as f64 / 1e3, ms / 100 * 2_000_000);
        }
        assert!((link.mean().unwrap() - 2e7).abs() < 2e6, "{:?}", link.mean());
        for ms in 2000..6000 {
            link.observe(ms as f64 / 1e3, 38_000_000);
        }
        assert!(link.mean().unwrap() < 1e6, "{:?}", link.mean());
    }

    #[test]
    fn idle_time_between_rounds_lowers_nothing() {
        let (mut link, mut now, mut bytes) = (of_a_connection(), 0.0, 0);
        for _ in 0..20 {
            link.start(now, bytes);
            for _ in 0..4 {
                now += 0.025;
                bytes += 2_500_000;
                link.observe(now, bytes);
            }
            link.stop(now + 0.01, bytes);
            now += 0.5;
        }
        assert!((link.mean().unwrap() - 1e8).abs() < 1e6, "{:?}", link.mean());
    }

    #[test]
    fn noise_shows_as_uncertainty_and_a_change_is_followed_within_two_seconds() {
        let (mut link, mut now, mut bytes) = (of_a_connection(), 0.0, 0);
        let mut run = |link: &mut Estimator, samples: u64, mean: u64| {
            for i in 0..samples {
                now += 0.025;
                bytes += if i % 2 == 0 { mean / 2 } else { mean * 3 / 2 };
                link.observe(now, bytes);
            }
        };
        run(&mut link, 100, 2_500_000);
        let noisy = link.bandwidth();
        assert!((noisy.bytes_per_s - 1e8).abs() < 3.0 * noisy.uncertainty_bytes_per_s, "{noisy:?}");
        assert!(noisy.uncertainty_bytes_per_s > 2e6, "{noisy:?}");
        run(&mut link, 80, 250_000);
        let slow = link.bandwidth();
        assert!((slow.bytes_per_s - 1e7).abs() < 4e6, "{slow:?}");
    }

    proptest! {
        #[test]
        fn no_clock_and_no_counter_breaks_it(
            steps in prop::collection::vec((any::<f64>(), any::<u64>(), 0..3), 0..50)
        ) {
            let mut link = of_the_plan();
            for (now, bytes, what) in steps {
                match what {
                    0 => link.start(now, bytes),
                    1 => link.observe(now, bytes),
                    _ => link.stop(now, bytes),
                }
                prop_assert!(link.mean().is_none_or(|mean| mean.is_finite() && mean >= 0.0));
                prop_assert!((0.0..=1.0).contains(&link.spread()));
            }
        }
    }
}
