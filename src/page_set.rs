//! A set of guest pages: one bit per guest frame number, and summary levels that make a sparse set cheap.
//!
//! Bit `i` of summary level `k + 1` is set exactly when word `i` of level `k` is not zero. Iterating, clearing,
//! uniting and subtracting follow the summaries down, so they touch the words that hold pages and few others:
//! 4,000 pages spread over 256 GiB cost 4,000 words, not a million. Memory that holds no page is never touched
//! either: the words are allocated zeroed by the kernel, 32 bytes per MiB of guest address space.
//!
//! This file owns the set of one thread; [`AtomicPageSet`] is the one that many threads fill. Neither knows
//! which pages are RAM: [`layout`](crate::layout) does.

mod atomic;
mod from_the_top;
mod prefetch;
#[cfg(test)]
mod tests;
mod words;

use std::fmt;

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;
use bitvec::view::BitView;

pub use self::atomic::AtomicPageSet;
pub(crate) use self::from_the_top::FromTheTop;
pub(crate) use self::prefetch::WordAtHand;
use self::words::Words;
use crate::layout::{PageIndex, PageRun, RAM_END_MAX};

/// Pages in a word.
const WORD: u64 = u64::BITS as u64;

/// The pages and three summaries. At 256 GiB of address space the last level is four words long, at the most
/// that a set may cover 1,024: short enough to scan.
const LEVELS: usize = 4;

/// A set of guest pages below a fixed capacity.
///
/// Pages at or beyond the capacity are never in the set. Adding one changes nothing but the count that
/// [`ignored`](Self::ignored) reports: it means that the caller's layout and the set's disagree.
#[derive(Default)]
pub struct PageSet {
    end: u64,
    len: u64,
    ignored: u64,
    levels: [Words; LEVELS],
}

/// Index of a word or page in memory that exists, so it fits.
#[inline]
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The word that holds bit `i`, and the bit alone.
#[inline]
fn split(i: usize) -> (usize, u64) {
    (i / 64, 1 << (i % 64))
}

/// Bits from `from` up.
#[inline]
fn bits_from(from: usize) -> u64 {
    !0 << (from % 64)
}

/// The bits of `word` that lie in pages `[first, end)`.
fn bits_between(word: usize, first: u64, end: u64) -> u64 {
    let start = word as u64 * WORD;
    let below = |page: u64| match page.saturating_sub(start) {
        n @ 0..WORD => (1 << n) - 1,
        _ => !0,
    };
    below(end) & !below(first)
}

/// Words in each level of a set of `pages` pages.
fn level_words(pages: u64) -> [usize; LEVELS] {
    let mut bits = pages;
    [(); LEVELS].map(|()| {
        bits = bits.div_ceil(WORD);
        index(bits)
    })
}

impl PageSet {
    /// An empty set of pages below `end`, which is [`GuestMemory::end`](crate::GuestMemory::end) as a rule.
    /// What lies beyond [`RAM_END_MAX`] is outside every set.
    pub fn new(end: PageIndex) -> Self {
        let end = end.min(RAM_END_MAX).0;
        Self { end, len: 0, ignored: 0, levels: level_words(end).map(words::zeroed) }
    }

    /// Makes room for pages below `end`, and drops those at or beyond it.
    pub(crate) fn resize(&mut self, end: PageIndex) {
        if self.capacity() != end.min(RAM_END_MAX) {
            let before = std::mem::replace(self, Self::new(end));
            self.union(&before);
        }
    }

    /// One past the highest page that the set can hold.
    pub fn capacity(&self) -> PageIndex {
        PageIndex(self.end)
    }

    /// Pages in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the set has no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many pages beyond the capacity were offered and ignored since the set was created or cleared, the
    /// same page counted each time.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Whether the page is in the set.
    #[inline]
    pub fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = split(index(page.0));
        self.levels[0].get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Adds a page; true if it is new.
    #[inline]
    pub fn insert(&mut self, page: PageIndex) -> bool {
        if page.0 >= self.end {
            self.ignore(1);
            return false;
        }
        let (word, bit) = split(index(page.0));
        let old = self.levels[0][word];
        self.levels[0][word] = old | bit;
        if old == 0 {
            self.raise(word);
        }
        let new = old & bit == 0;
        self.len += u64::from(new);
        new
    }

    /// Adds all pages of a run.
    pub fn insert_run(&mut self, run: PageRun) {
        let (first, end) = (run.first.0, run.end().0);
        self.ignore(end.saturating_sub(first.max(self.end)));
        let end = end.min(self.end);
        if first < end {
            for word in index(first / WORD)..=index((end - 1) / WORD) {
                self.add(word, bits_between(word, first, end));
            }
        }
    }

