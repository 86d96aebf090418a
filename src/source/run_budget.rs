//! How long a held-back vCPU that times its own runs may run between two stalls.
//!
//! The quota is in pages, a timer knows only time: what lies between is how fast the vCPU dirties pages just after a stall,
//! which is two or three times slower than it ever was, and is measured here from run to run.

use std::time::Duration;

/// A run is given time for so many pages at least: what `converge::throttle` wants to see between two stalls.
const PAGES_MIN: f64 = 16.0;
/// Until it is measured, and at least: a shorter run would be mostly the way into the guest and out of it.
pub(super) const RUN_MIN: Duration = Duration::from_micros(100);
/// And at most: a vCPU that dirties nothing meanwhile is not in need of being held back.
const RUN_MAX: Duration = Duration::from_millis(1);
/// Weight of the newest run.
const NEWEST: f64 = 0.2;

/// What is known of the runs of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RunBudget {
    pages_per_s: Option<f64>,
    /// Pages dirtied and time run when its gate was closed last.
    dirtied: u64,
    ran: Duration,
}

impl RunBudget {
    /// How long the next run may be, if it is to dirty `pages`. The vCPU has dirtied and run so much so far, the latter in
    /// timed runs that are over.
    pub fn next(&mut self, pages: f64, dirtied: u64, ran: Duration) -> Duration {
        let new = dirtied.checked_sub(self.dirtied);
        let time = ran.saturating_sub(self.ran);
        // Counts start anew when pages are recycled.
        if let Some(new) = new
            && !time.is_zero()
        {
            let rate = new as f64 / time.as_secs_f64();
            let mean = self.pages_per_s.unwrap_or(rate);
            self.pages_per_s = Some(mean + NEWEST * (rate - mean));
        }
        (self.dirtied, self.ran) = (dirtied, ran);
        let seconds = pages.max(PAGES_MIN) / self.pages_per_s.unwrap_or(f64::INFINITY);
        Duration::try_from_secs_f64(seconds).unwrap_or(RUN_MAX).clamp(RUN_MIN, RUN_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_as_long_as_its_pages_take_by_what_the_runs_before_it_took() {
        let us = Duration::from_micros;
        let mut budget = RunBudget::default();
        assert_eq!(budget.next(16.0, 1000, Duration::ZERO), RUN_MIN, "nothing is known");
        // 40 pages in 200 µs.
        assert_eq!(budget.next(40.0, 1040, us(200)), us(200));
        assert_eq!(budget.next(3.0, 1040, us(200)), RUN_MIN, "16 pages take 80 µs");
        assert_eq!(budget.next(1e9, 1040, us(200)), RUN_MAX);
        // The pages were recycled: the run says nothing.
        assert_eq!(budget.next(40.0, 7, us(300)), us(200));
        assert_eq!(budget.next(f64::NAN, 8, us(300)), RUN_MIN);
    }
}
