//! `max-bandwidth`: one token bucket for all channels, whose rate can be changed while they send.
//!
//! Bytes that a limit holds back do not say what the link carries. So now and then the bucket saves up what the limit allows
//! in a tenth of a second and lets it go at once, over all channels together; the average stays what it is. How long such a
//! burst takes to arrive says what the switchover may count on, which no limit holds back.

use std::num::NonZeroU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::uring::Wake;
use crate::converge::bandwidth::Estimator;

/// The bucket holds what the rate gives in this time: long enough that timers do not matter, short enough that
/// a link with small buffers sees no burst.
const BURST: Duration = Duration::from_millis(20);

/// Bytes that a bucket holds at least: the smallest frames must pass.
const BURST_BYTES_MIN: f64 = 64.0 * 1024.0;

/// A burst that measures is what the rate gives in this time, as QEMU's limit lets it go every time; at least so many bytes,
/// for which half a second is waited at most.
const MEASURING: Duration = Duration::from_millis(100);
const MEASURING_BYTES_MIN: f64 = 1024.0 * 1024.0;
const MEASURING_WAIT_MAX: Duration = Duration::from_millis(500);
/// How often: three in a row say enough, and then it has to be kept fresh.
const MEASURE_AT_FIRST_EVERY: Duration = Duration::from_millis(300);
const MEASURE_EVERY: Duration = Duration::from_secs(2);
const AT_FIRST: u64 = 3;
/// A burst that was interrupted for so long, because the round had no more pages, is two.
const INTERRUPTED: Duration = Duration::from_millis(2);
/// The average of bursts goes over so many seconds of them, and a burst is a sample however short it is.
const MEMORY_S: f64 = 0.1;
const SAMPLE_S: f64 = 1e-6;
/// A link that has not been held back for so long is measured by what it carries.
const HELD_BACK_WITHIN: Duration = Duration::from_secs(2);

/// A rate limit in bytes of frames per second (headers counted, TCP and IP not), shared by everyone that clones
/// it. Without a rate it limits nothing.
#[derive(Clone, Debug, Default)]
pub struct MaxBandwidth {
    bucket: Arc<Mutex<Bucket>>,
}

/// How channels go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pace {
    /// There is no limit.
    Free,
    /// There is one, which does not hold for now: what was measured under it says little.
    Lifted,
    /// In bytes per second.
    Limited(NonZeroU64),
}

/// The number of a burst that measures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ticket(u64);

/// A burst that measures.
#[derive(Debug)]
struct Burst {
    number: u64,
    begun: Instant,
    last_arrived: Instant,
    bytes: u64,
    under_way: u64,
    /// It gets no more frames.
    over: bool,
}

/// What a link carries that is held back, by bursts.
#[derive(Debug)]
struct Unpaced {
    /// Over the time of the bursts alone, and their bytes.
    estimator: Estimator,
    time_s: f64,
    bytes: u64,
    bursts: u64,
    /// Tokens are saved up for the next.
    saving: bool,
    next: Option<Instant>,
    burst: Option<Burst>,
    held_back: Option<Instant>,
}

impl Default for Unpaced {
    fn default() -> Self {
        Self {
            estimator: Estimator::new(SAMPLE_S, MEMORY_S),
            time_s: 0.0,
            bytes: 0,
            bursts: 0,
            saving: false,
            next: None,
            burst: None,
            held_back: None,
        }
    }
}

impl Unpaced {
    /// Nothing may go at `now`. Whether it is time to save up.
    fn held_back(&mut self, now: Instant) {
        self.held_back = Some(now);
        if let Some(burst) = &mut self.burst {
            burst.over = true;
        }
        self.end_if_arrived();
        if self.next.is_none_or(|next| now >= next) {
            self.saving = true;
        }
    }

    /// Enough is saved up.
    fn begin(&mut self, now: Instant) {
        self.saving = false;
        self.bursts += 1;
        let every = if self.bursts < AT_FIRST { MEASURE_AT_FIRST_EVERY } else { MEASURE_EVERY };
        self.next = Some(now + every);
        let number = self.bursts;
        self.burst =
            Some(Burst { number, begun: now, last_arrived: now, bytes: 0, under_way: 0, over: false });
    }

    fn is_bursting(&self) -> bool {
        self.burst.as_ref().is_some_and(|burst| !burst.over)
    }

