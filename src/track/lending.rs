//! The tracker of a VM whose rings another process follows: the VMM's end.
//!
//! While they are lent, the tracker does only what needs this address space (resets, logging), gathers what no ring sees
//! (marks, external sources), and keeps the way back open: whenever [`Lending`] is dropped, for whatever reason, logging
//! ends, the gates open, and the rings are this process's again.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use std::sync::PoisonError;

use super::error::TrackError;
use super::lent::Lent;
use super::lent_page::{LentGate, LentPage, has_room};
use super::others::Others;
use super::shared::{Backend, Shared};
use super::slots::stop_logging;
use super::tracker::DirtyTracker;
use crate::kvm::{Granule, KvmError, Protection, ResetCount, RingSize, UnmapError};
use crate::layout::{PageRun, SlotId};
use crate::page_set::PageSet;

/// A tracker that is lent.
#[derive(Debug)]
pub(crate) struct Lending {
    shared: Arc<Shared>,
    page: Arc<LentPage>,
    file: File,
    terms: Terms,
}

/// What the borrower has to know.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) ring: RingSize,
    /// The VMM's index of each vCPU, and how far its ring is taken.
    pub(crate) vcpus: Vec<(usize, u32)>,
    /// Each slot that is tracked.
    pub(crate) slots: Vec<(SlotId, PageRun)>,
}

impl DirtyTracker {
    /// Lets another process follow the rings. Tracking is off, and the borrower switches it on and off. `None` if they are
    /// needed here, because a session runs or a bitmap is beside them (arm64), or if there are none.
    ///
    /// # Errors
    ///
    /// [`TrackError::Lent`], or what the kernel refused. The tracker is then as before.
    pub(crate) fn lend(&self) -> Result<Option<Lending>, TrackError> {
        let state = &mut *self.shared.lock();
        state.check_not_lent()?;
        if state.pending.is_tracking() || !matches!(state.backend, Backend::Ring { beside: None, .. }) {
            return Ok(None);
        }
        let refused = |source: io::Error| TrackError::Kvm(KvmError::Ioctl { name: "memfd_create", source });
        let (page, file) =
            LentPage::create(c"ringferry-offload", state.vcpus.len().max(1)).map_err(refused)?;
        let page = Arc::new(page);
        let Backend::Ring { size, rings, .. } = &mut state.backend else { return Ok(None) };
        rings.recycle(self.shared.context(&state.slots), &mut state.pending)?;
        state.pending.forget();
        let positions = rings.positions();
        let terms = Terms {
            ring: *size,
            vcpus: state.vcpus.iter().map(|vcpu| vcpu.index).zip(positions).collect(),
            slots: state.slots.logged().map(|region| (region.slot, region.pages)).collect(),
        };
        for (at, vcpu) in state.vcpus.iter().enumerate() {
            page[at].taken.store(terms.vcpus[at].1, Ordering::Relaxed);
            if let Some(gate) = LentGate::new(&page, at) {
                vcpu.gate.lend(gate);
            }
        }
        state.lent = Some(Lent::Followed(Arc::clone(&page)));
        Ok(Some(Lending { shared: Arc::clone(&self.shared), page, file, terms }))
    }
}

impl Lending {
    pub(crate) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(crate) fn page(&self) -> &LentPage {
        &self.page
    }

    /// The page, to be passed on.
    pub(crate) fn page_file(&self) -> &File {
        &self.file
    }

    /// Resets what the borrower has flagged. No lock of the tracker's: the kernel has its own.
    pub(crate) fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError> {
        self.shared.kernel.reset_dirty_rings()
    }

    /// Switches the logging of a slot, if it is one that the borrower was told of.
    pub(crate) fn set_dirty_logging(&self, slot: SlotId, enabled: bool) -> Result<(), KvmError> {
        let state = self.shared.lock();
        let region = state.slots.get(slot).ok_or(KvmError::SlotGone(slot))?;
        self.shared.kernel.set_dirty_logging(region, enabled)
    }

