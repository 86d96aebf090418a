//! Peers that say anything at all, in any order, damaged or cut.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::layout::{PAGE_SIZE, PageIndex, PageRun};
use ringferry::wire::control::Message;
use ringferry::wire::features;
use ringferry::wire::hello::{Accept, Hello};

use crate::world::{NEVER, PAGES, SHORT, World};

/// One side's messages in their order, with one byte of them changed or the rest of them missing.
fn damaged(messages: Vec<Message>) -> impl Strategy<Value = Vec<u8>> {
    let bytes: Vec<u8> = messages.iter().flat_map(|message| message.encode().unwrap()).collect();
    (any::<prop::sample::Index>(), 0..=8_u32).prop_map(move |(at, bit)| {
        let (mut bytes, at) = (bytes.clone(), at.index(bytes.len()));
        if bit == 8 {
            bytes.truncate(at)
        } else {
            bytes[at] ^= 1 << bit
        }
        bytes
    })
}

fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..300)
}

/// What a source says from beginning to end.
fn of_a_source() -> Vec<Message> {
    let hello = Hello {
        page_bytes: u32::try_from(PAGE_SIZE).unwrap(),
        vcpus: 1,
        channels: 1,
        ram: vec![PageRun { first: PageIndex(0), pages: PAGES }],
        ..Hello::default()
    };
    vec![Message::Hello(hello), Message::Prepare { ram_digest: 0, state_bytes: 0 }, Message::Commit]
}

fn of_a_destination() -> Vec<Message> {
    let accept = Accept { version: features::NEWEST, data_port: 1, features: vec!["verify".into()] };
    vec![Message::Accept(accept), Message::Prepared { ram_digest: 0 }, Message::Running]
}

/// A destination that says it took state that was never sent.
#[test]
fn a_destination_that_takes_more_than_it_was_sent_ends_the_migration_and_not_the_guest() {
    for taken in [u64::MAX, 1 << 40] {
        let mut world = World::new();
        world.source_vm.device_bytes = 1000;
        world.proxied.inserted = Some(Message::StateTaken(taken).encode().unwrap().leak());
        let error = world.migrate().source.unwrap_err();
        assert!(error.to_string().contains("StateTaken of more"), "{error}");
        assert!(world.source_runs());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_a_destination_says_the_vm_runs_on_at_the_source(bytes in prop_oneof![damaged(of_a_destination()), noise()]) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&bytes).and_then(|()| stream.shutdown(Shutdown::Write));
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let mut world = World::new();
        prop_assert!(world.send_to(address).is_err());
        prop_assert!(world.source_runs() && !world.tracker.tracking);
    }

    #[test]
    fn whatever_a_source_says_the_vm_does_not_run_at_the_destination(
        bytes in prop_oneof![damaged(of_a_source()[..2].to_vec()), noise()]
    ) {
        let listen = ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)));
        let destination = Destination::bind(listen).unwrap();
        let mut source = TcpStream::connect(destination.local_addr().unwrap()).unwrap();
        source.write_all(&bytes).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let mut world = World::new();
        let options = DestinationOptions { commit: SHORT, ..DestinationOptions::default() };
        let memory = world.destination_ram.memory().clone();
        // A stranger is turned away and nobody comes.
        let result = destination
            .accept(Some(Duration::from_millis(100)), &NEVER)
            .and_then(|incoming| incoming.receive(&mut world.destination_vm, 1, &memory, &options, &NEVER));
        prop_assert!(result.is_err(), "{:?}", result);
        prop_assert!(!world.destination_runs());
    }
}
