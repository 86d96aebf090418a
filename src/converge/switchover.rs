//! When to stop the guest: what fits into the downtime limit, and the last check that it still does.

use std::time::Duration;

use super::units::{Pages, sane};

/// Times that a switchover may be called off after the guest was stopped, because more was dirty than expected.
/// Each costs the guest a pause for nothing; after these the limit has to give.
pub const MAX_CALLED_OFF: u32 = 3;

/// As much of the bandwidth stays in hand as the link varied, but no more than this share.
pub(super) const MOST_IN_HAND_FOR_SPREAD: f64 = 0.25;

/// The bandwidth to count on, of a mean that varies by `spread` of itself: what is promised is a limit, and what is measured
/// is a mean, so a share of it stays `in_hand` when the guest is about to be stopped. The last check needs neither.
pub fn careful(bandwidth: f64, spread: f64, in_hand: f64) -> f64 {
    sane(bandwidth) * (1.0 - sane(in_hand).min(1.0)) * (1.0 - sane(spread).min(MOST_IN_HAND_FOR_SPREAD))
}

/// `P* = B_switch × time ÷ bytes per page`: the pages that can be sent while the guest stands still, in what the downtime
/// limit leaves after the pause itself, the device state and the handing over. `bandwidth` in bytes per second. 0 if
/// nothing fits or nothing is known.
pub fn fit(time: Duration, bandwidth: f64, bytes_per_page: f64) -> Pages {
    let sending = time.as_secs_f64();
    let bytes_per_page = sane(bytes_per_page).max(1.0);
    Pages::floor(sane(bandwidth) * sending / bytes_per_page)
}

/// How long the guest stands still if `left` has to be sent.
pub fn downtime(left: Pages, overhead: Duration, bandwidth: f64, bytes_per_page: f64) -> Duration {
    let bandwidth = sane(bandwidth);
    if left.0 == 0 {
        return overhead;
    }
    if bandwidth == 0.0 {
        return Duration::MAX;
    }
    let sending = super::units::duration(left.as_f64() * sane(bytes_per_page) / bandwidth);
    overhead.saturating_add(sending)
}

/// What the last check says once the guest stands still and everything dirty is known exactly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LastCheck {
    /// Send it.
    GoOn,
    /// More is dirty than fits: let the guest run on, and treat what is dirty as the next round.
    CallOff,
}

/// The last check: the guest stands still, `left` is exactly what has to be sent and `fits` is [`fit`] now.
pub fn last_check(left: Pages, fits: Pages, called_off: u32) -> LastCheck {
    if left <= fits || called_off >= MAX_CALLED_OFF { LastCheck::GoOn } else { LastCheck::CallOff }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_limit_contains_the_measured_overhead() {
        let limit = Duration::from_millis(500);
        let overhead = Duration::from_millis(100);
        let fits = fit(limit - overhead, 100e6, 4096.0);
        assert_eq!(fits, Pages(9765));
        let stop = downtime(fits, overhead, 100e6, 4096.0);
        assert!(stop <= limit && stop > limit - Duration::from_millis(1));
        assert_eq!(fit(Duration::ZERO, 100e6, 4096.0), Pages(0));
    }

    #[test]
    fn a_wrong_estimate_calls_the_switchover_off_but_not_for_ever() {
        assert_eq!(last_check(Pages(100), Pages(100), 0), LastCheck::GoOn);
        assert_eq!(last_check(Pages(200), Pages(100), 0), LastCheck::CallOff);
        assert_eq!(last_check(Pages(200), Pages(100), MAX_CALLED_OFF), LastCheck::GoOn);
    }

    proptest! {
        #[test]
        fn nonsense_fits_nothing_and_never_panics(
            limit in any::<u64>(), overhead in any::<u64>(), bandwidth in any::<f64>(), cost in any::<f64>(), left in any::<u64>(),
        ) {
            let (limit, overhead) = (Duration::from_micros(limit), Duration::from_micros(overhead));
            let fits = fit(limit.saturating_sub(overhead), bandwidth, cost);
            prop_assert!(downtime(Pages(left), overhead, bandwidth, cost) >= overhead);
            if bandwidth.is_nan() || bandwidth <= 0.0 || limit <= overhead {
                prop_assert_eq!(fits, Pages(0));
            }
        }
    }
}
