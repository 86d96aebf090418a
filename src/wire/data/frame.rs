//! Frames: what opens one, and how its head is written and checked.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{DataError, check_flags, check_magic};
use super::kind::FrameKind;
use super::runs::{FrameRun, WireRun, read_list};
use super::versions::{DATA_VERSION, DATA_VERSION_OLDEST};
use crate::wire::{
    FRAME_DATA_PAGES_MAX, FRAME_EXTENSION_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX, FRAME_RUNS_MAX,
    STATE_CHUNK_BYTES_MAX,
};

const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"RFdf");

/// The flags of frames.
pub mod flags {
    /// The flags that must be understood.
    pub const REQUIRED_HALF: u16 = 0xff00;
    /// A receiver that does not know the frame's kind must refuse the frame rather than skip it.
    pub const KIND_REQUIRED: u16 = 1 << 15;
}

/// What opens a frame. 48 bytes, then `run_count` × 16 bytes of run list, `extension_bytes`, and `payload_bytes`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    magic: U32,
    version: U16,
    kind: U16,
    sequence: U64,
    round: U32,
    flags: U16,
    extension_bytes: U16,
    argument: U64,
    run_count: U32,
    payload_bytes: U32,
    payload_checksum: U32,
    /// Of the header before this field, of the run list and of the extension.
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
    /// Its [`flags`].
    pub flags: u16,
    /// Bytes of a later version, after the runs.
    pub extension_bytes: u16,
    /// What it means depends on the kind.
    pub argument: u64,
    /// Runs that follow.
    pub run_count: u32,
    /// Bytes of content that follow the runs and the extension.
    pub payload_bytes: u32,
    /// CRC32C of the payload where that holds still: of device state. 0 for pages.
    pub payload_checksum: u32,
}

impl Frame {
    /// A frame without runs and payload.
    pub fn new(kind: FrameKind, sequence: u64, round: u32, argument: u64) -> Self {
        Self {
            kind,
            sequence,
            round,
            flags: 0,
            extension_bytes: 0,
            argument,
            run_count: 0,
            payload_bytes: 0,
            payload_checksum: 0,
        }
    }

    /// Bytes of header, run list and extension: all that is checksummed.
    pub fn head_bytes(&self) -> usize {
        // Bounded by `FRAME_RUNS_MAX` and `FRAME_EXTENSION_BYTES_MAX`.
        let runs = usize::try_from(self.run_count).unwrap_or(usize::MAX).saturating_mul(WireRun::BYTES);
        FrameHeader::BYTES.saturating_add(runs).saturating_add(self.extension_bytes.into())
    }

    /// Bytes of the whole frame.
    pub fn bytes(&self) -> u64 {
        self.head_bytes() as u64 + u64::from(self.payload_bytes)
    }
}

impl FrameHeader {
    /// Bytes on the wire, the run list not counted.
    pub const BYTES: usize = size_of::<Self>();

    /// Bytes of the longest header with run list and extension.
    pub const HEAD_BYTES_MAX: usize =
        Self::BYTES + FRAME_RUNS_MAX as usize * WireRun::BYTES + FRAME_EXTENSION_BYTES_MAX as usize;

    /// Reads and checks what can be checked of a header before its run list is there. The checksum covers the run list
    /// too: all lengths are now safe to read.
    ///
    /// # Errors
    ///
    /// [`DataError`].
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<Frame, DataError> {
        let header: Self = zerocopy::transmute!(*bytes);
        check_magic("a frame", FRAME_MAGIC, header.magic)?;
        let version = header.version.get();
        if !(DATA_VERSION_OLDEST..=DATA_VERSION).contains(&version) {
            return Err(DataError::Version { oldest: version, newest: version });
        }
        let frame = Frame {
            kind: FrameKind::of(header.kind.get()),
            sequence: header.sequence.get(),
            round: header.round.get(),
            flags: header.flags.get(),
            extension_bytes: header.extension_bytes.get(),
            argument: header.argument.get(),
            run_count: header.run_count.get(),
            payload_bytes: header.payload_bytes.get(),
            payload_checksum: header.payload_checksum.get(),
        };
        let (bits, half) = (u32::from(frame.flags), u32::from(flags::REQUIRED_HALF));
        check_flags("a frame", bits, half, flags::KIND_REQUIRED.into())?;
        if let FrameKind::Unknown(found) = frame.kind
            && frame.flags & flags::KIND_REQUIRED != 0
        {
            return Err(DataError::UnknownKind { what: "a frame", found: found.into() });
        }
        let limit = |what, found: u32, limit: u32| {
            if found <= limit {
                Ok(())
            } else {
                Err(DataError::TooLong { what, found: found.into(), limit: limit.into() })
            }
        };
        limit("runs", frame.run_count, FRAME_RUNS_MAX)?;
        limit("bytes of extension", frame.extension_bytes.into(), FRAME_EXTENSION_BYTES_MAX.into())?;
        limit("bytes of payload", frame.payload_bytes, FRAME_PAYLOAD_BYTES_MAX)?;
        frame.check_shape()?;
        Ok(frame)
    }
}

