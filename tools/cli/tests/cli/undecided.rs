//! The control connection breaks between `Commit` and `Running`: `ringferry run` holds the VM until somebody has found out
//! where it runs, and has said so.

use std::path::Path;

use rustix::process::Signal;

use crate::control_proxy::{Fault, Proxied, proxy};
use crate::guest::{By, Guest, assert_consistent, assert_failed, kvm, receive, whoever_migrates};
use crate::support::{Running, ringferry};

whoever_migrates! {
    a_vm_that_its_destination_does_not_run_is_held_and_kept_and_can_migrate_again,
    a_vm_that_its_destination_runs_is_dropped_and_run_ends,
    a_destination_that_never_reads_commit_says_that_it_does_not_run_the_vm_and_nobody_has_to_decide,
}

/// A guest whose migration has ended unconfirmed, because `message` did not arrive; and its destination.
fn undecided(by: By, message: &'static str, fault: Fault) -> (Guest, Running) {
    let mut guest = Guest::small_for(by);
    let (receive, to) = receive(&[]);
    let proxied = proxy(to.parse().unwrap(), Proxied { fault: Some((message, fault)), ..Proxied::default() })
        .to_string();
    let send = ringferry(&[&guest.send(&proxied)[..], &["--json"]].concat());
    let object = send.objects().pop().unwrap();
    assert_eq!(object["kind"], "unconfirmed", "{object}");
    let of_vmm =
        ["did not confirm that it runs", "`ringferry resolve --keep", "`ringferry resolve --drop", &proxied];
    // The process beside it knows nothing of the VMM's commands.
    let told = if by.is_beside() { &["did not confirm"][..] } else { &of_vmm };
    assert_failed(&send, &told[..told.len().min(3)]);
    for part in told {
        assert!(object["message"].as_str().unwrap().contains(part), "{object}");
    }
    let told = guest.run.line_with("`ringferry resolve --keep");
    assert!(told.contains(&guest.monitor), "{told}");
    (guest, receive)
}

fn resolve(guest: &Guest, decision: &str) -> crate::support::Outcome {
    ringferry(&["resolve", decision, "--monitor", &guest.monitor])
}

fn a_vm_that_its_destination_does_not_run_is_held_and_kept_and_can_migrate_again(by: By) {
    if !kvm() {
        return;
    }
    for fault in [Fault::Cut, Fault::Half] {
        let (mut guest, receive) = undecided(by, "Commit", fault);
        assert_failed(&receive.end(), &["error: "]);
        let adjusted = ringferry(&["adjust", "--monitor", &guest.monitor, "--downtime-limit", "1s"]);
        assert_failed(&adjusted, &["was not confirmed", "ringferry resolve"]);
        let again = ringferry(&["send", "--monitor", &guest.monitor, "--to", "127.0.0.1:1"]);
        assert_failed(&again, &["was not confirmed", "ringferry resolve"]);
        let kept = resolve(&guest, "--keep");
        assert_eq!(
            (kept.code, kept.stdout.as_str()),
            (Some(0), "the VM is kept: it runs on here\n"),
            "{kept:?}"
        );
        guest.assert_runs();
        assert_failed(&resolve(&guest, "--drop"), &["nothing to decide"]);
        guest.assert_moves();
    }
}

fn a_vm_that_its_destination_runs_is_dropped_and_run_ends(by: By) {
    if !kvm() {
        return;
    }
    let (guest, mut receive) = undecided(by, "Running", Fault::Cut);
    receive.line_with("received");
    assert_eq!(resolve(&guest, "--drop").code, Some(0));
    let run = guest.run.end();
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stdout.contains("the VM is dropped"), "{run:?}");
    assert!(!Path::new(&guest.monitor).exists(), "the socket file is left behind");
    receive.interrupt();
    assert_consistent(&receive.end());
}

#[test]
fn a_signal_does_not_end_a_vm_that_may_run_nowhere_else_and_a_second_one_does() {
    if !kvm() {
        return;
    }
    let (mut guest, receive) = undecided(By::Vmm, "Commit", Fault::Cut);
    drop(receive);
    guest.run.signal(Signal::TERM);
    // It answers still, and the signal is forgotten once the VM is kept.
    assert_eq!(resolve(&guest, "--keep").code, Some(0));
    guest.assert_runs();
    guest.run.interrupt();
    let run = guest.run.end();
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("stopping (SIGTERM): the VM is still held here"), "{run:?}");

    let (guest, receive) = undecided(By::Vmm, "Commit", Fault::Cut);
    drop(receive);
    guest.end_by_two_signals();
}

fn a_destination_that_never_reads_commit_says_that_it_does_not_run_the_vm_and_nobody_has_to_decide(by: By) {
    if !kvm() {
        return;
    }
    let guest = Guest::small_for(by);
    let (receive, to) = receive(&["--peer-timeout", "1s"]);
    let proxied =
        proxy(to.parse().unwrap(), Proxied { fault: Some(("Commit", Fault::Stall)), ..Proxied::default() })
            .to_string();
    assert_failed(&ringferry(&guest.send(&proxied)), &["the destination ended the migration"]);
    assert_failed(&receive.end(), &["silent"]);
    guest.assert_runs_on();
}

#[test]
fn there_is_nothing_to_decide_on_a_vm_that_has_not_migrated_and_a_decision_is_one_of_two() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    assert_failed(&resolve(&guest, "--keep"), &["nothing to decide"]);
    guest.assert_runs_on();
    for decisions in [&["resolve"][..], &["resolve", "--keep", "--drop"]] {
        assert_eq!(ringferry(decisions).code, Some(2));
    }
}
