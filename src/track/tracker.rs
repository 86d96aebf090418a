//! The tracker that a VMM keeps for all of a VM's life: slots and vCPUs come and go, periods of tracking begin and end.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bitmap::BitmapLog;
use super::error::TrackError;
use super::external::ExternalSource;
use super::figures::{Figures, VmCounters};
use super::handle::VcpuHandle;
use super::pending::Pending;
use super::redirtied::Redirtied;
use super::rings::Rings;
use super::shared::{Backend, External, ExternalId, Shared, State};
use super::slots::{Slots, log_anew};
use super::source::{DirtySource, Observed};
use super::vcpu::Vcpu;
use crate::kvm::ring::{DirtyRing, VmMark};
use crate::kvm::{Kernel, KvmError, ManualProtect, RingSize, VmFd, caps};
use crate::layout::{GuestMemory, PageRun, SlotId};
use crate::page_set::{AtomicPageSet, PageSet};
#[cfg(any(test, feature = "testing"))]
use crate::testing::FakeKernel;
use crate::vm::Settled;

/// Dirty tracking of one VM, on KVM's rings or on its bitmap. Cheap to clone: all clones are the same tracker, so
/// that the VMM keeps one, and lends one to a migration as its [`DirtySource`].
///
/// The tracker sets and clears `KVM_MEM_LOG_DIRTY_PAGES` itself, on the slots that it was told of with
/// [`add_memory`](Self::add_memory): it must be able to do so from any thread and without a lock of the VMM's, to
/// protect memory anew after an overflow. The VMM creates and deletes slots, and leaves that flag alone.
#[derive(Clone, Debug)]
pub struct DirtyTracker {
    pub(super) shared: Arc<Shared>,
}

impl DirtyTracker {
    /// Gives every vCPU that is created from now on a dirty ring. It cannot be undone, and from then on KVM refuses
    /// the bitmap ioctls for this VM: see [`take_slot_bitmap`](Self::take_slot_bitmap). On arm64, before the first
    /// memory slot is created, as there is a bitmap beside the rings there; the final harvest collects it.
    ///
    /// # Errors
    ///
    /// [`TrackError::Kvm`]: no rings here, none of this size, or too late, because a vCPU exists.
    pub fn enable(vm: &impl AsRawFd, size: RingSize) -> Result<Self, TrackError> {
        let vm = VmFd::duplicate(vm, ManualProtect::Off)?;
        let beside = caps::enable_ring(vm.as_fd(), size)?.then(BitmapLog::default);
        Ok(Self::on(Box::new(vm), Backend::Ring { size, rings: Rings::default(), beside }))
    }

    /// Tracks by KVM's bitmap instead, with manual protection.
    ///
    /// # Errors
    ///
    /// [`TrackError::Kvm`]: this KVM cannot protect manually.
    pub fn enable_bitmap(vm: &impl AsRawFd) -> Result<Self, TrackError> {
        let vm = VmFd::duplicate(vm, ManualProtect::On)?;
        caps::enable_manual_protect(vm.as_fd())?;
        Ok(Self::on(Box::new(vm), Backend::Bitmap(BitmapLog::default())))
    }

    /// Tracks by the rings of a kernel in memory.
    #[cfg(any(test, feature = "testing"))]
    pub fn on_fake_rings(kernel: &FakeKernel, size: RingSize) -> Self {
        let backend = Backend::Ring { size, rings: Rings::default(), beside: None };
        Self::on(Box::new(kernel.clone()), backend)
    }

    /// Tracks by the rings of a kernel in memory and the bitmap beside them, as on arm64.
    #[cfg(any(test, feature = "testing"))]
    pub fn on_fake_rings_with_bitmap(kernel: &FakeKernel, size: RingSize) -> Self {
        let backend = Backend::Ring { size, rings: Rings::default(), beside: Some(BitmapLog::default()) };
        Self::on(Box::new(kernel.clone()), backend)
    }

