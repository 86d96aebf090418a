//! Guest memory as the offload process maps it.
//!
//! Its mappings begin without a page, and each page that is sent would cost a fault, or a share of one: a thread enters what
//! the files hold into the page tables, ahead of the pages that leave.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::error::OffloadError;
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun, Region, SlotId};
use crate::os::file::{next_data, next_hole};

/// Memory whose data is looked for at a time.
const WINDOW_BYTES: u64 = 256 << 20;
/// Memory that is entered into the page tables at a time, before anybody may want to end it.
const CHUNK_BYTES: u64 = 4 << 20;

/// A region as the VMM has passed it.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) slot: SlotId,
    pub(super) pages: PageRun,
    pub(super) offset: u64,
    pub(super) tracked: bool,
    pub(super) name: String,
    pub(super) file: File,
}

/// The same, mapped.
#[derive(Debug)]
pub(super) struct Mapped {
    passed: Passed,
    bytes: u64,
    mapping: Arc<MmapRaw>,
}

impl Mapped {
    /// Maps a region.
    ///
    /// # Errors
    ///
    /// [`OffloadError::Map`]: its file is too short for it, or cannot be mapped.
    pub(super) fn new(passed: Passed) -> Result<Self, OffloadError> {
        let slot = passed.slot;
        let refuse = |source| OffloadError::Map { slot, source };
        let unfit = || refuse(io::ErrorKind::InvalidInput.into());
        let bytes = passed.pages.pages.checked_mul(PAGE_SIZE as u64).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(unfit)?;
        let end = passed.offset.checked_add(bytes).ok_or_else(unfit)?;
        let length = usize::try_from(bytes).map_err(|_| unfit())?;
        let is_aligned = passed.offset.is_multiple_of(PAGE_SIZE as u64);
        if !is_aligned || passed.file.metadata().map_err(refuse)?.len() < end {
            return Err(unfit());
        }
        let mapping = MmapOptions::new().offset(passed.offset).len(length).map_raw(passed.file.as_raw_fd());
        Ok(Self { bytes, mapping: Arc::new(mapping.map_err(refuse)?), passed })
    }

    /// Enters what the file holds between two offsets of the region into the page tables, from the top down, as rounds go.
    fn populate(&self, window: Range<u64>, ends: &AtomicBool) -> io::Result<()> {
        let mut extents = Vec::new();
        let (mut at, end) = (self.passed.offset + window.start, self.passed.offset + window.end);
        while let Some(data) = next_data(&self.passed.file, at)?.filter(|data| *data < end) {
            let hole = next_hole(&self.passed.file, data)?.min(end);
            if hole <= at {
                break;
            }
            extents.push(data.max(at) - self.passed.offset..hole - self.passed.offset);
            at = hole;
        }
        for extent in extents.into_iter().rev() {
            let mut top = extent.end;
            // Relaxed: a flag without data, read again soon.
            while top > extent.start && !ends.load(Ordering::Relaxed) {
                let bottom = top.saturating_sub(CHUNK_BYTES).max(extent.start);
                let of = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
                self.mapping.advise_range(Advice::PopulateRead, of(bottom)?, of(top - bottom)?)?;
                top = bottom;
            }
        }
        Ok(())
    }
}

/// All regions as guest memory; or those that are tracked.
///
/// # Errors
///
/// [`OffloadError::Layout`].
pub(super) fn guest_memory(mapped: &[Mapped], only_tracked: bool) -> Result<GuestMemory, OffloadError> {
    let wanted = || mapped.iter().filter(|mapped| mapped.passed.tracked || !only_tracked);
    let region = |mapped: &Mapped| Region {
        slot: mapped.passed.slot,
        pages: mapped.passed.pages,
        host: mapped.mapping.as_mut_ptr(),
    };
    let mappings: Vec<Arc<MmapRaw>> = wanted().map(|mapped| Arc::clone(&mapped.mapping)).collect();
    let mut memory = vouched(wanted().map(region).collect())?.kept_by(Arc::new(mappings));
    for Mapped { passed, .. } in wanted().filter(|mapped| !mapped.passed.name.is_empty()) {
        memory.name_block(passed.pages.first, &passed.name)?;
    }
    Ok(memory)
}

