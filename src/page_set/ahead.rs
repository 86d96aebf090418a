//! Adding words of pages that the memory of the set is slow for: each is fetched while others are added.

use super::{PageSet, WORD, index};
use crate::layout::PageIndex;

/// Words between the fetching of one and the adding: enough to hide a miss of every cache behind the others' work.
const AHEAD: usize = 32;

/// A set to which words are added some time after they came, in the order in which they came.
///
/// A guest of 256 GiB that is dirtied here and there has every word in a cache line of its own, and no hardware
/// foresees the next one. Whoever reads a dirty ring does.
pub(crate) struct InsertAhead<'a> {
    pages: &'a mut PageSet,
    waiting: [(PageIndex, u64); AHEAD],
    next: usize,
    new: u64,
}

impl PageSet {
    /// For who comes by pages one by one and in runs: gathers them in a register first, which is faster than to load
    /// and store a word for each page.
    #[inline]
    pub(crate) fn insert_ahead(&mut self) -> InsertAhead<'_> {
        InsertAhead { pages: self, waiting: [(PageIndex(0), 0); AHEAD], next: 0, new: 0 }
    }
}

impl InsertAhead<'_> {
    /// The pages of one word, `first` a multiple of 64; no bits are no pages.
    #[inline]
    pub(crate) fn push(&mut self, first: PageIndex, bits: u64) {
        self.pages.prefetch(index(first.0 / WORD));
        let (first, bits) = std::mem::replace(&mut self.waiting[self.next], (first, bits));
        self.next = (self.next + 1) % AHEAD;
        self.new += self.pages.insert_word(first, bits);
    }

    /// Adds what is still on its way; how many of all the pages were new.
    pub(crate) fn finish(mut self) -> u64 {
        self.flush();
        self.new
    }

    fn flush(&mut self) {
        for _ in 0..AHEAD {
            self.push(PageIndex(0), 0);
        }
    }
}

impl Drop for InsertAhead<'_> {
    /// A panic on the way loses no page.
    fn drop(&mut self) {
        self.flush();
    }
}
