//! A migration process beside the VMM: it moves the guest as the VMM would, and whichever of the two dies, nothing is lost.

use std::thread;
use std::time::{Duration, Instant};

use ringferry::offload::connect;
use ringferry_testvm::skip;
use rustix::process::{Signal, geteuid};
use serde_json::Value;

use crate::control_proxy::{Fault, Proxied, proxy};
use crate::guest::{
    By, Guest, SMALL, SMALL_WORK, assert_consistent, assert_failed, kvm, receive, receive_beside,
};
use crate::support::{Running, ringferry};

/// A guest that is migrated beside its VMM.
fn lent(vm: &[&str], more: &[&str]) -> Guest {
    Guest::start_for(By::Beside, vm, more)
}

fn small() -> Guest {
    Guest::small_for(By::Beside)
}

/// `ringferry offload send` through a proxy that swallows everything from `message` on.
fn stalled_at(lent: &Guest, to: &str, message: &'static str, more: &[&str]) -> Running {
    let fault = Some((message, Fault::Stall));
    let through = proxy(to.parse().unwrap(), Proxied { fault, ..Proxied::default() }).to_string();
    Running::start(&[&lent.send(&through)[..], more].concat())
}

#[test]
fn a_guest_with_a_device_moves_by_an_offload_process_and_finds_every_write_of_its_own() {
    if !kvm() {
        return;
    }
    let vm = ["--memory", "96MiB", "--vcpus", "2", "--regions", "3", "--name", "vm-7"];
    let lent = lent(&vm, &[&SMALL_WORK[..], &["--device-state", "4MiB", "--kvmclock"]].concat());
    let (receive, to) = receive(&["--run-for", "200ms"]);
    let send = ringferry(&[&lent.send(&to)[..], &["--verify", "--json"]].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    let report = send.objects().pop().unwrap();
    assert_eq!((&report["backend"], &report["ram_digest_match"]), (&"ring".into(), &true.into()), "{report}");
    assert_eq!(report["vcpus"].as_array().map(Vec::len), Some(2), "{report}");
    assert_eq!(lent.run.end().code, Some(0));
    let received = receive.end();
    assert!(received.stdout.contains("vm-7"), "{received:?}");
    assert_consistent(&received);
}

#[test]
fn both_ends_of_a_migration_may_be_offloaded() {
    if !kvm() {
        return;
    }
    let lent = lent(&SMALL, &[&SMALL_WORK[..], &["--device-state", "1MiB"]].concat());
    let (vmm, bring, to) = receive_beside(&["--run-for", "200ms"]);
    let send = ringferry(&[&lent.send(&to)[..], &["--verify", "--json"]].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    assert_eq!(send.objects().last().unwrap()["ram_digest_match"], true);
    assert_eq!(bring.end().code, Some(0));
    assert_consistent(&vmm.end());
}

#[test]
fn vcpus_with_full_rings_are_served_from_the_other_process() {
    if !kvm() {
        return;
    }
    let work = ["--fill", "8MiB", "--work", "each=pattern:random,ws:24MiB", "--ring-entries", "1024"];
    let lent = lent(&["--memory", "128MiB", "--vcpus", "2"], &work);
    let (receive, to) = receive(&["--run-for", "100ms"]);
    let slowly = ["--json", "--verify", "--max-bandwidth", "20MB/s", "--policy", "none", "--max-rounds", "3"];
    let send = ringferry(&[&lent.send(&to)[..], &slowly].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    let report = send.objects().pop().unwrap();
    assert_eq!(report["ram_digest_match"], true, "{report}");
    let full = |vcpu: &Value| vcpu["ring_full_exits"].as_u64().unwrap();
    assert!(report["vcpus"].as_array().unwrap().iter().map(full).sum::<u64>() > 0, "{report}");
    assert_eq!(lent.run.end().code, Some(0));
    assert_consistent(&receive.end());
}

#[test]
fn a_guest_that_dirties_too_fast_is_throttled_from_the_other_process() {
    if !kvm() {
        return;
    }
    let work = ["--fill", "8MiB", "--work", "each=pattern:random,ws:48MiB"];
    let lent = lent(&["--memory", "128MiB", "--vcpus", "1"], &work);
    let (receive, to) = receive(&["--run-for", "100ms"]);
    let terms = ["--json", "--max-bandwidth", "40MB/s", "--switchover-bandwidth", "40MB/s"];
    let send = ringferry(&[&lent.send(&to)[..], &terms].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    let report = send.objects().pop().unwrap();
    assert!(report["vcpus"][0]["throttled_ms"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(lent.run.end().code, Some(0));
    assert_consistent(&receive.end());
}

#[test]
fn a_destination_that_dies_leaves_the_guest_with_its_vmm() {
    if !kvm() {
        return;
    }
    let mut lent = small();
    let (mut receive, to) = receive(&[]);
    let send = lent.send_slowly(&to);
    receive.signal(Signal::KILL);
    assert!(!send.end().stderr.is_empty());
    let _ = receive.is_alive();
    lent.run.line_with("the guest runs on here");
    lent.assert_runs();
    lent.assert_moves();
}

#[test]
fn an_offload_process_that_is_killed_before_commit_leaves_the_guest_running_and_whole() {
    if !kvm() {
        return;
    }
    let slowly = ["--max-bandwidth", "200kB/s"];
    // Before tracking, while the guest runs, and while it stands still.
    for (message, terms, phase) in [
        ("Accept", &[][..], None),
        ("never", &slowly, Some("tracking is on")),
        ("Prepare", &[], Some("stands still")),
    ] {
        let mut lent = small();
        let (receive, to) = receive(&[]);
        let mut send = stalled_at(&lent, &to, message, terms);
        match phase {
            Some(phase) => drop(send.line_with(phase)),
            None => thread::sleep(Duration::from_millis(300)),
        }
        thread::sleep(Duration::from_millis(100));
        send.signal(Signal::KILL);
        let told = lent.run.line_with("the guest runs on here");
        assert!(told.contains("the offload process has ended"), "{message}: {told}");
        drop(receive);
        lent.assert_runs();
        lent.assert_moves();
    }
}

#[test]
fn an_offload_process_that_is_killed_in_the_middle_of_taking_entries_loses_no_page_of_the_next_migration() {
    if !kvm() {
        return;
    }
    let work = ["--fill", "8MiB", "--work", "each=pattern:random,ws:24MiB", "--ring-entries", "4096"];
    let mut lent = lent(&["--memory", "128MiB", "--vcpus", "2"], &work);
    for kill in 0..4_u64 {
        let (receive, to) = receive(&[]);
        let slowly = ["--max-bandwidth", "10MB/s", "--policy", "none"];
        let mut send = Running::start(&[&lent.send(&to)[..], &slowly].concat());
        send.line_with("tracking is on");
        thread::sleep(Duration::from_millis(20 + 37 * kill));
        send.signal(Signal::KILL);
        lent.run.line_with("the guest runs on here");
        drop(receive);
    }
    lent.assert_runs();
    lent.assert_moves();
}

#[test]
fn an_offload_process_that_is_killed_after_commit_leaves_a_vm_that_somebody_has_to_decide_on() {
    if !kvm() {
        return;
    }
    for (message, decision) in [("Commit", "--keep"), ("Running", "--drop")] {
        let mut lent = small();
        let (mut receive, to) = receive(&["--run-for", "30s"]);
        let mut send = stalled_at(&lent, &to, message, &[]);
        send.line_with("stands still");
        // Until `Commit` has been sent.
        thread::sleep(Duration::from_millis(700));
        send.signal(Signal::KILL);
        let told = lent.run.line_with("ringferry resolve --keep");
        assert!(told.contains("nobody confirmed that it runs"), "{told}");
        let resolve = ringferry(&["resolve", decision, "--monitor", &lent.monitor]);
        assert_eq!(resolve.code, Some(0), "{resolve:?}");
        if decision == "--keep" {
            lent.assert_runs();
            drop(receive);
            lent.assert_moves();
        } else {
            assert_eq!(lent.run.end().code, Some(0));
            receive.line_with("received");
            receive.interrupt();
            assert_consistent(&receive.end());
        }
    }
}

#[test]
fn an_offload_process_that_freezes_is_given_up_and_tracking_waits_until_it_is_gone() {
    if !kvm() {
        return;
    }
    let mut lent = small();
    let (receive, to) = receive(&[]);
    let send = lent.send_slowly(&to);
    send.signal(Signal::STOP);
    let since = Instant::now();
    let told = lent.run.line_with("the guest runs on here");
    assert!(told.contains("said nothing for 5 s"), "{told}");
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    drop(receive);
    lent.assert_runs();
    // It could still take entries.
    let (receive, to) = crate::guest::receive(&[]);
    assert_failed(&ringferry(&lent.send(&to)), &["another process migrates this VM"]);
    drop(receive);
    send.signal(Signal::KILL);
    send.end();
    lent.assert_moves();
}

#[test]
fn an_offload_process_that_freezes_while_the_guest_stands_still_costs_the_guest_a_second_and_a_little() {
    if !kvm() {
        return;
    }
    let mut lent = small();
    let (receive, to) = receive(&[]);
    let patiently = ["--standstill-floor", "30s"];
    let mut send = stalled_at(&lent, &to, "Prepare", &patiently);
    send.line_with("stands still");
    thread::sleep(Duration::from_millis(300));
    send.signal(Signal::STOP);
    let since = Instant::now();
    let told = lent.run.line_with("the guest runs on here");
    assert!(told.contains("said nothing for 1 s"), "{told}");
    assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
    drop(receive);
    lent.assert_runs();
    send.signal(Signal::KILL);
    send.end();
    lent.assert_moves();
}

#[test]
fn an_offload_process_whose_vmm_dies_ends_with_an_error_and_so_does_the_destination() {
    if !kvm() {
        return;
    }
    let lent = small();
    let (receive, to) = receive(&[]);
    let send = lent.send_slowly(&to);
    lent.run.signal(Signal::KILL);
    let since = Instant::now();
    assert_failed(&send.end(), &["the VMM lends its VM no more"]);
    assert_failed(&receive.end(), &["error: "]);
    // The pages would have taken a minute.
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
}

#[test]
fn a_vmm_whose_offload_process_dies_while_a_vm_comes_does_not_run_it() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let (vmm, bring, to) = receive_beside(&[]);
    let send = guest.send_slowly(&to);
    bring.signal(Signal::KILL);
    assert_failed(&vmm.end(), &["the offload process has ended"]);
    assert_eq!(send.end().code, Some(1));
    guest.assert_runs_on();
}

#[test]
fn strangers_at_the_socket_are_turned_away_and_the_guest_does_not_notice() {
    if !kvm() {
        return;
    }
    let mut lent = small();
    for packet in [&b"GET / HTTP/1.1"[..], &[1, 9, 0, 9, 0, 0], &[1, 1, 0, 1, 0, 1], &[33], &[255; 70_000]] {
        let socket = connect(lent.socket.as_ref()).unwrap();
        rustix::net::send(&socket, packet, rustix::net::SendFlags::NOSIGNAL).unwrap();
        lent.run.line_with("the guest runs on here: ");
    }
    lent.assert_runs();
    lent.assert_moves();
}

#[test]
fn a_socket_may_be_inherited_by_an_offload_process_that_could_not_open_it() {
    if !kvm() {
        return;
    }
    let lent = small();
    let (receive, to) = receive(&["--run-for", "100ms"]);
    let socket = connect(lent.socket.as_ref()).unwrap();
    let send =
        Running::start_inheriting(&["offload", "send", "--fd", "40", "--to", &to, "--verify"], &socket);
    drop(socket);
    let send = send.end();
    assert_eq!(send.code, Some(0), "{send:?}");
    assert_eq!(lent.run.end().code, Some(0));
    assert_consistent(&receive.end());
    let nothing = ringferry(&["offload", "send", "--fd", "77", "--to", &to]);
    assert_failed(&nothing, &["descriptor 77 was not inherited"]);
}

#[test]
fn an_offload_process_needs_no_rights_once_it_is_connected() {
    if !kvm() {
        return;
    }
    if !geteuid().is_root() {
        return skip("becoming another user takes root");
    }
    let lent = small();
    let (mut receive, to) = receive(&[]);
    let as_nobody = ["--user", "65534:65534", "--json", "--verify"];
    let send = ringferry(&[&lent.send(&to)[..], &as_nobody].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    assert_eq!(send.objects().last().unwrap()["ram_digest_match"], true, "{send:?}");
    assert_eq!(lent.run.end().code, Some(0));
    receive.line_with("received");
    receive.interrupt();
    assert_consistent(&receive.end());
}

#[test]
fn memory_that_no_descriptor_names_cannot_be_lent_and_run_says_so() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [monitor, socket] =
        ["monitor", "offload"].map(|name| directory.path().join(name).to_str().unwrap().to_owned());
    let run = ["run", "--monitor", &monitor, "--offload", &socket, "--backing", "anonymous"];
    assert_failed(
        &ringferry(&[&run[..], &SMALL].concat()),
        &["anonymous memory has none", "--backing memfd"],
    );
}
