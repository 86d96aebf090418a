//! What travels on a data connection.
//!
//! The source opens it with a [`DataHello`] that proves by the migration's token that it belongs here, and the
//! destination answers with a [`DataWelcome`]. Then the source sends frames: a [`FrameHeader`], its list of
//! [`WireRun`]s, and the content of the runs of data, page after page. The destination answers each frame,
//! once all of it is in place, with an [`Acknowledgement`].
//!
//! All integers are little-endian. Headers and run lists carry a CRC32C; page contents cannot, because the
//! guest may write a page while the kernel reads it. This file checks what can be checked without the guest's
//! layout; `transport::receive` checks the rest before a byte lands.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{PAGE_SIZE, PageIndex, PageRun};
use crate::wire::{FRAME_DATA_PAGES_MAX, FRAME_PAYLOAD_BYTES_MAX, FRAME_RUNS_MAX};

/// Version of everything on a data connection. A peer with another one is refused.
pub const DATA_VERSION: u16 = 1;

const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"RFdh");
const WELCOME_MAGIC: u32 = u32::from_le_bytes(*b"RFdw");
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"RFdf");
const ACKNOWLEDGEMENT_MAGIC: u32 = u32::from_le_bytes(*b"RFda");

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
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {found} of the data protocol, this side {DATA_VERSION}: use the same release on both"
    )]
    Version {
        /// Its version.
        found: u16,
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
    /// A kind of frame or run that does not exist.
    #[error("there is no {what} of kind {found}")]
    UnknownKind {
        /// Frame or run.
        what: &'static str,
        /// The kind.
        found: u32,
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
    /// The peer acknowledged what it was never sent.
    #[error("frame {found} was acknowledged, {sent} were sent")]
    AcknowledgedUnsent {
        /// The frame acknowledged.
        found: u64,
        /// Frames sent.
        sent: u64,
    },
}

/// Checksums a message that ends with its own checksum.
fn checked_tail(message: &'static str, bytes: &[u8], stated: U32) -> Result<(), DataError> {
    let computed = crc32c::crc32c(&bytes[..bytes.len() - size_of::<U32>()]);
    let stated = stated.get();
    if stated == computed { Ok(()) } else { Err(DataError::Checksum { message, stated, computed }) }
}

fn check_magic(message: &'static str, expected: u32, found: U32) -> Result<(), DataError> {
    let found = found.get();
    if found == expected { Ok(()) } else { Err(DataError::Magic { message, expected, found }) }
}

fn check_version(found: U16) -> Result<(), DataError> {
    let found = found.get();
    if found == DATA_VERSION { Ok(()) } else { Err(DataError::Version { found }) }
}

/// The first message on a data connection, from the source. 40 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataHello {
    magic: U32,
    version: U16,
    channel: U16,
    token: [u8; 16],
    connection: U32,
    reserved: [U32; 2],
    checksum: U32,
}

impl DataHello {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// The greeting of connection number `connection`, which serves channel `channel` of the migration that
    /// `token` names. A channel that reconnects comes with a new connection number.
    pub fn new(token: [u8; 16], channel: u16, connection: u32) -> Self {
        let mut hello = Self {
            magic: HELLO_MAGIC.into(),
            version: DATA_VERSION.into(),
            channel: channel.into(),
            token,
            connection: connection.into(),
            reserved: [U32::ZERO; 2],
            checksum: U32::ZERO,
        };
        hello.checksum = crc32c::crc32c(&hello.as_bytes()[..Self::BYTES - size_of::<U32>()]).into();
        hello
    }

    /// Reads and checks a greeting; whether the token is the right one is the caller's business.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic, version or checksum.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<Self, DataError> {
        let hello: Self = zerocopy::transmute!(*bytes);
        check_magic("a greeting", HELLO_MAGIC, hello.magic)?;
        check_version(hello.version)?;
        checked_tail("a greeting", bytes, hello.checksum)?;
        Ok(hello)
    }

    /// The token of the migration.
    pub fn token(&self) -> [u8; 16] {
        self.token
    }

    /// The channel that the connection serves.
    pub fn channel(&self) -> u16 {
        self.channel.get()
    }

    /// The number of the connection.
    pub fn connection(&self) -> u32 {
        self.connection.get()
    }
}

/// What the destination says to a greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u16)]
#[non_exhaustive]
pub enum Verdict {
    /// Frames may follow.
    #[error("welcome")]
    Welcome = 0,
    /// The token names another migration.
    #[error("the destination serves another migration: the token is wrong")]
    WrongToken = 1,
    /// The destination speaks another version.
    #[error("the destination speaks another version of the data protocol")]
    WrongVersion = 2,
    /// More connections than the migration may have, or a number that was used before.
    #[error("the destination takes no further connection of this migration")]
    NotExpected = 3,
}

/// The destination's answer to a [`DataHello`]. 16 bytes; frames follow if it says [`Verdict::Welcome`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataWelcome {
    magic: U32,
    version: U16,
    verdict: U16,
    reserved: U32,
    checksum: U32,
}

