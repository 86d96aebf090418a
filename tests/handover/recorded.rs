//! The control connection of every released version, as it was recorded: what a later release has to go on reading, and,
//! as long as it speaks that version, to write.

use ringferry::layout::{PageIndex, PageRun};
use ringferry::wire::control::{HEAD_BYTES, Head, Message};
use ringferry::wire::features::Feature;
use ringferry::wire::hello::{Accept, Block, Hello};
use ringferry::wire::reason::Reason;

const SOURCE: &[u8] = include_bytes!("../wire/v2/control-source.bin");
const DESTINATION: &[u8] = include_bytes!("../wire/v2/control-destination.bin");

/// What a source of version 2 says from the greeting to the handing over, and what it may say besides.
fn of_the_source() -> Vec<Message> {
    let run = |first, pages| PageRun { first: PageIndex(first), pages };
    let feature = |name: &str, required| Feature { name: name.to_owned(), required };
    let hello = Hello {
        newest: 2,
        oldest: 2,
        token: *b"0123456789abcdef",
        page_bytes: 4096,
        vcpus: 4,
        channels: 2,
        ram: vec![run(0, 0xc0000), run(0x10_0000, 0x4_0000)],
        blocks: vec![Block { name: "vga.vram".to_owned(), pages: run(0x20_0000, 4096) }],
        vm_id: "web-7".to_owned(),
        description: b"{\"format\":1}".to_vec(),
        features: vec![feature("verify", true), feature("device-state", false)],
        resume: None,
    };
    vec![
        Message::Hello(hello),
        Message::Ping(1),
        Message::Pong(7),
        Message::Prepare { ram_digest: 0x1234_5678_9abc_def0_0fed_cba9_8765_4321, state_bytes: 200_000 },
        Message::Commit,
        Message::Abort(Reason::Cancelled, "cancelled; the VM runs on here".to_owned()),
    ]
}

fn of_the_destination() -> Vec<Message> {
    let features = vec!["verify".to_owned(), "device-state".to_owned()];
    vec![
        Message::Accept(Accept { version: 2, data_port: 4711, features }),
        Message::Pong(1),
        Message::Ping(7),
        Message::StateTaken(123_456),
        Message::Prepared { ram_digest: 0x1234_5678_9abc_def0_0fed_cba9_8765_4321 },
        Message::Running,
        Message::Refuse(Reason::Busy, "busy with web-6".to_owned()),
        Message::Abort(Reason::Vmm, "the VMM could not resume: no".to_owned()),
    ]
}

fn read_all(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>().unwrap();
        let head = Head::parse(*head).unwrap();
        let (body, rest) = rest.split_at(head.body_bytes());
        messages.push(Message::decode(&head, body).unwrap().unwrap());
        bytes = rest;
    }
    messages
}

fn write_all(messages: &[Message]) -> Vec<u8> {
    messages.iter().flat_map(|message| message.encode().unwrap()).collect()
}

#[test]
fn version_2_is_read_and_written_as_it_was_recorded() {
    for (recorded, messages) in [(SOURCE, of_the_source()), (DESTINATION, of_the_destination())] {
        assert_eq!(read_all(recorded), messages);
        assert_eq!(write_all(&messages), recorded);
    }
}
