//! The control connection's messages: who says what, in which order, and how many bytes it may take.
//!
//! ```text
//! source                                   destination
//! Hello            -->
//!                              <--         Accept | Refuse
//!                       (rounds of pages, acknowledged on the data connections themselves)
//! State, Prepare   -->
//!                              <--         Prepared
//! Commit           -->
//!                              <--         Running
//! Abort            <->                               (either side, at any time before Commit)
//! ```
//!
//! Each message is a [`Head`] and a body of fixed-size little-endian structs and at most one list. This file
//! owns their meaning and their limits; [`transport::control`](crate::transport::control) moves them.

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{PageIndex, PageRun};

/// The protocol that this build speaks. A different major number is refused by both sides.
pub const PROTOCOL: u16 = 1;

/// First bytes of every message: "RFCT" as they appear on the wire.
const MAGIC: [u8; 4] = *b"RFCT";

/// Longest body of any message but `State`.
pub const MAX_BODY_BYTES: usize = 64 << 10;
/// Longest device and vCPU state that is accepted: 16 vCPUs of our test VMM need 0.2 MiB.
pub const MAX_STATE_BYTES: usize = 64 << 20;
/// Most regions of RAM: KVM has 32764 slots, VMMs use a few dozen for RAM.
pub const MAX_REGIONS: usize = 1024;
/// Longest explanation in `Refuse` and `Abort`; longer ones are cut by the sender.
pub const MAX_TEXT_BYTES: usize = 2048;

/// Precedes every message.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Head {
    magic: [u8; 4],
    kind: U16,
    reserved: U16,
    body_bytes: U32,
    /// CRC32C over the fields above and the body.
    crc: U32,
}

/// Bytes of a [`Head`].
pub const HEAD_BYTES: usize = size_of::<Head>();

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlFormatError {
    /// The first four bytes are not ours.
    #[error("the peer does not speak Ringferry's control protocol (it began with {0:02x?})")]
    Magic([u8; 4]),
    /// A kind of message that this version does not know.
    #[error("unknown control message kind {0}: the peer is probably of another version")]
    Kind(u16),
    /// The announced length is over the limit for its kind.
    #[error("control message kind {kind} announces {bytes} bytes, the limit is {limit}")]
    TooLong {
        /// Which message.
        kind: u16,
        /// Announced length.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The checksum does not match.
    #[error("control message kind {0} is damaged (its checksum does not match)")]
    Checksum(u16),
    /// A body that is shorter or longer than its own fields say.
    #[error("control message kind {kind} has a body of {bytes} bytes, which is not what its fields say")]
    Body {
        /// Which message.
        kind: u16,
        /// Length found.
        bytes: usize,
    },
}

/// Identifies one migration on each of its connections. Random, from the source.
pub type Token = [u8; 16];

/// The source introduces the VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// Protocol of the source.
    pub protocol: u16,
    /// Identifies this migration.
    pub token: Token,
    /// Bytes in a page.
    pub page_bytes: u32,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// Data connections that the source is going to open.
    pub channels: u32,
    /// Whether RAM digests are going to be compared before the handing over.
    pub verify: bool,
    /// RAM in guest-physical order.
    pub ram: Vec<PageRun>,
}

/// A message of the control connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// The source introduces the VM.
    Hello(Hello),
    /// The destination is ready to receive on this TCP port (of the address that the source reached it at).
    Accept {
        /// Protocol of the destination.
        protocol: u16,
        /// Port for data connections.
        data_port: u16,
    },
    /// The destination will not take this VM, and why.
    Refuse(String),
    /// All that the guest can observe besides RAM, in the VMM's format.
    State(Vec<u8>),
    /// Everything has been sent: restore, and verify if asked.
    Prepare {
        /// Digest of the source's RAM, 0 when the migration does not verify.
        ram_digest: u128,
    },
    /// The destination could run the VM now.
    Prepared {
        /// Digest of the destination's RAM, 0 when the migration does not verify.
        ram_digest: u128,
    },
    /// From here on the VM is the destination's.
    Commit,
    /// The destination runs the VM.
    Running,
    /// The migration ends here, and why. The VM stays with the source.
    Abort(String),
}

