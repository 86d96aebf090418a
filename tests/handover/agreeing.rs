//! Releases that differ: each side skips what it may, and names what it must not.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use ringferry::destination::{Destination, ListenOptions};
use ringferry::layout::{PAGE_SIZE, PageIndex, PageRun};
use ringferry::source::SourceError;
use ringferry::wire::control::{HEAD_BYTES, Head, Message};
use ringferry::wire::features::{self, Feature};
use ringferry::wire::hello::{Accept, Block, Hello};
use ringferry::wire::parts::{self, Part};
use ringferry::wire::reason::Reason;

use crate::world::{NEVER, World};

fn read_message(stream: &mut TcpStream) -> Message {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).unwrap();
    let head = Head::parse(head).unwrap();
    let mut body = vec![0; head.body_bytes()];
    stream.read_exact(&mut body).unwrap();
    Message::decode(&head, &body).unwrap().unwrap()
}

fn hello_of_the_next_release(features: &[(&str, bool)]) -> Hello {
    let feature = |(name, required): &(&str, bool)| Feature { name: (*name).to_owned(), required: *required };
    Hello {
        newest: features::NEWEST + 1,
        oldest: features::NEWEST,
        page_bytes: u32::try_from(PAGE_SIZE).unwrap(),
        vcpus: 1,
        channels: 1,
        ram: vec![PageRun { first: PageIndex(0), pages: 64 }],
        features: features.iter().map(feature).collect(),
        ..Hello::default()
    }
}

/// What a destination of this release answers to `hello`.
fn answer_to(hello: Hello) -> Message {
    let destination = Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let mut source = TcpStream::connect(destination.local_addr().unwrap()).unwrap();
    source.write_all(&Message::Hello(hello).encode().unwrap()).unwrap();
    thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let Ok(incoming) = destination.accept(Some(Duration::from_millis(500)), &NEVER) else { return };
            let mut world = World::new();
            let options = ringferry::destination::DestinationOptions::default();
            let memory = world.destination_ram.memory();
            let _ = incoming.receive(&mut world.destination_vm, 1, memory, &options, &NEVER);
        });
        let answer = read_message(&mut source);
        drop(source);
        serving.join().unwrap();
        answer
    })
}

#[test]
fn a_source_of_the_next_release_is_accepted_without_what_it_offers_and_we_lack() {
    let answer =
        answer_to(hello_of_the_next_release(&[("teleport", false), (features::DEVICE_STATE, false)]));
    let Message::Accept(accept) = answer else { panic!("{answer:?}") };
    assert_eq!(accept.version, features::NEWEST);
    assert_eq!(accept.features, [features::DEVICE_STATE]);
}

#[test]
fn a_source_of_the_next_release_is_refused_by_the_name_of_what_it_needs_and_we_lack() {
    let answer = answer_to(hello_of_the_next_release(&[("teleport", true)]));
    let Message::Refuse(Reason::Feature, text) = answer else { panic!("{answer:?}") };
    assert!(text.contains("`teleport`"), "{text}");
}

#[test]
fn a_hello_with_a_required_part_that_we_do_not_know_is_refused_by_its_name() {
    let destination = Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let mut source = TcpStream::connect(destination.local_addr().unwrap()).unwrap();
    let hello = Message::Hello(hello_of_the_next_release(&[])).encode().unwrap();
    source.write_all(&with_part(&hello, Part::required("confidential", vec![1, 2, 3]))).unwrap();
    let Message::Refuse(Reason::Feature, text) = read_message(&mut source) else { panic!("no refusal") };
    assert!(text.contains("`confidential`"), "{text}");
}

/// The message with one part more, as a later release would send it.
fn with_part(message: &[u8], part: Part) -> Vec<u8> {
    let (head, body) = message.split_at(HEAD_BYTES);
    let mut body = body.to_vec();
    parts::write(&mut body, &[part]);
    let mut head = head.to_vec();
    head[8..12].copy_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    head[12..16].fill(0);
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&head), &body);
    head[12..16].copy_from_slice(&checksum.to_le_bytes());
    [head, body].concat()
}

#[test]
fn a_block_of_memory_that_the_destination_lacks_is_named() {
    let block = Block { name: "vga.vram".to_owned(), pages: PageRun { first: PageIndex(100), pages: 4 } };
    let hello = Hello { blocks: vec![block], ..hello_of_the_next_release(&[]) };
    let Message::Refuse(Reason::Layout, text) = answer_to(hello) else { panic!("no refusal") };
    assert!(text.contains("`vga.vram`"), "{text}");
}

#[test]
fn a_source_of_foreign_versions_is_refused_by_their_numbers() {
    let hello = Hello { newest: 9, oldest: 8, ..hello_of_the_next_release(&[]) };
    let answer = answer_to(hello);
    let Message::Refuse(Reason::Version, text) = answer else { panic!("{answer:?}") };
    assert!(text.contains("protocol 8 to 9"), "{text}");
}

/// What a source of this release says when the destination answers so.
fn source_against(answer: Vec<u8>) -> SourceError {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_message(&mut stream);
        stream.write_all(&answer).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut world = World::new();
    let error = world.send_to(address).unwrap_err();
    assert!(world.source_runs());
    error
}

#[test]
fn a_destination_that_lacks_what_this_source_needs_is_named() {
    let accept = Accept { version: features::NEWEST, data_port: 1, features: Vec::new() };
    let error = source_against(Message::Accept(accept).encode().unwrap());
    assert!(matches!(&error, SourceError::Incompatible { what } if what.contains("`verify`")), "{error}");
    let accept = Accept { version: features::NEWEST + 1, data_port: 1, features: vec!["verify".into()] };
    let error = source_against(Message::Accept(accept).encode().unwrap());
    assert!(matches!(&error, SourceError::Incompatible { what } if what.contains("version 3")), "{error}");
}

#[test]
fn a_peer_that_does_not_speak_the_protocol_is_named() {
    let error = source_against(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec());
    assert!(error.to_string().contains("does not speak Ringferry"), "{error}");
}
