//! The memory slots of the VM as the tracker knows them: whose pages an entry names, and which pages are RAM.

use std::sync::Arc;

use super::error::TrackError;
use crate::kvm::{Granule, Kernel, KvmError, UnmapError};
use crate::layout::{GuestMemory, PageIndex, PageRun, Region, RegionKind, SlotId};

/// One slot. It keeps the memory's owner-given promise alive, and with it the right to name it to KVM.
#[derive(Clone, Debug)]
struct Slot {
    id: SlotId,
    memory: Arc<GuestMemory>,
    region: usize,
    /// How many of its pages can be protected at once at least, if any can.
    granule: Option<Granule>,
}

impl Slot {
    fn region(&self) -> &Region {
        &self.memory.regions()[self.region]
    }
}

/// All tracked slots, by id.
#[derive(Default, Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
}

impl Slots {
    /// The regions of `memory` have ids, pages and host memory that no slot of the table has, nor another of them.
    fn check_new(&self, memory: &GuestMemory) -> Result<(), TrackError> {
        let mut ids: Vec<SlotId> = memory.regions().iter().map(|region| region.slot).collect();
        ids.extend(self.slots.iter().map(|slot| slot.id));
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(TrackError::SlotKnown(pair[0]));
        }
        let conflict = |region: &Region| self.regions().find_map(|known| known.conflict(region));
        memory.regions().iter().find_map(conflict).map_or(Ok(()), |error| Err(error.into()))
    }

    /// Adds every region of `memory` as a slot; none, if one cannot be.
    pub(super) fn add(&mut self, memory: &GuestMemory) -> Result<(), TrackError> {
        self.check_new(memory)?;
        if let Some(private) = memory.regions().iter().find(|region| region.kind == RegionKind::GuestMemfd) {
            return Err(TrackError::Private(private.slot));
        }
        let memory = Arc::new(memory.clone());
        for (region, Region { slot, .. }) in memory.regions().iter().enumerate() {
            self.slots.push(Slot { id: *slot, memory: Arc::clone(&memory), region, granule: None });
        }
        self.slots.sort_by_key(|slot| slot.id);
        Ok(())
    }

    fn position(&self, id: SlotId) -> Option<usize> {
        self.slots.binary_search_by_key(&id, |slot| slot.id).ok()
    }

    pub(super) fn get(&self, id: SlotId) -> Option<&Region> {
        self.position(id).map(|at| self.slots[at].region())
    }

    pub(super) fn remove(&mut self, id: SlotId) {
        self.slots.retain(|slot| slot.id != id);
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = &Region> + Clone {
        self.slots.iter().map(Slot::region)
    }

    /// Those whose writes KVM logs.
    pub(super) fn logged(&self) -> impl Iterator<Item = &Region> + Clone {
        self.regions().filter(|region| region.is_logged())
    }

    /// Sees to it that pages of every slot can be protected without the rings.
    pub(super) fn prepare_to_protect(&mut self, kernel: &dyn Kernel) -> Result<(), UnmapError> {
        for slot in self.slots.iter_mut().filter(|slot| slot.granule.is_none() && slot.region().is_logged()) {
            slot.granule = Some(kernel.can_protect(slot.region())?);
        }
        Ok(())
    }

    /// The slots whose pages can be.
    pub(super) fn protectable(&self) -> impl Iterator<Item = (&Region, Granule)> {
        self.slots.iter().filter_map(|slot| Some((slot.region(), slot.granule?)))
    }

    /// One past the highest page of any slot.
    pub(super) fn end(&self) -> PageIndex {
        self.regions().map(|region| region.pages.end()).max().unwrap_or(PageIndex(0))
    }

    /// What no slot has, below `end`.
    pub(super) fn holes(&self, end: PageIndex) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = self.regions().map(|region| region.pages).collect();
        runs.sort_by_key(|run| run.first);
        runs.push(PageRun { first: end, pages: 0 });
        let mut free_from = PageIndex(0);
        let mut holes = Vec::new();
        for run in runs {
            if free_from < run.first {
                holes.push(PageRun { first: free_from, pages: run.first.0 - free_from.0 });
            }
            free_from = free_from.max(run.end());
        }
        holes
    }
}

/// Ends dirty logging of some slots. All are tried, and the first refusal is returned.
pub(super) fn stop_logging(kernel: &dyn Kernel, regions: &[Region]) -> Result<(), KvmError> {
    regions.iter().map(|region| kernel.set_dirty_logging(region, false)).fold(Ok(()), Result::and)
}

/// Protects every page of some slots and logs writes from then on; none is logged when one was refused. A write in
/// between is not seen: the pages count as dirty anyway, or have not been read yet.
pub(super) fn log_these_anew<'a>(
    kernel: &dyn Kernel,
    regions: impl IntoIterator<Item = &'a Region> + Clone,
) -> Result<(), KvmError> {
    for (done, region) in regions.clone().into_iter().enumerate() {
        if let Err(error) = log_anew(kernel, region) {
            // The last one too: it may have been logged before.
            for region in regions.into_iter().take(done + 1) {
                // Best effort: the refusal that matters is already being reported.
                let _ = kernel.set_dirty_logging(region, false);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Protects every page of one slot and logs writes from then on.
///
/// Off comes first: KVM protects when logging goes on, and does nothing where it is on, be it by us or because the VMM
/// created the slot that way, perhaps at a time when KVM protected no page of it.
pub(super) fn log_anew(kernel: &dyn Kernel, region: &Region) -> Result<(), KvmError> {
    kernel.set_dirty_logging(region, false)?;
    kernel.set_dirty_logging(region, true)
}

/// The slot that the last entry named: entries come in long runs of one slot.
pub(super) struct SlotCursor<'a> {
    slots: &'a Slots,
    id: SlotId,
    pages: PageRun,
}

impl<'a> SlotCursor<'a> {
    pub(super) fn new(slots: &'a Slots) -> Self {
        // An empty run: any first entry looks its slot up, unless it names this id, which then has no page either.
        let nothing = PageRun { first: PageIndex(0), pages: 0 };
        let (id, pages) =
            slots.slots.first().map_or((SlotId(u32::MAX), nothing), |slot| (slot.id, slot.region().pages));
        Self { slots, id, pages }
    }

    /// The page that an entry names, if there is such a page.
    #[inline]
    pub(super) fn page(&mut self, slot: SlotId, offset: u64) -> Option<PageIndex> {
        if slot != self.id {
            self.pages = self.slots.get(slot)?.pages;
            self.id = slot;
        }
        (offset < self.pages.pages).then(|| PageIndex(self.pages.first.0 + offset))
    }
}
