//! What one session has accumulated: its dirty pages, which of them an observation has told it of, and who dirtied them.

use super::redirtied::Redirtied;
use crate::layout::{PageIndex, PageRun};
use crate::page_set::PageSet;

/// The name of a session among those of its tracker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SessionKey(pub(super) u64);

/// How many pages are still to be handed out, of how many there were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remainder {
    left: u64,
    before: u64,
}

impl Remainder {
    /// As large a part of `pages`, rounded down.
    fn share_of(self, pages: u64) -> u64 {
        let share = u128::from(pages) * u128::from(self.left) / u128::from(self.before.max(1));
        // No larger than `pages`, as no more are left than there were.
        u64::try_from(share).unwrap_or(pages)
    }
}

/// What a session knows of one vCPU since its last harvest.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct VcpuPages {
    /// Pages that came out of its ring and that the session did not have.
    pub(super) taken: u64,
    /// Entries, still in the ring, that name pages which the session has or which another entry named, as far as they were
    /// reported.
    pub(super) repeated: u32,
}

/// One session.
#[derive(Debug)]
pub(super) struct SessionPages {
    pub(super) key: SessionKey,
    pub(super) running: bool,
    /// Its dirty pages.
    pub(super) pages: PageSet,
    /// Pages, in `pages` or still in a ring, that an observation has found since the last harvest.
    reported: PageSet,
    /// Pages dirty since the last harvest of which the session has not been told.
    untold: PageSet,
    /// Pages that were handed out before and did not arrive. They outlast a period of tracking.
    pub(super) given_back: PageSet,
    /// Pages since the last harvest that no vCPU was the first to dirty, or one that is gone.
    pub(super) others: u64,
    /// The pause in which it was handed out pages that are unprotected, if it was since.
    pub(super) handed_out_in: Option<u64>,
    /// By vCPU, in the order of attachment.
    pub(super) vcpus: Vec<VcpuPages>,
}

impl SessionPages {
    pub(super) fn new(key: SessionKey, end: PageIndex, vcpus: usize) -> Self {
        let empty = || PageSet::new(end);
        Self {
            key,
            running: false,
            pages: empty(),
            reported: empty(),
            untold: empty(),
            given_back: empty(),
            others: 0,
            handed_out_in: None,
            vcpus: vec![VcpuPages::default(); vcpus],
        }
    }

    pub(super) fn sets(&mut self) -> [&mut PageSet; 4] {
        [&mut self.pages, &mut self.reported, &mut self.untold, &mut self.given_back]
    }

    /// A period of tracking begins or ends.
    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.handed_out();
        self.handed_out_in = None;
    }

    /// The set is empty: what comes now counts anew.
    fn handed_out(&mut self) {
        self.reported.clear();
        self.untold.clear();
        self.vcpus.fill(VcpuPages::default());
        self.others = 0;
    }

    /// Adds pages that came out of KVM; how many of them it did not have.
    pub(super) fn absorb(&mut self, fresh: &PageSet) -> u64 {
        let Self { pages, untold, reported, .. } = self;
        pages.union_telling(fresh, |word, new| untold.insert_unless(word, new, reported))
    }

    /// An observation found the page in the ring of a vCPU.
    pub(super) fn report(&mut self, vcpu: usize, page: PageIndex) {
        if self.reported.insert(page) && (self.pages.is_empty() || !self.pages.contains(page)) {
            self.untold.insert(page);
        } else {
            self.vcpus[vcpu].repeated += 1;
        }
    }

    /// Pages that a vCPU with so many entries in its ring has dirtied since the last harvest.
    pub(super) fn pages_of(&self, vcpu: usize, entries: u32) -> u64 {
        let VcpuPages { taken, repeated } = self.vcpus[vcpu];
        taken + u64::from(entries - repeated.min(entries))
    }

    /// Adds the pages of which it was not told.
    pub(super) fn tell(&mut self, redirtied: &mut Redirtied) {
        let told = redirtied.pages_mut();
        if told.is_empty() && told.capacity() == self.untold.capacity() {
            std::mem::swap(told, &mut self.untold);
        } else {
            told.union(&self.untold);
        }
        self.untold.clear();
    }

    /// Adds all pages to `dirty`, `unsure` ones besides.
    pub(super) fn hand_out(&mut self, unsure: &PageSet, dirty: &mut PageSet) {
        self.gather(unsure);
        if dirty.is_empty() && dirty.capacity() == self.pages.capacity() {
            // The usual case, and the cheap one: no page is copied.
            std::mem::swap(&mut self.pages, dirty);
        } else {
            dirty.union(&self.pages);
        }
        self.pages.clear();
        self.handed_out();
    }

    /// Adds all pages but the `unprotected` ones to `dirty`. Those stay: it has them all.
    pub(super) fn hand_out_all_but(&mut self, unprotected: &PageSet, unsure: &PageSet, dirty: &mut PageSet) {
        self.gather(unsure);
        self.pages.subtract(unprotected);
        dirty.union(&self.pages);
        self.pages.clone_from(unprotected);
        self.handed_out();
    }

    /// Adds pages that it has to `dirty`.
    pub(super) fn hand_out_runs(&mut self, runs: &[PageRun], dirty: &mut PageSet) {
        for run in runs {
            dirty.insert_run(*run);
            for set in [&mut self.pages, &mut self.reported, &mut self.untold] {
                set.remove_run(*run);
            }
        }
    }

    /// What is dirty for other reasons than an entry.
    fn gather(&mut self, unsure: &PageSet) {
        self.pages.union(unsure);
        self.pages.union(&self.given_back);
        self.given_back.clear();
    }

    /// The pages of one run, `unsure` ones besides, as `take` takes them out of the set.
    pub(super) fn hand_out_run<T>(
        &mut self,
        unsure: &PageSet,
        run: PageRun,
        take: impl FnOnce(&mut PageSet, PageRun) -> T,
    ) -> T {
        self.pages.union(unsure);
        for part in self.given_back.runs_within(run) {
            self.pages.insert_run(part);
        }
        for set in [&mut self.given_back, &mut self.reported, &mut self.untold] {
            set.remove_run(run);
        }
        let before = self.pages.len();
        let taken = take(&mut self.pages, run);
        self.divide(Remainder { left: self.pages.len(), before });
        taken
    }

    /// The pages of one slot were handed out. Whose the rest are is not known: each vCPU keeps its share of them.
    fn divide(&mut self, remainder: Remainder) {
        for vcpu in &mut self.vcpus {
            vcpu.taken = remainder.share_of(vcpu.taken);
        }
        self.others = remainder.share_of(self.others);
    }
}