    /// How many pages of a slot can be protected at once at least, without a ring entry that names them.
    pub(crate) fn can_protect(&self, slot: SlotId) -> Result<Granule, UnmapError> {
        let state = self.shared.lock();
        self.shared.kernel.can_protect(state.slots.get(slot).ok_or_else(not_of_the_slot)?)
    }

    /// Protects pages of a slot, if they are of it. Each range has the lock for itself: a vCPU with a full ring waits for one.
    pub(crate) fn protect(&self, slot: SlotId, ranges: &[Protection]) -> Result<(), UnmapError> {
        for range in ranges {
            let state = self.shared.lock();
            let region = state.slots.get(slot).ok_or_else(not_of_the_slot)?;
            let (pages, of_slot) = (range.pages, region.pages);
            if pages.pages == 0 || pages.first < of_slot.first || pages.end() > of_slot.end() {
                return Err(not_of_the_slot());
            }
            self.shared.kernel.protect(region, std::slice::from_ref(range))?;
        }
        Ok(())
    }

    /// What no ring sees is gathered from now on.
    pub(crate) fn start_writers(&self) -> Result<(), TrackError> {
        let mut others = self.shared.others.lock();
        if self.shared.tracking.load(Ordering::Relaxed) {
            return Err(TrackError::AlreadyTracking);
        }
        let mut old = PageSet::new(self.shared.lock().slots.end());
        self.shared.marks.read().unwrap_or_else(PoisonError::into_inner).drain_into(&mut old);
        others.start()?;
        self.shared.tracking.store(true, Ordering::Relaxed);
        // Before anybody reads a page: see `mark_dirty`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// What no ring has seen since the last call.
    pub(crate) fn drain_writers(&self) -> PageSet {
        let mut others = self.shared.others.lock();
        others.drain();
        let mut dirty = PageSet::new(self.shared.lock().slots.end());
        self.shared.marks.read().unwrap_or_else(PoisonError::into_inner).drain_into(&mut dirty);
        others.move_into(&mut dirty);
        dirty
    }

    /// It is gathered no more.
    pub(crate) fn stop_writers(&self) {
        stop_writers(&self.shared, &mut self.shared.others.lock());
    }

    /// The borrower answers no more, and has not gone: until `connection` ends, nothing is tracked by anybody.
    pub(crate) fn freeze(self, connection: OwnedFd) {
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.lock().lent = Some(Lent::Frozen(connection));
    }
}

fn not_of_the_slot() -> UnmapError {
    UnmapError::NotProtectable(Arc::new(io::Error::from(io::ErrorKind::InvalidInput)))
}

fn stop_writers(shared: &Shared, others: &mut Others) {
    if shared.tracking.swap(false, Ordering::Relaxed) {
        others.stop();
    }
}

impl Drop for Lending {
    fn drop(&mut self) {
        // The guest first: nobody waits for the borrower any more.
        self.shared.lock().vcpus.iter().for_each(|vcpu| vcpu.gate.take_back());
        stop_writers(&self.shared, &mut self.shared.others.lock());
        let state = &mut *self.shared.lock();
        let regions: Vec<_> = state.slots.logged().copied().collect();
        let logging_off = stop_logging(&*self.shared.kernel, &regions);
        if let Backend::Ring { rings, .. } = &mut state.backend {
            let published =
                |at: usize| self.page.get(at).map_or(0, |vcpu| vcpu.taken.load(Ordering::Acquire));
            let followed = rings.follow_borrower(self.shared.context(&state.slots), published);
            if let Err(error) = followed.and(logging_off.map_err(TrackError::from)) {
                tracing::warn!(%error, "the dirty rings did not come back in order");
                rings.distrust();
            }
        }
        state.pending.forget();
        state.lent = None;
        (0..self.page.len()).for_each(|at| has_room(&self.page, at));
    }
}