    /// A frame goes; whether it belongs to a burst.
    fn goes(&mut self, now: Instant, bytes: u64) -> Option<Ticket> {
        let burst = self.burst.as_mut().filter(|burst| !burst.over)?;
        let idle = burst.under_way == 0 && burst.bytes > 0;
        if idle && now.saturating_duration_since(burst.last_arrived) > INTERRUPTED {
            // What did arrive is too little to tell, or it would not have been waited for.
            self.burst = None;
            return None;
        }
        burst.bytes += bytes;
        burst.under_way += bytes;
        Some(Ticket(burst.number))
    }

    fn arrived(&mut self, now: Instant, ticket: Ticket, bytes: u64) {
        let Some(burst) = self.burst.as_mut().filter(|burst| burst.number == ticket.0) else { return };
        burst.under_way = burst.under_way.saturating_sub(bytes);
        burst.last_arrived = now;
        self.end_if_arrived();
    }

    fn end_if_arrived(&mut self) {
        let Some(burst) = self.burst.take_if(|burst| burst.over && burst.under_way == 0) else { return };
        let took_s = burst.last_arrived.saturating_duration_since(burst.begun).as_secs_f64();
        if burst.bytes > 0 && took_s > 0.0 {
            self.estimator.start(self.time_s, self.bytes);
            self.time_s += took_s;
            self.bytes += burst.bytes;
            self.estimator.stop(self.time_s, self.bytes);
        }
    }
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
    unpaced: Unpaced,
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

    /// What holds now.
    pub(super) fn pace(&self) -> Pace {
        let bucket = self.bucket.lock();
        match bucket.bytes_per_s {
            None => Pace::Free,
            // A burst is to go as fast as it would without a limit.
            Some(_) if bucket.lifted > 0 || bucket.unpaced.is_bursting() => Pace::Lifted,
            Some(bytes_per_s) => Pace::Limited(bytes_per_s),
        }
    }

    /// Bytes per second that all channels together carry when nothing is held back, as measured; `None` while nothing is
    /// held back, because then every byte says it.
    pub(super) fn unpaced(&self, now: Instant) -> Option<f64> {
        let bucket = self.bucket.lock();
        bucket.rate()?;
        let held_back = bucket.unpaced.held_back?;
        let lately = now.saturating_duration_since(held_back) <= HELD_BACK_WITHIN;
        bucket.unpaced.estimator.mean().filter(|_| lately)
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
        let enough = if bucket.unpaced.saving { Bucket::measuring(rate) } else { 1.0 };
        if bucket.tokens >= enough {
            if bucket.unpaced.saving {
                bucket.unpaced.begin(now);
            }
            return Ok(());
        }
        bucket.unpaced.held_back(now);
        let wait = Duration::from_secs_f64((enough - bucket.tokens) / rate);
        Err(wait.clamp(Duration::from_micros(50), BURST))
    }

    /// Books a frame that goes. It may be larger than what is there: the debt is waited for afterwards, so the
    /// average holds whatever the size of frames. When a frame with a ticket [arrived](Self::arrived), the bucket wants to
    /// know.
    pub(super) fn take(&self, now: Instant, bytes: u64) -> Option<Ticket> {
        let mut bucket = self.bucket.lock();
        bucket.bytes_per_s?;
        bucket.tokens -= precise(bytes);
        bucket.unpaced.goes(now, bytes)
    }

