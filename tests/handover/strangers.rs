//! Whoever connects to a destination and is no source of ours.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use ringferry::destination::{Destination, DestinationError, DestinationOptions, ListenOptions};
use ringferry::source::SourceError;
use ringferry::wire::control::Message;
use ringferry::wire::hello::Hello;
use ringferry::wire::reason::Reason;

use crate::world::{NEVER, TestVm, World, read_all};

fn bind(vms: usize) -> (Destination, SocketAddr) {
    let listen = ListenOptions { vms, ..ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0))) };
    let destination = Destination::bind(listen).unwrap();
    let address = destination.local_addr().unwrap();
    (destination, address)
}

#[test]
fn strangers_neither_end_a_destination_nor_stand_in_an_honest_sources_way() {
    let (destination, address) = bind(1);
    let connect = || TcpStream::connect(address).unwrap();
    drop(connect());
    let mut noise = connect();
    noise.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut out_of_turn = connect();
    out_of_turn.write_all(&Message::Commit.encode().unwrap()).unwrap();
    let silent: Vec<TcpStream> = (0..100).map(|_| connect()).collect();
    let mut world = World::new();
    thread::scope(|scope| {
        let (vm, memory) = (&mut world.destination_vm, world.destination_ram.memory());
        let receiving = scope.spawn(move || {
            let incoming = destination.accept(Some(Duration::from_secs(20)), &NEVER)?;
            incoming.receive(vm, 1, memory, &DestinationOptions::default(), &NEVER)
        });
        let mut source = World::new();
        source.source_ram = std::sync::Arc::clone(&world.source_ram);
        source.send_to(address).unwrap();
        receiving.join().unwrap().unwrap();
    });
    drop(silent);
    assert!(world.destination_runs());
}

#[test]
fn a_second_source_hears_that_the_destination_is_busy_and_with_what() {
    let (destination, address) = bind(1);
    let hello = |id: &str| {
        let vm_id = id.to_owned();
        let hello = Hello { page_bytes: 4096, vcpus: 1, channels: 1, vm_id, ..Hello::default() };
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&Message::Hello(hello).encode().unwrap()).unwrap();
        stream
    };
    let _first = hello("web-7");
    let incoming = destination.accept(Some(Duration::from_secs(20)), &NEVER).unwrap();
    assert_eq!(incoming.vm_id(), "web-7");
    let mut world = World::new();
    let error = world.send_to(address).unwrap_err();
    let SourceError::Refused { reason: Reason::Busy, text } = &error else { panic!("{error}") };
    assert_eq!(text, "busy with web-7");
    assert!(world.source_runs());
    // The seat is free again when the first has gone.
    let refused = incoming.refuse(Reason::Unbuildable, "not today".into());
    assert!(matches!(refused, DestinationError::Refused { reason: Reason::Unbuildable, .. }));
    let _next = hello("web-8");
    assert_eq!(destination.accept(Some(Duration::from_secs(20)), &NEVER).unwrap().vm_id(), "web-8");
}

#[test]
fn one_port_takes_several_vms_at_once() {
    let (destination, address) = bind(3);
    thread::scope(|scope| {
        let receiving: Vec<_> = (0..3)
            .map(|_| {
                let destination = &destination;
                scope.spawn(move || {
                    let world = World::new();
                    let mut vm = TestVm::new(false, &world.destination_ram);
                    let memory = world.destination_ram.memory();
                    let incoming = destination.accept(Some(Duration::from_secs(20)), &NEVER).unwrap();
                    let report =
                        incoming.receive(&mut vm, 1, memory, &DestinationOptions::default(), &NEVER).unwrap();
                    (report.vm_id, world.destination_ram.is_equal(&world.source_ram))
                })
            })
            .collect();
        for id in ["a", "b", "c"] {
            scope.spawn(move || {
                let mut world = World::new();
                world.tracker.dirty_pages =
                    Some(ringferry::PageRun { first: ringferry::PageIndex(3), pages: 1 });
                world.options.vm_id = id.to_owned();
                world.send_to(address).unwrap();
            });
        }
        let mut received: Vec<_> = receiving.into_iter().map(|vm| vm.join().unwrap()).collect();
        received.sort();
        assert_eq!(received, [("a".to_owned(), true), ("b".to_owned(), true), ("c".to_owned(), true)]);
    });
}

#[test]
fn nobody_coming_is_told_with_the_address() {
    let (destination, address) = bind(1);
    let error = destination.accept(Some(Duration::from_millis(50)), &NEVER).unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn a_source_of_version_1_hears_a_refusal_in_its_own_words() {
    let (_destination, address) = bind(1);
    let mut source = TcpStream::connect(address).unwrap();
    // What version 1 sent: its head, and a body that begins with the number of its protocol.
    let mut hello = Message::Hello(Hello { newest: 1, oldest: 1, ..Hello::default() }).encode().unwrap();
    assert_eq!(&hello[..4], b"RFCT");
    source.write_all(&std::mem::take(&mut hello)).unwrap();
    let answer = read_all(source);
    assert_eq!(answer[4..6], [3, 0], "kind 3 is Refuse in both versions");
    let text = String::from_utf8_lossy(&answer[16..]).into_owned();
    assert_eq!(text, "the source speaks protocol 1, this destination 2: use the same version");
}

#[test]
fn a_source_that_answers_pings_and_sends_nothing_keeps_no_seat() {
    let (destination, address) = bind(1);
    let hello = Hello {
        page_bytes: 4096,
        vcpus: 1,
        channels: 1,
        ram: vec![ringferry::PageRun { first: ringferry::PageIndex(0), pages: 64 }],
        ..Hello::default()
    };
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&Message::Hello(hello).encode().unwrap()).unwrap();
    // Whatever it is asked, it says that it lives.
    let living = thread::spawn(move || {
        while stream.write_all(&Message::Pong(1).encode().unwrap()).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let mut world = World::new();
    let options = DestinationOptions { silence: Duration::from_millis(300), ..DestinationOptions::default() };
    let incoming = destination.accept(Some(Duration::from_secs(20)), &NEVER).unwrap();
    let memory = world.destination_ram.memory().clone();
    let error = incoming.receive(&mut world.destination_vm, 1, &memory, &options, &NEVER).unwrap_err();
    assert!(error.to_string().contains("no pages"), "{error}");
    living.join().unwrap();
}
