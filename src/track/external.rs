//! Writers of guest memory that neither rings nor KVM's bitmap see, and their logs.
//!
//! | who writes | its log here |
//! |---|---|
//! | the VMM's own threads, through vm-memory | [`RegionLog`], a type for vm-memory's `Bitmap` parameter |
//! | the same, in a VMM that has a bitmap already | [`BitmapSource`] over vm-memory's `AtomicBitmap` or any other |
//! | vhost-user backends, in their own processes | [`VhostUserLog`], the shared log region of the protocol |
//! | jailed devices and anything else in another process | [`SharedLog`], in memory that the process marks by a [`SharedLogWriter`] |
//! | devices, by DMA | [`DmaSource`] over a [`DmaLogging`] that the VMM implements with VFIO or iommufd |
//!
//! Each is an [`ExternalSource`]; a [`DirtyTracker`] starts them with itself and ORs them into every harvest. The order in
//! which nothing is lost is the same for all: a writer writes, then marks; a tracker drains, then reads.
//!
//! [`DirtyTracker`]: super::DirtyTracker

mod dma;
mod region_log;
mod shared_log;
#[cfg(test)]
mod tests;
mod vhost_user;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::dma::{DmaLogging, DmaMapping, DmaSource, IovaRange};
#[cfg(any(feature = "vm-memory-0-16", feature = "vm-memory-0-17", feature = "vm-memory-0-18"))]
pub use self::region_log::RegionLogSlice;
pub use self::region_log::{RegionLog, RegionSource};
pub use self::shared_log::{SharedLog, SharedLogWriter};
pub use self::vhost_user::VhostUserLog;
use crate::layout::PageIndex;
use crate::page_set::PageSet;
use crate::vm::VmError;

/// The log of writers that KVM does not see.
///
/// A VMM that has to go on using a source (to map DMA, to swap a log) adds an `Arc<Mutex<_>>` of it and keeps a clone. The
/// tracker takes a lock of its own for all sources, then the source's, and while it holds either never waits for a vCPU, nor a vCPU for it.
/// So with the source's lock held the VMM calls no session and no `add_`, `remove_` of the tracker; and a source's methods call
/// nothing of the tracker's.
pub trait ExternalSource: Send {
    /// The name that errors and reports show: `vm-memory`, `vhost-user`, `dma`.
    fn name(&self) -> &'static str;

    /// Begins logging: whatever is written once this has returned will be drained. What was logged before is
    /// forgotten.
    ///
    /// # Errors
    ///
    /// Why it cannot log; nothing is logged then, and the writer's pages must not be read as clean.
    fn start(&mut self) -> Result<(), VmError>;

    /// Moves every logged page into `dirty`. A source that cannot tell any more, as its device failed, adds every
    /// page that its writer may write.
    fn drain_into(&mut self, dirty: &mut PageSet);

    /// Ends logging.
    fn stop(&mut self);
}

impl<S: ExternalSource> ExternalSource for Arc<Mutex<S>> {
    fn name(&self) -> &'static str {
        self.lock().unwrap_or_else(PoisonError::into_inner).name()
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).start()
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        self.lock().unwrap_or_else(PoisonError::into_inner).drain_into(dirty);
    }

    fn stop(&mut self) {
        self.lock().unwrap_or_else(PoisonError::into_inner).stop();
    }
}

/// A bitmap that the VMM has and fills already, with a bit per 4 KiB page from the first page of a region on.
///
/// With vm-memory, for each region of a `GuestMemoryMmap<AtomicBitmap>`:
///
/// ```
/// # use ringferry::track::external::BitmapSource;
/// # use ringferry::{GuestAddress, PageIndex};
/// # use vm_memory_0_18 as vm_memory;
/// # use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, bitmap::AtomicBitmap};
/// # let ranges = [(vm_memory::GuestAddress(1 << 32), 1 << 20)];
/// # let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
/// # let mut sources = Vec::new();
/// for region in memory.iter() {
///     let (memory, start) = (memory.clone(), region.start_addr());
///     let fetch_and_clear = move || match memory.find_region(start) {
///         Some(region) => MmapRegion::bitmap(region).get_and_reset(),
///         None => Vec::new(),
///     };
///     sources.push(BitmapSource::new("vm-memory", GuestAddress(start.0).page(), fetch_and_clear));
/// }
/// # use {ringferry::track::ExternalSource, vm_memory::Bytes};
/// # memory.write_obj(1_u8, vm_memory::GuestAddress((1 << 32) + 5000)).unwrap();
/// # let mut dirty = ringferry::PageSet::new(PageIndex(1 << 21));
/// # sources[0].drain_into(&mut dirty);
/// # assert!(dirty.contains(PageIndex((1 << 20) + 1)) && dirty.len() == 1);
/// ```
pub struct BitmapSource<F> {
    name: &'static str,
    first: PageIndex,
    fetch_and_clear: F,
}

impl<F: FnMut() -> Vec<u64> + Send> BitmapSource<F> {
    /// `fetch_and_clear` takes each word and leaves 0 in one atomic step, and returns the words, least significant
    /// bit first; `first` is the guest page of the first bit. A bitmap in other units than 4 KiB does not fit.
    pub fn new(name: &'static str, first: PageIndex, fetch_and_clear: F) -> Self {
        Self { name, first, fetch_and_clear }
    }
}

impl<F: FnMut() -> Vec<u64> + Send> ExternalSource for BitmapSource<F> {
    fn name(&self) -> &'static str {
        self.name
    }

    /// Such a bitmap is always filled: what is in it is old.
    fn start(&mut self) -> Result<(), VmError> {
        (self.fetch_and_clear)();
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        dirty.union_words(self.first, &(self.fetch_and_clear)());
    }

    fn stop(&mut self) {}
}

impl<F> fmt::Debug for BitmapSource<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BitmapSource({} from {})", self.name, self.first.address())
    }
}
