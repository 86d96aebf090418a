//! Dirty tracking of memory that ordinary threads write: userfaultfd's asynchronous write protection, read and
//! re-armed by `PAGEMAP_SCAN` (both Linux 6.7).
//!
//! It serves the guest made of threads, which runs where there is no /dev/kvm. The kernel write-protects pages in
//! our own page table; the first write to one takes a fault that the kernel resolves by itself, no thread of ours
//! waits for it. A scan finds the pages that are no longer protected, and protects them again in the same step,
//! under the page table's lock and with the TLB flushed before it returns: a write is either in this harvest or in
//! the next one.
//!
//! What it does not see: writes through another mapping of a shared file, in this process or another, and pages
//! that `madvise` threw away; the code that does that marks them, see [`external`](super::external). It knows no vCPUs, so what
//! it observes is a total, and not of this very moment. A scan walks the page tables: it costs what is populated, not
//! what is dirty (`cargo bench --bench pagemap`).

use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::error::{PagemapError, TrackError};
use super::redirtied::Redirtied;
use super::source::{DirtySource, Observed};
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun, SlotId};
use crate::os::pagemap::{CHECK_WPASYNC, Filter, Pagemap, WP_MATCHING, category};
use crate::os::userfault::Userfault;
use crate::page_set::PageSet;
use crate::vm::Settled;

/// Tracks the RAM of a guest made of this process's threads.
#[derive(Debug)]
pub struct PagemapTracker {
    memory: GuestMemory,
    pagemap: Pagemap,
    /// While tracking. Closing it removes the protection.
    userfault: Option<Userfault>,
    /// Harvested by a scan that failed later on, not handed out yet.
    found: PageSet,
    /// A scan failed half-way: pages may be protected that were not reported.
    lost_count: bool,
    given_back: PageSet,
    last_sample: Option<Sample>,
}

/// An observation that may be asked for again.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    took: Duration,
    pages: u64,
}

/// An observation is repeated until it is so many times older than it took to make: two milliseconds per populated
/// GiB would be a core of its own for a caller that asks every millisecond.
const SAMPLE_REST: u32 = 20;

/// The written pages. One that does not exist is not written: it will be when it is populated, for then nothing
/// protects it. Nor is the page of zeroes, to which a page is mapped that was only read.
const WRITTEN: Filter = Filter {
    flags: 0,
    inverted: category::PFNZERO,
    mask: category::WRITTEN | category::PFNZERO,
    anyof: category::PRESENT | category::SWAPPED,
};

/// The same, and they are protected in the same step.
const PROTECT: Filter = Filter { flags: WP_MATCHING | CHECK_WPASYNC, ..WRITTEN };

impl PagemapTracker {
    /// A tracker of all of `memory`, off.
    ///
    /// # Errors
    ///
    /// [`PagemapError`]: what this kernel, or this process's rights, lack.
    pub fn new(memory: GuestMemory) -> Result<Self, PagemapError> {
        let pagemap = Pagemap::open().map_err(PagemapError::NoPagemap)?;
        // To fail here rather than at the start of a migration.
        Userfault::open()?;
        let empty = || PageSet::new(memory.end());
        let (found, given_back) = (empty(), empty());
        Ok(Self { memory, pagemap, userfault: None, found, lost_count: false, given_back, last_sample: None })
    }

    /// Tracks a write of our own, to see whether this kernel and the rights of this process allow it.
    ///
    /// # Errors
    ///
    /// [`PagemapError`], as [`TrackError::Pagemap`]: what they lack.
    pub fn probe() -> Result<(), TrackError> {
        let mut map = MmapMut::map_anon(PAGE_SIZE).map_err(PagemapError::NoPagemap)?;
        let host = map.as_ptr().addr()..map.as_ptr().addr() + PAGE_SIZE;
        let pagemap = Pagemap::open().map_err(PagemapError::NoPagemap)?;
        let userfault = Userfault::open().map_err(PagemapError::from)?;
        userfault.register(host.clone()).map_err(|error| PagemapError::NotProtectable(SlotId(0), error))?;
        let written_bytes = || {
            let mut bytes = 0;
            let scanned = pagemap.scan(host.clone(), PROTECT, |part| bytes += part.len());
            scanned.map_err(PagemapError::Scan).map(|()| bytes)
        };
        written_bytes()?;
        // Only the kernel looks at the page: without the boxes, the compiler need not write it.
        black_box(&mut map)[0] = 1;
        black_box(&map);
        if written_bytes()? != PAGE_SIZE {
            return Err(PagemapError::Scan(io::Error::other("a write went unseen")).into());
        }
        Ok(())
    }

    /// Protects what is written and puts it into `found`.
    fn scan(&mut self) -> Result<(), PagemapError> {
        let found = &mut self.found;
        for region in self.memory.regions() {
            let scanned = self.pagemap.scan(region.host_range(), PROTECT, |part| {
                found.insert_run(region.pages_at(part));
            });
            if let Err(error) = scanned {
                self.lost_count = true;
                return Err(PagemapError::Scan(error));
            }
        }
        Ok(())
    }

    /// Counts the written pages and reports them, unless the last sample was taken a moment ago.
    fn sample(&mut self, mut report: impl FnMut(PageRun)) -> Result<Observed, TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotTracking);
        }
        if let Some(sample) =
            self.last_sample.filter(|sample| sample.at.elapsed() < sample.took * SAMPLE_REST)
        {
            return Ok(Observed::Total(sample.pages));
        }
        let (at, mut pages) = (Instant::now(), 0);
        for region in self.memory.regions() {
            let found = |part: Range<usize>| {
                pages += (part.len() / PAGE_SIZE) as u64;
                report(region.pages_at(part));
            };
            self.pagemap.scan(region.host_range(), WRITTEN, found).map_err(PagemapError::Scan)?;
        }
        self.last_sample = Some(Sample { at, took: at.elapsed(), pages });
        Ok(Observed::Total(pages))
    }
}

impl DirtySource for PagemapTracker {
    fn backend(&self) -> &'static str {
        "pagemap"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if self.userfault.is_some() {
            return Err(TrackError::AlreadyTracking);
        }
        let userfault = Userfault::open().map_err(PagemapError::from)?;
        for region in self.memory.regions() {
            userfault
                .register(region.host_range())
                .map_err(|error| PagemapError::NotProtectable(region.slot, error))?;
        }
        // Protects everything: all that exists counts as written until then.
        self.scan()?;
        self.found.clear();
        self.lost_count = false;
        self.userfault = Some(userfault);
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        self.sample(|_| {})
    }

    fn observe_into(&mut self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        self.sample(|run| redirtied.pages_mut().insert_run(run))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotTracking);
        }
        let (capacity, needed) = (dirty.capacity(), self.memory.end());
        if capacity < needed {
            return Err(TrackError::SetTooSmall { capacity, needed });
        }
        self.last_sample = None;
        self.scan()?;
        if std::mem::take(&mut self.lost_count) {
            self.memory.regions().iter().for_each(|region| dirty.insert_run(region.pages));
        }
        for set in [&mut self.found, &mut self.given_back] {
            dirty.union(set);
            set.clear();
        }
        Ok(())
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        // A scan sees every write that has happened, so the last one needs nothing more.
        self.harvest(dirty)
    }

    fn give_back(&mut self, pages: &PageSet) {
        self.given_back.union(pages);
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.userfault = None;
        self.last_sample = None;
        self.found.clear();
        Ok(())
    }
}
