//! What the VMM's own threads write through vm-memory: a bitmap type that costs a load while nobody migrates.
//!
//! `GuestMemoryMmap<RegionLog>` marks its writes here. vm-memory writes first and marks then. So a write that finds
//! tracking off must be visible to whoever switched it on and reads the page next, which a plain flag does not
//! give: the writing processor may still hold the write in its store buffer when it looks at the flag. Instead of
//! a fence in each write, [`RegionSource::start`] makes every thread of the process pass one, by membarrier(2).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};

use super::ExternalSource;
use crate::layout::{PAGE_SIZE, PageIndex, PageRun};
use crate::os::membarrier::every_thread_passes_a_fence;
use crate::page_set::{AtomicPageSet, PageSet};
use crate::vm::VmError;

/// The pages of one region that the VMM's own threads dirtied, by their offset in the region.
///
/// Clones are handles to the same log. With the feature `vm-memory-0-17` or `vm-memory-0-18` it implements
/// vm-memory's `Bitmap` and `NewBitmap`; `MmapRegion::bitmap(region)` gets it back from a region. Writes before
/// tracking is started, and marks beyond the region, are not kept.
#[derive(Clone)]
pub struct RegionLog {
    shared: Arc<Shared>,
}

struct Shared {
    tracking: AtomicBool,
    pages: AtomicPageSet,
}

/// A [`RegionLog`] and the guest page where its region begins.
#[derive(Debug)]
pub struct RegionSource {
    log: RegionLog,
    first: PageIndex,
}

impl Shared {
    /// `len` bytes at `offset` were written.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        // The compiler keeps the order of the write before and the look at the flag; `membarrier` in `start` makes
        // the processor's order the same where it matters. Relaxed, because of that.
        compiler_fence(Ordering::SeqCst);
        if self.tracking.load(Ordering::Relaxed) && len != 0 {
            let first = (offset / PAGE_SIZE) as u64;
            let last = (offset.saturating_add(len - 1) / PAGE_SIZE) as u64;
            let last = last.min(self.pages.capacity().0.saturating_sub(1));
            self.pages
                .insert_run(PageRun { first: PageIndex(first), pages: (last + 1).saturating_sub(first) });
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.contains(PageIndex((offset / PAGE_SIZE) as u64))
    }
}

impl RegionLog {
    /// A log for a region of `len` bytes, not tracking.
    pub fn new(len: usize) -> Self {
        let pages = AtomicPageSet::new(PageIndex(len.div_ceil(PAGE_SIZE) as u64));
        Self { shared: Arc::new(Shared { tracking: AtomicBool::new(false), pages }) }
    }

    /// `len` bytes at `offset` bytes from the beginning of the region were written: to be called after the write.
    #[inline]
    pub fn mark_dirty(&self, offset: usize, len: usize) {
        self.shared.mark(offset, len);
    }

    /// Whether the page at `offset` was marked since the last drain.
    pub fn dirty_at(&self, offset: usize) -> bool {
        self.shared.dirty_at(offset)
    }

    /// What a tracker drains; `first` is the guest page where the region begins.
    pub fn source(&self, first: PageIndex) -> RegionSource {
        RegionSource { log: self.clone(), first }
    }
}

impl ExternalSource for RegionSource {
    fn name(&self) -> &'static str {
        "vm-memory"
    }

    fn start(&mut self) -> Result<(), VmError> {
        let log = &self.log.shared;
        log.pages.drain_words(|_, _| ());
        log.tracking.store(true, Ordering::SeqCst);
        every_thread_passes_a_fence().map_err(|error| {
            log.tracking.store(false, Ordering::Relaxed);
            format!("membarrier, which makes the VMM's own writes trackable, failed: {error}; seccomp must allow it")
        })?;
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let first = self.first.0;
        self.log.shared.pages.drain_words(|word, bits| {
            dirty.union_words(PageIndex(first + word as u64 * u64::from(u64::BITS)), &[bits]);
        });
    }

    fn stop(&mut self) {
        // Relaxed: a write that still sees it on marks a page that nobody will ask for.
        self.log.shared.tracking.store(false, Ordering::Relaxed);
    }
}

impl Default for RegionLog {
    /// A log without pages.
    fn default() -> Self {
        Self::new(0)
    }
}

impl fmt::Debug for RegionLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tracking = self.shared.tracking.load(Ordering::Relaxed);
        write!(f, "RegionLog({} pages, tracking: {tracking})", self.shared.pages.capacity().0)
    }
}

#[cfg(any(feature = "vm-memory-0-16", feature = "vm-memory-0-17", feature = "vm-memory-0-18"))]
pub use self::bitmap::RegionLogSlice;

#[cfg(any(feature = "vm-memory-0-16", feature = "vm-memory-0-17", feature = "vm-memory-0-18"))]
mod bitmap {
    use std::fmt;

    use super::{RegionLog, Shared};

    /// A part of a [`RegionLog`], as vm-memory's slices need it.
    #[derive(Clone, Copy)]
    pub struct RegionLogSlice<'a> {
        log: &'a Shared,
        base: usize,
    }

    impl fmt::Debug for RegionLogSlice<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "RegionLogSlice(from {:#x})", self.base)
        }
    }

    /// The traits are the same in every minor of vm-memory, and yet others.
    macro_rules! is_bitmap_of {
        ($vm_memory:ident, $new_bitmap:path) => {
            const _: () = {
                use $new_bitmap as NewBitmap;
                use $vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

                impl<'a> WithBitmapSlice<'a> for RegionLog {
                    type S = RegionLogSlice<'a>;
                }

                impl Bitmap for RegionLog {
                    #[inline]
                    fn mark_dirty(&self, offset: usize, len: usize) {
                        self.shared.mark(offset, len);
                    }

                    fn dirty_at(&self, offset: usize) -> bool {
                        self.shared.dirty_at(offset)
                    }

                    #[inline]
                    fn slice_at(&self, offset: usize) -> RegionLogSlice<'_> {
                        RegionLogSlice { log: &self.shared, base: offset }
                    }
                }

                impl NewBitmap for RegionLog {
                    fn with_len(len: usize) -> Self {
                        Self::new(len)
                    }
                }

                impl WithBitmapSlice<'_> for RegionLogSlice<'_> {
                    type S = Self;
                }

                impl BitmapSlice for RegionLogSlice<'_> {}

                impl Bitmap for RegionLogSlice<'_> {
                    #[inline]
                    fn mark_dirty(&self, offset: usize, len: usize) {
                        // vm-memory has checked that the write is inside the region; a sum that wraps is outside.
                        self.log.mark(self.base.wrapping_add(offset), len);
                    }

                    fn dirty_at(&self, offset: usize) -> bool {
                        self.log.dirty_at(self.base.wrapping_add(offset))
                    }

                    #[inline]
                    fn slice_at(&self, offset: usize) -> Self {
                        Self { log: self.log, base: self.base.wrapping_add(offset) }
                    }
                }
            };
        };
    }

    #[cfg(feature = "vm-memory-0-16")]
    is_bitmap_of!(vm_memory_0_16, vm_memory_0_16::mmap::NewBitmap);
    // vm-memory 0.17.2 hands out the very traits of 0.18, so that one implementation serves both, and two would clash.
    #[cfg(all(feature = "vm-memory-0-17", not(feature = "vm-memory-0-18")))]
    is_bitmap_of!(vm_memory_0_17, vm_memory_0_17::bitmap::NewBitmap);
    #[cfg(feature = "vm-memory-0-18")]
    is_bitmap_of!(vm_memory_0_18, vm_memory_0_18::bitmap::NewBitmap);
}