impl DataWelcome {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// The answer that says `verdict`.
    pub fn new(verdict: Verdict) -> Self {
        let mut welcome = Self {
            magic: WELCOME_MAGIC.into(),
            version: DATA_VERSION.into(),
            verdict: (verdict as u16).into(),
            reserved: U32::ZERO,
            checksum: U32::ZERO,
        };
        welcome.checksum = crc32c::crc32c(&welcome.as_bytes()[..Self::BYTES - size_of::<U32>()]).into();
        welcome
    }

    /// Reads and checks an answer.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic, checksum, or an unknown verdict. An answer of another version is read as such, for
    /// its verdict says so.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<Verdict, DataError> {
        let welcome: Self = zerocopy::transmute!(*bytes);
        check_magic("an answer to a greeting", WELCOME_MAGIC, welcome.magic)?;
        checked_tail("an answer to a greeting", bytes, welcome.checksum)?;
        match welcome.verdict.get() {
            0 => check_version(welcome.version).map(|()| Verdict::Welcome),
            1 => Ok(Verdict::WrongToken),
            2 => Ok(Verdict::WrongVersion),
            3 => Ok(Verdict::NotExpected),
            found => Err(DataError::UnknownKind { what: "verdict", found: found.into() }),
        }
    }
}

/// What a frame is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum FrameKind {
    /// Runs of pages and the content of those that are data.
    Pages = 1,
    /// The connection that the argument names is dead to the source. Acknowledged once the destination's end of
    /// it can write no page any more.
    Retire = 2,
}

/// What opens a frame. 40 bytes, then `run_count` × 16 bytes of run list, then `payload_bytes` of pages.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    magic: U32,
    version: U16,
    kind: U16,
    sequence: U64,
    round: U32,
    argument: U32,
    run_count: U32,
    payload_bytes: U32,
    reserved: U32,
    /// Of the header before this field and of the run list after it.
    checksum: U32,
}

/// A [`FrameHeader`] whose fields are possible; its checksum waits for the run list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What it is for.
    pub kind: FrameKind,
    /// Its number on this connection, from 1.
    pub sequence: u64,
    /// The round that its pages belong to.
    pub round: u32,
    /// For [`FrameKind::Retire`], the connection. For [`FrameKind::Pages`], the bytes that the link holds under way
    /// as far as the source knows, so that the destination can make its buffer as large.
    pub argument: u32,
    /// Runs that follow.
    pub run_count: u32,
    /// Bytes of pages that follow the runs.
    pub payload_bytes: u32,
}

impl FrameHeader {
    /// Bytes on the wire, the run list not counted.
    pub const BYTES: usize = size_of::<Self>();

    /// Reads a header and checks everything about it but the checksum, which covers the run list too: the
    /// number of runs is now safe to read.
    ///
    /// # Errors
    ///
    /// [`DataError`].
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<Frame, DataError> {
        let header: Self = zerocopy::transmute!(*bytes);
        check_magic("a frame", FRAME_MAGIC, header.magic)?;
        check_version(header.version)?;
        let kind = match header.kind.get() {
            1 => FrameKind::Pages,
            2 => FrameKind::Retire,
            found => return Err(DataError::UnknownKind { what: "frame", found: found.into() }),
        };
        let (run_count, payload_bytes) = (header.run_count.get(), header.payload_bytes.get());
        let limit = |what, found: u32, limit: u32| {
            if found <= limit {
                Ok(())
            } else {
                Err(DataError::TooLong { what, found: found.into(), limit: limit.into() })
            }
        };
        limit("runs", run_count, FRAME_RUNS_MAX)?;
        limit("bytes of payload", payload_bytes, FRAME_PAYLOAD_BYTES_MAX)?;
        if (kind == FrameKind::Pages) != (run_count > 0) || (kind != FrameKind::Pages && payload_bytes > 0) {
            return Err(DataError::Shape { kind, run_count, payload_bytes });
        }
        Ok(Frame {
            kind,
            sequence: header.sequence.get(),
            round: header.round.get(),
            argument: header.argument.get(),
            run_count,
            payload_bytes,
        })
    }
}

/// Writes header and run list of `frame` over `out`.
pub fn write_frame(out: &mut Vec<u8>, frame: &Frame, runs: &[FrameRun]) {
    let mut header = FrameHeader {
        magic: FRAME_MAGIC.into(),
        version: DATA_VERSION.into(),
        kind: (frame.kind as u16).into(),
        sequence: frame.sequence.into(),
        round: frame.round.into(),
        argument: frame.argument.into(),
        run_count: frame.run_count.into(),
        payload_bytes: frame.payload_bytes.into(),
        reserved: U32::ZERO,
        checksum: U32::ZERO,
    };
    out.clear();
    out.extend_from_slice(header.as_bytes());
    for run in runs {
        out.extend_from_slice(WireRun::from(*run).as_bytes());
    }
    header.checksum = frame_checksum(out).into();
    out[..FrameHeader::BYTES].copy_from_slice(header.as_bytes());
}

