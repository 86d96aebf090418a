//! The log region of the vhost-user protocol, and of vhost in the kernel: shared memory with a bit per 4 KiB page of guest physical address
//! space, which the backends' processes set and we fetch and clear.
//!
//! The life of a log, in the messages of the protocol's "Migration" section: the VMM creates it, sends its file,
//! size and offset with `VHOST_USER_SET_LOG_BASE` and switches `VHOST_F_LOG_ALL` on. When guest memory grows beyond
//! the log, it is swapped for a larger one while backends write: the old one stays drained until all of them have
//! acknowledged the new one.
#![expect(unsafe_code, reason = "the log is shared with other processes, by address")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;

use super::ExternalSource;
use crate::layout::{PAGE_SIZE, PageIndex, RAM_END_MAX};
use crate::os::file::memfd_of_fixed_size;
use crate::page_set::PageSet;
use crate::vm::VmError;

const WORD_PAGES: u64 = u64::BITS as u64;

/// The log that all vhost-user backends of a VM share.
#[derive(Debug)]
pub struct VhostUserLog {
    current: Region,
    /// Logs that a backend may still write, because it has not acknowledged their successor.
    replaced: Vec<Region>,
    /// What the replaced logs held in the end.
    rest: PageSet,
}

#[derive(Debug)]
struct Region {
    file: File,
    map: MmapRaw,
    end: PageIndex,
}

impl VhostUserLog {
    /// A log of the pages below `end`, in sealed shared memory of its own.
    ///
    /// # Errors
    ///
    /// What the kernel refused: memfd, its seals, or the mapping; or that `end` is above [`RAM_END_MAX`].
    pub fn new(end: PageIndex) -> io::Result<Self> {
        Ok(Self { current: Region::new(end)?, replaced: Vec::new(), rest: PageSet::new(end) })
    }

    /// The file to send with `VHOST_USER_SET_LOG_BASE`; the log begins at offset 0.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.current.file.as_fd()
    }

    /// The size to send with `VHOST_USER_SET_LOG_BASE`, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.current.map.len()
    }

    /// Where the log is mapped in this process: what vhost in the kernel (`/dev/vhost-net`, `-vsock`, `-scsi`) takes with `VHOST_SET_LOG_BASE`, by
    /// a pointer to these 64 bits, before its `VHOST_F_LOG_ALL` is set. It writes the same log as backends in other processes: a bit per
    /// page of 4096 bytes, in bytes from the lowest address on. After [`swap`](Self::swap) the ioctl with the new address is its acknowledgement.
    pub fn base(&self) -> u64 {
        self.current.map.as_ptr().addr() as u64
    }

    /// Puts a new log of the pages below `end` in place. Send [`file`](Self::file) to each backend; once each has
    /// acknowledged it, call [`every_backend_acknowledged`](Self::every_backend_acknowledged).
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); the log in use stays.
    pub fn swap(&mut self, end: PageIndex) -> io::Result<()> {
        let new = Region::new(end)?;
        self.replaced.push(std::mem::replace(&mut self.current, new));
        if self.rest.capacity() < end {
            let rest = std::mem::replace(&mut self.rest, PageSet::new(end));
            self.rest.union(&rest);
        }
        Ok(())
    }

    /// No backend writes a replaced log any more: what they hold is kept for the next drain, they are unmapped.
    pub fn every_backend_acknowledged(&mut self) {
        for region in self.replaced.drain(..) {
            region.fetch_and_clear(|first, bits| self.rest.union_words(first, &[bits]));
        }
    }
}

impl ExternalSource for VhostUserLog {
    fn name(&self) -> &'static str {
        "vhost-user"
    }

    /// Forgets what was logged. `VHOST_F_LOG_ALL` and the log itself must have reached the backends before.
    fn start(&mut self) -> Result<(), VmError> {
        self.rest.clear();
        for region in self.replaced.iter().chain([&self.current]) {
            region.fetch_and_clear(|_, _| ());
        }
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        dirty.union(&self.rest);
        self.rest.clear();
        for region in self.replaced.iter().chain([&self.current]) {
            region.fetch_and_clear(|first, bits| dirty.union_words(first, &[bits]));
        }
    }

    fn stop(&mut self) {}
}

impl Region {
    fn new(end: PageIndex) -> io::Result<Self> {
        if end > RAM_END_MAX {
            return Err(io::Error::other(format!(
                "a log up to {} is asked for, beyond 64 TiB",
                end.address()
            )));
        }
        // Whole host pages: mapped as such, and every word of 64 bits is inside.
        let bytes = end.0.div_ceil(8).max(1).next_multiple_of(PAGE_SIZE as u64);
        // A backend that shrank the file would make our next look at it a SIGBUS.
        let file = memfd_of_fixed_size(c"vhost-user log", bytes)?;
        let map = MmapRaw::map_raw(&file)?;
        Ok(Self { file, map, end })
    }

    /// Takes each word that is not 0, with the page of its first bit, and leaves 0.
    ///
    /// Backends set bits with an atomic `or` after the write that it tells of. The swap takes the bit with acquire
    /// ordering, so whoever reads the page afterwards sees the write. A word that is 0 at first sight is left alone,
    /// for its cache line stays with the backend then; a bit set just after comes with the next fetch.
    fn fetch_and_clear(&self, mut word_with_bits: impl FnMut(PageIndex, u64)) {
        let words = self.map.as_mut_ptr().cast::<AtomicU64>();
        let count = self.end.0.div_ceil(WORD_PAGES);
        for (first, i) in (0..count).map(|word| word * WORD_PAGES).zip(0..) {
            // SAFETY:
            // * The mapping is page-aligned, holds `count` words by `new`, cannot shrink, and lives on with `self`.
            // * It is only ever accessed as atomics here; what other processes do to it is at worst wrong bits.
            let word = unsafe { &*words.add(i) };
            if word.load(Ordering::Relaxed) != 0 {
                word_with_bits(PageIndex(first), u64::from_le(word.swap(0, Ordering::Acquire)));
            }
        }
    }
}

#[cfg(test)]
impl VhostUserLog {
    /// Marks a page as a backend does: through a mapping of its own, byte by byte.
    pub(super) fn backend(&self) -> impl Fn(PageIndex) + Send + Sync + use<> {
        use std::sync::atomic::AtomicU8;
        let map = MmapRaw::map_raw(&self.current.file).expect("a backend maps the log");
        move |page| {
            let byte = usize::try_from(page.0 / 8).expect("a page of a test");
            assert!(byte < map.len());
            // SAFETY: inside the mapping by the assertion, which lives as long as the closure.
            let byte = unsafe { &*map.as_mut_ptr().add(byte).cast::<AtomicU8>() };
            byte.fetch_or(1 << (page.0 % 8), Ordering::Release);
        }
    }
}
