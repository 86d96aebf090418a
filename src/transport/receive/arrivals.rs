//! What arrives in a migration's RAM: where pages go, which did, and how many.

use std::sync::atomic::AtomicBool;

use crate::layout::{GuestMemory, PageRun};
use crate::page;
use crate::page_set::AtomicPageSet;
use crate::transport::TransportError;
use crate::transport::counters::Counter;

/// One migration's RAM.
pub(super) struct Arrivals {
    pub memory: GuestMemory,
    /// Pages that were written here, and may hold something else than zeros.
    pub written: AtomicPageSet,
    /// Pages that are in place and that nobody has taken note of.
    pub arrived: AtomicPageSet,
    /// Pages that were cleared before anything arrived.
    pub cleared_pages: u64,
    pub pages: Counter,
    pub zero_pages: Counter,
    pub bytes: Counter,
}

impl Arrivals {
    /// RAM in which only what arrives from now on is not zero.
    pub(super) fn new(memory: GuestMemory, cancel: &AtomicBool) -> Result<Self, TransportError> {
        let cleared_pages = page::clear_used(&memory, cancel).ok_or(TransportError::Cancelled)?;
        if cleared_pages > 0 {
            tracing::warn!(cleared_pages, "this RAM was used before, and has been cleared");
        }
        Ok(Self {
            written: AtomicPageSet::new(memory.end()),
            arrived: AtomicPageSet::new(memory.end()),
            memory,
            cleared_pages,
            pages: Counter::default(),
            zero_pages: Counter::default(),
            bytes: Counter::default(),
        })
    }

    /// Makes pages of RAM zero that may not be. Fresh memory is left untouched, so that it stays unallocated.
    pub(super) fn clear(&self, run: PageRun) {
        let mut page = run.first;
        while page < run.end() {
            let mut end = page;
            while end < run.end() && self.written.contains(end) {
                end.0 += 1;
            }
            if end > page {
                let run = PageRun { first: page, pages: end.0 - page.0 };
                // Inside RAM, as the whole run is.
                let _ = page::clear(&self.memory, run);
                self.arrived.insert_run(run);
            }
            page.0 = end.0 + 1;
        }
    }
}