mod kind {
    pub const HELLO: u16 = 1;
    pub const ACCEPT: u16 = 2;
    pub const REFUSE: u16 = 3;
    pub const STATE: u16 = 4;
    pub const PREPARE: u16 = 5;
    pub const PREPARED: u16 = 6;
    pub const COMMIT: u16 = 7;
    pub const RUNNING: u16 = 8;
    pub const ABORT: u16 = 9;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloBody {
    protocol: U16,
    verify: U16,
    page_bytes: U32,
    token: Token,
    vcpus: U32,
    channels: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RamBody {
    first_page: U64,
    pages: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AcceptBody {
    protocol: U16,
    data_port: U16,
}

impl Message {
    /// The message's name as error texts and traces show it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Accept { .. } => "Accept",
            Self::Refuse(_) => "Refuse",
            Self::State(_) => "State",
            Self::Prepare { .. } => "Prepare",
            Self::Prepared { .. } => "Prepared",
            Self::Commit => "Commit",
            Self::Running => "Running",
            Self::Abort(_) => "Abort",
        }
    }

    fn kind_and_body(&self) -> (u16, Vec<u8>) {
        match self {
            Self::Hello(hello) => (kind::HELLO, hello_body(hello)),
            Self::Accept { protocol, data_port } => {
                let body = AcceptBody { protocol: (*protocol).into(), data_port: (*data_port).into() };
                (kind::ACCEPT, body.as_bytes().to_vec())
            }
            Self::Refuse(text) => (kind::REFUSE, text_body(text)),
            Self::State(state) => (kind::STATE, state.clone()),
            Self::Prepare { ram_digest } => (kind::PREPARE, ram_digest.to_le_bytes().to_vec()),
            Self::Prepared { ram_digest } => (kind::PREPARED, ram_digest.to_le_bytes().to_vec()),
            Self::Commit => (kind::COMMIT, Vec::new()),
            Self::Running => (kind::RUNNING, Vec::new()),
            Self::Abort(text) => (kind::ABORT, text_body(text)),
        }
    }

    /// The message as it goes on the wire.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError::TooLong`] for a state or a layout that no destination would accept.
    pub fn encode(&self) -> Result<Vec<u8>, ControlFormatError> {
        let (kind, body) = self.kind_and_body();
        let too_long = ControlFormatError::TooLong { kind, bytes: body.len(), limit: body_limit(kind) };
        let body_bytes = match u32::try_from(body.len()) {
            Ok(bytes) if body.len() <= body_limit(kind) => bytes,
            _ => return Err(too_long),
        };
        let mut head = Head {
            magic: MAGIC,
            kind: kind.into(),
            reserved: 0.into(),
            body_bytes: body_bytes.into(),
            crc: 0.into(),
        };
        head.crc = checksum(&head, &body).into();
        Ok([head.as_bytes(), &body].concat())
    }

    /// Reads a body whose head was checked by [`Head::parse`].
    ///
    /// # Errors
    ///
    /// [`ControlFormatError`] says what is wrong with the bytes.
    pub fn decode(head: &Head, body: &[u8]) -> Result<Self, ControlFormatError> {
        let kind = head.kind.get();
        if head.crc.get() != checksum(head, body) {
            return Err(ControlFormatError::Checksum(kind));
        }
        let wrong_body = ControlFormatError::Body { kind, bytes: body.len() };
        let digest = || U128::read_from_bytes(body).map(U128::get);
        let message = match kind {
            kind::HELLO => parse_hello(body).map(Self::Hello),
            kind::ACCEPT => AcceptBody::read_from_bytes(body).ok().map(|accept| Self::Accept {
                protocol: accept.protocol.get(),
                data_port: accept.data_port.get(),
            }),
            kind::REFUSE => Some(Self::Refuse(String::from_utf8_lossy(body).into_owned())),
            kind::STATE => Some(Self::State(body.to_vec())),
            kind::PREPARE => digest().ok().map(|ram_digest| Self::Prepare { ram_digest }),
            kind::PREPARED => digest().ok().map(|ram_digest| Self::Prepared { ram_digest }),
            kind::COMMIT if body.is_empty() => Some(Self::Commit),
            kind::RUNNING if body.is_empty() => Some(Self::Running),
            kind::ABORT => Some(Self::Abort(String::from_utf8_lossy(body).into_owned())),
            _ => None,
        };
        message.ok_or(wrong_body)
    }
}

impl Head {
    /// Reads a head and bounds the body that it announces.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError`] if it is not ours, of an unknown kind, or announces more than its kind may have.
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Result<Self, ControlFormatError> {
        let head: Self = zerocopy::transmute!(bytes);
        let kind = head.kind.get();
        if head.magic != MAGIC {
            return Err(ControlFormatError::Magic(head.magic));
        }
        if !(kind::HELLO..=kind::ABORT).contains(&kind) {
            return Err(ControlFormatError::Kind(kind));
        }
        let (bytes, limit) = (head.body_bytes(), body_limit(kind));
        if bytes > limit {
            return Err(ControlFormatError::TooLong { kind, bytes, limit });
        }
        Ok(head)
    }

