//! VMs that are more than RAM and vCPUs: a clock that KVM keeps in guest RAM, and a device with state of its own.

use serde_json::Value;

use crate::guest::{
    By, Guest, SMALL, SMALL_WORK, assert_consistent, in_every_way, kvm, receive, whoever_migrates,
};
use crate::support::ringferry;

whoever_migrates! {
    a_guest_with_kvmclock_verifies_equal,
    the_state_of_a_device_arrives_whole_and_is_counted,
}

in_every_way! {
    the_state_of_a_device_arrives_whole_and_is_counted,
}

/// The report of the migration of a guest with these options, which moves whole: the demo's, or that of a process beside.
fn report_of_move(by: By, more: &[&str]) -> Value {
    if by.is_beside() {
        let guest = Guest::start_for(by, &SMALL, &[&SMALL_WORK, more].concat());
        let (receive, to) = receive(&["--run-for", "100ms"]);
        let send = ringferry(&[&guest.send(&to)[..], &["--verify", "--json"]].concat());
        assert_eq!(send.code, Some(0), "{send:?}");
        assert_consistent(&receive.end());
        let report = send.objects().pop().unwrap();
        assert_eq!(report["ram_digest_match"], true, "{report}");
        return report;
    }
    let demo = ringferry(&[&["demo", "--json"], &SMALL[..], &SMALL_WORK, more].concat());
    assert_eq!(demo.code, Some(0), "{demo:?}");
    let report = demo.objects().pop().unwrap();
    assert_eq!(
        (&report["ram_digest_match"], &report["guest_consistent"]),
        (&true.into(), &true.into()),
        "{report}"
    );
    report
}

fn a_guest_with_kvmclock_verifies_equal(by: By) {
    if kvm() {
        report_of_move(by, &["--kvmclock"]);
    }
}

fn the_state_of_a_device_arrives_whole_and_is_counted(by: By) {
    if kvm() {
        let report = report_of_move(by, &["--device-state", "64MiB"]);
        assert!(report["state_bytes"].as_u64().unwrap() > 64 << 20, "{report}");
    }
}

#[test]
fn a_simulated_guest_has_no_device_and_says_so() {
    let demo = ringferry(&[&["demo", "--guest", "threads", "--device-state", "1MiB"], &SMALL[..]].concat());
    assert_eq!(demo.code, Some(2), "{demo:?}");
    assert!(demo.stderr.contains("only a VM of KVM has one"), "{demo:?}");
}
