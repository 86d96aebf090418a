//! What `ringferry receive` takes: VMs as their sources describe them, several at once, and nothing that it cannot build.

use std::io::Write;
use std::net::TcpStream;

use ringferry::wire::control::Message;
use ringferry::wire::hello::Hello;

use crate::guest::{By, Guest, SMALL, SMALL_WORK, assert_failed, kvm, receive, whoever_migrates};
use crate::support::{Running, ringferry};

whoever_migrates! {
    a_vm_that_the_destination_has_no_room_for_is_refused_on_both_sides_and_the_next_one_is_taken,
    three_vms_arrive_at_one_port_at_once_and_a_fourth_hears_who_is_there,
    a_second_source_hears_that_the_destination_is_busy_while_a_vm_is_on_its_way,
}

fn a_vm_that_the_destination_has_no_room_for_is_refused_on_both_sides_and_the_next_one_is_taken(by: By) {
    if !kvm() {
        return;
    }
    let (mut receive, address) = receive(&["--memory-max", "64MiB", "--run-for", "100ms"]);
    let vm = ["--memory", "128MiB", "--vcpus", "2", "--name", "large"];
    let large = Guest::start_for(by, &vm, &SMALL_WORK);
    assert_failed(&ringferry(&large.send(&address)), &["128 MiB of RAM", "64 MiB are left", "--memory-max"]);
    let refused = receive.line_with("refused");
    assert!(refused.contains(r#""vm_id":"large""#) && refused.contains("128 MiB of RAM"), "{refused}");
    large.assert_runs_on();
    let small = Guest::small_for(by);
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

fn three_vms_arrive_at_one_port_at_once_and_a_fourth_hears_who_is_there(by: By) {
    if !kvm() {
        return;
    }
    let (mut receive, address) = receive(&["--vms", "3"]);
    let names = ["a", "b", "c"];
    let named = |name| Guest::start_for(by, &SMALL, &[&SMALL_WORK[..], &["--name", name]].concat());
    let guests = names.map(named);
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
    let fourth = named("d");
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

fn a_second_source_hears_that_the_destination_is_busy_while_a_vm_is_on_its_way(by: By) {
    if !kvm() {
        return;
    }
    let (receive, address) = receive(&["--run-for", "100ms"]);
    let first = Guest::start_for(by, &SMALL, &[&SMALL_WORK[..], &["--name", "web-7"]].concat());
    let second = Guest::small_for(by);
    // Three seconds.
    let slowly = ["--max-bandwidth", "4MB/s"];
    let mut send = Running::start(&[&first.send(&address)[..], &slowly].concat());
    send.line_with("tracking is on");
    assert_failed(&ringferry(&second.send(&address)), &["busy with web-7"]);
    second.assert_runs_on();
    assert_eq!(send.end().code, Some(0));
    assert_eq!(receive.end().code, Some(0));
}
