//! A set of guest pages that any thread may add to while one takes everything out.
//!
//! It has the shape of [`PageSet`], and no count: a shared counter would cost each insert more than the insert.
#![expect(unsafe_code, reason = "zeroed words are taken from the allocator as atomics, untouched")]

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{LEVELS, PageSet, WORD, bits_between, index, level_words, split};
use crate::layout::{PageIndex, PageRun, RAM_END_MAX};

/// A set of guest pages below a fixed capacity, shared between threads.
///
/// A writer first writes the page, then inserts it. A reader first drains, then reads the page. A page whose
/// insert returned before a drain began is in what that drain, or one that runs beside it, hands out; an insert
/// that races with a drain is in this one or the next. Either way the reader sees what the writer wrote before.
///
/// Pages at or beyond the capacity are counted and ignored, as in [`PageSet`].
pub struct AtomicPageSet {
    end: u64,
    ignored: AtomicU64,
    levels: [Box<[AtomicU64]>; LEVELS],
}

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    const { assert!(align_of::<AtomicU64>() == align_of::<u64>()) };
    // Zeroed by the allocator, which takes fresh memory from the kernel and does not touch it.
    let words = Box::into_raw(vec![0_u64; words].into_boxed_slice());
    // SAFETY:
    // * The pointer comes from `Box::into_raw` one line above, and nothing else owns it.
    // * An `AtomicU64` has the size and bit validity of a `u64`, and its alignment by the assertion above, so the
    //   slice is valid as atomics and is freed with the layout it was allocated with.
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}

impl AtomicPageSet {
    /// An empty set of pages below `end`. What lies beyond [`RAM_END_MAX`] is outside every set.
    pub fn new(end: PageIndex) -> Self {
        let end = end.min(RAM_END_MAX).0;
        Self { end, ignored: AtomicU64::new(0), levels: level_words(end).map(zeroed) }
    }

    /// One past the highest page that the set can hold.
    pub fn capacity(&self) -> PageIndex {
        PageIndex(self.end)
    }

    /// How many pages beyond the capacity were offered and ignored since the set was created, the same page
    /// counted each time.
    pub fn ignored(&self) -> u64 {
        self.ignored.load(Ordering::Relaxed)
    }

    /// Whether the page is in the set at this moment.
    pub fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = split(index(page.0));
        self.levels[0].get(word).is_some_and(|bits| bits.load(Ordering::SeqCst) & bit != 0)
    }

    /// Adds a page; true if it is new.
    #[inline]
    pub fn insert(&self, page: PageIndex) -> bool {
        if page.0 >= self.end {
            self.ignore(1);
            return false;
        }
        let (word, bit) = split(index(page.0));
        self.add(word, bit) & bit == 0
    }

    /// Adds all pages of a run.
    pub fn insert_run(&self, run: PageRun) {
        let (first, end) = (run.first.0, run.end().0);
        self.ignore(end.saturating_sub(first.max(self.end)));
        let end = end.min(self.end);
        if first < end {
            for word in index(first / WORD)..=index((end - 1) / WORD) {
                self.add(word, bits_between(word, first, end));
            }
        }
    }

    /// Adds all pages of `other`.
    pub fn union(&self, other: &PageSet) {
        for (word, bits) in other.nonzero_words() {
            let inside = bits & bits_between(word, 0, self.end);
            self.ignore(u64::from((bits & !inside).count_ones()));
            if inside != 0 {
                self.add(word, inside);
            }
        }
    }

    /// Moves every page into `pages`. What is beyond the capacity of `pages` ends as ignored there.
    pub fn drain_into(&self, pages: &mut PageSet) {
        self.drain_words(|word, bits| {
            pages.add_within(word, bits);
        });
    }

    /// Takes every word that holds a page: its number and its bits, which leave the set.
    pub(crate) fn drain_words(&self, mut taken: impl FnMut(usize, u64)) {
        for word in 0..self.levels[LEVELS - 1].len() {
            self.drain_word(LEVELS - 1, word, &mut taken);
        }
    }

    fn ignore(&self, pages: u64) {
        if pages != 0 {
            self.ignored.fetch_add(pages, Ordering::Relaxed);
        }
    }

    /// Adds `bits` to a word of pages and marks it in every summary; the word as it was.
    ///
    /// Why no page is lost: this goes up, page word first, and the drain goes down, summary first. Take two
    /// neighbouring levels. Here: `or` the lower word, then look at the upper bit. In the drain: clear the upper
    /// bit, then swap the lower word. All four are `SeqCst`, so they have one order: either our look comes before
    /// the drain's clearing, then our `or` does too, and the drain's swap of the lower word, still later, takes
    /// our bit; or our look comes after, finds the bit clear and sets it again for the next drain. An upper bit
    /// over an empty word is harmless.
    ///
    /// Every level is looked at on every insert: to stop at the first non-zero word would be to rely on another
    /// thread that has set it and not yet gone on to the next level.
    ///
    /// The `or` must happen even where a load finds the bit set: it is what orders the caller's writes to the page
    /// before a drain that takes this bit and then reads the page.
    #[inline]
    fn add(&self, word: usize, bits: u64) -> u64 {
        let old = self.levels[0][word].fetch_or(bits, Ordering::SeqCst);
        let mut i = word;
        for level in &self.levels[1..] {
            let (word, bit) = split(i);
            if level[word].load(Ordering::SeqCst) & bit == 0 {
                level[word].fetch_or(bit, Ordering::SeqCst);
            }
            i = word;
        }
        old
    }

    /// Takes what is in one word of a level and everything below it. The ordering is argued at `add`.
    fn drain_word(&self, level: usize, word: usize, taken: &mut impl FnMut(usize, u64)) {
        // Not to write, and so to own, the cache line of a word that is empty anyway. An insert that has
        // returned set the bit before; one that has not may wait for the next drain.
        if self.levels[level][word].load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut bits = self.levels[level][word].swap(0, Ordering::SeqCst);
        if level == 0 {
            return taken(word, bits);
        }
        while bits != 0 {
            self.drain_word(level - 1, word * 64 + bits.trailing_zeros() as usize, taken);
            bits &= bits - 1;
        }
    }
}

impl fmt::Debug for AtomicPageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages: u64 =
            self.levels[0].iter().map(|bits| u64::from(bits.load(Ordering::Relaxed).count_ones())).sum();
        write!(f, "AtomicPageSet({pages} of {} pages)", self.end)
    }
}
