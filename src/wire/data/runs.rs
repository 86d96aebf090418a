//! The run list of a frame: which pages it has, and what each run of them is encoded as.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{DataError, check_flags};
use crate::layout::{PAGE_SIZE, PageIndex, PageRun};

/// Pages are numbered by 48 bits: 2⁶⁰ bytes of guest-physical space.
const PAGE_BITS: u32 = 48;
/// The flags of a run that must be understood. This version knows none.
const REQUIRED_HALF: u32 = 0xf0;

/// What a run of pages holds, and how. A new encoding gets a number here, its content from `page::encode`, and its
/// way back into RAM in `transport::receive`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RunKind {
    /// The content as it is, page after page, in the payload.
    Raw = 0,
    /// Zeros; nothing in the payload.
    Zero = 1,
}

impl RunKind {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw pages",
            Self::Zero => "zeros",
        }
    }

    fn of(number: u8) -> Result<Self, DataError> {
        match number {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Zero),
            2 => Err(DataError::NotNegotiated { kind: "deltas" }),
            3 => Err(DataError::NotNegotiated { kind: "compressed pages" }),
            found => Err(DataError::UnknownKind { what: "a run", found: found.into() }),
        }
    }

    /// The bytes that `pages` pages take in the payload.
    fn encoded_bytes(self, pages: u32) -> u64 {
        match self {
            Self::Raw => u64::from(pages) * PAGE_SIZE as u64,
            Self::Zero => 0,
        }
    }
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
    /// From the lowest bit up: 48 bits of first page, 8 of kind, 8 of flags, the upper half of which must be
    /// understood.
    pub(super) first_kind_flags: U64,
    pub(super) pages: U32,
    pub(super) encoded_bytes: U32,
}

impl WireRun {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    fn read(&self) -> Result<FrameRun, DataError> {
        let [first @ .., kind, flags] = self.first_kind_flags.get().to_le_bytes();
        let mut number = [0; 8];
        number[..first.len()].copy_from_slice(&first);
        let (first, pages) = (u64::from_le_bytes(number), self.pages.get());
        check_flags("a run", flags.into(), REQUIRED_HALF, 0)?;
        let kind = RunKind::of(kind)?;
        if pages == 0 || first + u64::from(pages) > 1 << PAGE_BITS {
            return Err(DataError::Run { first, pages });
        }
        let (found, expected) = (self.encoded_bytes.get(), kind.encoded_bytes(pages));
        if u64::from(found) != expected {
            return Err(DataError::RunBytes { pages, kind: kind.name(), found, expected });
        }
        Ok(FrameRun { first: PageIndex(first), pages, kind })
    }
}

impl From<FrameRun> for WireRun {
    fn from(run: FrameRun) -> Self {
        let kind = u64::from(run.kind as u8) << PAGE_BITS;
        let encoded_bytes = u32::try_from(run.kind.encoded_bytes(run.pages)).unwrap_or(u32::MAX);
        Self {
            first_kind_flags: (run.first.0 | kind).into(),
            pages: run.pages.into(),
            encoded_bytes: encoded_bytes.into(),
        }
    }
}

/// What a run list adds up to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Content {
    /// Pages that are sent as they are.
    pub raw_pages: u64,
    /// Bytes in the payload.
    pub encoded_bytes: u64,
}

/// Reads a run list into `runs`; what it adds up to.
pub(super) fn read_list(list: &[u8], runs: &mut Vec<FrameRun>) -> Result<Content, DataError> {
    let (mut free_from, mut content) = (0, Content::default());
    for bytes in list.chunks(WireRun::BYTES) {
        let wire = WireRun::read_from_bytes(bytes);
        let wire = wire.map_err(|_| DataError::Length { message: "a run", found: bytes.len() })?;
        let run = wire.read()?;
        if run.first.0 < free_from {
            return Err(DataError::RunOrder { first: run.first.0 });
        }
        free_from = run.run().end().0;
        if run.kind == RunKind::Raw {
            content.raw_pages += u64::from(run.pages);
        }
        // At most `FRAME_RUNS_MAX` runs of less than 2⁴⁵ bytes each: the sum fits.
        content.encoded_bytes += run.kind.encoded_bytes(run.pages);
        runs.push(run);
    }
    Ok(content)
}