impl Frame {
    fn check_shape(&self) -> Result<(), DataError> {
        let Self { kind, argument, run_count, payload_bytes, .. } = *self;
        let has_shape = match kind {
            FrameKind::Pages => run_count > 0,
            FrameKind::Retire => run_count == 0 && payload_bytes == 0,
            FrameKind::State => run_count == 0 && (1..=STATE_CHUNK_BYTES_MAX).contains(&payload_bytes),
            FrameKind::Unknown(_) => true,
        };
        if !has_shape {
            return Err(DataError::Shape { kind, run_count, payload_bytes });
        }
        let in_range = match kind {
            FrameKind::Retire => argument <= u64::from(u32::MAX),
            FrameKind::State => argument.checked_add(payload_bytes.into()).is_some(),
            FrameKind::Pages | FrameKind::Unknown(_) => true,
        };
        if in_range { Ok(()) } else { Err(DataError::Argument { kind, argument }) }
    }

    /// Checks header, run list and extension, all in `head`, against the checksum in the header.
    fn check_head(&self, head: &[u8]) -> Result<(), DataError> {
        let (expected, found) = (self.head_bytes(), head.len());
        let header = head.first_chunk::<{ FrameHeader::BYTES }>().filter(|_| found == expected);
        let header: FrameHeader =
            zerocopy::transmute!(*header.ok_or(DataError::Length { message: "a frame's head", found })?);
        let (stated, computed) = (header.checksum.get(), head_checksum(head));
        if stated == computed {
            Ok(())
        } else {
            Err(DataError::Checksum { message: "a frame", stated, computed })
        }
    }
}

/// Writes header and run list of `frame` over `out`. This version has no extension to write.
pub fn write_frame(out: &mut Vec<u8>, frame: &Frame, runs: &[FrameRun]) {
    let mut header = FrameHeader {
        magic: FRAME_MAGIC.into(),
        version: DATA_VERSION.into(),
        kind: frame.kind.number().into(),
        sequence: frame.sequence.into(),
        round: frame.round.into(),
        flags: frame.flags.into(),
        extension_bytes: frame.extension_bytes.into(),
        argument: frame.argument.into(),
        run_count: frame.run_count.into(),
        payload_bytes: frame.payload_bytes.into(),
        payload_checksum: frame.payload_checksum.into(),
        checksum: U32::ZERO,
    };
    out.clear();
    out.extend_from_slice(header.as_bytes());
    for run in runs {
        out.extend_from_slice(WireRun::from(*run).as_bytes());
    }
    header.checksum = head_checksum(out).into();
    out[..FrameHeader::BYTES].copy_from_slice(header.as_bytes());
}

/// Checks a frame's checksum, given its header, run list and extension together, and leaves the runs of
/// [`FrameKind::Pages`] in `runs`: each has a page, none overlaps another, and their content adds up to the payload.
///
/// # Errors
///
/// [`DataError`]; `runs` is then worthless.
pub fn read_runs(frame: &Frame, head: &[u8], runs: &mut Vec<FrameRun>) -> Result<(), DataError> {
    runs.clear();
    frame.check_head(head)?;
    if frame.kind != FrameKind::Pages {
        return Ok(());
    }
    let list = &head[FrameHeader::BYTES..head.len() - usize::from(frame.extension_bytes)];
    let content = read_list(list, runs)?;
    let (stated, computed) = (u64::from(frame.payload_bytes), content.encoded_bytes);
    if computed == stated && content.raw_pages <= u64::from(FRAME_DATA_PAGES_MAX) {
        Ok(())
    } else {
        Err(DataError::PayloadMismatch { stated, computed })
    }
}

/// Of everything in a frame's head but the checksum itself.
pub(super) fn head_checksum(head: &[u8]) -> u32 {
    let of_header = crc32c::crc32c(&head[..FrameHeader::BYTES - size_of::<U32>()]);
    crc32c::crc32c_append(of_header, &head[FrameHeader::BYTES..])
}

/// The checksum of a payload that holds still.
pub fn payload_checksum(payload: &[u8]) -> u32 {
    crc32c::crc32c(payload)
}
