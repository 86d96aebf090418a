//! Named migrations, and that each shows what is demanded of it.

use crate::converge::simulate::demands::scenarios;

/// Runs the scenarios with these names; all of them have to show what is demanded.
pub fn meet(names: &[&str]) {
    let mut unmet = Vec::new();
    for name in names {
        let scenario = scenarios().into_iter().find(|scenario| scenario.name == *name);
        let scenario = scenario.unwrap_or_else(|| panic!("there is no scenario {name}"));
        let of_this = scenario.demand.unmet(&scenario.run());
        unmet.extend(of_this.iter().map(|demand| format!("{name}: {demand}")));
    }
    assert!(unmet.is_empty(), "{}", unmet.join("\n"));
}

#[test]
fn every_scenario_has_a_name_of_its_own() {
    let mut names: Vec<_> = scenarios().iter().map(|scenario| scenario.name).collect();
    names.sort_unstable();
    names.windows(2).for_each(|two| assert_ne!(two[0], two[1]));
}

#[test]
fn what_could_be_done_at_first_can_still_be_done() {
    meet(&["rhel73-30m", "rhel73-50m", "rhel73-60m", "rhel73-100m"]);
}

#[test]
fn paced_writers_of_512_mib_are_braked_late_and_hard_or_not_at_all() {
    meet(&["heavy-512m-50", "heavy-512m-80", "heavy-512m-150"]);
}

#[test]
fn an_idle_guest_stands_still_for_what_the_switchover_takes_and_5_ms() {
    meet(&["idle", "idle-loopback", "slow-writer"]);
}

#[test]
fn a_small_set_stands_still_for_as_long_as_the_link_takes_for_it() {
    meet(&["small-set", "unlimited"]);
}

#[test]
fn a_link_that_drops_to_a_tenth_is_answered_with_what_it_can_carry() {
    meet(&["drop-for-good-60m", "drop-for-good-30m", "drop-for-good-512m-5", "drop-for-5-s"]);
}

#[test]
fn a_cliff_that_comes_when_next_to_nothing_is_left_does_no_harm() {
    meet(&["cliff-for-good"]);
}

#[test]
fn round_trips_of_100_ms_are_part_of_the_pause() {
    meet(&["round-trip-100-limit-1000", "round-trip-100-limit-300"]);
}

#[test]
fn links_of_400_gbit_are_no_exception() {
    meet(&["400-gbit"]);
}

#[test]
fn limits_of_10_and_20_ms_are_kept_or_it_is_said_that_they_cannot_be() {
    meet(&["limit-20-of-2", "limit-10-of-2", "limit-20-of-20", "limit-5-of-20"]);
}

#[test]
fn small_rings_cost_the_guest_nothing() {
    meet(&["small-ring-60m"]);
}

#[test]
fn every_order_of_sending_moves_the_guest() {
    meet(&["cyclic-down", "hot-cold-down", "hot-cold-young", "hot-cold-old", "random-down"]);
}
