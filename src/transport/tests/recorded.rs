//! What released versions put on the wire, as recorded in `tests/wire`: every later version must still understand it.

use super::*;
use crate::wire::data::{Acknowledgement, DataWelcome, Verdict};

/// A greeting and four frames of version 2: pages (zeros 3 to 6, content in 9), the last piece of 12 bytes of device
/// state, the retirement of connection 2, and a frame of a kind that version 2 does not know, with an extension and
/// 5 bytes of payload.
const SOURCE_V2: &[u8] = include_bytes!("../../../tests/wire/v2/source.bin");

/// The welcome and the four acknowledgements to it.
const DESTINATION_V2: &[u8] = include_bytes!("../../../tests/wire/v2/destination.bin");

#[test]
fn a_recorded_source_of_version_2_is_answered_as_it_was_then() {
    let source = Ram::new(&[(0, 100)]);
    let (target, receiver, address) = destination(&source);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(SOURCE_V2).unwrap();
    let mut answer = vec![0; DESTINATION_V2.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, DESTINATION_V2, "{:?}", receiver.failures());
    source.write(PageIndex(9), 1);
    assert_eq!(source.digest(), target.digest());
    assert_eq!(receiver.next_state(PATIENCE).as_deref(), Some(b"device state".as_slice()));
    let received = receiver.received();
    assert_eq!((received.pages, received.zero_pages, received.state_bytes), (1, 4, 12));
}

#[test]
fn a_recorded_destination_of_version_2_is_understood() {
    let (welcome, acknowledgements) = DESTINATION_V2.split_first_chunk().unwrap();
    assert_eq!(DataWelcome::read(welcome), Ok((Verdict::Welcome, 0)));
    let (acknowledgements, rest) = acknowledgements.as_chunks::<{ Acknowledgement::BYTES }>();
    let sequences: Vec<_> = acknowledgements.iter().map(Acknowledgement::read).collect();
    assert_eq!(sequences, [1, 2, 3, 4].map(Ok));
    assert!(rest.is_empty());
}
