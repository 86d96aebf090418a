//! What `ringferry doctor` says of a machine, and of one where something is missing.

use crate::support::{ringferry, ringferry_as_nobody, ringferry_without_devices};
use ringferry_testvm::skip;
use serde_json::Value;

fn check<'a>(objects: &'a [Value], name: &str) -> &'a Value {
    objects.iter().find(|object| object["name"] == name).unwrap_or_else(|| panic!("no check of {name}"))
}

#[test]
fn every_check_has_all_its_fields_and_the_verdict_comes_last() {
    let objects = ringferry(&["doctor", "--json"]).objects();
    let (verdict, checks) = objects.split_last().unwrap();
    for check in checks {
        assert_eq!(check["kind"], "doctor_check");
        for field in ["group", "name", "status", "found", "needed_for"] {
            assert!(check[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {check}");
        }
        // Advice is given where something is wrong, and only there.
        assert_eq!(check["what_to_do"].is_string(), check["status"] != "ok", "{check}");
    }
    assert_eq!(verdict["kind"], "doctor_verdict");
}

#[test]
fn the_exit_code_says_whether_the_demo_can_run() {
    let run = ringferry(&["doctor", "--json"]);
    let demo = run.objects().last().unwrap()["demo"].clone();
    assert_eq!(run.code, Some(if demo == "missing" { 1 } else { 0 }), "{demo}");
}

#[test]
fn the_table_names_every_check_and_has_no_colours_off_a_terminal() {
    let table = ringferry(&["doctor"]).stdout;
    for check in ringferry(&["doctor", "--json"]).objects() {
        let name = check["name"].as_str().unwrap_or("tracking");
        assert!(table.contains(name), "{name} is not in:\n{table}");
    }
    assert!(!table.contains('\u{1b}'), "{table}");
}

#[test]
fn a_machine_without_dev_kvm_is_told_to_switch_virtualization_on_and_what_the_demo_does_instead() {
    let Some(run) = ringferry_without_devices(&["doctor", "--json"]) else {
        return skip("hiding /dev/kvm takes root");
    };
    let objects = run.objects();
    assert_missing(check(&objects, "/dev/kvm"), "does not exist");
    let (verdict, simulated) = (objects.last().unwrap(), check(&objects, "simulated guest"));
    assert_eq!((&verdict["tracking"], &verdict["migration"]), (&"missing".into(), &"missing".into()));
    assert_eq!(verdict["demo"], simulated["status"]);
    assert_ne!(verdict["demo"], "ok");
}

#[test]
fn a_user_who_may_not_open_dev_kvm_is_told_who_may() {
    let Some(run) = ringferry_as_nobody(&["doctor", "--json"]) else {
        return skip("becoming another user takes root");
    };
    if !std::path::Path::new("/dev/kvm").exists() {
        return skip("no /dev/kvm");
    }
    let objects = run.objects();
    assert_missing(check(&objects, "/dev/kvm"), "may not open it");
    assert_missing(check(&objects, "permission"), "no CAP_BPF");
    assert_eq!(objects.last().unwrap()["demo"], "missing");
    assert_eq!(run.code, Some(1));
}

fn assert_missing(check: &Value, found: &str) {
    assert_eq!(check["status"], "missing", "{check}");
    assert!(check["found"].as_str().unwrap().contains(found), "{check}");
    assert!(!check["what_to_do"].as_str().unwrap().is_empty(), "{check}");
}