    /// A frame with this ticket is in place at the destination.
    pub(super) fn arrived(&self, now: Instant, ticket: Ticket, bytes: u64) {
        self.bucket.lock().unpaced.arrived(now, ticket, bytes);
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

    /// Tokens of a burst that measures.
    fn measuring(rate: f64) -> f64 {
        let at_least = MEASURING_BYTES_MIN.min(rate * MEASURING_WAIT_MAX.as_secs_f64());
        (rate * MEASURING.as_secs_f64()).max(at_least)
    }

    /// Debts and savings of another rate do not count; what the link carries stays known.
    fn begin_anew(&mut self) {
        self.tokens = 0.0;
        self.filled = None;
        (self.unpaced.saving, self.unpaced.burst) = (false, None);
        self.waiting.iter().filter_map(Weak::upgrade).for_each(|waiting| waiting.wake());
    }

    fn fill(&mut self, now: Instant, rate: f64) {
        let full = (rate * BURST.as_secs_f64()).max(BURST_BYTES_MIN);
        let full = if self.unpaced.saving { full.max(Self::measuring(rate)) } else { full };
        let since = match self.filled.replace(now) {
            Some(before) => now.saturating_duration_since(before),
            None => BURST,
        };
        // What was saved up for a burst stays until it is spent.
        self.tokens = (self.tokens + rate * since.as_secs_f64()).min(full.max(self.tokens));
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
                    limit.take(now, frame);
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
        limit.take(Instant::now(), u64::MAX / 2);
        assert_eq!(limit.ask(Instant::now()), Ok(()));
        limit.set(NonZeroU64::new(1_000));
        let now = Instant::now();
        assert_eq!(limit.ask(now), Ok(()));
        limit.take(now, 1 << 30);
        assert!(limit.ask(now).is_err());
        limit.set(NonZeroU64::new(1_000_000));
        assert_eq!(limit.ask(now), Ok(()));
    }

    #[test]
    fn a_lifted_limit_holds_again_afterwards_and_a_change_meanwhile_is_not_lost() {
        let limit = MaxBandwidth::new(NonZeroU64::new(1_000));
        let now = Instant::now();
        limit.take(now, 1 << 30);
        assert!(limit.ask(now).is_err());
        let lifted = limit.lift();
        limit.set(NonZeroU64::new(2_000));
        assert_eq!((limit.ask(now), limit.pace()), (Ok(()), Pace::Lifted));
        drop(lifted);
        assert_eq!(limit.pace(), Pace::Limited(NonZeroU64::new(2_000).unwrap()));
        assert_eq!(limit.ask(now), Ok(()));
        limit.take(now, 1 << 30);
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
            limit.take(later, 4096);
            burst += 4096;
        }
        assert!(burst <= 2_100_000, "{burst} bytes at once");
    }

    /// Sends through a link of so many bytes per second and half a millisecond of latency, for five seconds of its own
    /// time; what the bucket says at the end, and the rate that went through.
    fn measured(limit: &MaxBandwidth, frame: u64, link_bytes_per_s: f64) -> (Option<f64>, f64) {
        let start = Instant::now();
        let (mut now, mut free, mut sent) = (start, start, 0);
        let mut under_way: Vec<(Instant, Option<Ticket>)> = Vec::new();
        while now < start + Duration::from_secs(5) {
            while let Some((at, ticket)) = under_way.first().copied().filter(|(at, _)| *at <= now) {
                ticket.into_iter().for_each(|ticket| limit.arrived(at, ticket, frame));
                under_way.remove(0);
            }
            match limit.ask(now) {
                Ok(()) if under_way.len() < 64 => {
                    let ticket = limit.take(now, frame);
                    sent += frame;
                    free = free.max(now) + Duration::from_secs_f64(precise(frame) / link_bytes_per_s);
                    under_way.push((free + Duration::from_micros(500), ticket));
                }
                Ok(()) => now = under_way[0].0,
                Err(wait) => now = under_way.first().map_or(now + wait, |(at, _)| (*at).min(now + wait)),
            }
        }
        (limit.unpaced(now), precise(sent) / 5.0)
    }

    #[test]
    fn what_a_link_carries_is_measured_although_a_limit_holds_it_back() {
        for (limit, link) in [(10e6, 100e6), (1e6, 100e6), (50e6, 1.2e9), (90e6, 100e6)] {
            let bytes_per_s = NonZeroU64::new(crate::converge::units::whole(limit));
            let (unpaced, went) = measured(&MaxBandwidth::new(bytes_per_s), 32_768, link);
            let unpaced = unpaced.unwrap();
            assert!((0.7 * link..1.02 * link).contains(&unpaced), "{limit} of {link}: {unpaced}");
            assert!((went / limit - 1.0).abs() < 0.05, "{limit}: {went}");
        }
    }

    #[test]
    fn a_link_that_is_slower_than_the_limit_is_measured_by_what_it_carries() {
        let limit = MaxBandwidth::new(NonZeroU64::new(100_000_000));
        assert_eq!(measured(&limit, 32_768, 50e6).0, None);
    }

    #[test]
    fn a_burst_that_a_connection_took_with_it_is_forgotten() {
        let limit = MaxBandwidth::new(NonZeroU64::new(10_000_000));
        let mut now = Instant::now();
        let mut taken = 0;
        while taken == 0 {
            match limit.ask(now) {
                Ok(()) => taken += u64::from(limit.take(now, 65_536).is_some()),
                Err(wait) => now += wait,
            }
        }
        // It never arrives, and the next ones do.
        let (unpaced, _) = measured(&limit, 32_768, 1e8);
        assert!(unpaced.is_some_and(|unpaced| unpaced > 6e7), "{unpaced:?}");
    }
}
