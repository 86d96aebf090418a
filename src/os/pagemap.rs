//! The kernel's page table of this process: `/proc/self/pagemap` and its `PAGEMAP_SCAN` ioctl (Linux 6.7).
//!
//! This file owns the ABI and the loop around it. What the answers mean is for `page::populated` (which pages
//! exist) and `track::pagemap` (which were written) to say.
#![expect(unsafe_code, reason = "the kernel fills a struct that it is given by address")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// What the kernel says of a page, as a set of bits. From include/uapi/linux/fs.h.
pub(crate) mod category {
    /// Written since it was last write-protected (userfaultfd `WP_ASYNC`).
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// In memory and in our page table.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// Swapped out, or on its way somewhere: the entry holds something that is not a page.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeroes: read, never written.
    pub(crate) const PFNZERO: u64 = 1 << 5;
}

/// Write-protect each reported page in the same step in which it is looked at.
pub(crate) const WP_MATCHING: u64 = 1 << 0;
/// Fail with EPERM where a mapping is not registered for `WP_ASYNC`, instead of reporting it as written.
pub(crate) const CHECK_WPASYNC: u64 = 1 << 1;

/// Which pages a scan reports: those whose categories, after flipping `inverted`, contain all of `mask` and any of
/// `anyof` (if that is not 0).
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Filter {
    pub(crate) flags: u64,
    pub(crate) inverted: u64,
    pub(crate) mask: u64,
    pub(crate) anyof: u64,
}

/// `struct pm_scan_arg` of include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<ScanRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

/// Regions taken per call: as many as the kernel gathers before it writes them out (those of one page-table page). With
/// room for more, it goes on behind the first batch and at the end still says that the walk ended where that batch
/// did: the rest would be walked, and reported, twice (seen on Linux 6.18, kernel-notes/pagemap.md).
const REGIONS: usize = 512;

/// The open `/proc/self/pagemap`.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
}

impl Pagemap {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")? })
    }

    /// Reports the pages of a host address range that pass the filter, as ascending address ranges. Neighbouring
    /// ranges may touch. A range that is not mapped has no pages.
    ///
    /// Errors are the kernel's: ENOTTY before Linux 6.7, EPERM for [`CHECK_WPASYNC`], EINTR only when the process
    /// is being killed. After an error, pages may have been protected that were not reported.
    pub(crate) fn scan(
        &self,
        host: Range<usize>,
        filter: Filter,
        mut found: impl FnMut(Range<usize>),
    ) -> io::Result<()> {
        let mut regions = vec![ScanRegion::default(); REGIONS];
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: filter.flags,
            start: host.start as u64,
            end: host.end as u64,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: filter.inverted,
            category_mask: filter.mask,
            category_anyof_mask: filter.anyof,
            return_mask: filter.mask | filter.anyof,
            ..ScanArg::default()
        };
        while arg.start < arg.end {
            // SAFETY:
            // * `arg` is the kernel's struct, by the size assertion and the field order above, and lives on.
            // * `vec` and `vec_len` are `regions`, which lives on and is not looked at during the call.
            // * The range is only looked at, or write-protected, which changes no byte of it.
            let filled = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let Ok(filled) = usize::try_from(filled) else {
                return Err(io::Error::last_os_error());
            };
            for region in regions.iter().take(filled) {
                found(to_usize(region.start)..to_usize(region.end));
            }
            if arg.walk_end <= arg.start {
                return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
            }
            arg.start = std::mem::take(&mut arg.walk_end);
        }
        Ok(())
    }
}

/// The kernel reports addresses of this process.
fn to_usize(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}
