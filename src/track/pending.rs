//! Pages known to be dirty and not yet handed out, behind the one rule: out only against proof that they are
//! write-protected again, or that nobody writes them.
//!
//! A page that a ring was recycled without is dirty and unprotected: it stays here, known and silent, until somebody wants to
//! read it. Then `unprotected` protects it.

use super::error::TrackError;
use super::redirtied::Redirtied;
use super::slots::Slots;
use crate::kvm::UnmapError;
use crate::kvm::ring::Recycle;
use crate::layout::{PageIndex, PageRun, Region};
use crate::page_set::PageSet;
use crate::vm::Paused;

/// Proof that every page in [`Pending`] may be read: it is write-protected. Only a backend makes one, at the end of its
/// collecting, and it is used up before the tracker's lock is released.
pub(super) trait AllReadable {}

/// Proof that every page may be read that is not unprotected.
pub(super) trait ProtectedReadable {}

/// Proof that the pages that come with it may be read.
pub(super) trait TheseReadable {}

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
    /// Dirty pages that may be written without an entry to tell of it. They are in `pages`, or were handed out while the
    /// guest stood still.
    unprotected: PageSet,
    /// The pause in which `unprotected` was handed out, if it was.
    handed_out_in: Option<u64>,
    /// Whether pages may be left unprotected, as they can be protected later; or why they cannot.
    may_leave: Result<(), UnmapError>,
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
            unprotected: empty(),
            handed_out_in: None,
            may_leave: Err(UnmapError::NotAsked),
            everything: false,
        }
    }

    /// Guest RAM ends at `end` from now on; pages beyond have been removed.
    pub(super) fn resize(&mut self, end: PageIndex) {
        for set in self.all_sets() {
            set.resize(end);
        }
    }

    fn all_sets(&mut self) -> [&mut PageSet; 5] {
        let Self { pages, reported, given_back, unsure, unprotected, .. } = self;
        [pages, reported, given_back, unsure, unprotected]
    }

    /// Where guest RAM ends.
    pub(super) fn capacity(&self) -> PageIndex {
        self.pages.capacity()
    }

    /// Where a backend puts what it finds.
    pub(super) fn pages_mut(&mut self) -> &mut PageSet {
        &mut self.pages
    }

    /// The same, and where it puts what it leaves unprotected as well.
    pub(super) fn pages_and_unprotected_mut(&mut self) -> (&mut PageSet, &mut PageSet) {
        (&mut self.pages, &mut self.unprotected)
    }

    /// Whether pages may be left unprotected from now on.
    pub(super) fn may_leave(&mut self, may_leave: Result<(), UnmapError>) {
        self.may_leave = may_leave;
    }

    /// Why none may, if so.
    pub(super) fn why_none_is_left(&self) -> Result<(), UnmapError> {
        self.may_leave.clone()
    }

    /// How a ring is recycled when its pages are not about to be read.
    pub(super) fn recycle_early(&self) -> Recycle {
        if self.may_leave.is_ok() { Recycle::Leaving } else { Recycle::Protecting }
    }

    /// Pages could not be protected after all: all of memory is protected anew, and none is left unprotected any more.
    pub(super) fn cannot_protect(&mut self, error: UnmapError) {
        tracing::warn!(%error, "pages that a dirty ring was recycled without cannot be protected: every page is dirty");
        self.may_leave = Err(error);
        self.everything = true;
    }

    /// The pages that are unprotected.
    pub(super) fn unprotected(&self) -> &PageSet {
        &self.unprotected
    }

    /// They have been protected. Some may have been handed out while the guest stood still, and written since.
    pub(super) fn all_are_protected(&mut self, _: &impl TheseReadable) {
        self.pages.union(&self.unprotected);
        self.unprotected.clear();
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
        if std::mem::take(&mut self.everything) {
            self.unprotected.clear();
        }
    }

    /// These pages are no longer RAM.
    pub(super) fn remove_runs(&mut self, runs: Vec<PageRun>) {
        for run in runs {
            for set in self.all_sets() {
                set.remove_run(run);
            }
        }
    }

    /// A period of tracking begins or ends.
    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.reported.clear();
        self.unprotected.clear();
        self.rearmed();
    }

    /// Whether a set of this capacity can take everything.
    pub(super) fn check_fits(&self, dirty: &PageSet) -> Result<(), TrackError> {
        let (capacity, needed) = (dirty.capacity(), self.pages.capacity());
        if capacity < needed { Err(TrackError::SetTooSmall { capacity, needed }) } else { Ok(()) }
    }

    /// Adds all pages to `dirty`.
    pub(super) fn hand_out(&mut self, _: impl AllReadable, dirty: &mut PageSet) {
        self.hand_out_gathered(dirty);
    }

    /// Adds all pages to `dirty` while the guest stands still: then they may be read, protected or not. Others that write its
    /// memory do not heed its protection, and are logged without it.
    pub(super) fn hand_out_paused(&mut self, paused: &Paused, dirty: &mut PageSet) {
        // What was handed out in an earlier pause may have been written since.
        if self.handed_out_in.replace(paused.number) != Some(paused.number) {
            self.pages.union(&self.unprotected);
        }
        self.hand_out_gathered(dirty);
    }

    fn hand_out_gathered(&mut self, dirty: &mut PageSet) {
        self.gather();
        if dirty.is_empty() && dirty.capacity() == self.pages.capacity() {
            // The usual case, and the cheap one: no page is copied.
            std::mem::swap(&mut self.pages, dirty);
        } else {
            dirty.union(&self.pages);
        }
        self.pages.clear();
        self.reported.clear();
    }

    /// Adds the pages that are protected to `dirty`, and the others to `behind`.
    pub(super) fn hand_out_protected(
        &mut self,
        _: impl ProtectedReadable,
        dirty: &mut PageSet,
        behind: &mut Redirtied,
    ) {
        self.gather();
        self.pages.subtract(&self.unprotected);
        dirty.union(&self.pages);
        self.pages.clone_from(&self.unprotected);
        behind.add(&self.unprotected);
        self.reported.clear();
    }

    /// Adds `runs` to `dirty`, which have just been protected.
    pub(super) fn hand_out_these(&mut self, _: &impl TheseReadable, runs: &[PageRun], dirty: &mut PageSet) {
        for run in runs {
            dirty.insert_run(*run);
            for set in [&mut self.pages, &mut self.reported, &mut self.unprotected] {
                set.remove_run(*run);
            }
        }
    }

    /// What is dirty for other reasons than an entry.
    fn gather(&mut self) {
        self.pages.union(&self.unsure);
        self.unsure_handed_out += self.unsure.len();
        self.pages.union(&self.given_back);
        self.given_back.clear();
    }

    /// The pages of one run as a bitmap, bit 0 of word 0 the first; and what that leaves.
    pub(super) fn hand_out_words(&mut self, _: impl AllReadable, run: PageRun) -> (Vec<u64>, Remainder) {
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
