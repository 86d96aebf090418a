//! Taking pages out of a set from the top down, some at a time.

use super::PageSet;
use crate::layout::{PageIndex, PageRun};

/// Pages of the set that the first scan covers, and those where there are few: so that no call takes longer than
/// microseconds.
const WINDOW_PAGES: u64 = 1 << 11;
const WINDOW_PAGES_MAX: u64 = 1 << 24;

/// How far one has come from the top down.
#[derive(Default, Debug)]
pub(crate) struct FromTheTop {
    /// All pages of the set are below.
    cursor: u64,
    /// Runs of one scan, kept for their memory.
    found: Vec<PageRun>,
}

impl FromTheTop {
    /// The set may have pages again up to `end`.
    pub(crate) fn reach(&mut self, end: PageIndex) {
        self.cursor = self.cursor.max(end.0);
    }

    /// Moves up to `wanted` pages out of `set`, the highest first, and adds them to `runs`, ascending; how many.
    pub(crate) fn take(&mut self, set: &mut PageSet, wanted: u64, runs: &mut Vec<PageRun>) -> u64 {
        let (mut taken, mut window, before) = (0, WINDOW_PAGES, runs.len());
        while taken < wanted && !set.is_empty() && self.cursor > 0 {
            let first = self.cursor.saturating_sub(window);
            let scan = PageRun { first: PageIndex(first), pages: self.cursor - first };
            self.found.clear();
            self.found.extend(set.runs_within(scan));
            let mut next = first;
            while let Some(run) = self.found.pop() {
                let pages = run.pages.min(wanted - taken);
                let highest = PageRun { first: PageIndex(run.end().0 - pages), pages };
                set.remove_run(highest);
                runs.push(highest);
                taken += pages;
                if taken == wanted {
                    next = highest.first.0;
                    break;
                }
            }
            self.cursor = next;
            // Where there are few pages, the next scan reaches further.
            window = window.saturating_mul(2).min(WINDOW_PAGES_MAX);
        }
        runs[before..].reverse();
        taken
    }
}
