//! VMs that are more than RAM and vCPUs: a clock that KVM keeps in guest RAM, and a device with state of its own.

use serde_json::Value;

use crate::guest::{SMALL, SMALL_WORK, kvm};
use crate::support::ringferry;

/// The report of a demo with these options, which moves its guest whole.
fn report_of_demo(more: &[&str]) -> Value {
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

#[test]
fn a_guest_with_kvmclock_verifies_equal() {
    if kvm() {
        report_of_demo(&["--kvmclock"]);
    }
}

#[test]
fn the_state_of_a_device_arrives_whole_and_is_counted() {
    if kvm() {
        let report = report_of_demo(&["--device-state", "64MiB"]);
        assert!(report["state_bytes"].as_u64().unwrap() > 64 << 20, "{report}");
    }
}

#[test]
fn a_simulated_guest_has_no_device_and_says_so() {
    let demo = ringferry(&[&["demo", "--guest", "threads", "--device-state", "1MiB"], &SMALL[..]].concat());
    assert_eq!(demo.code, Some(2), "{demo:?}");
    assert!(demo.stderr.contains("only a VM of KVM has one"), "{demo:?}");
}