fn frame_checksum(header_and_runs: &[u8]) -> u32 {
    let of_header = crc32c::crc32c(&header_and_runs[..FrameHeader::BYTES - size_of::<U32>()]);
    crc32c::crc32c_append(of_header, &header_and_runs[FrameHeader::BYTES..])
}

/// What a run of pages holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RunKind {
    /// Content that follows in the payload.
    Data = 0,
    /// Zeros; nothing follows.
    Zero = 1,
}

/// A run of pages in a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRun {
    /// Its first page.
    pub first: PageIndex,
    /// Its length.
    pub pages: u32,
    /// What it holds.
    pub kind: RunKind,
}

impl FrameRun {
    /// The pages of it.
    pub fn run(self) -> PageRun {
        PageRun { first: self.first, pages: self.pages.into() }
    }
}

/// A [`FrameRun`] on the wire. 16 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WireRun {
    first: U64,
    pages: U32,
    kind: U32,
}

impl WireRun {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();
}

impl From<FrameRun> for WireRun {
    fn from(run: FrameRun) -> Self {
        Self { first: run.first.0.into(), pages: run.pages.into(), kind: (run.kind as u32).into() }
    }
}

/// Checks a frame's checksum and run list, given the bytes of header and run list together, and leaves the runs
/// in `runs`: each has a page, none overlaps another, and their data adds up to the payload.
///
/// # Errors
///
/// [`DataError`]; `runs` is then worthless.
pub fn read_runs(frame: &Frame, header_and_runs: &[u8], runs: &mut Vec<FrameRun>) -> Result<(), DataError> {
    runs.clear();
    let (header, list) = FrameHeader::read_from_prefix(header_and_runs)
        .ok()
        .filter(|(_, list)| list.len() as u64 == u64::from(frame.run_count) * WireRun::BYTES as u64)
        .ok_or(DataError::TooLong {
            what: "bytes of header and runs",
            found: header_and_runs.len() as u64,
            limit: (FrameHeader::BYTES as u64) + u64::from(frame.run_count) * WireRun::BYTES as u64,
        })?;
    let (stated, computed) = (header.checksum.get(), frame_checksum(header_and_runs));
    if stated != computed {
        return Err(DataError::Checksum { message: "a frame", stated, computed });
    }
    let mut free_from = 0;
    let mut data_pages = 0;
    for bytes in list.chunks_exact(WireRun::BYTES) {
        let Ok(run) = WireRun::read_from_bytes(bytes) else { break };
        let (first, pages) = (run.first.get(), run.pages.get());
        let kind = match run.kind.get() {
            0 => RunKind::Data,
            1 => RunKind::Zero,
            found => return Err(DataError::UnknownKind { what: "run", found }),
        };
        let last_possible = u64::MAX / PAGE_SIZE as u64;
        let end = first.checked_add(pages.into()).filter(|end| pages > 0 && *end <= last_possible);
        let end = end.ok_or(DataError::Run { first, pages })?;
        if first < free_from {
            return Err(DataError::RunOrder { first });
        }
        free_from = end;
        if kind == RunKind::Data {
            data_pages += u64::from(pages);
        }
        runs.push(FrameRun { first: PageIndex(first), pages, kind });
    }
    let computed = data_pages.saturating_mul(PAGE_SIZE as u64);
    if computed != u64::from(frame.payload_bytes) || data_pages > u64::from(FRAME_DATA_PAGES_MAX) {
        return Err(DataError::PayloadMismatch { stated: frame.payload_bytes.into(), computed });
    }
    Ok(())
}

/// What the destination sends back when everything up to and including frame `sequence` is in place. 24 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Acknowledgement {
    magic: U32,
    reserved: U32,
    sequence: U64,
    pad: U32,
    checksum: U32,
}

impl Acknowledgement {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// Says that everything up to frame `sequence` is in place.
    pub fn new(sequence: u64) -> Self {
        let mut acknowledgement = Self {
            magic: ACKNOWLEDGEMENT_MAGIC.into(),
            reserved: U32::ZERO,
            sequence: sequence.into(),
            pad: U32::ZERO,
            checksum: U32::ZERO,
        };
        let checksum = crc32c::crc32c(&acknowledgement.as_bytes()[..Self::BYTES - size_of::<U32>()]);
        acknowledgement.checksum = checksum.into();
        acknowledgement
    }

    /// Reads and checks one; the frame up to which everything is in place.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic or checksum.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<u64, DataError> {
        let acknowledgement: Self = zerocopy::transmute!(*bytes);
        check_magic("an acknowledgement", ACKNOWLEDGEMENT_MAGIC, acknowledgement.magic)?;
        checked_tail("an acknowledgement", bytes, acknowledgement.checksum)?;
        Ok(acknowledgement.sequence.get())
    }
}

#[cfg(test)]
mod tests;
