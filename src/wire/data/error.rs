//! What can be wrong with bytes from a peer, and the checks that all messages share.

use zerocopy::byteorder::little_endian::U32;

use super::kind::FrameKind;
use super::versions::{DATA_VERSION, DATA_VERSION_OLDEST};

/// What was wrong with bytes from a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The bytes do not begin as this message does.
    #[error(
        "found {found:#010x} where {message} begins with {expected:#010x}: the peer is not Ringferry, or out of step"
    )]
    Magic {
        /// The message that was due.
        message: &'static str,
        /// What it begins with.
        expected: u32,
        /// What was there.
        found: u32,
    },
    /// The peer speaks no version that this side does.
    #[error(
        "the peer speaks versions {oldest} to {newest} of the data protocol, this side {DATA_VERSION_OLDEST} to \
         {DATA_VERSION}: use releases that have one in common"
    )]
    Version {
        /// The oldest that it speaks.
        oldest: u16,
        /// The newest.
        newest: u16,
    },
    /// Checksum and content differ.
    #[error("the checksum of {message} is {stated:#010x}, its content gives {computed:#010x}")]
    Checksum {
        /// The message.
        message: &'static str,
        /// The checksum in it.
        stated: u32,
        /// The checksum of it.
        computed: u32,
    },
    /// A kind of message, frame or run that this version does not have.
    #[error("{what} of kind {found} is not known to this version")]
    UnknownKind {
        /// What has the kind.
        what: &'static str,
        /// The kind.
        found: u32,
    },
    /// An encoding that has its number, but that the two sides did not agree on.
    #[error("a run is encoded as {kind}, which was not negotiated")]
    NotNegotiated {
        /// The encoding.
        kind: &'static str,
    },
    /// Flags that must be understood, and are not.
    #[error("{what} has the flags {bits:#x}, which this version would have to understand and does not")]
    UnknownRequirement {
        /// What has the flags.
        what: &'static str,
        /// The flags that are not known.
        bits: u32,
    },
    /// A length beyond its limit.
    #[error("a frame states {found} {what}, the limit is {limit}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },
    /// A message of a length that it cannot have.
    #[error("{message} of {found} bytes is not possible")]
    Length {
        /// The message.
        message: &'static str,
        /// Its length.
        found: usize,
    },
    /// A frame of this kind has no such part, or lacks it.
    #[error("a frame of kind {kind:?} states {run_count} runs and {payload_bytes} bytes of payload")]
    Shape {
        /// The kind.
        kind: FrameKind,
        /// Its runs.
        run_count: u32,
        /// Its payload.
        payload_bytes: u32,
    },
    /// The argument of a frame of this kind is out of its range.
    #[error("a frame of kind {kind:?} with the argument {argument:#x} is not possible")]
    Argument {
        /// The kind.
        kind: FrameKind,
        /// Its argument.
        argument: u64,
    },
    /// The payload is not what the run list adds up to.
    #[error("a frame states {stated} bytes of payload, its runs add up to {computed}")]
    PayloadMismatch {
        /// By the header.
        stated: u64,
        /// By the run list.
        computed: u64,
    },
    /// A run without a page, or one that ends beyond the last page there can be.
    #[error("a run of {pages} pages from {first:#x} on is not possible")]
    Run {
        /// Its first page.
        first: u64,
        /// Its length.
        pages: u32,
    },
    /// A run whose content cannot have the length that it states.
    #[error("a run of {pages} pages encoded as {kind} states {found} bytes of content, {expected} are due")]
    RunBytes {
        /// Its length.
        pages: u32,
        /// The encoding.
        kind: &'static str,
        /// What it states.
        found: u32,
        /// What is due.
        expected: u64,
    },
    /// A run begins before the one ahead of it ends.
    #[error("the run that begins at page {first:#x} overlaps the one before, or goes backwards")]
    RunOrder {
        /// Its first page.
        first: u64,
    },
    /// A frame, or an acknowledgement, out of turn.
    #[error("frame {found} arrived, {expected} was due")]
    Sequence {
        /// The number it has.
        found: u64,
        /// The number that was due.
        expected: u64,
    },
    /// A frame of an older round than the one before it.
    #[error("a frame of round {found} after one of round {newest}")]
    Round {
        /// Its round.
        found: u32,
        /// The newest round so far.
        newest: u32,
    },
    /// Device state further ahead than the source may send it.
    #[error("device state at {offset} to {end}, only up to {limit} may be on its way")]
    StateWindow {
        /// Where the chunk begins.
        offset: u64,
        /// Where it ends.
        end: u64,
        /// How far it may reach.
        limit: u64,
    },
    /// A chunk of device state that overlaps another one without being the same.
    #[error("the device state at {offset} to {end} overlaps another chunk of it")]
    StateOverlap {
        /// Where the chunk begins.
        offset: u64,
        /// Where it ends.
        end: u64,
    },
    /// The peer acknowledged what it was never sent.
    #[error("frame {found} was acknowledged, {sent} were sent")]
    AcknowledgedUnsent {
        /// The frame acknowledged.
        found: u64,
        /// Frames sent.
        sent: u64,
    },
}

/// Checks a message that ends with its own checksum.
pub(super) fn check_tail(message: &'static str, bytes: &[u8]) -> Result<(), DataError> {
    let Some((content, stated)) = bytes.split_last_chunk() else {
        return Err(DataError::Length { message, found: bytes.len() });
    };
    let (stated, computed) = (u32::from_le_bytes(*stated), crc32c::crc32c(content));
    if stated == computed { Ok(()) } else { Err(DataError::Checksum { message, stated, computed }) }
}

/// The checksum of everything in `message` but its last four bytes.
pub(super) fn tail_of(message: &[u8]) -> U32 {
    crc32c::crc32c(&message[..message.len() - size_of::<U32>()]).into()
}

pub(super) fn check_magic(message: &'static str, expected: u32, found: U32) -> Result<(), DataError> {
    let found = found.get();
    if found == expected { Ok(()) } else { Err(DataError::Magic { message, expected, found }) }
}

/// Refuses those of `bits` that must be understood, and are not `known`.
pub(super) fn check_flags(
    what: &'static str,
    bits: u32,
    required_half: u32,
    known: u32,
) -> Result<(), DataError> {
    match bits & required_half & !known {
        0 => Ok(()),
        bits => Err(DataError::UnknownRequirement { what, bits }),
    }
}
