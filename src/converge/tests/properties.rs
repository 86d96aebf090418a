//! What holds for every guest, every link and every limit.

use std::time::Duration;

use proptest::prelude::*;

use super::any::{announced, case, config, duration, said_by_round_2, shown, steady_case};
use crate::converge::Change;
use crate::converge::simulate::{LimitKept, Writer};

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_downtime_limit_holds_or_an_event_says_why_not(case in case()) {
        let done = case.run_for_a_while();
        prop_assert!(done.limit != LimitKept::NoAndSilent, "{} of {:?}", shown(&done), case.limit);
    }

    #[test]
    fn whoever_is_innocent_is_never_throttled(case in case()) {
        let done = case.run_for_a_while();
        // Two fifths of an equal share of what fits at the worst of times, whatever the round.
        let share = 0.4 * case.fits() * case.slowest_paced() / case.slowest() / case.guest.writers.len() as f64;
        for (writer, vcpu) in case.guest.writers.iter().zip(&done.vcpus) {
            let most: f64 = writer.phases.iter().map(|phase| phase.pages.as_f64()).sum();
            prop_assert!(most > share || vcpu.throttled.is_zero(), "{} pages of {}: {:?}", most, share, vcpu);
        }
    }

    #[test]
    fn a_guest_that_does_not_change_is_moved_or_it_is_said_by_the_end_of_round_2_that_it_is_not(case in steady_case()) {
        let done = case.run();
        prop_assert!(done.ended.is_some() || said_by_round_2(&done), "{}", shown(&done));
    }

    #[test]
    fn no_stall_is_longer_than_was_announced(case in case()) {
        let done = case.run_for_a_while();
        prop_assert!(done.longest_stall() <= announced(&done), "{} of {:?}", shown(&done), announced(&done));
    }

    #[test]
    fn a_deadline_is_kept_or_declared_out_of_reach(case in steady_case(), slack in 1.0..3.0f64) {
        let mut settings = case.settings();
        let deadline = duration(case.once_s() * slack + 0.5);
        settings.limits.deadline = Some(deadline);
        let done = case.run_with(settings);
        let said = done.events.iter().any(|event| event.change == Change::DeadlineOutOfReach);
        let kept = done.ended.is_some() && done.total <= deadline;
        prop_assert!(kept || said || said_by_round_2(&done), "{} of {deadline:?}", shown(&done));
    }

    #[test]
    fn a_guest_that_writes_nothing_stands_still_for_what_the_switchover_takes_and_5_ms(
        mut case in case(), vcpus in 0..4usize,
    ) {
        case.guest.writers = vec![Writer::default(); vcpus];
        case.guest.devices.clear();
        case.machine.held_back = 0;
        let done = case.run();
        prop_assert!(done.ended.is_some(), "{}", shown(&done));
        let most = case.overhead() + Duration::from_millis(5);
        prop_assert!(done.downtime <= most, "{} of {most:?}", shown(&done));
        prop_assert!(done.total.as_secs_f64() <= 1.1 * case.once_s() + 1.0, "{} of {}", shown(&done), case.once_s());
    }
}
