//! Pages known to be dirty and not yet handed out, behind the one rule: out only against proof that they are
//! write-protected again.

use super::error::TrackError;
use super::slots::Slots;
use crate::layout::{PageIndex, PageRun, Region};
use crate::page_set::PageSet;

/// Proof that every page in [`Pending`] is write-protected. Only a backend makes one, at the end of its collecting,
/// and it is used up before the tracker's lock is released.
pub(super) trait Protected {}

/// How many pages are still to be handed out, of how many there were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remainder {
    left: u64,
    before: u64,
}

impl Remainder {
    /// As large a part of `pages`, rounded down.
    pub(super) fn share_of(self, pages: u64) -> u64 {
        let share = u128::from(pages) * u128::from(self.left) / u128::from(self.before.max(1));
        // No larger than `pages`, as no more are left than there were.
        u64::try_from(share).unwrap_or(pages)
    }
}

/// The pages between a backend and the next harvest.
#[derive(Debug)]
pub(super) struct Pending {
    pages: PageSet,
    /// Pages, in `pages` or to come, that an observation has reported since they were handed out.
    reported: PageSet,
    /// Pages that were handed out before and did not arrive. They outlast a period of tracking.
    given_back: PageSet,
    /// Pages that an interrupted reset may have left writable with no entry to tell of later writes: dirty in
    /// every harvest, until their slots are protected anew.
    unsure: PageSet,
    /// How many pages of `unsure` were handed out since it was last empty.
    unsure_handed_out: u64,
    /// An overflow lost entries: every page is dirty, and all of memory must be protected anew.
    pub(super) everything: bool,
}

impl Pending {
    pub(super) fn new() -> Self {
        let empty = || PageSet::new(PageIndex(0));
        Self {
            pages: empty(),
            reported: empty(),
            given_back: empty(),
            unsure: empty(),
            unsure_handed_out: 0,
            everything: false,
        }
    }

    /// Guest RAM ends at `end` from now on; pages beyond have been removed.
    pub(super) fn resize(&mut self, end: PageIndex) {
        for set in [&mut self.pages, &mut self.reported, &mut self.given_back, &mut self.unsure] {
            set.resize(end);
        }
    }

    /// Where guest RAM ends.
    pub(super) fn capacity(&self) -> PageIndex {
        self.pages.capacity()
    }

    /// Where a backend puts what it finds.
    pub(super) fn pages_mut(&mut self) -> &mut PageSet {
        &mut self.pages
    }

    /// An observation found the page, which will come: whether it is the first that did.
    pub(super) fn report(&mut self, page: PageIndex) -> bool {
        self.reported.insert(page) && (self.pages.is_empty() || !self.pages.contains(page))
    }

    pub(super) fn give_back(&mut self, pages: &PageSet) {
        self.given_back.union(pages);
    }

    pub(super) fn insert_unsure(&mut self, page: PageIndex) {
        self.unsure.insert(page);
    }

    /// The slots with unsure pages, once these have been handed out so often that handing out the slots once costs no more:
    /// then is the time to protect them anew. None before.
    pub(super) fn slots_better_protected_anew(&self, slots: &Slots) -> Vec<Region> {
        if self.unsure.is_empty() {
            return Vec::new();
        }
        let mut regions: Vec<Region> = slots.regions().copied().collect();
        regions.retain(|region| self.unsure.count_within(region.pages) > 0);
        let pages: u64 = regions.iter().map(|region| region.pages.pages).sum();
        if self.unsure_handed_out < pages {
            regions.clear();
        }
        regions
    }

    /// All of memory has been protected anew, or all that had unsure pages.
    pub(super) fn rearmed(&mut self) {
        self.unsure.clear();
        self.unsure_handed_out = 0;
        self.everything = false;
    }

    /// These pages are no longer RAM.
    pub(super) fn remove_runs(&mut self, runs: Vec<PageRun>) {
        for run in runs {
            for set in [&mut self.pages, &mut self.reported, &mut self.given_back, &mut self.unsure] {
                set.remove_run(run);
            }
        }
    }

    /// A period of tracking begins or ends.
    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.reported.clear();
        self.rearmed();
    }

    /// Whether a set of this capacity can take everything.
    pub(super) fn check_fits(&self, dirty: &PageSet) -> Result<(), TrackError> {
        let (capacity, needed) = (dirty.capacity(), self.pages.capacity());
        if capacity < needed { Err(TrackError::SetTooSmall { capacity, needed }) } else { Ok(()) }
    }

    /// Adds all pages to `dirty`.
    pub(super) fn hand_out(&mut self, _: impl Protected, dirty: &mut PageSet) {
        self.pages.union(&self.unsure);
        self.unsure_handed_out += self.unsure.len();
        self.pages.union(&self.given_back);
        self.given_back.clear();
        if dirty.is_empty() && dirty.capacity() == self.pages.capacity() {
            // The usual case, and the cheap one: no page is copied.
            std::mem::swap(&mut self.pages, dirty);
        } else {
            dirty.union(&self.pages);
        }
        self.pages.clear();
        self.reported.clear();
    }

    /// The pages of one run as a bitmap, bit 0 of word 0 the first; and what that leaves.
    pub(super) fn hand_out_words(&mut self, _: impl Protected, run: PageRun) -> (Vec<u64>, Remainder) {
        self.pages.union(&self.unsure);
        self.unsure_handed_out += self.unsure.count_within(run);
        for part in self.given_back.runs_within(run) {
            self.pages.insert_run(part);
        }
        self.given_back.remove_run(run);
        self.reported.remove_run(run);
        let before = self.pages.len();
        let words = self.pages.take_words(run);
        (words, Remainder { left: self.pages.len(), before })
    }
}
