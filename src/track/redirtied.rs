//! Pages that are dirty again and not yet protected again.

use crate::layout::{PageIndex, PageRun};
use crate::page_set::{FromTheTop, PageSet};

/// Pages that an observation has found dirty. Each of them comes with the next harvest; until then it is writable, and its
/// content must not be read. So nobody outside can ask which they are: a migration strikes them off the round that it
/// is sending, because they have to be sent once more in any case.
#[derive(Debug)]
pub struct Redirtied {
    pages: PageSet,
    top: FromTheTop,
}

impl Redirtied {
    /// No pages, all to come from below `end`.
    pub fn new(end: PageIndex) -> Self {
        Self { pages: PageSet::new(end), top: FromTheTop::default() }
    }

    /// How many.
    pub fn len(&self) -> u64 {
        self.pages.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Takes these pages out of `round`.
    pub fn strike_off(&self, round: &mut PageSet) {
        round.subtract(&self.pages);
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// Adds pages.
    pub(super) fn add(&mut self, pages: &PageSet) {
        self.pages.union(pages);
        self.top.reach(self.pages.capacity());
    }

    /// Adds pages.
    #[cfg(feature = "offload")]
    pub(crate) fn add_runs(&mut self, runs: &[PageRun]) {
        runs.iter().for_each(|run| self.pages.insert_run(*run));
        self.top.reach(self.pages.capacity());
    }

    /// Which they are: for another process, where they are as unreadable.
    #[cfg(feature = "offload")]
    pub(crate) fn for_another_process(&self) -> &PageSet {
        &self.pages
    }

    /// Takes up to `pages` pages out, the highest first, as ascending runs.
    pub(crate) fn take_highest(&mut self, pages: u64) -> Vec<PageRun> {
        let mut runs = Vec::new();
        self.top.take(&mut self.pages, pages, &mut runs);
        runs
    }

    pub(super) fn pages_mut(&mut self) -> &mut PageSet {
        &mut self.pages
    }
}
