//! Guest memory that the VMM gives back to the host while a migration runs: a balloon that inflates, free page reporting,
//! `MADV_DONTNEED`, a hole punched into a file.
//!
//! Two things that the migration knows are wrong from then on. The destination has the old content, so the page is
//! dirty: it goes out again, as a page of zeroes that costs no bytes if nobody has written it since. And memory that
//! is registered with the kernel is the old page, which would be sent instead of the new one: registration ends, and
//! with it the pins that kept the balloon from giving anything back. It is renewed, with what is populated by then, once the VMM
//! says that it discards nothing for now ([`Discards::settled`]): to register after each discard would pin all of RAM over and over.
//!
//! Order: the VMM discards, then says so. Whoever takes the pages from here ([`Discards::take_into`]) and then has them
//! sent sees the [`Discards::count`] that ends registration, because both are behind one lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::layout::{GuestMemory, PageIndex, PageRun};
use crate::page_set::PageSet;

/// Where a VMM says what it has discarded, from any thread. All clones are the same; the VMM keeps one, the migration gets
/// one with its [`SendOptions`](super::SendOptions).
#[derive(Clone, Debug, Default)]
pub struct Discards(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// How often something was discarded.
    count: AtomicU64,
    /// What `count` was when the VMM last said that it discards nothing for now.
    settled_at: AtomicU64,
    /// What was discarded since it was last taken; `None` while nobody wants to know.
    pages: Mutex<Option<PageSet>>,
}

impl Discards {
    /// These pages have been given back to the host, so that they read as zeroes until somebody writes them. To be called
    /// after the discard, and before the VMM says that it is [quiesced](crate::vm::Vm::quiesce) if the discard was before
    /// that. A lock and a few instructions while nobody migrates.
    pub fn discarded(&self, run: PageRun) {
        let mut pages = self.0.pages.lock();
        // Relaxed: ordered by the lock for whoever takes the pages.
        self.0.count.fetch_add(1, Ordering::Relaxed);
        if let Some(pages) = &mut *pages {
            pages.insert_run(run);
        }
    }

    /// Nothing is discarded for now: the balloon has its size, a report of free pages was worked off. Guest RAM may be registered
    /// again; the next [`discarded`](Self::discarded) ends that again. A VMM that never says so has it sent without.
    pub fn settled(&self) {
        let _pages = self.0.pages.lock();
        // Relaxed: who reads it compares it with `count`, and a stale one renews later.
        self.0.settled_at.store(self.0.count.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Keeps what is discarded from now on, of guest RAM that ends at `end`.
    pub(crate) fn follow(&self, end: PageIndex) {
        *self.0.pages.lock() = Some(PageSet::new(end));
    }

    /// Forgets, and keeps nothing any more.
    pub(crate) fn forget(&self) {
        *self.0.pages.lock() = None;
    }

    /// Adds to `dirty` what was discarded of `memory` since this was last called.
    pub(crate) fn take_into(&self, dirty: &mut PageSet, memory: &GuestMemory) {
        if let Some(pages) = &mut *self.0.pages.lock()
            && !pages.is_empty()
        {
            // What else the VMM names is not RAM, and would be sent by nobody.
            for run in memory.regions().iter().flat_map(|region| pages.runs_within(region.pages)) {
                dirty.insert_run(run);
            }
            pages.clear();
        }
    }

    /// Whether something was discarded that has not been taken.
    pub(crate) fn is_pending(&self) -> bool {
        self.0.pages.lock().as_ref().is_some_and(|pages| !pages.is_empty())
    }

    /// Takes out of `undealt` what was discarded and has not been taken: it will be in the next round.
    pub(crate) fn strike_off(&self, undealt: &mut PageSet) {
        if let Some(pages) = &*self.0.pages.lock() {
            undealt.subtract(pages);
        }
    }

    /// Whether the VMM has discarded nothing since that count and said that it is done.
    pub(super) fn is_settled_at(&self, count: u64) -> bool {
        self.0.settled_at.load(Ordering::Relaxed) == count
    }

    /// How often something was discarded so far.
    pub(super) fn count(&self) -> u64 {
        self.0.count.load(Ordering::Relaxed)
    }
}
