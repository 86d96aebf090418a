//! The guest's RAM, page by page: what is still to be sent, what was written since, and who could have noticed.

use super::pages::{PageBits, Run, count, words};

/// Who writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    /// A vCPU, whose first write to a protected page is noticed by KVM.
    Vcpu,
    /// Somebody else, who keeps a log of his own.
    Device,
}

/// Every page, in the sets that say what has to become of it.
#[derive(Debug)]
pub(super) struct Memory {
    /// To be sent in this round, and protected since.
    pub ready: PageBits,
    /// To be sent in this round, known to be dirty, not protected: writing it is free and unseen.
    pub behind: PageBits,
    /// Written by a vCPU since it was last protected.
    dirty: PageBits,
    /// Written by a device since its log was last drained.
    logged: PageBits,
    /// Pages that would have to be sent if the guest stood still now.
    left: usize,
    /// No page before this word is behind.
    behind_from: usize,
    /// How often pages were protected: what was written is clean again.
    pub protections: u64,
}

impl Memory {
    /// RAM of so many pages, the first `populated` of which have to be sent.
    pub fn new(pages: usize, populated: usize) -> Self {
        let empty = PageBits::new(pages);
        let mut ready = empty.clone();
        for (word, mask) in words(0, populated.min(pages)) {
            ready.add(word, mask);
        }
        let left = ready.len();
        Self {
            ready,
            behind: empty.clone(),
            dirty: empty.clone(),
            logged: empty,
            left,
            behind_from: 0,
            protections: 0,
        }
    }

    /// Pages that would have to be sent if the guest stood still now: unsent, or dirty, or both.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Pages of this round that are still to be sent.
    pub fn unsent(&self) -> usize {
        self.ready.len() + self.behind.len()
    }

    /// Pages dirtied by vCPUs, by devices.
    pub fn dirtied(&self) -> (usize, usize) {
        (self.dirty.len(), self.logged.len())
    }

    /// Pages of one word that `side` writes for free, because they are dirty for it already.
    pub fn written(&self, side: Side, word: usize) -> u64 {
        match side {
            Side::Vcpu => self.dirty.word(word) | self.behind.word(word),
            Side::Device => self.logged.word(word),
        }
    }

    /// `side` writes these pages, of those that are not free for it.
    pub fn write(&mut self, side: Side, word: usize, pages: u64) {
        let unsent = self.ready.word(word) | self.behind.word(word);
        let (set, other) = match side {
            Side::Vcpu => (&mut self.dirty, self.logged.word(word)),
            Side::Device => (&mut self.logged, self.dirty.word(word)),
        };
        let new = set.add(word, pages);
        self.left += count(new & !unsent & !other);
    }

    /// These pages were sent.
    pub fn sent(&mut self, word: usize, pages: u64) {
        let gone = self.ready.remove(word, pages);
        self.left -= count(gone & !self.dirty.word(word) & !self.logged.word(word));
    }

    /// These pages are known to be dirty: those that are to be sent in this round need not be. How many there were.
    pub fn strike_off(&mut self, run: Run) -> usize {
        let struck = |(word, mask)| {
            let dirty = self.dirty.word(word) | self.logged.word(word);
            count(self.ready.remove(word, mask & dirty))
        };
        words(run.first, run.pages).map(struck).sum()
    }

    /// A harvest takes pages that vCPUs dirtied; they are to be sent, and writable until they are protected.
    pub fn harvest(&mut self, run: Run, protect: bool) {
        for (word, mask) in words(run.first, run.pages) {
            let taken = self.dirty.remove(word, mask);
            if protect {
                self.ready.add(word, taken & !self.behind.word(word));
            } else {
                self.ready.remove(word, taken);
                self.behind.add(word, taken);
                self.behind_from = self.behind_from.min(word);
            }
        }
    }

    /// A harvest takes pages that devices wrote.
    pub fn drain(&mut self, run: Run) {
        for (word, mask) in words(run.first, run.pages) {
            let taken = self.logged.remove(word, mask);
            self.ready.add(word, taken & !self.behind.word(word));
        }
    }

    /// Protects the first `pages` pages, and a few more, of those that are known to be dirty.
    pub fn protect(&mut self, pages: usize) {
        let mut done = 0;
        while done < pages && self.behind.len() > 0 {
            let now = self.behind.remove(self.behind_from, u64::MAX);
            self.ready.add(self.behind_from, now);
            done += count(now);
            self.behind_from += 1;
        }
        self.protections += 1;
    }
}
