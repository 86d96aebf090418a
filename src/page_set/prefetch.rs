//! Adding words of pages that the memory of the set is slow for: each is fetched while others are added.

use super::{PageSet, WORD, index};
use crate::layout::PageIndex;

/// Words between the fetching of one and the adding: enough to hide a miss of every cache behind the others' work.
const IN_FLIGHT: usize = 32;

/// A set to which words are added some time after they came, in the order in which they came.
///
/// A guest of 256 GiB that is dirtied here and there has every word in a cache line of its own, and no hardware
/// foresees the next one. Whoever reads a dirty ring does.
pub(crate) struct PrefetchedInsert<'a> {
    pages: &'a mut PageSet,
    waiting: [WordAtHand; IN_FLIGHT],
    next: usize,
    new: u64,
}

/// The word to which the last page belongs. Neighbours come one after the other as a rule: to gather them in registers
/// is faster than to load and store a word for each. So it stands apart from [`PrefetchedInsert`], which is memory.
pub(crate) struct WordAtHand {
    first: PageIndex,
    bits: u64,
}

impl WordAtHand {
    /// No page.
    pub(crate) const NONE: Self = Self { first: PageIndex(0), bits: 0 };

    /// Adds a page to the word at hand, or hands that on and begins another.
    #[inline]
    pub(crate) fn add(&mut self, page: PageIndex, words: &mut PrefetchedInsert<'_>) {
        let first = PageIndex(page.0 / WORD * WORD);
        if first != self.first {
            words.push(std::mem::replace(self, Self { first, bits: 0 }));
        }
        self.bits |= 1 << (page.0 % WORD);
    }
}

impl PageSet {
    /// For callers that get pages one by one. None of the pages may be beyond the capacity.
    #[inline]
    pub(crate) fn insert_prefetched(&mut self) -> PrefetchedInsert<'_> {
        PrefetchedInsert { pages: self, waiting: [const { WordAtHand::NONE }; IN_FLIGHT], next: 0, new: 0 }
    }
}

impl PrefetchedInsert<'_> {
    #[inline]
    fn push(&mut self, word: WordAtHand) {
        self.pages.prefetch(index(word.first.0 / WORD));
        let WordAtHand { first, bits } = std::mem::replace(&mut self.waiting[self.next], word);
        self.next = (self.next + 1) % IN_FLIGHT;
        self.new += self.pages.insert_word(first, bits);
    }

    /// Adds the last word and those that are still on their way; how many of all the pages were new.
    pub(crate) fn finish(mut self, last: WordAtHand) -> u64 {
        self.push(last);
        for _ in 0..IN_FLIGHT {
            self.push(WordAtHand::NONE);
        }
        self.new
    }
}

impl Extend<PageIndex> for PageSet {
    /// Neighbours that follow each other, as in a dirty ring, are gathered in a register: a store per word, where
    /// inserting them one by one would wait for its own last store each time.
    #[inline]
    fn extend<I: IntoIterator<Item = PageIndex>>(&mut self, pages: I) {
        let (end, mut beyond) = (self.end, 0);
        let (mut words, mut word) = (self.insert_prefetched(), WordAtHand::NONE);
        for page in pages {
            if page.0 < end {
                word.add(page, &mut words);
            } else {
                beyond += 1;
            }
        }
        words.finish(word);
        self.ignore(beyond);
    }
}
