//! Clients of the monitor socket that are silent, talk nonsense or read nothing: none of them holds up the VM, its
//! migration, or another client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::guest::{Guest, kvm, receive};
use crate::support::{Running, ringferry};

#[test]
fn silent_clients_hold_up_neither_the_guest_nor_a_migration_nor_an_adjustment_nor_a_signal() {
    if !kvm() {
        return;
    }
    let mut guest = Guest::start();
    let silent = || -> Vec<_> { (0..4).map(|_| UnixStream::connect(&guest.monitor).unwrap()).collect() };
    let before = silent();
    guest.assert_runs();
    let (receive, to) = receive(&["--run-for", "100ms"]);
    let slowly = ["--max-bandwidth", "200kB/s"];
    let mut send = Running::start(&[&guest.send(&to)[..], &slowly].concat());
    send.line_with("tracking is on");
    let during: Vec<_> = (0..4).map(|_| UnixStream::connect(&guest.monitor).unwrap()).collect();
    let adjusted = ringferry(&["adjust", "--monitor", &guest.monitor, "--max-bandwidth", "1GB/s"]);
    assert_eq!(adjusted.code, Some(0), "{adjusted:?}");
    assert_eq!(send.end().code, Some(0));
    assert_eq!(guest.run.end().code, Some(0));
    assert_eq!(receive.end().code, Some(0));
    drop((before, during));
}

#[test]
fn a_signal_ends_a_guest_while_a_silent_client_is_connected() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let _silent = UnixStream::connect(&guest.monitor).unwrap();
    guest.run.interrupt();
    assert_eq!(guest.run.end().code, Some(0));
    assert!(!Path::new(&guest.monitor).exists());
}

#[test]
fn a_client_that_asks_for_a_migration_and_reads_nothing_does_not_hold_it_up() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let (receive, to) = receive(&["--run-for", "100ms"]);
    let mut client = UnixStream::connect(&guest.monitor).unwrap();
    let migrate = format!(
        r#"{{"migrate":{{"to":"{to}","args":{{"channels":1,"channel":[],"verify":true,"terms":{{}}}}}}}}"#
    );
    client.write_all(migrate.as_bytes()).unwrap();
    client.write_all(b"\n").unwrap();
    let received = receive.end();
    assert_eq!(received.code, Some(0), "{received:?}");
    let mut answers = String::new();
    client.read_to_string(&mut answers).unwrap();
    assert!(answers.lines().last().unwrap().starts_with(r#"{"report":"#), "{answers}");
    assert_eq!(guest.run.end().code, Some(0));
}

#[test]
fn clients_that_talk_nonsense_or_without_end_are_turned_away_and_the_guest_runs_on() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    for request in
        [&b"\n"[..], b"\x1b[2J\n", b"{\"migrate\":{}}\n", &[b'['; 100 << 10], b"{\"cancel\":null}\n"]
    {
        let mut client = UnixStream::connect(&guest.monitor).unwrap();
        // It may be turned away before it has said all.
        let _ = client.write_all(request);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    guest.assert_runs_on();
}

#[test]
fn more_clients_than_there_are_places_cost_the_guest_nothing() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let clients: Vec<_> = (0..40).filter_map(|_| UnixStream::connect(&guest.monitor).ok()).collect();
    assert_eq!(clients.len(), 40);
    guest.assert_runs_on();
}
