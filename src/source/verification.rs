//! What the source digests, and when: a page that was not dirtied again in a round is believed to be final.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::layout::{GuestMemory, PAGE_SIZE};
use crate::page::{Audit, RamDigest, RamLedger};
use crate::page_set::PageSet;
use crate::track::Redirtied;

/// Bytes per second of one thread that hashes, to be careful: a third of what `cargo bench --bench page` shows on an
/// idle CPU, because both sides may share the CPUs with the guest.
const BYTES_PER_S: f64 = 2.5e9;

/// The source's half of the comparison of RAM.
#[derive(Debug)]
pub(super) struct Verification {
    ledger: RamLedger,
    /// Pages that may be dirty again by the next harvest: hashed later.
    unhashed: PageSet,
    /// Pages whose content the guest has given up, and which were never sent.
    discarded: PageSet,
}

impl Verification {
    /// Begins, with all RAM write-protected: `populated` pages have content, of which `dirty` ones have changed since, and
    /// the guest has given up `discarded`.
    pub fn new(
        memory: &GuestMemory,
        populated: &PageSet,
        dirty: &PageSet,
        discarded: PageSet,
    ) -> std::io::Result<Self> {
        let mut begun = Self { ledger: RamLedger::new(memory)?, unhashed: populated.clone(), discarded };
        begun.harvested(dirty);
        Ok(begun)
    }

    /// A harvest found these pages dirty; all others are believed to be final.
    pub fn harvested(&mut self, dirty: &PageSet) {
        self.harvested_but(dirty, None);
    }

    /// The same of a harvest that left pages `behind`, dirty as well.
    pub fn harvested_but(&mut self, dirty: &PageSet, behind: Option<&Redirtied>) {
        self.ledger.unsettled(dirty);
        self.unhashed.subtract(dirty);
        if let Some(behind) = behind {
            behind.strike_off(&mut self.unhashed);
        }
        self.ledger.settled(&self.unhashed);
        self.unhashed.clone_from(dirty);
        self.discarded.subtract(dirty);
    }

    /// These pages, too, were dirty at the last harvest, which left them behind.
    pub fn dirty_after_all(&mut self, dirty: &PageSet) {
        self.ledger.unsettled(dirty);
        self.unhashed.union(dirty);
        self.discarded.subtract(dirty);
    }

    /// Nothing writes RAM any more: all of it is final.
    pub fn settle(&mut self) {
        self.ledger.settled(&self.unhashed);
        self.unhashed.clear();
    }

    /// How long it will take to finish once the guest stands still.
    pub fn left(&self) -> Duration {
        let pages = self.unhashed.len() + self.ledger.waiting_pages();
        Duration::from_secs_f64((pages * PAGE_SIZE as u64) as f64 / BYTES_PER_S)
    }

    /// The digest of all RAM, once it settled; `None` if it was not there before `deadline` or `cancel`.
    pub fn digest(&self, deadline: Instant, cancel: &AtomicBool) -> Option<RamDigest> {
        self.ledger.digest(deadline, cancel)
    }

    /// Reads all RAM once more and compares it with what was digested: finds a write that tracking missed. The guest must
    /// not run here any more.
    /// `None` if `cancel` was raised meanwhile.
    pub fn audit(&self, cancel: &AtomicBool) -> Option<Audit> {
        self.ledger.audit(&self.discarded, cancel)
    }
}
