//! The control connection's messages: who says what, in which order, and how many bytes it may take.
//!
//! ```text
//! source                                   destination
//! Hello            -->
//!                              <--         Accept | Refuse
//!                       (rounds of pages and pieces of device state, acknowledged on the data connections)
//! Ping             <->                     Pong
//!                              <--         StateTaken
//! Prepare          -->
//!                              <--         Prepared
//! Commit           -->
//!                              <--         Running | Abort: not taken over, and will not be
//! Abort            <->                               (either side, at any time before Commit)
//! ```
//!
//! Each message is a [`Head`], fixed little-endian fields and named parts ([`parts`]), by which it grows. A message
//! of an unknown kind is skipped, unless its head says that it must be understood. This file owns their meaning and
//! their limits; [`transport::control`](crate::transport::control) moves them.

use std::fmt::Write;

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::ControlFormatError;
use super::hello::{Accept, Hello};
use super::parts::{self, Part, Parts};
use super::reason::Reason;

/// First bytes of every message: "RFCT" as they appear on the wire.
const MAGIC: [u8; 4] = *b"RFCT";

/// A receiver that does not know the message's kind must end the migration.
const MUST_UNDERSTAND: u16 = 1;

/// Longest body of any message.
pub const MAX_BODY_BYTES: usize = 64 << 10;
/// Longest explanation in `Refuse` and `Abort`; longer ones are cut, by the sender and by the receiver.
pub const MAX_TEXT_BYTES: usize = 2048;

/// Precedes every message.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Head {
    magic: [u8; 4],
    kind: U16,
    flags: U16,
    body_bytes: U32,
    /// CRC32C over the fields above and the body.
    crc: U32,
}

/// Bytes of a [`Head`].
pub const HEAD_BYTES: usize = size_of::<Head>();

/// A message of the control connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// The source introduces itself and the VM.
    Hello(Hello),
    /// The destination is ready to receive.
    Accept(Accept),
    /// The destination will not take this VM, and why.
    Refuse(Reason, String),
    /// Everything has been sent: verify if that was agreed, restore, and take what can fail.
    Prepare {
        /// Digest of the source's RAM, 0 when the migration does not verify.
        ram_digest: u128,
        /// Bytes of the state stream: it is complete when so many have arrived.
        state_bytes: u64,
    },
    /// The destination could run the VM now.
    Prepared {
        /// Digest of the destination's RAM, 0 when the migration does not verify.
        ram_digest: u128,
    },
    /// From here on the VM is the destination's, unless that says a definite no.
    Commit,
    /// The destination runs the VM.
    Running,
    /// The migration ends here, and why. The VM stays with the source; after `Commit`, the destination says by it that
    /// it has not taken the VM over, and will not.
    Abort(Reason, String),
    /// Are you there? May be sent at any time by either side, and is answered at once.
    Ping(u64),
    /// The answer to the `Ping` with this number.
    Pong(u64),
    /// The destination has taken so many bytes of the state stream: a window beyond it may be under way.
    StateTaken(u64),
}

