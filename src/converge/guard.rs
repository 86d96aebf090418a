//! The guard of a standstill: until the last page is in place it projects how long the guest is going to stand still. When that is
//! beyond the limit, because the link has become slower since the guest was stopped, the guest runs on and the rounds go on.
//!
//! A link that carried what fits a moment ago may carry a tenth of it now. What it carries now is seen by the pages that
//! arrive: over a stretch that is short against the limit, and long against the round trip and the size of a frame.

use std::collections::VecDeque;
use std::time::Duration;

use super::Pages;

/// The pace of pages is taken over this share of the limit,
const STRETCH_SHARE: u32 = 6;
/// within these bounds, and no less than so many round trips.
const STRETCH_MIN: Duration = Duration::from_millis(8);
const STRETCH_MAX: Duration = Duration::from_millis(60);
const STRETCH_ROUND_TRIPS: u32 = 4;
/// Of a stretch, so many round trips may have passed without a page because one round had to end before the next began.
const WAITED_ROUND_TRIPS: u32 = 2;
/// A projection that is too long has to stay so for this share of the stretch: a host that was busy for a moment is no slow link.
const STAYS_SHARE: u32 = 2;
/// Looks within a stretch.
const LOOKS: u32 = 4;

/// Watches one standstill. Times are since the guest was stopped.
#[derive(Debug)]
pub(crate) struct Guard {
    limit: Duration,
    /// What comes after the last page.
    besides: Duration,
    stretch: Duration,
    waited: Duration,
    /// When, and how many pages were left then.
    looks: VecDeque<(Duration, u64)>,
    too_long_since: Option<Duration>,
}

/// What the guard expects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct TooLong {
    /// The standstill as projected.
    pub expected: Duration,
    pub pages_left: u64,
    /// Of these, what would still fit.
    pub pages_fit: u64,
}

impl Guard {
    /// The guest may stand still for `limit`; the last page is followed by what takes `besides`.
    pub fn new(limit: Duration, besides: Duration, round_trip: Duration) -> Self {
        let stretch = (limit / STRETCH_SHARE).clamp(STRETCH_MIN, STRETCH_MAX);
        Self {
            limit,
            besides,
            stretch: stretch.max(round_trip * STRETCH_ROUND_TRIPS),
            waited: round_trip * WAITED_ROUND_TRIPS,
            looks: VecDeque::new(),
            too_long_since: None,
        }
    }

    /// How long to wait until the next look at most.
    pub fn look_every(&self) -> Duration {
        self.stretch / LOOKS
    }

    /// `pages_left` are not in place yet. Whether that is going to take too long.
    pub fn look(&mut self, now: Duration, pages_left: u64) -> Option<TooLong> {
        self.looks.push_back((now, pages_left));
        // One look that is older than the stretch has to stay.
        while self.looks.get(1).is_some_and(|look| now.saturating_sub(look.0) >= self.stretch) {
            self.looks.pop_front();
        }
        let (begun, pages_then) = *self.looks.front()?;
        let took = now.saturating_sub(begun);
        let spent = now + self.besides;
        if pages_left == 0 || (took < self.stretch && spent <= self.limit) {
            return None;
        }
        let pages_per_s = pages_then.saturating_sub(pages_left) as f64
            / took.saturating_sub(self.waited).as_secs_f64().max(1e-9);
        let rest = Duration::try_from_secs_f64(pages_left as f64 / pages_per_s).unwrap_or(Duration::MAX);
        let expected = spent.saturating_add(rest);
        if expected <= self.limit {
            self.too_long_since = None;
            return None;
        }
        let since = *self.too_long_since.get_or_insert(now);
        let stays = now.saturating_sub(since) >= self.stretch / STAYS_SHARE;
        let pages_fit = Pages::floor(pages_per_s * self.limit.saturating_sub(spent).as_secs_f64());
        stays.then_some(TooLong { expected, pages_left, pages_fit: pages_fit.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Looks each millisecond at a link that carries `pages_per_ms(ms)`; when the guard calls it off.
    fn called_off(limit: u64, pages: u64, pages_per_ms: impl Fn(u64) -> u64) -> Option<u64> {
        let mut guard = Guard::new(ms(limit), ms(10), ms(0));
        let mut left = pages;
        for at in 1..10_000 {
            if left == 0 {
                return None;
            }
            left = left.saturating_sub(pages_per_ms(at));
            if guard.look(ms(at), left).is_some() {
                return Some(at);
            }
        }
        panic!("neither done nor called off");
    }

    #[test]
    fn a_link_that_drops_to_a_tenth_is_noticed_long_before_the_limit_and_one_that_does_not_is_left_alone() {
        assert_eq!(called_off(300, 6_000, |_| 24), None);
        let at = called_off(300, 6_000, |_| 2).unwrap();
        assert!(at < 100, "after {at} ms");
        let at = called_off(300, 6_000, |ms| if ms < 100 { 24 } else { 2 }).unwrap();
        assert!((100..200).contains(&at), "after {at} ms");
        let at = called_off(20, 200, |_| 2).unwrap();
        assert!(at <= 20, "after {at} ms");
    }

    #[test]
    fn a_moment_in_which_nothing_arrives_is_no_slow_link() {
        assert_eq!(called_off(300, 4_000, |ms| if (40..60).contains(&ms) { 0 } else { 24 }), None);
        // 64 pages arrive at a time.
        assert_eq!(called_off(300, 6_000, |ms| if ms % 3 == 0 { 72 } else { 0 }), None);
    }

    #[test]
    fn a_link_that_carries_nothing_is_called_off() {
        let at = called_off(300, 100, |_| 0).unwrap();
        assert!(at < 120, "after {at} ms");
    }
}
