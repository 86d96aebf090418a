//! Pages that are dirty again and not yet protected again.

use crate::layout::PageIndex;
use crate::page_set::PageSet;

/// Pages that an observation has found dirty. Each of them comes with the next harvest; until then it is writable, and its
/// content must not be read. So nobody outside can ask which they are: a migration strikes them off the round that it
/// is sending, because they have to be sent once more in any case.
#[derive(Debug)]
pub struct Redirtied {
    pages: PageSet,
}

impl Redirtied {
    /// No pages, all to come from below `end`.
    pub fn new(end: PageIndex) -> Self {
        Self { pages: PageSet::new(end) }
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

    pub(super) fn pages_mut(&mut self) -> &mut PageSet {
        &mut self.pages
    }
}