    /// Tracks by the bitmap of a kernel in memory.
    #[cfg(any(test, feature = "testing"))]
    pub fn on_fake_bitmap(kernel: &FakeKernel) -> Self {
        Self::on(Box::new(kernel.clone()), Backend::Bitmap(BitmapLog::default()))
    }

    /// Creates a vCPU in a kernel in memory and follows it: see
    /// [`FakeKernel`](crate::testing::FakeKernel) for the arguments.
    ///
    /// # Errors
    ///
    /// [`TrackError::VcpuKnown`] if the index is taken.
    #[cfg(any(test, feature = "testing"))]
    pub fn attach_fake_vcpu(
        &self,
        index: usize,
        kernel: &FakeKernel,
        position: u32,
        cpu_log_entries: usize,
    ) -> Result<VcpuHandle, TrackError> {
        self.attach(index, |size, _| Ok(kernel.create_vcpu(size, position, cpu_log_entries)))
    }

    pub(super) fn on(kernel: Box<dyn Kernel>, backend: Backend) -> Self {
        let pending = Pending::new();
        let slots = Slots::default();
        let marks = RwLock::new(AtomicPageSet::new(slots.end()));
        let state = State {
            backend,
            slots,
            vcpus: Vec::new(),
            externals: Vec::new(),
            next_external: 0,
            pending,
            tracking: false,
            #[cfg(feature = "offload")]
            lent: None,
        };
        let shared = Shared {
            kernel,
            counters: VmCounters::default(),
            tracking: AtomicBool::new(false),
            marks,
            state: Mutex::new(state),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Every region of `memory` is a slot from now on. The VMM calls this once it has created the slots, at start-up
    /// or when memory is plugged in. While tracking is on, all of the new memory counts as dirty.
    ///
    /// What system management mode sees is added besides, by
    /// [`in_address_space`](GuestMemory::in_address_space). A page that two slots have then is dirty once, and no longer
    /// RAM when both are removed.
    ///
    /// # Errors
    ///
    /// [`TrackError::SlotKnown`] for an id that is in use, [`TrackError::Layout`] for pages or host memory that are, or
    /// what KVM refused; no region is added then.
    pub fn add_memory(&self, memory: &GuestMemory) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        state.check_ours()?;
        state.slots.add(memory)?;
        if state.tracking {
            let mut refused = Ok(());
            for region in memory.regions() {
                refused = refused.and_then(|()| log_anew(&*self.shared.kernel, region));
            }
            if let Err(error) = refused {
                memory.regions().iter().for_each(|region| state.slots.remove(region.slot));
                return Err(error.into());
            }
        }
        let end = state.slots.end();
        state.pending.resize(end);
        let mut marks = self.shared.marks.write().unwrap_or_else(PoisonError::into_inner);
        if marks.capacity() < end {
            marks.drain_into(state.pending.pages_mut());
            *marks = AtomicPageSet::new(end);
        }
        if state.tracking {
            for region in memory.regions() {
                state.pending.pages_mut().insert_run(region.pages);
            }
        }
        Ok(())
    }

    /// Forgets a slot. The VMM calls this before it deletes or moves the slot in KVM: entries that still name it are
    /// recycled first, because KVM would take them for entries of the next slot with this id.
    ///
    /// # Errors
    ///
    /// [`TrackError::SlotUnknown`], or what KVM refused; the slot is then still tracked. A slot that the VMM has deleted
    /// already is forgotten.
    pub fn remove_slot(&self, slot: SlotId) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        state.check_ours()?;
        let region = *state.slots.get(slot).ok_or(TrackError::SlotUnknown(slot))?;
        if state.tracking {
            match self.shared.kernel.set_dirty_logging(&region, false) {
                // The VMM was too early. It can do nothing better now than to have the slot forgotten.
                Err(KvmError::SlotGone(_)) => {}
                switched => switched?,
            }
        }
        // With logging off, nothing new can name the slot.
        if let Backend::Ring { rings, .. } = &mut state.backend {
            rings.recycle(self.shared.context(&state.slots), &mut state.pending)?;
        }
        state.slots.remove(slot);
        // Not simply its pages: another address space may have them, too.
        state.pending.remove_runs(state.slots.holes(state.pending.capacity()));
        state.pending.resize(state.slots.end());
        Ok(())
    }

