//! Signals: the first ends the work cleanly, in every command and state; a second ends the process at once.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{By, Guest, SMALL, SMALL_WORK, assert_failed, kvm, receive, whoever_migrates};
use crate::support::Running;

const ALL: [(Signal, &str); 4] =
    [(Signal::HUP, "SIGHUP"), (Signal::INT, "SIGINT"), (Signal::QUIT, "SIGQUIT"), (Signal::TERM, "SIGTERM")];

#[test]
fn each_signal_ends_a_running_guest_cleanly_and_says_what_a_second_one_does() {
    if !kvm() {
        return;
    }
    for (signal, name) in ALL {
        let guest = Guest::start();
        guest.run.signal(signal);
        let run = guest.run.end();
        assert_eq!(run.code, Some(0), "{name}: {run:?}");
        let said = format!(
            "stopping ({name}): the guest is checked, and ends; a second signal ends the process at once"
        );
        assert!(run.stderr.contains(&said), "{run:?}");
        assert!(!Path::new(&guest.monitor).exists(), "{name}: the socket file is left behind");
    }
}

#[test]
fn each_signal_ends_a_destination_that_waits() {
    if !kvm() {
        return;
    }
    for (signal, name) in ALL {
        let (receive, _) = receive(&[]);
        receive.signal(signal);
        assert_failed(&receive.end(), &[&format!("stopping ({name}): no VM is taken"), "cancelled"]);
    }
}

whoever_migrates! {
    each_signal_cancels_a_migration_of_run_and_then_ends_it_and_both_sides_know,
}

fn each_signal_cancels_a_migration_of_run_and_then_ends_it_and_both_sides_know(by: By) {
    if !kvm() {
        return;
    }
    for (signal, name) in ALL {
        let guest = Guest::small_for(by);
        let (receive, to) = receive(&[]);
        let send = guest.send_slowly(&to);
        guest.run.signal(signal);
        let told = if by.is_beside() { "the VMM lends its VM no more" } else { "cancelled" };
        assert_failed(&send.end(), &[told]);
        assert_failed(&receive.end(), &["the source ended the migration"]);
        let run = guest.run.end();
        assert_eq!(run.code, Some(0), "{name}: {run:?}");
        assert!(run.stderr.contains("the migration is cancelled, and the guest ends"), "{run:?}");
        assert!(!Path::new(&guest.monitor).exists(), "{name}: the socket file is left behind");
    }
}

#[test]
fn each_signal_cancels_the_migration_of_the_demo() {
    if !kvm() {
        return;
    }
    for (signal, name) in ALL {
        let slowly = ["--max-bandwidth", "200kB/s"];
        let mut demo = Running::start(&[&["demo"], &SMALL[..], &SMALL_WORK, &slowly].concat());
        demo.line_with("tracking is on");
        demo.signal(signal);
        let run = demo.end();
        assert_failed(&run, &[&format!("stopping ({name}): the migration is cancelled"), "cancelled"]);
        assert!(run.stdout.contains("the guest runs on at the source"), "{run:?}");
    }
}

#[test]
fn a_demo_whose_destination_dies_says_so_and_its_guest_runs_on() {
    if !kvm() {
        return;
    }
    let slowly = ["--max-bandwidth", "200kB/s"];
    let mut demo = Running::start(&[&["demo"], &SMALL[..], &SMALL_WORK, &slowly].concat());
    let migrating = demo.line_with("migrating to process");
    let destination = migrating.rsplit(' ').next().and_then(|pid| Pid::from_raw(pid.parse().ok()?)).unwrap();
    demo.line_with("tracking is on");
    kill_process(destination, Signal::KILL).unwrap();
    let run = demo.end();
    assert_failed(&run, &["error: "]);
    assert!(run.stdout.contains("the guest runs on at the source"), "{run:?}");
}

#[test]
fn a_second_signal_ends_the_process_at_once_with_its_own_number() {
    let directory = tempfile::tempdir().unwrap();
    for (signal, _) in ALL {
        let monitor = directory.path().join(signal.as_raw().to_string());
        // A `run` that takes the request, and the cancellation, and says nothing.
        let silent = UnixListener::bind(&monitor).unwrap();
        let send = Running::start(&["send", "--monitor", monitor.to_str().unwrap(), "--to", "127.0.0.1:1"]);
        let (mut client, _) = silent.accept().unwrap();
        let mut said = String::new();
        let mut byte = [0];
        send.signal(signal);
        while !said.contains("cancel") {
            assert_eq!(client.read(&mut byte).unwrap(), 1, "{said}");
            said.push(char::from(byte[0]));
        }
        send.signal(signal);
        assert_eq!(send.end().code, Some(128 + signal.as_raw()));
    }
}

#[test]
fn a_second_signal_leaves_no_socket_file_behind() {
    if !kvm() {
        return;
    }
    Guest::start().end_by_two_signals();
}

#[test]
fn a_guest_that_was_started_to_outlive_its_terminal_outlives_it() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
    let run = [&["run", "--monitor", &monitor], &SMALL[..], &SMALL_WORK].concat();
    let mut run = Running::start_without_hangup(&run);
    run.line_with("steps: ");
    run.signal(Signal::HUP);
    run.line_with("steps: ");
    run.line_with("steps: ");
    run.interrupt();
    assert_eq!(run.end().code, Some(0));
}
