//! Nobody takes what the program says: a full disk, a reader that sleeps. No VM ends or stands still because of that, and
//! the exit code tells it.

use std::process::Stdio;

use crate::guest::{Guest, SMALL, SMALL_WORK, assert_failed, closed_port, kvm};
use crate::support::{Running, full_disk, full_pipe, ringferry, ringferry_arranged, ringferry_writing_to};

/// A guest moves, and neither side can write to its standard output.
fn a_guest_moves_between_sides_that_write_to(stdout: impl Fn() -> Stdio, why: &str) {
    let directory = tempfile::tempdir().unwrap();
    let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
    let run = [&["run", "--monitor", &monitor], &SMALL[..], &SMALL_WORK].concat();
    let run = Running::start_writing_to(&run, stdout());
    let to = closed_port();
    let mut receive = Running::start_writing_to(&["receive", "--listen", &to], stdout());
    let send = ["send", "--verify", "--monitor", &monitor, "--to", &to];
    // Neither side can say when it is ready.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let sent = loop {
        let sent = ringferry(&send);
        let is_early = sent.stderr.contains("no `ringferry run` answers")
            || sent.stderr.contains("is `ringferry receive` running there?");
        if !is_early || std::time::Instant::now() > deadline {
            break sent;
        }
    };
    assert_eq!(sent.code, Some(0), "{sent:?}");
    assert!(sent.stdout.contains("RAM digests are equal"), "{sent:?}");
    let lost = ["standard output could not be written: ", why, "lost"];
    assert_failed(&run.end(), &lost);
    assert!(receive.is_alive(), "the VM exists nowhere");
    receive.interrupt();
    let received = receive.end();
    assert_failed(&received, &lost);
    assert!(!received.stderr.contains("error: "), "{received:?}");
}

#[test]
fn a_guest_moves_although_neither_side_has_room_for_its_output() {
    if kvm() {
        a_guest_moves_between_sides_that_write_to(|| full_disk().into(), "No space left");
    }
}

#[test]
fn a_guest_moves_although_nobody_reads_what_either_side_says() {
    if kvm() {
        let (_asleep, pipe) = full_pipe();
        a_guest_moves_between_sides_that_write_to(|| pipe.try_clone().unwrap().into(), "nothing was taken");
    }
}

#[test]
fn the_demo_moves_its_guest_although_its_output_is_lost() {
    if !kvm() {
        return;
    }
    let (_asleep, pipe) = full_pipe();
    let demo = [&["demo"], &SMALL[..], &SMALL_WORK].concat();
    for (stdout, why) in
        [(Stdio::from(full_disk()), "No space left"), (Stdio::from(pipe), "nothing was taken")]
    {
        let run = ringferry_writing_to(&demo, stdout);
        assert_failed(&run, &["standard output could not be written: ", why]);
        assert!(!run.stderr.contains("error: "), "{run:?}");
    }
}

#[test]
fn logs_that_nobody_takes_cost_neither_the_demo_nor_its_exit_code() {
    if !kvm() {
        return;
    }
    let (_asleep, pipe) = full_pipe();
    let demo = [&["demo", "-vvv"], &SMALL[..], &SMALL_WORK].concat();
    for stderr in [Stdio::from(full_disk()), Stdio::from(pipe)] {
        let run = ringferry_arranged(&demo, |command| command.stderr(stderr));
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(run.stdout.contains("the guest found every write of its own"), "{run:?}");
    }
}

#[test]
fn an_error_that_nobody_takes_is_still_an_exit_code() {
    let (_asleep, pipe) = full_pipe();
    for stderr in [Stdio::from(full_disk()), Stdio::from(pipe)] {
        let send = ["send", "--monitor", "/no/such/monitor", "--to", "127.0.0.1:1"];
        assert_eq!(ringferry_arranged(&send, |command| command.stderr(stderr)).code, Some(1));
    }
}

#[test]
fn a_reader_of_a_running_guest_that_goes_away_is_no_failure() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let reader_gone = std::io::pipe().unwrap().1;
    let to = closed_port();
    let receive = ["receive", "--listen", &to, "--run-for", "100ms"];
    let receive = Running::start_writing_to(&receive, reader_gone);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(ringferry(&guest.send(&to)).code, Some(0));
    let received = receive.end();
    assert_eq!((received.code, received.stderr.as_str()), (Some(0), ""));
}
