//! From pages that were dealt to a frame: which of them are zero, and where the others are in host memory.
#![expect(unsafe_code, reason = "pages are looked at through raw pointers")]

use crate::layout::{GuestMemory, HostRun, LayoutError, PAGE_SIZE, PageIndex, PageRun};
use crate::page;
use crate::wire::data::{Frame, FrameKind, FrameRun, RunKind};

/// A frame of pages before it has a number.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Its run list, ascending.
    pub runs: Vec<FrameRun>,
    /// The memory of its data runs.
    pub payload: Vec<HostRun>,
    /// Pages with content.
    pub data_pages: u64,
    /// Pages without.
    pub zero_pages: u64,
}

impl Pages {
    /// Looks at the pages of `dealt`, which are ascending and at most [`FRAME_DATA_PAGES_MAX`] in all.
    ///
    /// A page that the guest writes at this very moment may be taken for zero or not: its write made it dirty
    /// again, and what it holds then is sent in the next round.
    ///
    /// [`FRAME_DATA_PAGES_MAX`]: crate::wire::FRAME_DATA_PAGES_MAX
    pub(super) fn look_at(&mut self, memory: &GuestMemory, dealt: &[PageRun]) -> Result<(), LayoutError> {
        self.runs.clear();
        self.payload.clear();
        (self.data_pages, self.zero_pages) = (0, 0);
        for run in dealt {
            for piece in memory.host_runs(*run)? {
                self.add_piece(piece);
            }
        }
        Ok(())
    }

    fn add_piece(&mut self, piece: HostRun) {
        let HostRun { run, region, host } = piece;
        let page_at = |page: u64| {
            host.wrapping_add(usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE))
        };
        // SAFETY: asked below for pages of the piece only, which `host_runs` gave out: mapped RAM, page-aligned.
        let is_zero = |page: u64| unsafe { page::is_zero(page_at(page)) };
        let mut start = 0;
        while start < run.pages {
            let kind = if is_zero(start) { RunKind::Zero } else { RunKind::Data };
            let mut end = start + 1;
            while end < run.pages && is_zero(end) == (kind == RunKind::Zero) {
                end += 1;
            }
            let first = PageIndex(run.first.0 + start);
            let pages = end - start;
            self.push(FrameRun { first, pages: u32::try_from(pages).unwrap_or(u32::MAX), kind });
            match kind {
                RunKind::Zero => self.zero_pages += pages,
                RunKind::Data => {
                    self.data_pages += pages;
                    let run = PageRun { first, pages };
                    self.payload.push(HostRun { run, region, host: page_at(start) });
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

    /// Its header, with `argument` for the bytes that the link holds.
    pub(super) fn frame(&self, sequence: u64, round: u32, argument: u32) -> Frame {
        Frame {
            kind: FrameKind::Pages,
            sequence,
            round,
            argument,
            run_count: u32::try_from(self.runs.len()).unwrap_or(u32::MAX),
            payload_bytes: u32::try_from(self.payload_bytes()).unwrap_or(u32::MAX),
        }
    }

    /// Bytes of page content.
    pub(super) fn payload_bytes(&self) -> u64 {
        self.data_pages * PAGE_SIZE as u64
    }
}
