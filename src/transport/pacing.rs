//! `max-bandwidth`: one token bucket for all channels, whose rate can be changed while they send.

use std::num::NonZeroU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::uring::Wake;

/// The bucket holds what the rate gives in this time: long enough that timers do not matter, short enough that
/// a link with small buffers sees no burst.
const BURST: Duration = Duration::from_millis(20);

/// Bytes that a bucket holds at least: the smallest frames must pass.
const BURST_BYTES_MIN: f64 = 64.0 * 1024.0;

/// A rate limit in bytes of frames per second (headers counted, TCP and IP not), shared by everyone that clones
/// it. Without a rate it limits nothing.
#[derive(Clone, Debug, Default)]
pub struct MaxBandwidth {
    bucket: Arc<Mutex<Bucket>>,
}

#[derive(Debug, Default)]
struct Bucket {
    bytes_per_s: Option<NonZeroU64>,
    /// How many say that it does not hold for now.
    lifted: u32,
    /// Below zero after a frame that was larger than what was there.
    tokens: f64,
    filled: Option<Instant>,
    /// The channels, which may wait for tokens and must hear of another rate at once.
    waiting: Vec<Weak<Wake>>,
}

impl MaxBandwidth {
    /// A limit of `bytes_per_s`.
    pub fn new(bytes_per_s: Option<NonZeroU64>) -> Self {
        let limit = Self::default();
        limit.set(bytes_per_s);
        limit
    }

    /// The limit now.
    pub fn get(&self) -> Option<NonZeroU64> {
        self.bucket.lock().bytes_per_s
    }

    /// Changes the limit; `None` is none. It holds at once, for channels that wait for tokens at this moment, too.
    pub fn set(&self, bytes_per_s: Option<NonZeroU64>) {
        let mut bucket = self.bucket.lock();
        bucket.bytes_per_s = bytes_per_s;
        bucket.begin_anew();
    }

    /// Lifts the limit until the value that it returns ends, whoever changes it meanwhile: while the guest stands still,
    /// nothing holds bytes back.
    pub(super) fn lift(&self) -> Lifted {
        let mut bucket = self.bucket.lock();
        bucket.lifted += 1;
        bucket.begin_anew();
        Lifted(self.clone())
    }

    /// The limit that holds now.
    pub(super) fn in_force(&self) -> Option<NonZeroU64> {
        let bucket = self.bucket.lock();
        bucket.bytes_per_s.filter(|_| bucket.lifted == 0)
    }

    /// Wakes `wake` whenever the limit is changed, for as long as it lives.
    pub(super) fn wake_on_change(&self, wake: &Arc<Wake>) {
        let mut bucket = self.bucket.lock();
        bucket.waiting.retain(|waiting| waiting.strong_count() > 0);
        bucket.waiting.push(Arc::downgrade(wake));
    }

    /// Whether a frame may go now; if not, how long to wait before asking again.
    pub(super) fn ask(&self, now: Instant) -> Result<(), Duration> {
        let mut bucket = self.bucket.lock();
        let Some(rate) = bucket.rate() else { return Ok(()) };
        bucket.fill(now, rate);
        if bucket.tokens > 0.0 {
            return Ok(());
        }
        let wait = Duration::from_secs_f64((1.0 - bucket.tokens) / rate);
        Err(wait.clamp(Duration::from_micros(50), BURST))
    }

    /// Books a frame that goes. It may be larger than what is there: the debt is waited for afterwards, so the
    /// average holds whatever the size of frames.
    pub(super) fn take(&self, bytes: u64) {
        let mut bucket = self.bucket.lock();
        if bucket.bytes_per_s.is_some() {
            bucket.tokens -= precise(bytes);
        }
    }
}

/// A limit that is lifted as long as this value lives.
#[derive(Debug)]
pub(super) struct Lifted(MaxBandwidth);

impl Drop for Lifted {
    fn drop(&mut self) {
        let mut bucket = self.0.bucket.lock();
        bucket.lifted -= 1;
        bucket.begin_anew();
    }
}

impl Bucket {
    fn rate(&self) -> Option<f64> {
        self.bytes_per_s.filter(|_| self.lifted == 0).map(|rate| precise(rate.get()))
    }

    /// Debts and savings of another rate do not count.
    fn begin_anew(&mut self) {
        self.tokens = 0.0;
        self.filled = None;
        self.waiting.iter().filter_map(Weak::upgrade).for_each(|waiting| waiting.wake());
    }

    fn fill(&mut self, now: Instant, rate: f64) {
        let full = (rate * BURST.as_secs_f64()).max(BURST_BYTES_MIN);
        let since = match self.filled.replace(now) {
            Some(before) => now.saturating_duration_since(before),
            None => BURST,
        };
        self.tokens = (self.tokens + rate * since.as_secs_f64()).min(full);
    }
}

/// Byte counts are far below 2^53, where `f64` stops being exact.
pub(super) fn precise(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends frames of `frame` bytes through the bucket for `seconds` of its own time; bytes per second.
    fn rate_through(limit: &MaxBandwidth, frame: u64, seconds: u64) -> f64 {
        let start = Instant::now();
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match limit.ask(now) {
                Ok(()) => {
                    limit.take(frame);
                    sent += frame;
                }
                Err(wait) => now += wait,
            }
        }
        precise(sent) / Duration::from_secs(seconds).as_secs_f64()
    }

    #[test]
    fn the_average_holds_for_frames_far_smaller_and_far_larger_than_the_bucket() {
        for frame in [100, 4096, 65_536, 4 << 20] {
            let limit = MaxBandwidth::new(NonZeroU64::new(100_000_000));
            let rate = rate_through(&limit, frame, 20);
            assert!((rate / 1e8 - 1.0).abs() < 0.02, "{frame} byte frames: {rate} bytes/s");
        }
    }

    #[test]
    fn without_a_rate_nothing_waits_and_a_new_rate_forgets_old_debt() {
        let limit = MaxBandwidth::default();
        limit.take(u64::MAX / 2);
        assert_eq!(limit.ask(Instant::now()), Ok(()));
        limit.set(NonZeroU64::new(1_000));
        let now = Instant::now();
        assert_eq!(limit.ask(now), Ok(()));
        limit.take(1 << 30);
        assert!(limit.ask(now).is_err());
        limit.set(NonZeroU64::new(1_000_000));
        assert_eq!(limit.ask(now), Ok(()));
    }

    #[test]
    fn a_lifted_limit_holds_again_afterwards_and_a_change_meanwhile_is_not_lost() {
        let limit = MaxBandwidth::new(NonZeroU64::new(1_000));
        let now = Instant::now();
        limit.take(1 << 30);
        assert!(limit.ask(now).is_err());
        let lifted = limit.lift();
        limit.set(NonZeroU64::new(2_000));
        assert_eq!((limit.ask(now), limit.in_force()), (Ok(()), None));
        drop(lifted);
        assert_eq!(limit.in_force(), NonZeroU64::new(2_000));
        assert_eq!(limit.ask(now), Ok(()));
        limit.take(1 << 30);
        assert!(limit.ask(now).is_err());
    }

    #[test]
    fn an_idle_hour_is_not_saved_up() {
        let limit = MaxBandwidth::new(NonZeroU64::new(100_000_000));
        let now = Instant::now();
        assert_eq!(limit.ask(now), Ok(()));
        let later = now + Duration::from_secs(3600);
        let mut burst = 0;
        while limit.ask(later).is_ok() {
            limit.take(4096);
            burst += 4096;
        }
        assert!(burst <= 2_100_000, "{burst} bytes at once");
    }
}
