//! What a link carries: bytes that the peer's kernel acknowledged, over the time in which there was something to
//! acknowledge.

use std::time::{Duration, Instant};

use super::pacing::precise;

/// One sample covers at least this: several round trips of any link that migrations run over.
const SAMPLE_MIN: Duration = Duration::from_millis(20);

/// The memory of the average: a sample this old counts 1/e.
const MEMORY: Duration = Duration::from_millis(500);

/// A bandwidth as measured, with how sure one can be.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct Bandwidth {
    /// Bytes per second that arrived while there were bytes to send.
    pub bytes_per_s: f64,
    /// One standard error of it. As large as the value itself while there are too few samples to tell.
    pub uncertainty_bytes_per_s: f64,
    /// Samples behind it, of at least 20 ms each.
    pub samples: u64,
    /// Whether `max-bandwidth`, and not the link, set the pace during the last sample.
    pub limited: bool,
}

impl Bandwidth {
    /// Two links side by side: the values add up, their independent errors do in squares.
    #[must_use]
    pub fn beside(self, other: Self) -> Self {
        Self {
            bytes_per_s: self.bytes_per_s + other.bytes_per_s,
            uncertainty_bytes_per_s: self.uncertainty_bytes_per_s.hypot(other.uncertainty_bytes_per_s),
            samples: self.samples + other.samples,
            limited: self.limited || other.limited,
        }
    }
}

/// The estimate of one connection.
#[derive(Debug, Default)]
pub(super) struct Estimator {
    mean: f64,
    variance: f64,
    samples: u64,
    /// The sum of squared weights: the reciprocal of how many samples the mean is worth.
    concentration: f64,
    begun: Option<(Instant, u64)>,
    waited_for_tokens: bool,
    limited: bool,
}

impl Estimator {
    /// The limit held the channel back during the current sample.
    pub(super) fn waited_for_tokens(&mut self) {
        self.waited_for_tokens = true;
    }

    /// Whether a call of [`sample`](Self::sample) now would end a sample.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.begun.is_none_or(|(begun, _)| now.saturating_duration_since(begun) >= SAMPLE_MIN)
    }

    /// At `now`, the peer's kernel had acknowledged `acknowledged` bytes in all; `busy` if more are under way, or
    /// wait for the limit. Samples begin and end while busy, so idle time between rounds counts for nothing.
    pub(super) fn sample(&mut self, now: Instant, acknowledged: u64, busy: bool) {
        if let Some((begun, before)) = self.begun {
            let time = now.saturating_duration_since(begun);
            // On a long link, bytes arrive in bursts a round trip apart: the pauses count, too.
            if busy && (time < SAMPLE_MIN || acknowledged == before) {
                return;
            }
            // What a short end of a round brought says little, and says it too noisily.
            if time >= SAMPLE_MIN / 4 && acknowledged > before {
                self.add(precise(acknowledged - before) / time.as_secs_f64(), time);
            }
        }
        self.begun = busy.then_some((now, acknowledged));
    }

    fn add(&mut self, bytes_per_s: f64, time: Duration) {
        self.limited = std::mem::take(&mut self.waited_for_tokens);
        self.samples += 1;
        let weight = if self.samples == 1 {
            1.0
        } else {
            // The first samples are averaged plainly, the later ones exponentially.
            let exponential = 1.0 - (-time.as_secs_f64() / MEMORY.as_secs_f64()).exp();
            exponential.max(1.0 / precise(self.samples))
        };
        let off = bytes_per_s - self.mean;
        self.mean += weight * off;
        self.variance = (1.0 - weight) * (self.variance + weight * off * off);
        self.concentration = (1.0 - weight) * (1.0 - weight) * self.concentration + weight * weight;
    }

    /// The estimate now.
    pub(super) fn bandwidth(&self) -> Bandwidth {
        let uncertainty_bytes_per_s = if self.samples < 3 {
            self.mean
        } else {
            // The weighted sample variance, unbiased, over the number of samples that the weights are worth.
            let unbiased = self.variance / (1.0 - self.concentration).max(f64::EPSILON);
            (unbiased * self.concentration).sqrt()
        };
        Bandwidth {
            bytes_per_s: self.mean,
            uncertainty_bytes_per_s,
            samples: self.samples,
            limited: self.limited,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_steady_link_is_measured_exactly_and_surely() {
        let (start, mut link) = (Instant::now(), Estimator::default());
        for i in 0..200 {
            link.sample(start + after(25 * i), 2_500_000 * i, true);
        }
        let found = link.bandwidth();
        assert!((found.bytes_per_s - 1e8).abs() < 1.0, "{found:?}");
        assert!(found.uncertainty_bytes_per_s < 1.0, "{found:?}");
    }

    #[test]
    fn pauses_between_bursts_count_while_there_is_something_to_send() {
        let (start, mut link) = (Instant::now(), Estimator::default());
        // 2 MB at once, every 100 ms.
        for i in 0..2000 {
            link.sample(start + after(i), i / 100 * 2_000_000, true);
        }
        assert!((link.bandwidth().bytes_per_s - 2e7).abs() < 2e6, "{:?}", link.bandwidth());
    }

    #[test]
    fn idle_time_between_rounds_lowers_nothing() {
        let (start, mut link) = (Instant::now(), Estimator::default());
        let (mut now, mut bytes) = (start, 0);
        for _ in 0..20 {
            link.sample(now, bytes, true);
            for _ in 0..4 {
                now += after(25);
                bytes += 2_500_000;
                link.sample(now, bytes, true);
            }
            link.sample(now + after(10), bytes, false);
            now += after(500);
        }
        assert!((link.bandwidth().bytes_per_s - 1e8).abs() < 1e6, "{:?}", link.bandwidth());
    }

    #[test]
    fn noise_shows_as_uncertainty_and_a_change_is_followed_within_two_seconds() {
        let (start, mut link) = (Instant::now(), Estimator::default());
        let (mut now, mut bytes) = (start, 0);
        let mut run = |link: &mut Estimator, samples: u64, mean: u64| {
            for i in 0..samples {
                now += after(25);
                bytes += if i % 2 == 0 { mean / 2 } else { mean * 3 / 2 };
                link.sample(now, bytes, true);
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
}
