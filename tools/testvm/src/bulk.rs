//! What a device writes in bulk, as one that moves data does: page after page of a stretch at the end of RAM, at a rate, logged
//! for dirty tracking as a VMM logs what its own threads write.

use std::time::{Duration, Instant};

use ringferry::track::DirtyTracker;
use ringferry::track::external::RegionLog;
use ringferry::{GuestMemory, PageIndex};

use crate::machine::HostMachine;
use crate::workload::Machine;
use crate::workload::mailbox::PAGE_BYTES;

/// It makes up for no more lost time than this.
const CATCH_UP: Duration = Duration::from_millis(20);

/// How much a device writes, and over how much.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BulkConfig {
    /// In whole pages.
    pub bytes_per_s: u64,
    /// The stretch at the end of RAM, which the guest must not use.
    pub bytes: u64,
}

/// A device's bulk writes.
#[derive(Debug)]
pub(crate) struct Bulk {
    config: BulkConfig,
    log: RegionLog,
    first: PageIndex,
    pages: u64,
    written: u64,
    last: Option<Instant>,
    due_bytes: u64,
}

impl Bulk {
    /// Nothing where nobody tracks, or the last region of RAM is smaller than the stretch.
    pub fn new(config: BulkConfig, memory: &GuestMemory, tracker: Option<&DirtyTracker>) -> Option<Self> {
        let region = memory.regions().last()?.pages;
        let pages = config.bytes / PAGE_BYTES;
        let first = PageIndex(region.end().0.checked_sub(pages).filter(|first| *first >= region.first.0)?);
        let log = RegionLog::new(usize::try_from(config.bytes).ok()?);
        if let Err(error) = tracker?.add_external(Box::new(log.source(first))) {
            tracing::error!(%error, "what a device writes in bulk cannot be tracked: it writes nothing");
            return None;
        }
        Some(Self { config, log, first, pages, written: 0, last: None, due_bytes: 0 })
    }

    /// Writes what is due.
    pub fn write(&mut self, machine: &mut HostMachine) {
        let now = Instant::now();
        let since = self.last.replace(now).map_or(Duration::ZERO, |last| (now - last).min(CATCH_UP));
        let due = u128::from(self.config.bytes_per_s) * since.as_nanos() / 1_000_000_000;
        self.due_bytes += u64::try_from(due).unwrap_or(0);
        while self.due_bytes >= PAGE_BYTES && self.pages > 0 {
            self.due_bytes -= PAGE_BYTES;
            let page = self.written % self.pages;
            self.written += 1;
            machine.store((self.first.0 + page) * PAGE_BYTES, self.written);
            // After the store: a harvest that takes the mark is followed by a read of what was stored.
            let offset = usize::try_from(page * PAGE_BYTES).unwrap_or(usize::MAX);
            self.log.mark_dirty(offset, 8);
        }
    }
}