mod kind {
    pub const HELLO: u16 = 1;
    pub const ACCEPT: u16 = 2;
    pub const REFUSE: u16 = 3;
    // 4 was the state of version 1.
    pub const PREPARE: u16 = 5;
    pub const PREPARED: u16 = 6;
    pub const COMMIT: u16 = 7;
    pub const RUNNING: u16 = 8;
    pub const ABORT: u16 = 9;
    pub const PING: u16 = 10;
    pub const PONG: u16 = 11;
    pub const STATE_TAKEN: u16 = 12;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PrepareBody {
    ram_digest: U128,
    state_bytes: U64,
}

/// The part of `Refuse` and `Abort` that people read.
const TEXT: &str = "text";

impl Message {
    /// The message's name as error texts and traces show it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Accept(_) => "Accept",
            Self::Refuse(..) => "Refuse",
            Self::Prepare { .. } => "Prepare",
            Self::Prepared { .. } => "Prepared",
            Self::Commit => "Commit",
            Self::Running => "Running",
            Self::Abort(..) => "Abort",
            Self::Ping(_) => "Ping",
            Self::Pong(_) => "Pong",
            Self::StateTaken(_) => "StateTaken",
        }
    }

    fn kind_and_body(&self) -> (u16, Vec<u8>) {
        match self {
            Self::Hello(hello) => (kind::HELLO, hello.body()),
            Self::Accept(accept) => (kind::ACCEPT, accept.body()),
            Self::Refuse(reason, text) => (kind::REFUSE, reason_body(*reason, text)),
            Self::Prepare { ram_digest, state_bytes } => {
                let body =
                    PrepareBody { ram_digest: (*ram_digest).into(), state_bytes: (*state_bytes).into() };
                (kind::PREPARE, body.as_bytes().to_vec())
            }
            Self::Prepared { ram_digest } => (kind::PREPARED, ram_digest.to_le_bytes().to_vec()),
            Self::Commit => (kind::COMMIT, Vec::new()),
            Self::Running => (kind::RUNNING, Vec::new()),
            Self::Abort(reason, text) => (kind::ABORT, reason_body(*reason, text)),
            Self::Ping(number) => (kind::PING, number.to_le_bytes().to_vec()),
            Self::Pong(number) => (kind::PONG, number.to_le_bytes().to_vec()),
            Self::StateTaken(bytes) => (kind::STATE_TAKEN, bytes.to_le_bytes().to_vec()),
        }
    }

    /// The message as it goes on the wire.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError::TooLong`] for a layout or a description that no destination would accept.
    pub fn encode(&self) -> Result<Vec<u8>, ControlFormatError> {
        let (kind, body) = self.kind_and_body();
        frame(kind, MUST_UNDERSTAND, &body)
    }

    /// Reads a body whose head was checked by [`Head::parse`]; `None` for a message that this version does not know and
    /// may skip.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError`] says what is wrong with the bytes.
    pub fn decode(head: &Head, body: &[u8]) -> Result<Option<Self>, ControlFormatError> {
        let kind = head.kind.get();
        if head.crc.get() != checksum(head, body) {
            return Err(ControlFormatError::Checksum(kind));
        }
        let wrong = |message| ControlFormatError::Body { message, bytes: body.len() };
        Ok(Some(match kind {
            kind::HELLO => Self::Hello(Hello::parse(body)?),
            kind::ACCEPT => Self::Accept(Accept::parse(body)?),
            kind::REFUSE => parse_reason("Refuse", body).map(|(reason, text)| Self::Refuse(reason, text))?,
            kind::PREPARE => {
                let (fixed, rest) = PrepareBody::read_from_prefix(body).map_err(|_| wrong("Prepare"))?;
                Parts::read(rest)?.finish()?;
                Self::Prepare { ram_digest: fixed.ram_digest.get(), state_bytes: fixed.state_bytes.get() }
            }
            kind::PREPARED => {
                let (digest, rest) = U128::read_from_prefix(body).map_err(|_| wrong("Prepared"))?;
                Parts::read(rest)?.finish()?;
                Self::Prepared { ram_digest: digest.get() }
            }
            kind::COMMIT => Parts::read(body)?.finish().map(|()| Self::Commit)?,
            kind::RUNNING => Parts::read(body)?.finish().map(|()| Self::Running)?,
            kind::ABORT => parse_reason("Abort", body).map(|(reason, text)| Self::Abort(reason, text))?,
            kind::PING | kind::PONG | kind::STATE_TAKEN => {
                let (number, rest) =
                    U64::read_from_prefix(body).map_err(|_| wrong("Ping, Pong or StateTaken"))?;
                Parts::read(rest)?.finish()?;
                match kind {
                    kind::PING => Self::Ping(number.get()),
                    kind::PONG => Self::Pong(number.get()),
                    _ => Self::StateTaken(number.get()),
                }
            }
            unknown if head.flags.get() & MUST_UNDERSTAND != 0 => {
                return Err(ControlFormatError::Kind(unknown));
            }
            _ => return Ok(None),
        }))
    }
}

