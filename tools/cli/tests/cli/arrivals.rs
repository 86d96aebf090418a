//! What `ringferry receive` takes: VMs as their sources describe them, several at once, and nothing that it cannot build.

use std::io::Write;
use std::net::TcpStream;

use ringferry::wire::control::Message;
use ringferry::wire::hello::Hello;

use crate::guest::{Guest, SMALL_WORK, assert_failed, kvm, receive};
use crate::support::{Running, ringferry};

#[test]
fn a_vm_that_the_destination_has_no_room_for_is_refused_on_both_sides_and_the_next_one_is_taken() {
    if !kvm() {
        return;
    }
    let (mut receive, address) = receive(&["--memory-max", "64MiB", "--run-for", "100ms"]);
    let large = Guest::start_as(&["--memory", "128MiB", "--vcpus", "2", "--name", "large"], &SMALL_WORK);
    assert_failed(&ringferry(&large.send(&address)), &["128 MiB of RAM", "64 MiB are left", "--memory-max"]);
    let refused = receive.line_with("refused");
    assert!(refused.contains(r#""vm_id":"large""#) && refused.contains("128 MiB of RAM"), "{refused}");
    large.assert_runs_on();
    let small = Guest::start();
    assert_eq!(ringferry(&small.send(&address)).code, Some(0));
    assert_eq!(small.run.end().code, Some(0));
    assert_eq!(receive.end().code, Some(0));
}

#[test]
fn strangers_and_sources_that_describe_nothing_do_not_keep_an_honest_one_out() {
    if !kvm() {
        return;
    }
    let (receive, address) = receive(&["--run-for", "100ms"]);
    let connect = || TcpStream::connect(&address).unwrap();
    drop(connect());
    connect().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let silent = connect();
    let description = b"\x1b[2J no description".to_vec();
    let nothing = Hello { page_bytes: 4096, vcpus: 1, channels: 1, description, ..Hello::default() };
    let mut source = connect();
    source.write_all(&Message::Hello(nothing).encode().unwrap()).unwrap();
    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut source, &mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("no description of one"), "{answer}");
    let guest = Guest::start();
    let sent = ringferry(&guest.send(&address));
    assert_eq!(sent.code, Some(0), "{sent:?}");
    let received = receive.end();
    assert_eq!(received.code, Some(0), "{received:?}");
    assert!(!received.stdout.contains('\u{1b}'), "{received:?}");
    drop(silent);
}

#[test]
fn three_vms_arrive_at_one_port_at_once_and_a_fourth_hears_who_is_there() {
    if !kvm() {
        return;
    }
    let (mut receive, address) = receive(&["--vms", "3"]);
    let names = ["a", "b", "c"];
    let guests = names.map(|name| Guest::start_with(&["--name", name]));
    let sends: Vec<Running> = guests.iter().map(|guest| Running::start(&guest.send(&address))).collect();
    for send in sends {
        let sent = send.end();
        assert_eq!(sent.code, Some(0), "{sent:?}");
    }
    for _ in names {
        receive.line_with("received");
    }
    for guest in guests {
        assert_eq!(guest.run.end().code, Some(0));
    }
    let fourth = Guest::start_with(&["--name", "d"]);
    assert_failed(&ringferry(&fourth.send(&address)), &["busy with ", "a", "b", "c"]);
    fourth.assert_runs_on();
    receive.interrupt();
    let received = receive.end();
    assert_eq!(received.code, Some(0), "{received:?}");
    let objects = received.objects();
    for name in names {
        let of_vm = |kind: &str| {
            let found = objects.iter().find(|object| object["kind"] == kind && object["vm_id"] == name);
            found.unwrap_or_else(|| panic!("no {kind} of {name} in {objects:?}"))
        };
        of_vm("received");
        assert_eq!(of_vm("checked")["guest_consistent"], true);
    }
}

#[test]
fn a_second_source_hears_that_the_destination_is_busy_while_a_vm_is_on_its_way() {
    if !kvm() {
        return;
    }
    let (receive, address) = receive(&["--run-for", "100ms"]);
    let (first, second) = (Guest::start_with(&["--name", "web-7"]), Guest::start());
    let slowly = ["--max-bandwidth", "200kB/s"];
    let mut send = Running::start(&[&first.send(&address)[..], &slowly].concat());
    send.line_with("tracking is on");
    assert_failed(&ringferry(&second.send(&address)), &["busy with web-7"]);
    second.assert_runs_on();
    let faster = ringferry(&["adjust", "--monitor", &first.monitor, "--max-bandwidth", "1GB/s"]);
    assert_eq!(faster.code, Some(0), "{faster:?}");
    assert_eq!(send.end().code, Some(0));
    assert_eq!(receive.end().code, Some(0));
}
