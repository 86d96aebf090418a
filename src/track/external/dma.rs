//! Pages that devices dirty by DMA, as VFIO and iommufd report them: bitmaps indexed by I/O virtual address.
//!
//! This file knows no ioctl: the VMM owns its VFIO containers and implements [`DmaLogging`] with
//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_{START,REPORT,STOP}` (Linux 6.2), `VFIO_IOMMU_DIRTY_PAGES` (5.8) or
//! `IOMMU_HWPT_GET_DIRTY_BITMAP` (6.7), all of which fill the same bitmap. What is done here is to turn I/O virtual
//! addresses into guest pages, and not to lose a page when mappings go or a device fails.

use super::ExternalSource;
use crate::layout::{PAGE_SIZE, PageIndex, PageRun};
use crate::page_set::PageSet;
use crate::vm::VmError;

/// I/O virtual addresses `[iova, iova + bytes)`, multiples of 4096.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IovaRange {
    /// The first address.
    pub iova: u64,
    /// The length in bytes.
    pub bytes: u64,
}

/// Which guest pages a range of I/O virtual addresses leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaMapping {
    /// The first address, a multiple of 4096. Equal to the guest physical address where there is no virtual IOMMU.
    pub iova: u64,
    /// The guest pages behind it.
    pub pages: PageRun,
}

/// A device, or a container of them, that logs which memory it writes.
pub trait DmaLogging: Send {
    /// Begins to log writes to these ranges.
    ///
    /// # Errors
    ///
    /// The VMM's own; nothing is logged then.
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), VmError>;

    /// Sets in `bitmap` the bits of the pages of `range` written since the last report, and makes the device forget
    /// them: bit 0 of the first word is the page at `range.iova`, pages of 4096 bytes, `bitmap` all 0 before.
    ///
    /// # Errors
    ///
    /// The VMM's own; all pages of the range then count as dirty.
    fn report(&mut self, range: IovaRange, bitmap: &mut [u64]) -> Result<(), VmError>;

    /// Ends logging.
    fn stop(&mut self);
}

/// A [`DmaLogging`] device with the mappings through which it reaches guest memory.
#[derive(Debug)]
pub struct DmaSource<D> {
    device: D,
    logging: bool,
    mappings: Vec<Mapped>,
    /// What was dirty in mappings that are gone.
    rest: PageSet,
}

#[derive(Debug)]
struct Mapped {
    mapping: DmaMapping,
    /// The device was told of it when it started to log.
    logged: bool,
}

impl DmaMapping {
    fn range(&self) -> IovaRange {
        IovaRange { iova: self.iova, bytes: self.pages.pages.saturating_mul(PAGE_SIZE as u64) }
    }
}

impl<D: DmaLogging> DmaSource<D> {
    /// A device that can reach guest memory through `mappings`.
    pub fn new(device: D, mappings: impl IntoIterator<Item = DmaMapping>) -> Self {
        let mappings = mappings.into_iter().map(|mapping| Mapped { mapping, logged: false }).collect();
        Self { device, logging: false, mappings, rest: PageSet::new(PageIndex(0)) }
    }

    /// A mapping came, by a virtual IOMMU or with new memory: to be called before the device can use it. While the
    /// device logs it cannot be told of more, so all these pages count as dirty in every drain until the next start.
    pub fn map(&mut self, mapping: DmaMapping) {
        self.mappings.push(Mapped { mapping, logged: false });
    }

    /// A mapping goes: to be called before it is taken from the device, whose log of it is fetched a last time.
    /// Mappings are known by their first address; an unknown one is nothing.
    pub fn unmap(&mut self, iova: u64) {
        while let Some(at) = self.mappings.iter().position(|mapped| mapped.mapping.iova == iova) {
            let mapped = self.mappings.swap_remove(at);
            if self.logging {
                let end = mapped.mapping.pages.end();
                self.rest.resize(end.max(self.rest.capacity()));
                mapped.fetch(&mut self.device, &mut self.rest);
            }
        }
    }
}

impl Mapped {
    fn fetch<D: DmaLogging>(&self, device: &mut D, dirty: &mut PageSet) {
        let pages = self.mapping.pages;
        // A run below the set's end, so its bitmap can be allocated; what is beyond ends as ignored in the set.
        let inside = pages.pages.min(dirty.capacity().0.saturating_sub(pages.first.0));
        let words = usize::try_from(inside.div_ceil(u64::from(u64::BITS))).unwrap_or(0);
        if !self.logged || inside < pages.pages {
            return dirty.insert_run(pages);
        }
        let mut bitmap = vec![0; words];
        match device.report(self.mapping.range(), &mut bitmap) {
            Ok(()) => dirty.union_words(pages.first, &bitmap),
            Err(error) => {
                tracing::warn!(%error, ?self.mapping, "a device's DMA log cannot be read: all its pages are dirty");
                dirty.insert_run(pages);
            }
        }
    }
}

impl<D: DmaLogging> ExternalSource for DmaSource<D> {
    fn name(&self) -> &'static str {
        "dma"
    }

    fn start(&mut self) -> Result<(), VmError> {
        let ranges: Vec<IovaRange> = self.mappings.iter().map(|mapped| mapped.mapping.range()).collect();
        self.device.start(&ranges)?;
        self.mappings.iter_mut().for_each(|mapped| mapped.logged = true);
        self.rest.clear();
        self.logging = true;
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        dirty.union(&self.rest);
        self.rest.clear();
        if self.logging {
            for mapped in &self.mappings {
                mapped.fetch(&mut self.device, dirty);
            }
        }
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.logging) {
            self.device.stop();
        }
        self.mappings.iter_mut().for_each(|mapped| mapped.logged = false);
    }
}