impl Head {
    /// Reads a head and bounds the body that it announces.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError`] if it is not ours, or announces more than a message may have.
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Result<Self, ControlFormatError> {
        let head: Self = zerocopy::transmute!(bytes);
        if head.magic != MAGIC {
            return Err(ControlFormatError::Magic(head.magic));
        }
        let bytes = head.body_bytes();
        if bytes > MAX_BODY_BYTES {
            return Err(ControlFormatError::TooLong { kind: head.kind.get(), bytes, limit: MAX_BODY_BYTES });
        }
        Ok(head)
    }

    /// Bytes of the body that follows.
    pub fn body_bytes(&self) -> usize {
        usize::try_from(self.body_bytes.get()).unwrap_or(usize::MAX)
    }
}

/// The refusal that a source of version 1 understands: its body was the text and nothing else.
pub fn refusal_of_version_1(text: &str) -> Vec<u8> {
    frame(kind::REFUSE, 0, cut(text).as_bytes()).unwrap_or_default()
}

fn frame(kind: u16, flags: u16, body: &[u8]) -> Result<Vec<u8>, ControlFormatError> {
    let too_long = ControlFormatError::TooLong { kind, bytes: body.len(), limit: MAX_BODY_BYTES };
    let body_bytes = match u32::try_from(body.len()) {
        Ok(bytes) if body.len() <= MAX_BODY_BYTES => bytes,
        _ => return Err(too_long),
    };
    let mut head = Head {
        magic: MAGIC,
        kind: kind.into(),
        flags: flags.into(),
        body_bytes: body_bytes.into(),
        crc: 0.into(),
    };
    head.crc = checksum(&head, body).into();
    Ok([head.as_bytes(), body].concat())
}

fn checksum(head: &Head, body: &[u8]) -> u32 {
    let unsummed = Head { crc: 0.into(), ..*head };
    crc32c::crc32c_append(crc32c::crc32c(unsummed.as_bytes()), body)
}

fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(MAX_TEXT_BYTES)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

fn reason_body(reason: Reason, text: &str) -> Vec<u8> {
    let mut body = U16::new(reason.number()).as_bytes().to_vec();
    parts::write(&mut body, &[Part::optional(TEXT, cut(text).as_bytes().to_vec())]);
    body
}

fn parse_reason(message: &'static str, body: &[u8]) -> Result<(Reason, String), ControlFormatError> {
    let wrong = |_| ControlFormatError::Body { message, bytes: body.len() };
    let (reason, rest) = U16::read_from_prefix(body).map_err(wrong)?;
    let mut parts = Parts::read(rest)?;
    let text = parts.take(TEXT).unwrap_or_default();
    parts.finish()?;
    Ok((Reason::from_number(reason.get()), printable(&text)))
}

