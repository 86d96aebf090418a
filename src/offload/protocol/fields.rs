//! Fields of a packet: numbers in little-endian order, runs of pages, and parts of any length within a bound.

use crate::kvm::{Protection, Until};
use crate::layout::{PageIndex, PageRun};

/// The longest text of an error.
pub(super) const TEXT_BYTES_MAX: usize = 1 << 10;
/// The longest name of a VM or a block of memory.
pub(in crate::offload) const NAME_BYTES_MAX: usize = 64;

/// What a packet is that is no message.
pub(in crate::offload) type Malformed = &'static str;

/// Bytes of a run.
const RUN_BYTES: usize = 16;

/// Writes fields.
pub(super) struct Out(pub(super) Vec<u8>);

impl Out {
    pub(super) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn run(self, run: PageRun) -> Self {
        self.u64(run.first.0).u64(run.pages)
    }

    pub(super) fn runs(self, runs: &[PageRun]) -> Self {
        runs.iter().fold(self, |out, run| out.run(*run))
    }

    pub(super) fn words(self, words: &[u64]) -> Self {
        words.iter().fold(self, |out, word| out.u64(*word))
    }

    pub(super) fn ranges(self, ranges: &[Protection]) -> Self {
        let range =
            |out: Self, range: &Protection| out.run(range.pages).u8((range.until == Until::Written).into());
        ranges.iter().fold(self, range)
    }

    /// A part whose length is told.
    pub(super) fn sized(mut self, bytes: &[u8]) -> Self {
        // No longer than a packet, or sending it fails.
        self = self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.rest(bytes)
    }

    /// The last part: as long as the packet.
    pub(super) fn rest(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

/// Reads fields.
pub(super) struct In<'a>(pub(super) &'a [u8]);

impl<'a> In<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or("too short")?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        self.take().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a flag is neither 0 nor 1"),
        }
    }

    pub(super) fn run(&mut self) -> Result<PageRun, Malformed> {
        Ok(PageRun { first: PageIndex(self.u64()?), pages: self.u64()? })
    }

    pub(super) fn runs(&mut self, count: usize) -> Result<Vec<PageRun>, Malformed> {
        if count.checked_mul(RUN_BYTES).is_none_or(|bytes| bytes > self.0.len()) {
            return Err("fewer runs than announced");
        }
        (0..count).map(|_| self.run()).collect()
    }

    /// Runs to the end of the packet.
    pub(super) fn all_runs(&mut self) -> Result<Vec<PageRun>, Malformed> {
        self.runs(self.0.len() / RUN_BYTES)
    }

    /// Words to the end of the packet.
    pub(super) fn all_words(&mut self) -> Result<Vec<u64>, Malformed> {
        (0..self.0.len() / 8).map(|_| self.u64()).collect()
    }

    /// Pairs of numbers to the end of the packet.
    pub(super) fn all_pairs(&mut self) -> Result<Vec<(u32, u32)>, Malformed> {
        (0..self.0.len() / 8).map(|_| Ok((self.u32()?, self.u32()?))).collect()
    }

    /// Ranges to the end of the packet.
    pub(super) fn all_ranges(&mut self) -> Result<Vec<Protection>, Malformed> {
        let range = |fields: &mut Self| {
            let pages = fields.run()?;
            let until = if fields.flag()? { Until::Written } else { Until::Touched };
            Ok(Protection { pages, until })
        };
        (0..self.0.len() / (RUN_BYTES + 1)).map(|_| range(self)).collect()
    }

    pub(super) fn sized(&mut self, bytes_max: usize) -> Result<&'a [u8], Malformed> {
        let bytes = usize::try_from(self.u32()?).map_err(|_| "a part is too long")?;
        if bytes > bytes_max {
            return Err("a part is too long");
        }
        let (part, rest) = self.0.split_at_checked(bytes).ok_or("too short")?;
        self.0 = rest;
        Ok(part)
    }

    pub(super) fn rest(&mut self, bytes_max: usize) -> Result<&'a [u8], Malformed> {
        let part = std::mem::take(&mut self.0);
        if part.len() > bytes_max { Err("a part is too long") } else { Ok(part) }
    }

    pub(super) fn name(&mut self) -> Result<String, Malformed> {
        let name = self.sized(NAME_BYTES_MAX)?;
        match std::str::from_utf8(name) {
            Ok(name) if name.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(name.to_owned()),
            _ => Err("a name is not printable"),
        }
    }
}

/// An error's text as it may be printed.
pub(super) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What of an error's text is sent.
pub(super) fn cut(text: &str) -> &[u8] {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}
