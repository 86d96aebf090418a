//! What the controller of 3d10d1b did not show: bursts, devices, cliffs, limits of a few milliseconds, hosts with cheap faults.

use std::time::Duration;

use proptest::prelude::*;

use super::any::{Case, FLAT_OUT, WIRE, case, config, duration, shown, steady_link, usual_machine};
use super::scenarios::meet;
use crate::converge::Pages;
use crate::converge::simulate::demands::{Demand, Ends};
use crate::converge::simulate::{Guest, LimitKept, Link, Step, Writer};

const MIB: u64 = 1 << 20;

/// 600 MiB, these, and a vCPU that writes nothing.
fn guest(mut writers: Vec<Writer>, devices: Vec<Writer>) -> Guest {
    writers.push(Writer::default());
    Guest { ram: Pages(1 << 19), populated: Pages(153_600), writers, devices, ..Guest::default() }
}

#[test]
fn a_heavy_writer_ends_as_predicted() {
    meet(&["heavy-512m", "heavy-512m-twice"]);
}

#[test]
fn the_writer_beside_seven_light_ones_is_not_let_go_again_and_again() {
    meet(&["one-heavy-of-eight"]);
}

#[test]
fn bursts_are_waited_for_or_braked_and_not_put_off() {
    meet(&["bursts", "bursts-from-1-s", "bursts-from-2-s", "bursts-from-2.5-s", "bursts-from-4-s"]);
}

#[test]
fn a_device_that_writes_less_than_the_link_carries_is_planned_around() {
    meet(&["device-20", "device-50", "device-20-and-a-writer"]);
}

#[test]
fn a_device_that_writes_more_than_the_link_carries_is_said_to_be_hopeless() {
    meet(&["device-120", "device-120-and-a-writer"]);
}

#[test]
fn a_cliff_after_the_stop_calls_the_switchover_off() {
    meet(&["cliff-after-the-stop"]);
}

#[test]
fn what_the_user_allows_rounds_says_nothing_of_the_pause() {
    meet(&["max-bandwidth-20-of-1000"]);
}

#[test]
fn a_guest_that_a_slow_link_cannot_hold_is_let_go() {
    meet(&["10-mbit"]);
}

#[test]
fn a_limit_that_leaves_time_for_nothing_does_not_brake_for_ever() {
    meet(&["limit-5-of-2"]);
}

#[test]
fn hosts_with_cheap_faults_and_busy_ones_come_to_an_end() {
    meet(&["cheap-faults-60m", "cheap-faults-512m", "busy-host-60m", "busy-host-512m-150", "pml-16-vcpus"]);
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_guest_that_writes_nothing_stands_still_as_shortly_where_pages_may_be_held_back(
        mut case in case(), vcpus in 0..4usize,
    ) {
        case.guest.writers = vec![Writer::default(); vcpus];
        case.guest.devices.clear();
        case.machine.held_back = 512;
        let done = case.run();
        prop_assert!(done.ended.is_some(), "{}", shown(&done));
        let most = case.overhead() + Duration::from_millis(5);
        prop_assert!(done.downtime <= most, "{} of {most:?}", shown(&done));
        prop_assert!(done.total.as_secs_f64() <= 1.1 * case.once_s() + 1.0, "{} of {}", shown(&done), case.once_s());
    }

    #[test]
    fn a_device_slower_than_the_link_costs_no_vcpu_anything(
        link in steady_link(), share in 0.02..0.6f64, set_mib in 1..512u64, limit in 200..1000u64,
    ) {
        let devices = vec![Writer::steady(set_mib * MIB, share * link.bytes_per_s)];
        // A writer that fits besides.
        let fits = 0.1 * link.bytes_per_s / WIRE * 0.1;
        let writers = vec![Writer::steady(Pages::floor(fits).0 * 4096, FLAT_OUT)];
        let case = Case { guest: guest(writers, devices), link, machine: usual_machine(), limit: Duration::from_millis(limit) };
        let done = case.run();
        prop_assert!(done.ended.is_some() && done.limit == LimitKept::Yes, "{} of {:?}", shown(&done), case.limit);
        prop_assert!(done.throttled().is_zero() && done.called_off == 0, "{}", shown(&done));
    }

    #[test]
    fn a_device_faster_than_the_link_is_said_to_be_hopeless_and_nobody_is_throttled_for_it(
        link in steady_link(), times in 1.2..4.0f64, limit in 200..1000u64, set_mib in 1..100u64,
    ) {
        // More than can be sent in the pause.
        let set = Pages::floor(2.0 * link.bytes_per_s * 1.0 / WIRE).0.min(1 << 17);
        let devices = vec![Writer::steady(set * 4096, times * link.bytes_per_s)];
        let hopeless = Pages(set).as_f64() * WIRE / link.bytes_per_s > 1.2;
        prop_assume!(hopeless);
        let writers = vec![Writer::steady(set_mib * MIB, FLAT_OUT)];
        let case = Case { guest: guest(writers, devices), link, machine: usual_machine(), limit: Duration::from_millis(limit) };
        let done = case.run();
        let demand = Demand {
            ends: Ends::Never,
            throttled: Some(Duration::from_secs(1)),
            ..Demand::default()
        };
        prop_assert_eq!(demand.unmet(&done), Vec::<String>::new(), "{}", shown(&done));
    }

    #[test]
    fn a_link_that_drops_to_a_tenth_for_good_costs_no_more_than_the_new_link_needs(
        set_mib in 1..512u64, share in prop_oneof![Just(FLAT_OUT), 0.01..0.3f64],
        bytes_per_s in 80e6..1e9f64, at_share in 0.1..0.9f64,
    ) {
        let all = 153_600.0 * WIRE / bytes_per_s;
        let at = all * at_share;
        let steps = vec![Step { at: duration(at), until: None, share: 0.1 }];
        let link = Link { steps, ..Link::steady(bytes_per_s) };
        let guest = guest(vec![Writer::steady(set_mib * MIB, share * 0.1 * bytes_per_s)], Vec::new());
        let case = Case { guest, link, machine: usual_machine(), limit: Duration::from_millis(500) };
        let done = case.run();
        // What is unsent when it drops, and the set once more, besides what is written meanwhile without end.
        let set_s = Pages(set_mib * 256).as_f64() * WIRE / (0.1 * bytes_per_s);
        let free = if share < 1.0 { 1.0 - share } else { 1.0 };
        let needs = at + ((all - at) * 10.0 + set_s) / free;
        prop_assert!(done.ended.is_some() && done.limit == LimitKept::Yes, "{}", shown(&done));
        // Stalls become longer until what is left falls by half of what it would with the longest.
        prop_assert!(done.total.as_secs_f64() <= 2.2 * needs, "{} of {needs}", shown(&done));
        prop_assert!(done.longest_stall() <= Duration::from_millis(160), "{}", shown(&done));
    }
}