    /// Removes a page; true if it was there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let there = self.contains(page);
        if there {
            let (word, bit) = split(index(page.0));
            self.take(word, bit);
        }
        there
    }

    /// Removes all pages of a run.
    pub fn remove_run(&mut self, run: PageRun) {
        let (first, end) = (run.first.0, run.end().0);
        let mut next = first;
        while let Some(page) = self.next_page(next, end) {
            let word = index(page / WORD);
            self.take(word, bits_between(word, first, end));
            next = (word as u64 + 1) * WORD;
        }
    }

    /// Adds all pages of `other`.
    pub fn union(&mut self, other: &Self) {
        for (word, bits) in other.nonzero_words() {
            self.add_within(word, bits);
        }
    }

    /// Adds all pages of `other` and gives each word of those that are new to `told`; how many they are.
    pub(crate) fn union_telling(&mut self, other: &Self, mut told: impl FnMut(usize, u64)) -> u64 {
        let before = self.len;
        for (word, bits) in other.nonzero_words() {
            let new = bits & !self.levels[0].get(word).copied().unwrap_or(0);
            if new != 0 {
                self.add_within(word, new);
                told(word, new);
            }
        }
        self.len - before
    }

    /// Adds those of `bits` that are not in `known`.
    pub(crate) fn insert_unless(&mut self, word: usize, bits: u64, known: &Self) {
        let bits = bits & !known.levels[0].get(word).copied().unwrap_or(0);
        if bits != 0 {
            self.add_within(word, bits);
        }
    }

    /// Adds the pages of one word, `first` a multiple of 64; how many are new.
    #[inline]
    fn insert_word(&mut self, first: PageIndex, bits: u64) -> u64 {
        let word = index(first.0 / WORD);
        // Nearly always: the word ends before the capacity does.
        if bits != 0 && first.0.saturating_add(WORD) <= self.end {
            self.add(word, bits)
        } else {
            self.add_within(word, bits)
        }
    }

    /// Adds the pages whose bits are set in `words`: bit 0 of the first word is the page `first`, which needs
    /// no alignment. This is what `KVM_GET_DIRTY_LOG` returns for a slot that begins at `first`.
    pub fn union_words(&mut self, first: PageIndex, words: &[u64]) {
        let (word, shift) = (first.0 / WORD, first.0 % WORD);
        for (word, &bits) in (word..).zip(words).filter(|(_, bits)| **bits != 0) {
            self.add_within(index(word), bits << shift);
            if shift != 0 {
                self.add_within(index(word + 1), bits >> (WORD - shift));
            }
        }
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (word, bits) in other.nonzero_words() {
            if word >= self.levels[0].len() {
                break;
            }
            self.take(word, bits);
        }
    }

    /// Whether the sets have a page in common.
    pub fn intersects(&self, other: &Self) -> bool {
        self.nonzero_words().any(|(word, bits)| other.levels[0].get(word).is_some_and(|b| b & bits != 0))
    }

    /// Pages of the run that are in the set.
    pub fn count_within(&self, run: PageRun) -> u64 {
        self.runs_within(run).map(|run| run.pages).sum()
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        let mut next = 0;
        while let Some(word) = self.next_set(1, next) {
            self.levels[0][word] = 0;
            next = word + 1;
            // The last word under a summary word takes the summary word with it, and so on up.
            self.lower(word);
        }
        (self.len, self.ignored) = (0, 0);
    }

    /// The pages as maximal runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        self.runs_within(PageRun { first: PageIndex(0), pages: self.end })
    }

    /// The pages of `run` that are in the set, as maximal runs inside it, in order.
    pub fn runs_within(&self, run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let (mut next, end) = (run.first.0, run.end().0.min(self.end));
        std::iter::from_fn(move || {
            let first = self.next_page(next, end)?;
            next = self.next_gap(first, end);
            Some(PageRun { first: PageIndex(first), pages: next - first })
        })
    }

    /// The run as a bitmap: bit 0 of word 0 is its first page, bits after its last page are 0. The part of the
    /// run beyond the capacity has no words.
    pub fn words_in(&self, run: PageRun) -> Vec<u64> {
        let (first, end) = (run.first.0, run.end().0.min(self.end));
        let mut words = vec![0; index(end.saturating_sub(first).div_ceil(WORD))];
        let mut next = first;
        while let Some(page) = self.next_page(next, end) {
            let n = (page - first) / WORD;
            let start = first + n * WORD;
            words[index(n)] = self.word_at(start) & bits_between(0, 0, end - start);
            next = start + WORD;
        }
        words
    }

    /// [`words_in`](Self::words_in), and the pages leave the set: one slot's `KVM_GET_DIRTY_LOG`.
    pub fn take_words(&mut self, run: PageRun) -> Vec<u64> {
        let words = self.words_in(run);
        self.remove_run(run);
        words
    }

    /// The pages of the run that are in the set, as runs in order, and they leave the set.
    pub fn take_runs(&mut self, run: PageRun) -> Vec<PageRun> {
        let runs = self.runs_within(run).collect();
        self.remove_run(run);
        runs
    }

    /// The set as bits: bit `i` is page `i`. Bits at and beyond the capacity are 0.
    pub fn as_bits(&self) -> &BitSlice<u64, Lsb0> {
        self.levels[0].view_bits()
    }

    fn ignore(&mut self, pages: u64) {
        self.ignored = self.ignored.saturating_add(pages);
    }

    /// Adds `bits` to a word that exists, none of them beyond the capacity. Returns how many are new.
    #[inline]
    fn add(&mut self, word: usize, bits: u64) -> u64 {
        let old = self.levels[0][word];
        self.levels[0][word] = old | bits;
        let new = u64::from((bits & !old).count_ones());
        self.len += new;
        if old == 0 && bits != 0 {
            self.raise(word);
        }
        new
    }

    /// Fetches a word and its summary into the cache.
    #[inline]
    fn prefetch(&self, word: usize) {
        words::prefetch(&self.levels[0], word);
        words::prefetch(&self.levels[1], word / 64);
    }

    /// Adds those of `bits` that are below the capacity, ignores the others. Returns how many are new.
    fn add_within(&mut self, word: usize, bits: u64) -> u64 {
        let inside = bits & bits_between(word, 0, self.end);
        self.ignore(u64::from((bits & !inside).count_ones()));
        if inside == 0 { 0 } else { self.add(word, inside) }
    }

    /// Removes `bits` from a word that exists.
    fn take(&mut self, word: usize, bits: u64) {
        let old = self.levels[0][word];
        self.levels[0][word] = old & !bits;
        self.len -= u64::from((bits & old).count_ones());
        if old != 0 && old & !bits == 0 {
            self.lower(word);
        }
    }

    /// Word `i` of the pages became non-zero.
    fn raise(&mut self, mut i: usize) {
        for level in &mut self.levels[1..] {
            let (word, bit) = split(i);
            let old = level[word];
            level[word] = old | bit;
            if old != 0 {
                break;
            }
            i = word;
        }
    }

    /// Word `i` of the pages became zero.
    fn lower(&mut self, mut i: usize) {
        for level in &mut self.levels[1..] {
            let (word, bit) = split(i);
            level[word] &= !bit;
            if level[word] != 0 {
                break;
            }
            i = word;
        }
    }

    /// The next set bit of a level, `from` included.
    fn next_set(&self, level: usize, from: usize) -> Option<usize> {
        let words = &self.levels[level];
        let (word, _) = split(from);
        let bits = *words.get(word)? & bits_from(from);
        let (word, bits) = if bits != 0 {
            (word, bits)
        } else if level + 1 < LEVELS {
            let word = self.next_set(level + 1, word + 1)?;
            (word, words[word])
        } else {
            let word = word + 1 + words[word + 1..].iter().position(|bits| *bits != 0)?;
            (word, words[word])
        };
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// The next page of the set in `[from, end)`.
    fn next_page(&self, from: u64, end: u64) -> Option<u64> {
        self.next_set(0, index(from)).map(|page| page as u64).filter(|page| *page < end)
    }

    /// The next page that is not in the set, `from` included, or `end`; no word beyond `end` is looked at.
    fn next_gap(&self, from: u64, end: u64) -> u64 {
        let (mut word, _) = split(index(from));
        let mut gaps = !self.levels[0][word] & bits_from(index(from));
        while gaps == 0 && (word as u64 + 1) * WORD < end {
            word += 1;
            gaps = !self.levels[0][word];
        }
        (word as u64 * WORD + u64::from(gaps.trailing_zeros())).min(end)
    }

    /// The 64 pages from `page` on, at any alignment.
    fn word_at(&self, page: u64) -> u64 {
        let (word, shift) = (index(page / WORD), page % WORD);
        let bits = |word: usize| self.levels[0].get(word).copied().unwrap_or(0);
        match shift {
            0 => bits(word),
            _ => bits(word) >> shift | bits(word + 1) << (WORD - shift),
        }
    }

    /// Every word that holds a page, in order.
    fn nonzero_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let word = self.next_set(1, next)?;
            next = word + 1;
            Some((word, self.levels[0][word]))
        })
    }
}

impl Clone for PageSet {
    /// Copies the pages, not the empty words between them.
    fn clone(&self) -> Self {
        let mut copy = Self::new(self.capacity());
        copy.union(self);
        copy.ignored = self.ignored;
        copy
    }
}

impl PartialEq for PageSet {
    /// The same pages, whatever the capacities.
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.nonzero_words().eq(other.nonzero_words())
    }
}

impl Eq for PageSet {}

impl fmt::Debug for PageSet {
    /// The size and the first few runs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const RUNS_SHOWN: usize = 8;
        write!(f, "PageSet({} of {} pages:", self.len, self.end)?;
        for run in self.runs().take(RUNS_SHOWN) {
            write!(f, " {:#x}+{}", run.first.0, run.pages)?;
        }
        f.write_str(if self.runs().nth(RUNS_SHOWN).is_some() { " …)" } else { ")" })
    }
}
