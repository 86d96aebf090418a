//! Sets of pages that are cheap to go through by the word, and the order in which pages were written.

/// Pages of one word.
const WORD: usize = 64;

/// The words that pages `first..first + pages` are in, each with the bits that are theirs.
pub(super) fn words(first: usize, pages: usize) -> impl Iterator<Item = (usize, u64)> {
    let end = first + pages;
    (first / WORD..end.div_ceil(WORD)).map(move |word| {
        let from = first.saturating_sub(word * WORD).min(WORD);
        let to = (end - word * WORD).min(WORD);
        (word, bits(from, to))
    })
}

/// Bits `from..to` of a word.
fn bits(from: usize, to: usize) -> u64 {
    if from >= to {
        return 0;
    }
    (u64::MAX >> (WORD - (to - from))) << from
}

/// Bits of a word as a number of pages.
pub(super) fn count(word: u64) -> usize {
    usize::try_from(word.count_ones()).unwrap_or(WORD)
}

/// The lowest `n` bits of those set in `word`.
pub(super) fn lowest(word: u64, n: usize) -> u64 {
    let mut rest = word;
    for _ in 0..n {
        rest &= rest.wrapping_sub(1);
    }
    word & !rest
}

/// The highest `n` bits of those set in `word`.
pub(super) fn highest(word: u64, n: usize) -> u64 {
    lowest(word.reverse_bits(), n).reverse_bits()
}

/// A set of pages that knows how many it has.
#[derive(Clone, Debug, Default)]
pub(super) struct PageBits {
    words: Vec<u64>,
    len: usize,
}

impl PageBits {
    /// None of `pages` pages.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(WORD)], len: 0 }
    }

    /// How many are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many words it has.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// The bits of one word.
    pub fn word(&self, word: usize) -> u64 {
        self.words[word]
    }

    /// Adds pages; those that were not in it.
    pub fn add(&mut self, word: usize, pages: u64) -> u64 {
        let new = pages & !self.words[word];
        self.words[word] |= new;
        self.len += count(new);
        new
    }

    /// Removes pages; those that were in it.
    pub fn remove(&mut self, word: usize, pages: u64) -> u64 {
        let gone = pages & self.words[word];
        self.words[word] &= !gone;
        self.len -= count(gone);
        gone
    }
}

/// Pages that one writer was the first to write, one after the other, at the same step of the simulation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// The first of them.
    pub first: usize,
    /// How many.
    pub pages: usize,
    /// When.
    pub step: u32,
}

/// What a writer has dirtied since it was last harvested, in its order: a ring of any size.
#[derive(Clone, Debug, Default)]
pub(super) struct Entries {
    runs: Vec<Run>,
    len: usize,
    /// The run, and the pages of it, up to which somebody has looked.
    looked: (usize, usize),
    looked_pages: usize,
}

impl Entries {
    /// How many pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Pages were dirtied.
    pub fn push(&mut self, run: Run) {
        self.len += run.pages;
        match self.runs.last_mut() {
            Some(last) if last.step == run.step && last.first + last.pages == run.first => {
                last.pages += run.pages;
            }
            _ => self.runs.push(run),
        }
    }

    /// Goes on where the last look ended, as far as the first `visible` pages.
    pub fn look(&mut self, visible: usize, mut at: impl FnMut(Run)) {
        let visible = visible.min(self.len);
        while self.looked_pages < visible {
            let (index, within) = self.looked;
            let Some(run) = self.runs.get(index) else { return };
            let pages = (run.pages - within).min(visible - self.looked_pages);
            if pages > 0 {
                at(Run { first: run.first + within, pages, step: run.step });
            }
            self.looked_pages += pages;
            self.looked = if within + pages == run.pages && index + 1 < self.runs.len() {
                (index + 1, 0)
            } else {
                (index, within + pages)
            };
        }
    }

    /// Takes the first `pages` pages, each run with the number of pages before it, and leaves the others.
    pub fn take(&mut self, pages: usize, mut taken: impl FnMut(Run, usize)) {
        let mut before = 0;
        let runs = std::mem::take(&mut self.runs);
        (self.len, self.looked, self.looked_pages) = (0, (0, 0), 0);
        for run in runs {
            let now = run.pages.min(pages - before);
            if now > 0 {
                taken(Run { pages: now, ..run }, before);
            }
            before += now;
            if now < run.pages {
                self.push(Run { first: run.first + now, pages: run.pages - now, ..run });
            }
        }
    }
}

/// Numbers that look random, the same every time (xorshift64*).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Another row of numbers for every `seed`.
    pub fn new(seed: usize) -> Self {
        let seed = u64::try_from(seed).unwrap_or(u64::MAX);
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d);
        random.0 = random.0.max(1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// At least 0 and below 1.
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n64 = u64::try_from(n).unwrap_or(u64::MAX);
        let high = (u128::from(self.next()) * u128::from(n64)) >> 64;
        usize::try_from(high).unwrap_or(0).min(n.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_range_hold_its_pages_and_no_others() {
        for (first, pages) in [(0, 0), (0, 64), (3, 5), (60, 10), (63, 130), (128, 1)] {
            let mut seen = Vec::new();
            for (word, mask) in words(first, pages) {
                seen.extend((0..WORD).filter(|bit| mask >> bit & 1 == 1).map(|bit| word * WORD + bit));
            }
            assert_eq!(seen, (first..first + pages).collect::<Vec<_>>());
        }
        assert_eq!((lowest(0b1011_0100, 2), highest(0b1011_0100, 2)), (0b1_0100, 0b1010_0000));
    }

    #[test]
    fn entries_are_looked_at_once_and_taken_in_their_order() {
        let mut entries = Entries::default();
        for (first, pages, step) in [(10, 5, 0), (15, 5, 0), (40, 3, 1), (2, 1, 1)] {
            entries.push(Run { first, pages, step });
        }
        let mut looked = Vec::new();
        for visible in [4, 4, 12, 14] {
            entries.look(visible, |run| looked.push((run.first, run.pages)));
        }
        assert_eq!(looked, [(10, 4), (14, 6), (40, 2), (42, 1), (2, 1)]);
        let mut taken = Vec::new();
        entries.take(11, |run, before| taken.push((run.first, run.pages, before)));
        assert_eq!(taken, [(10, 10, 0), (40, 1, 10)]);
        assert_eq!(entries.len(), 3);
    }
}
