//! What the destination digests, and when: a page that has not arrived again for a while is believed to be final.

use std::io;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::layout::GuestMemory;
use crate::page::{RamDigest, RamLedger};
use crate::page_set::{AtomicPageSet, PageSet};

/// A page that did not arrive again for so long is hashed.
const SETTLED_AFTER: Duration = Duration::from_millis(200);

/// The destination's half of the comparison of RAM.
#[derive(Debug)]
pub(super) struct Verification {
    ledger: RamLedger,
    /// Pages that arrived a moment ago.
    recent: PageSet,
    next: Instant,
}

impl Verification {
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let next = Instant::now() + SETTLED_AFTER;
        Ok(Self { ledger: RamLedger::new(memory)?, recent: PageSet::new(memory.end()), next })
    }

    /// To be called now and then: takes note of pages that arrived.
    pub fn follow(&mut self, arrived: &AtomicPageSet) {
        if Instant::now() >= self.next {
            self.next = Instant::now() + SETTLED_AFTER;
            self.take(arrived);
        }
    }

    fn take(&mut self, arrived: &AtomicPageSet) {
        let mut newest = PageSet::new(self.recent.capacity());
        arrived.drain_into(&mut newest);
        self.ledger.unsettled(&newest);
        self.recent.subtract(&newest);
        self.ledger.settled(&self.recent);
        self.recent = newest;
    }

    /// The digest of all RAM, now that everything has arrived; `None` if it was not there before `deadline` or `cancel`.
    pub fn digest(
        &mut self,
        arrived: &AtomicPageSet,
        deadline: Instant,
        cancel: &AtomicBool,
    ) -> Option<RamDigest> {
        self.take(arrived);
        self.ledger.settled(&self.recent);
        self.ledger.digest(deadline, cancel)
    }
}
