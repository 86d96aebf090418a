//! The RAM of a measurement: runs of pages with content, and gaps between them.
#![expect(unsafe_code, reason = "the transport takes memory as a guest has it, by raw pointer")]

use std::sync::Arc;

use anyhow::Context;
use memmap2::{MmapMut, MmapRaw};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId};

/// Bytes of one plain `send` or `recv`; amounts of memory are multiples of it.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Anonymous memory as guest RAM.
pub struct BenchMemory {
    mapping: Arc<MmapRaw>,
    guest: GuestMemory,
    content_pages: u64,
    run_pages: u64,
}

impl BenchMemory {
    /// Fresh memory that has room for `bytes` in runs of `run_pages` with gaps of the same length.
    pub fn fresh(bytes: u64, run_pages: u64) -> anyhow::Result<Self> {
        let content_pages = bytes / CHUNK_BYTES as u64 * (CHUNK_BYTES / PAGE_SIZE) as u64;
        let pages = match run_pages {
            0 => content_pages,
            _ => content_pages.next_multiple_of(run_pages) * 2,
        };
        let length = usize::try_from(pages)?.saturating_mul(PAGE_SIZE);
        let mapping =
            MmapMut::map_anon(length).with_context(|| format!("mapping {length} bytes of memory"))?;
        let mapping = Arc::new(MmapRaw::from(mapping));
        let region = Region::new(SlotId(0), PageRun { first: PageIndex(0), pages }, mapping.as_mut_ptr());
        // SAFETY: the mapping is kept by the value and its clones, and is readable and writable; slices of it are
        // made for plain sends and receives only, while no transport runs.
        let guest = unsafe { GuestMemory::new(vec![region]) }?.kept_by(Arc::clone(&mapping) as _);
        Ok(Self { mapping, guest, content_pages, run_pages })
    }

    /// The same with content that is neither zero nor the same in two pages.
    pub fn filled(bytes: u64, run_pages: u64) -> anyhow::Result<Self> {
        let memory = Self::fresh(bytes, run_pages)?;
        for run in memory.pages().runs() {
            for piece in memory.guest.host_runs(run)? {
                let words = piece.host.cast::<u64>();
                for word in 0..piece.len_bytes() / 8 {
                    let address = piece.run.first.0 << 12 | word as u64;
                    // SAFETY: inside the piece, aligned; nobody else uses the memory yet.
                    unsafe { words.add(word).write(address.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1) };
                }
            }
        }
        Ok(memory)
    }

    /// Every page written once, so that none is populated by what is measured.
    pub fn populate(&self) {
        for page in 0..self.mapping.len() / PAGE_SIZE {
            // SAFETY: inside the mapping; nobody else uses the memory yet. Not the zero of fresh memory, for
            // which the transport might leave a page alone.
            unsafe { self.mapping.as_mut_ptr().add(page * PAGE_SIZE).write_volatile(1) };
        }
    }

    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// The pages with content.
    pub fn pages(&self) -> PageSet {
        let mut pages = PageSet::new(self.guest.end());
        let step = if self.run_pages == 0 { self.content_pages } else { self.run_pages };
        let mut left = self.content_pages;
        let mut first = 0;
        while left > 0 {
            let run = step.min(left);
            pages.insert_run(PageRun { first: PageIndex(first), pages: run });
            first += 2 * step;
            left -= run;
        }
        pages
    }

    pub fn content_bytes(&self) -> u64 {
        self.content_pages * PAGE_SIZE as u64
    }

    /// Chunk `index` of as many bytes as there is content, for plain sends; `None` after the last one. Nobody else
    /// uses the memory meanwhile.
    pub fn chunk(&self, index: usize) -> Option<&[u8]> {
        let start = self.chunk_start(index)?;
        // SAFETY: inside the mapping; nobody writes it while plain sends run.
        Some(unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().add(start), CHUNK_BYTES) })
    }

    /// The same for plain receives. Each index may be taken once.
    #[expect(clippy::mut_from_ref, reason = "chunks are disjoint pieces of memory behind a raw pointer")]
    pub fn take_chunk(&self, index: usize) -> Option<&mut [u8]> {
        let start = self.chunk_start(index)?;
        // SAFETY:
        // * Inside the mapping; chunks do not overlap.
        // * Indexes come from one counter, so none is taken twice, and no transport runs meanwhile.
        Some(unsafe { std::slice::from_raw_parts_mut(self.mapping.as_mut_ptr().add(start), CHUNK_BYTES) })
    }

    fn chunk_start(&self, index: usize) -> Option<usize> {
        let start = index.checked_mul(CHUNK_BYTES)?;
        (start as u64 + CHUNK_BYTES as u64 <= self.content_bytes()).then_some(start)
    }
}
