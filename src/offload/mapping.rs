//! Guest memory as the offload process maps it: the files that the VMM has passed, checked before they are touched.
//!
//! The mappings begin without a page. To enter pages into them ahead (`MADV_POPULATE_READ`) took as many faults and more CPU
//! time than to let each fault bring its neighbours, so nothing does (kernel-notes/offload.md).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use super::error::OffloadError;
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun, Region, SlotId};

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
        Ok(Self { mapping: Arc::new(mapping.map_err(refuse)?), passed })
    }
}

/// All regions as guest memory; or those that are tracked.
///
/// # Errors
///
/// [`OffloadError::Layout`].
pub(super) fn guest_memory(mapped: &[Mapped], only_tracked: bool) -> Result<GuestMemory, OffloadError> {
    let wanted = || mapped.iter().filter(|mapped| mapped.passed.tracked || !only_tracked);
    let region =
        |mapped: &Mapped| Region::new(mapped.passed.slot, mapped.passed.pages, mapped.mapping.as_mut_ptr());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::PageIndex;
    use crate::os::file::memfd;

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
}