    /// Follows a vCPU, at start-up or when it is plugged in, before it first runs.
    ///
    /// # Errors
    ///
    /// [`TrackError::VcpuKnown`] if the index is taken; on rings [`TrackError::Kvm`], if this is no vCPU, or one without a
    /// ring, or one of another VM than the first.
    pub fn attach_vcpu(&self, index: usize, vcpu: &impl AsRawFd) -> Result<VcpuHandle, TrackError> {
        let mark = VmMark(Arc::as_ptr(&self.shared).addr());
        self.attach(index, |size, is_first| DirtyRing::map(vcpu, size, mark, is_first))
    }

    fn attach(
        &self,
        index: usize,
        map: impl FnOnce(RingSize, bool) -> Result<DirtyRing, KvmError>,
    ) -> Result<VcpuHandle, TrackError> {
        let state = &mut *self.shared.lock();
        state.check_ours()?;
        if state.vcpus.iter().any(|vcpu| vcpu.index == index) {
            return Err(TrackError::VcpuKnown(index));
        }
        let vcpu = Arc::new(Vcpu::new(index));
        if let Backend::Ring { size, rings, .. } = &mut state.backend {
            let ring = map(*size, rings.is_empty())?;
            rings.push(ring, Arc::clone(&vcpu));
        }
        state.vcpus.push(Arc::clone(&vcpu));
        Ok(VcpuHandle::new(Arc::clone(&self.shared), vcpu))
    }

    /// Marks pages dirty that the VMM itself wrote, from any thread: after the write. Rings and bitmap do not see
    /// such writes. A fence and a load while tracking is off.
    pub fn mark_dirty(&self, run: PageRun) {
        // The caller's write comes before our load, as `start` stores the flag before anybody reads a page: either
        // we see the flag, or the reader sees the write. Both sides need the fence, for a store before a load.
        fence(Ordering::SeqCst);
        if self.shared.tracking.load(Ordering::Relaxed) {
            self.shared.marks.read().unwrap_or_else(PoisonError::into_inner).insert_run(run);
        }
    }

    /// What `KVM_GET_DIRTY_LOG` would say of one slot: bit 0 of word 0 is its first page. The pages of other slots
    /// stay for their own turn.
    ///
    /// # Errors
    ///
    /// [`TrackError::SlotUnknown`], and as for [`harvest`](DirtySource::harvest).
    pub fn take_slot_bitmap(&self, slot: SlotId) -> Result<Vec<u64>, TrackError> {
        let state = &mut *self.shared.lock();
        let run = state.slots.get(slot).ok_or(TrackError::SlotUnknown(slot))?.pages;
        if !state.tracking {
            return Err(TrackError::NotTracking);
        }
        let collected = self.shared.collect(state, false)?;
        let (words, remainder) = state.pending.hand_out_words(collected, run);
        if let Backend::Ring { rings, .. } = &mut state.backend {
            rings.harvested_in_part(remainder);
        }
        self.shared.counters.harvests.add(1);
        Ok(words)
    }

    /// From now on the pages that `source` logs are in every harvest. It is started and stopped with the tracker; while
    /// tracking is on, at once: its writer must not have begun before.
    ///
    /// # Errors
    ///
    /// [`TrackError::External`] if it had to be started and could not; it is not added then.
    pub fn add_external(&self, source: Box<dyn ExternalSource>) -> Result<ExternalId, TrackError> {
        let state = &mut *self.shared.lock();
        let mut external = External { id: ExternalId(state.next_external), source };
        if state.tracking {
            external.start()?;
        }
        state.next_external += 1;
        let id = external.id;
        state.externals.push(external);
        Ok(id)
    }