    /// Bytes of the body that follows.
    pub fn body_bytes(&self) -> usize {
        usize::try_from(self.body_bytes.get()).unwrap_or(usize::MAX)
    }
}

fn body_limit(kind: u16) -> usize {
    if kind == kind::STATE { MAX_STATE_BYTES } else { MAX_BODY_BYTES }
}

fn checksum(head: &Head, body: &[u8]) -> u32 {
    let unsummed = Head { crc: 0.into(), ..*head };
    crc32c::crc32c_append(crc32c::crc32c(unsummed.as_bytes()), body)
}

fn text_body(text: &str) -> Vec<u8> {
    let end = (0..=text.len().min(MAX_TEXT_BYTES)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.as_bytes()[..end].to_vec()
}

fn hello_body(hello: &Hello) -> Vec<u8> {
    let fixed = HelloBody {
        protocol: hello.protocol.into(),
        verify: u16::from(hello.verify).into(),
        page_bytes: hello.page_bytes.into(),
        token: hello.token,
        vcpus: hello.vcpus.into(),
        channels: hello.channels.into(),
    };
    let mut body = fixed.as_bytes().to_vec();
    for run in &hello.ram {
        let ram = RamBody { first_page: run.first.0.into(), pages: run.pages.into() };
        body.extend_from_slice(ram.as_bytes());
    }
    body
}

fn parse_hello(body: &[u8]) -> Option<Hello> {
    let protocol = U16::read_from_prefix(body).ok()?.0.get();
    if protocol != PROTOCOL {
        // Only its first field is known to mean the same in every version: enough to refuse it by name.
        return Some(Hello { protocol, ..Hello::default() });
    }
    let (fixed, list) = HelloBody::read_from_prefix(body).ok()?;
    let list = <[RamBody]>::ref_from_bytes(list).ok()?;
    if list.len() > MAX_REGIONS {
        return None;
    }
    let ram = list
        .iter()
        .map(|ram| PageRun { first: PageIndex(ram.first_page.get()), pages: ram.pages.get() })
        .collect();
    Some(Hello {
        protocol,
        token: fixed.token,
        page_bytes: fixed.page_bytes.get(),
        vcpus: fixed.vcpus.get(),
        channels: fixed.channels.get(),
        verify: fixed.verify.get() != 0,
        ram,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let run = (any::<u64>(), any::<u64>())
            .prop_map(|(first, pages)| PageRun { first: PageIndex(first), pages });
        let hello =
            (any::<(Token, u32, u32, u32, bool)>(), prop::collection::vec(run, 0..8)).prop_map(|(f, ram)| {
                Message::Hello(Hello {
                    protocol: PROTOCOL,
                    token: f.0,
                    page_bytes: f.1,
                    vcpus: f.2,
                    channels: f.3,
                    verify: f.4,
                    ram,
                })
            });
        prop_oneof![
            hello,
            any::<(u16, u16)>().prop_map(|(protocol, data_port)| Message::Accept { protocol, data_port }),
            ".{0,40}".prop_map(Message::Refuse),
            prop::collection::vec(any::<u8>(), 0..300).prop_map(Message::State),
            any::<u128>().prop_map(|ram_digest| Message::Prepare { ram_digest }),
            any::<u128>().prop_map(|ram_digest| Message::Prepared { ram_digest }),
            Just(Message::Commit),
            Just(Message::Running),
            ".{0,40}".prop_map(Message::Abort),
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Message, ControlFormatError> {
        let (head, body) = bytes.split_first_chunk::<HEAD_BYTES>().unwrap();
        Message::decode(&Head::parse(*head)?, body)
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in any_message()) {
            prop_assert_eq!(decode(&message.encode().unwrap()).unwrap(), message);
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
            bytes in prop::collection::vec(any::<u8>(), HEAD_BYTES..200), kind in 0..12u16
        ) {
            prop_assert!(decode(&bytes).is_err());
            // The same behind a head that passes, checksum included.
            let body = &bytes[HEAD_BYTES..];
            let mut head = Head {
                magic: MAGIC, kind: kind.into(), reserved: 0.into(),
                body_bytes: u32::try_from(body.len()).unwrap().into(), crc: 0.into(),
            };
            head.crc = checksum(&head, body).into();
            let _ = Message::decode(&head, body);
        }
    }

    #[test]
    fn a_hello_of_another_version_is_read_far_enough_to_name_it() {
        let mut bytes = Message::Hello(Hello { protocol: 7, ..Hello::default() }).encode().unwrap();
        bytes.truncate(HEAD_BYTES + 2);
        let mut head = Head { body_bytes: 2.into(), ..Head::read_from_prefix(&bytes).unwrap().0 };
        head.crc = checksum(&head, &bytes[HEAD_BYTES..]).into();
        let read = Message::decode(&head, &bytes[HEAD_BYTES..]).unwrap();
        assert_eq!(read, Message::Hello(Hello { protocol: 7, ..Hello::default() }));
    }

    #[test]
    fn a_state_over_the_limit_is_not_sent() {
        let state = Message::State(vec![0; MAX_STATE_BYTES + 1]);
        assert!(matches!(state.encode(), Err(ControlFormatError::TooLong { .. })));
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let text = "ä".repeat(MAX_TEXT_BYTES);
        let Message::Abort(cut) = decode(&Message::Abort(text).encode().unwrap()).unwrap() else { panic!() };
        assert_eq!(cut.len(), MAX_TEXT_BYTES);
    }
}