#[expect(unsafe_code, reason = "guest memory is mapped here, so that this side vouches for the mappings")]
fn vouched(regions: Vec<Region>) -> Result<GuestMemory, OffloadError> {
    // SAFETY:
    // * Each region is a mapping of its own, readable and writable, as long as its pages; the caller has them kept.
    // * Nobody makes a reference to what is in it. A VMM that cuts the file short ends this process, which only serves it.
    Ok(unsafe { GuestMemory::new(regions) }?)
}

/// The thread that enters memory into the page tables. It ends with the value.
#[derive(Debug)]
pub(super) struct Populating {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populating {
    /// Begins.
    ///
    /// # Errors
    ///
    /// [`OffloadError::Thread`].
    pub(super) fn start(mut mapped: Vec<Mapped>) -> Result<Self, OffloadError> {
        mapped.sort_by_key(|mapped| mapped.passed.pages.first);
        let ends = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&ends);
        let thread = Builder::new().name("ringferry-map".to_owned()).spawn(move || {
            for mapped in mapped.iter().rev() {
                let mut top = mapped.bytes;
                while top > 0 && !of_thread.load(Ordering::Relaxed) {
                    let bottom = (top - 1) / WINDOW_BYTES * WINDOW_BYTES;
                    if let Err(error) = mapped.populate(bottom..top, &of_thread) {
                        // Before Linux 5.14: each page has its fault then.
                        return tracing::debug!(%error, "memory is not entered into the page tables ahead");
                    }
                    top = bottom;
                }
            }
        });
        Ok(Self { ends, thread: Some(thread.map_err(OffloadError::Thread)?) })
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::layout::PageIndex;
    use crate::os::file::memfd;
    use crate::os::memory::mincore;
    use crate::os::pagemap::{Filter, Pagemap, category};

    fn passed(file: &File, offset: u64, pages: u64) -> Passed {
        let pages = PageRun { first: PageIndex(0x100), pages };
        let file = file.try_clone().unwrap();
        Passed { slot: SlotId(0), pages, offset, tracked: true, name: String::new(), file }
    }

    #[test]
    fn a_file_that_is_shorter_than_its_region_is_refused() {
        let file = memfd(c"short").unwrap();
        file.set_len(8 * 4096).unwrap();
        for (offset, pages) in [(0, 9), (4096, 8), (100, 1), (0, 0), (u64::MAX - 4095, 1), (0, u64::MAX)] {
            let refused = Mapped::new(passed(&file, offset, pages));
            assert!(matches!(refused, Err(OffloadError::Map { .. })), "{offset} {pages}: {refused:?}");
        }
        assert!(Mapped::new(passed(&file, 4096, 7)).is_ok());
    }

    #[test]
    fn what_a_file_holds_is_entered_into_the_page_tables_and_holes_stay_holes() {
        const PAGES: usize = 64;
        let file = memfd(c"sparse").unwrap();
        file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
        let written = [3, 4, 40];
        written.iter().for_each(|page| file.write_all_at(&[1], page * 4096).unwrap());
        let mapped = Mapped::new(passed(&file, 4096, PAGES as u64 - 1)).unwrap();
        let host = mapped.mapping.as_ptr().addr();
        let range = host..host + (PAGES - 1) * PAGE_SIZE;
        mapped.populate(0..mapped.bytes, &AtomicBool::new(false)).unwrap();
        let mut resident = [0; PAGES - 1];
        mincore(range.clone(), &mut resident).unwrap();
        assert_eq!(resident.iter().filter(|flags| **flags & 1 != 0).count(), written.len());
        let mut present = 0;
        let filter = Filter { mask: category::PRESENT, ..Filter::default() };
        let Ok(pagemap) = Pagemap::open() else { return };
        if pagemap.scan(range, filter, |found| present += found.len() / PAGE_SIZE).is_ok() {
            assert_eq!(present, written.len());
        }
    }
}
