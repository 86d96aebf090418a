//! What pages become on the wire: their bytes as they are, a note that they are zero, or bytes that were made of
//! them.
//!
//! A frame's payload is a list of [`Piece`]s. Raw pages are pieces of guest RAM, which the kernel reads; whatever is
//! made of pages or comes from elsewhere (device state) is staged in the encoder's own buffer. A new encoding is a new
//! [`RunKind`] that [`Encoder::encode_part`] chooses, and that stages its bytes by [`Encoder::stage`].
#![expect(unsafe_code, reason = "pages are looked at through raw pointers")]

use std::ops::Range;

use super::read::is_zero;
use crate::layout::{GuestMemory, HostRun, LayoutError, PAGE_SIZE, PageIndex, PageRun};
use crate::wire::data::{FrameRun, RunKind};

/// A part of a frame's payload.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Guest RAM, read when it is sent.
    Ram(HostRun),
    /// Bytes of the encoder's own buffer.
    Staged(Range<usize>),
}

/// Turns the pages of one frame into its run list and payload. Kept from frame to frame for its memory.
#[derive(Debug, Default)]
pub struct Encoder {
    runs: Vec<FrameRun>,
    pieces: Vec<Piece>,
    staged: Vec<u8>,
    content_pages: u64,
    zero_pages: u64,
}

impl Encoder {
    /// Encodes the pages of `dealt`, which are ascending and at most
    /// [`FRAME_DATA_PAGES_MAX`](crate::wire::FRAME_DATA_PAGES_MAX) in all.
    ///
    /// A page that the guest writes at this very moment may be taken for zero or not: its write made it dirty
    /// again, and what it holds then is sent in the next round.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] for a page outside RAM.
    pub fn encode(&mut self, memory: &GuestMemory, dealt: &[PageRun]) -> Result<(), LayoutError> {
        self.clear();
        for run in dealt {
            for part in memory.host_runs(*run)? {
                self.encode_part(part);
            }
        }
        Ok(())
    }

    /// Makes bytes that are no pages the payload, or nothing.
    pub fn encode_bytes(&mut self, bytes: &[u8]) {
        self.clear();
        if !bytes.is_empty() {
            self.stage(bytes);
        }
    }

    fn clear(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.staged.clear();
        (self.content_pages, self.zero_pages) = (0, 0);
    }

    fn encode_part(&mut self, part: HostRun) {
        let HostRun { run, region, host } = part;
        let page_at = |page: u64| {
            host.wrapping_add(usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE))
        };
        // SAFETY: asked below for pages of the part only, which `host_runs` gave out: mapped RAM, page-aligned.
        let is_zero = |page: u64| unsafe { is_zero(page_at(page)) };
        let mut start = 0;
        while start < run.pages {
            let kind = if is_zero(start) { RunKind::Zero } else { RunKind::Raw };
            let mut end = start + 1;
            while end < run.pages && is_zero(end) == (kind == RunKind::Zero) {
                end += 1;
            }
            let first = PageIndex(run.first.0 + start);
            let pages = end - start;
            self.push(FrameRun { first, pages: u32::try_from(pages).unwrap_or(u32::MAX), kind });
            match kind {
                RunKind::Zero => self.zero_pages += pages,
                RunKind::Raw => {
                    self.content_pages += pages;
                    let run = PageRun { first, pages };
                    self.pieces.push(Piece::Ram(HostRun { run, region, host: page_at(start) }));
                }
            }
            start = end;
        }
    }

    /// Appends a run; one that goes on where the last one ended, over the border of a region, becomes part of it.
    fn push(&mut self, run: FrameRun) {
        match self.runs.last_mut() {
            Some(last) if last.kind == run.kind && last.run().end() == run.first => last.pages += run.pages,
            _ => self.runs.push(run),
        }
    }

    /// Appends bytes to the payload.
    fn stage(&mut self, bytes: &[u8]) {
        let start = self.staged.len();
        self.staged.extend_from_slice(bytes);
        self.pieces.push(Piece::Staged(start..self.staged.len()));
    }

    /// The run list, ascending.
    pub fn runs(&self) -> &[FrameRun] {
        &self.runs
    }

    /// The payload.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Hands run list, payload and the buffer of its staged pieces to the channel that sends them, which may exchange the buffer
    /// for another one.
    pub fn load_into(&mut self, load: impl FnOnce(&[FrameRun], &[Piece], &mut Vec<u8>)) {
        load(&self.runs, &self.pieces, &mut self.staged);
    }

    /// Pages with content.
    pub fn content_pages(&self) -> u64 {
        self.content_pages
    }

    /// Pages without.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// Bytes of the payload.
    pub fn payload_bytes(&self) -> usize {
        let bytes = |piece: &Piece| match piece {
            Piece::Ram(run) => run.len_bytes(),
            Piece::Staged(range) => range.len(),
        };
        self.pieces.iter().map(bytes).sum()
    }
}
