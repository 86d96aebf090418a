//! Dirty pages that a harvest left behind unprotected, because the guest writes more pages than its rings have entries.
//!
//! They belong to the round that follows, and are protected right before they are sent, as much at a time as the link soon takes:
//! until then the guest writes them without a fault. What is still behind when the guest is stopped was never protected.
//!
//! A round that is braked has all of them at once. A guest that is held back loses nothing by a fault; and what it writes
//! again before its turn came is struck off, which it could not be if nobody saw it (`heavy-512m`: 7.6 instead of 10.4 s).

use std::time::Duration;

use super::error::SourceError;
use super::link::Link;
use super::migration::Migration;
use super::steering::Steering;
use crate::layout::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::track::{DirtySource, Redirtied};
use crate::vm::Vm;

/// The channels are to have as much to send as the link carries in this time: some samples' worth.
const AHEAD: Duration = Duration::from_millis(10);
/// And no fewer pages: 8 MiB, two per cent of what rings leave behind at least.
const AHEAD_PAGES_MIN: u64 = 2048;
/// The next look after the channels comes no later.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What the harvest before the current round left behind, as far as it was not protected since.
#[derive(Debug)]
pub(super) struct Behind {
    pages: Redirtied,
}

impl Behind {
    /// Nothing, of a guest whose RAM ends at `end`.
    pub fn new(end: crate::PageIndex) -> Self {
        Self { pages: Redirtied::new(end) }
    }

    /// A harvest puts here what it leaves behind.
    pub fn pages_mut(&mut self) -> &mut Redirtied {
        &mut self.pages
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.pages.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// How long to wait for the end of a round at most.
    pub fn wait(&self, next_sample: Duration) -> Duration {
        if self.is_empty() { next_sample } else { next_sample.min(LOOK_EVERY) }
    }

    /// Gives the channels more of these pages, if they have little left.
    pub fn top_up<V: Vm + ?Sized, D: DirtySource + ?Sized>(
        &mut self,
        migration: &mut Migration<'_, V, D>,
        link: &mut Link,
        steering: &Steering,
    ) -> Result<(), SourceError> {
        let ahead = (steering.bytes_in(AHEAD) / PAGE_SIZE as u64).max(AHEAD_PAGES_MIN);
        while !self.is_empty() && (steering.is_braking() || link.sender.undealt_pages() < ahead) {
            self.give(migration, link, ahead)?;
        }
        Ok(())
    }

    /// Gives the channels `pages` of these pages.
    fn give<V: Vm + ?Sized, D: DirtySource + ?Sized>(
        &mut self,
        migration: &mut Migration<'_, V, D>,
        link: &mut Link,
        pages_max: u64,
    ) -> Result<(), SourceError> {
        let before = self.len();
        let mut pages = PageSet::new(migration.memory.end());
        migration.tracker.protect(&mut self.pages, pages_max, &mut pages)?;
        migration.taken.union(&pages);
        if let Some(verification) = &mut migration.verification {
            verification.dirty_after_all(&pages);
        }
        let gone = before - self.len() - pages.len();
        link.sender.add_to_round(&pages, gone, !self.is_empty());
        Ok(())
    }
}