    /// Takes a source out again, once its writer has stopped; what it has logged stays dirty. `None` if it is gone
    /// already.
    pub fn remove_external(&self, id: ExternalId) -> Option<Box<dyn ExternalSource>> {
        let state = &mut *self.shared.lock();
        let at = state.externals.iter().position(|external| external.id == id)?;
        let mut source = state.externals.remove(at).source;
        if state.tracking {
            source.drain_into(state.pending.pages_mut());
            source.stop();
        }
        Some(source)
    }

    /// Handles of all vCPUs, in the order of attachment: for whoever throttles.
    pub fn vcpus(&self) -> Vec<VcpuHandle> {
        let state = self.shared.lock();
        let handle = |vcpu: &Arc<Vcpu>| VcpuHandle::new(Arc::clone(&self.shared), Arc::clone(vcpu));
        state.vcpus.iter().map(handle).collect()
    }

    /// What tracking did so far and what it cost.
    pub fn snapshot(&self) -> Figures {
        let state = self.shared.lock();
        let vcpus = state.vcpus.iter().map(|vcpu| vcpu.figures()).collect();
        self.shared.counters.figures(vcpus)
    }

    fn observe_and_report(&self, redirtied: Option<&mut Redirtied>) -> Result<Observed, TrackError> {
        let State { backend, slots, pending, tracking, .. } = &mut *self.shared.lock();
        match backend {
            _ if !*tracking => Err(TrackError::NotTracking),
            Backend::Ring { rings, .. } => {
                rings.observe(self.shared.context(slots), pending, redirtied).map(Observed::PerVcpu)
            }
            Backend::Bitmap(_) => Ok(Observed::Unobservable),
        }
    }

    fn harvest_when(&self, quiet: bool, dirty: &mut PageSet) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        if !state.tracking {
            return Err(TrackError::NotTracking);
        }
        state.pending.check_fits(dirty)?;
        let collected = self.shared.collect(state, quiet)?;
        state.pending.hand_out(collected, dirty);
        if let Backend::Ring { rings, .. } = &mut state.backend {
            rings.harvested();
        }
        self.shared.counters.harvests.add(1);
        Ok(())
    }
}

impl DirtySource for DirtyTracker {
    fn backend(&self) -> &'static str {
        match self.shared.lock().backend {
            Backend::Ring { .. } => "ring",
            Backend::Bitmap(_) => "bitmap",
        }
    }

    fn vcpus(&self) -> Vec<VcpuHandle> {
        Self::vcpus(self)
    }

    fn start(&mut self) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        if state.tracking {
            return Err(TrackError::AlreadyTracking);
        }
        state.check_ours()?;
        if let Backend::Ring { rings, .. } = &mut state.backend {
            // What an earlier period left behind.
            rings.recycle(self.shared.context(&state.slots), &mut state.pending)?;
            rings.harvested();
        }
        state.pending.forget();
        state.start_externals()?;
        if let Err(error) = state.slots.log_anew(&*self.shared.kernel) {
            state.stop_externals();
            return Err(error.into());
        }
        state.tracking = true;
        self.shared.tracking.store(true, Ordering::Relaxed);
        // Before anybody reads a page: see `mark_dirty`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        self.observe_and_report(None)
    }

    fn observe_into(&mut self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        self.observe_and_report(Some(redirtied))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_when(false, dirty)
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_when(true, dirty)
    }

    fn give_back(&mut self, pages: &PageSet) {
        self.shared.lock().pending.give_back(pages);
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        if !state.tracking {
            return Ok(());
        }
        state.tracking = false;
        self.shared.tracking.store(false, Ordering::Relaxed);
        state.stop_externals();
        let logging_off = state.slots.stop_logging(&*self.shared.kernel);
        if let Backend::Ring { rings, .. } = &mut state.backend {
            rings.recycle(self.shared.context(&state.slots), &mut state.pending)?;
        }
        state.pending.forget();
        Ok(logging_off?)
    }
}