/// A peer's text, bounded, and without anything that would steer a terminal or break a line of a log.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut printable = String::new();
    for character in cut(&text).chars() {
        if character.is_control() {
            // Writing to a `String` cannot fail.
            let _ = write!(printable, "{}", character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{PageIndex, PageRun};
    use crate::wire::features::Feature;
    use crate::wire::hello::{Block, Token};
    use proptest::prelude::*;

    fn any_run() -> impl Strategy<Value = PageRun> {
        (any::<u64>(), any::<u64>()).prop_map(|(first, pages)| PageRun { first: PageIndex(first), pages })
    }

    fn any_hello() -> impl Strategy<Value = Hello> {
        let feature = ("[a-z-]{1,12}", any::<bool>()).prop_map(|(name, required)| Feature { name, required });
        let block = ("[a-z-]{1,12}", any_run()).prop_map(|(name, pages)| Block { name, pages });
        (
            any::<(Token, u32, u32, u32, Option<Token>)>(),
            prop::collection::vec(any_run(), 0..8),
            prop::collection::vec(block, 0..3),
            prop::collection::vec(feature, 0..4),
            prop::option::of("[!-~]{1,20}"),
            prop::collection::vec(any::<u8>(), 0..100),
        )
            .prop_map(|(f, ram, blocks, features, id, description)| Hello {
                token: f.0,
                page_bytes: f.1,
                vcpus: f.2,
                channels: f.3,
                resume: f.4,
                ram,
                blocks,
                features,
                vm_id: id.unwrap_or_default(),
                description,
                ..Hello::default()
            })
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let accept = (any::<(u16, u16)>(), prop::collection::vec("[a-z]{1,9}", 0..4));
        let reason = any::<u16>().prop_map(Reason::from_number);
        prop_oneof![
            any_hello().prop_map(Message::Hello),
            accept.prop_map(|((version, data_port), features)| {
                Message::Accept(Accept { version, data_port, features })
            }),
            (reason.clone(), "[ -~]{0,40}").prop_map(|(reason, text)| Message::Refuse(reason, text)),
            any::<(u128, u64)>()
                .prop_map(|(ram_digest, state_bytes)| Message::Prepare { ram_digest, state_bytes }),
            any::<u128>().prop_map(|ram_digest| Message::Prepared { ram_digest }),
            Just(Message::Commit),
            Just(Message::Running),
            (reason, "[ -~ä]{0,40}").prop_map(|(reason, text)| Message::Abort(reason, text)),
            any::<u64>().prop_map(Message::Ping),
            any::<u64>().prop_map(Message::Pong),
            any::<u64>().prop_map(Message::StateTaken),
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Option<Message>, ControlFormatError> {
        let (head, body) = bytes.split_first_chunk::<HEAD_BYTES>().unwrap();
        Message::decode(&Head::parse(*head)?, body)
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in any_message()) {
            prop_assert_eq!(decode(&message.encode().unwrap()).unwrap(), Some(message));
        }

        #[test]
        fn a_flipped_bit_is_never_believed(message in any_message(), at in any::<prop::sample::Index>(), bit in 0..8u32) {
            let mut bytes = message.encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_give_an_error_and_no_panic(
            bytes in prop::collection::vec(any::<u8>(), HEAD_BYTES..200), kind in 0..16u16
        ) {
            prop_assert!(decode(&bytes).is_err());
            // The same behind a head that passes, checksum included.
            let _ = decode(&frame(kind, MUST_UNDERSTAND, &bytes).unwrap());
        }
    }

    #[test]
    fn an_unknown_message_is_skipped_unless_it_must_be_understood() {
        assert_eq!(decode(&frame(999, 0, b"of a later release").unwrap()), Ok(None));
        assert_eq!(decode(&frame(999, MUST_UNDERSTAND, b"").unwrap()), Err(ControlFormatError::Kind(999)));
    }

    #[test]
    fn a_body_over_the_limit_is_neither_sent_nor_believed() {
        let hello = Hello { description: vec![0; MAX_BODY_BYTES + 1], ..Hello::default() };
        assert!(matches!(Message::Hello(hello).encode(), Err(ControlFormatError::TooLong { .. })));
        let mut bytes: [u8; HEAD_BYTES] = Message::Commit.encode().unwrap().try_into().unwrap();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Head::parse(bytes), Err(ControlFormatError::TooLong { .. })));
    }

    #[test]
    fn a_long_text_is_cut_at_a_character_and_what_steers_a_terminal_is_escaped() {
        let said = |text: String| match decode(&Message::Abort(Reason::Vmm, text).encode().unwrap()) {
            Ok(Some(Message::Abort(Reason::Vmm, text))) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(said("ä".repeat(MAX_TEXT_BYTES)).len(), MAX_TEXT_BYTES);
        assert_eq!(said("a\u{1b}[2J\nb".into()), "a\\u{1b}[2J\\nb");
    }
}
