//! The tracker that a VMM keeps for all of a VM's life: slots and vCPUs come and go, sessions begin and end.
#![expect(unsafe_code, reason = "a VMM may name a slot's memory by address, and vouches for it")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bitmap::BitmapLog;
use super::error::TrackError;
use super::external::ExternalSource;
use super::figures::{Figures, VmCounters};
use super::handle::VcpuHandle;
use super::others::{ExternalId, Others};
use super::pending::Pending;
use super::rings::Rings;
use super::session::Session;
use super::shared::{Backend, Shared, State};
use super::slots::{Slots, log_these_anew};
use super::throttle::VcpuThrottle;
use super::vcpu::Vcpu;
use crate::kvm::ring::{DirtyRing, VmMark};
use crate::kvm::{Kernel, KvmError, ManualProtect, RingSize, UnmapError, VmFd, caps};
use crate::layout::{GuestAddress, GuestMemory, PageRun, Region, SlotId};
use crate::page_set::AtomicPageSet;
#[cfg(any(test, feature = "testing"))]
use crate::testing::FakeKernel;

/// Whether memory that is plugged in while sessions run is dirty for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Initially {
    /// What it holds is known to every session, as fresh memory of zeroes is: only what is written from now on is dirty.
    Clean,
    /// All of it is dirty.
    Dirty,
}

/// Dirty tracking of one VM, on KVM's rings or on its bitmap. Cheap to clone: all clones are the same tracker.
///
/// It hands out no pages itself. Whoever wants to know dirty pages has a [`Session`], with a set of its own: a migration,
/// an incremental backup beside it and a measurement of the dirty rate see each page once, each of them.
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
    /// the bitmap ioctls for this VM: see [`Session::take_slot_bitmap`]. On arm64, before the first
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

    /// [`enable`](Self::enable), or [`enable_bitmap`](Self::enable_bitmap) where KVM has no rings;
    /// [`backend`](Self::backend) tells which.
    ///
    /// # Errors
    ///
    /// [`TrackError::Kvm`]: neither is there, or KVM has rings and refuses these.
    pub fn enable_or_bitmap(vm: &impl AsRawFd, size: RingSize) -> Result<Self, TrackError> {
        match Self::enable(vm, size) {
            Err(TrackError::Kvm(KvmError::RingUnsupported)) => Self::enable_bitmap(vm),
            enabled => enabled,
        }
    }

    /// What it tracks by: `ring` or `bitmap`.
    pub fn backend(&self) -> &'static str {
        self.shared.lock().backend.name()
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
        let slots = Slots::default();
        let marks = RwLock::new(AtomicPageSet::new(slots.end()));
        let state = State {
            backend,
            slots,
            vcpus: Vec::new(),
            pending: Pending::new(),
            ended: false,
            #[cfg(feature = "offload")]
            lent: None,
            #[cfg(feature = "offload")]
            gates: None,
        };
        let shared = Shared {
            kernel,
            counters: VmCounters::default(),
            tracking: AtomicBool::new(false),
            marks,
            full_rings: AtomicU32::new(0),
            others: parking_lot::Mutex::new(Others::new()),
            state: Mutex::new(state),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Every region of `memory` is a slot from now on. The VMM calls this once it has created the slots, at start-up
    /// or when memory is plugged in. All of the new memory is dirty for the sessions that run;
    /// [`add_memory_as`](Self::add_memory_as) and [`add_slot`](Self::add_slot) take it as clean, if it is.
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
        self.add_memory_as(memory, Initially::Dirty)
    }

    /// One slot more, for a VMM that knows its memory slot by slot: `len_bytes` of guest memory from `address` on, which
    /// KVM has as slot `slot` at `host`. All of them are multiples of 4096.
    ///
    /// # Safety
    ///
    /// `[host, host + len_bytes)` is mapped readable and writable, stays mapped until [`remove_slot`](Self::remove_slot) or until the
    /// tracker with all its sessions and handles is gone, and no Rust reference to it exists: the guest writes it at any time.
    ///
    /// # Errors
    ///
    /// As for [`add_memory`](Self::add_memory), and [`TrackError::Layout`] for what cannot be memory of a guest.
    pub unsafe fn add_slot(
        &self,
        slot: SlotId,
        address: GuestAddress,
        len_bytes: u64,
        host: *mut u8,
        initially: Initially,
    ) -> Result<(), TrackError> {
        let region = Region::from_bytes(slot, address, len_bytes, host)?;
        // SAFETY: what our caller vouches for is what this demands.
        let memory = unsafe { GuestMemory::new(vec![region]) }?;
        self.add_memory_as(&memory, initially)
    }

    /// [`add_memory`](Self::add_memory), and the caller says whether the new memory is dirty for the sessions that run.
    ///
    /// # Errors
    ///
    /// As for `add_memory`.
    pub fn add_memory_as(&self, memory: &GuestMemory, initially: Initially) -> Result<(), TrackError> {
        let mut others = self.shared.others.lock();
        let state = &mut *self.shared.lock();
        state.check_not_ended()?;
        state.check_ours()?;
        state.slots.add(memory)?;
        if state.pending.is_tracking()
            && let Err(error) = log_these_anew(
                &*self.shared.kernel,
                memory.regions().iter().filter(|region| region.is_logged()),
            )
        {
            memory.regions().iter().for_each(|region| state.slots.remove(region.slot));
            return Err(error.into());
        }
        let end = state.slots.end();
        state.pending.resize(end);
        others.resize(end);
        let mut marks = self.shared.marks.write().unwrap_or_else(PoisonError::into_inner);
        if marks.capacity() < end {
            marks.drain_into(state.pending.sink());
            state.pending.distribute(None, 0);
            *marks = AtomicPageSet::new(end);
        }
        if state.pending.is_tracking() {
            state.prepare_to_protect(&*self.shared.kernel);
        }
        if initially == Initially::Dirty {
            memory.regions().iter().for_each(|region| state.pending.insert_run(region.pages));
        }
        Ok(())
    }

    /// Forgets a slot; whether the tracker knew it. The VMM calls this before it deletes or moves the slot in KVM: entries that
    /// still name it are recycled first, because KVM would take them for entries of the next slot with this id.
    ///
    /// # Errors
    ///
    /// What KVM refused; the slot is then still tracked. A slot that the VMM has deleted already is forgotten.
    pub fn remove_slot(&self, slot: SlotId) -> Result<bool, TrackError> {
        let mut others = self.shared.others.lock();
        let state = &mut *self.shared.lock();
        state.check_ours()?;
        let Some(region) = state.slots.get(slot).copied() else { return Ok(false) };
        if state.pending.is_tracking() && region.is_logged() {
            match self.shared.kernel.set_dirty_logging(&region, false) {
                // The VMM was too early. It can do nothing better now than to have the slot forgotten.
                Err(KvmError::SlotGone(_)) => {}
                switched => switched?,
            }
        }
        // With logging off, nothing new can name the slot.
        if let Backend::Ring { rings, .. } = &mut state.backend
            && let Err(error) = rings.recycle(self.shared.context(&state.slots), &mut state.pending)
        {
            // The slot stays, and nobody logs it: the next harvest has it logged again.
            state.pending.everything = true;
            return Err(error);
        }
        state.slots.remove(slot);
        // Not simply its pages: another address space may have them, too.
        state.pending.remove_runs(&state.slots.holes(state.pending.capacity()));
        state.pending.resize(state.slots.end());
        others.resize(state.slots.end());
        Ok(true)
    }

    /// Follows a vCPU, at start-up or when it is plugged in, before it first runs. One that was
    /// [detached](Self::detach_vcpu) may be attached again, under any index, and goes on where it was.
    ///
    /// # Errors
    ///
    /// [`TrackError::VcpuKnown`] if the index is taken; on rings [`TrackError::Kvm`], if this is no vCPU, or one without a
    /// ring, or one of another VM than the first.
    pub fn attach_vcpu(&self, index: usize, vcpu: &impl AsRawFd) -> Result<VcpuHandle, TrackError> {
        let mark = VmMark(Arc::as_ptr(&self.shared).addr());
        self.attach(index, |size, is_first| DirtyRing::map(vcpu, size, mark, is_first))
    }

    /// A vCPU is unplugged: harvests what its ring still holds, for every session, and forgets it. The VMM calls this once the
    /// vCPU has left `KVM_RUN` for good, or until it is attached again. Its pages since the last harvest count as
    /// [`others`](super::Observed::PerVcpu); those behind it move up in the order, and the index is free.
    ///
    /// Its [`VcpuHandle`] gets [`TrackError::VcpuUnknown`] for a full ring from then on.
    ///
    /// # Errors
    ///
    /// [`TrackError::VcpuUnknown`]; [`TrackError::Lent`] while another process follows the rings; what KVM refused, or
    /// [`TrackError::RingLost`]: the vCPU is still attached then.
    pub fn detach_vcpu(&self, index: usize) -> Result<(), TrackError> {
        let state = &mut *self.shared.lock();
        state.check_not_ended()?;
        state.check_ours()?;
        let at = state.vcpus.iter().position(|vcpu| vcpu.index == index);
        let at = at.ok_or(TrackError::VcpuUnknown(index))?;
        let State { backend, slots, vcpus, pending, .. } = state;
        if let Backend::Ring { rings, .. } = backend {
            rings.detach(&vcpus[at], self.shared.context(slots), pending)?;
        }
        vcpus.remove(at).gate.open();
        pending.vcpu_detached(at);
        Ok(())
    }

    fn attach(
        &self,
        index: usize,
        map: impl FnOnce(RingSize, bool) -> Result<DirtyRing, KvmError>,
    ) -> Result<VcpuHandle, TrackError> {
        let state = &mut *self.shared.lock();
        state.check_not_ended()?;
        state.check_ours()?;
        if state.vcpus.iter().any(|vcpu| vcpu.index == index) {
            return Err(TrackError::VcpuKnown(index));
        }
        let vcpu = Arc::new(Vcpu::new(index));
        if let Backend::Ring { size, rings, .. } = &mut state.backend {
            let ring = map(*size, rings.none_yet())?;
            rings.push(ring, Arc::clone(&vcpu));
        }
        #[cfg(feature = "offload")]
        if let Some(gates) = &mut state.gates {
            gates.lend(&vcpu);
        }
        state.vcpus.push(Arc::clone(&vcpu));
        state.pending.vcpu_attached();
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

    /// From now on the pages that `source` logs are in every harvest. It is started with the first session and stopped with the
    /// last; while one runs, at once: its writer must not have begun before.
    ///
    /// A VMM that has to go on using its source adds an `Arc<Mutex<_>>` of it, and keeps a clone: see
    /// [`ExternalSource`](super::ExternalSource).
    ///
    /// # Errors
    ///
    /// [`TrackError::External`] if it had to be started and could not; it is not added then.
    pub fn add_external(&self, source: Box<dyn ExternalSource>) -> Result<ExternalId, TrackError> {
        self.shared.others.lock().add(source)
    }

    /// Takes a source out again, once its writer has stopped; what it has logged stays dirty. `None` if it is gone
    /// already.
    pub fn remove_external(&self, id: ExternalId) -> Option<Box<dyn ExternalSource>> {
        self.shared.others.lock().remove(id)
    }

    /// A session that does not run yet: for a migration, which begins it when its peer has agreed.
    pub fn session(&self) -> Session {
        Session::new(Arc::clone(&self.shared))
    }

    /// A session that runs: what is dirtied from here on is in its harvests.
    ///
    /// # Errors
    ///
    /// What the kernel or an external source refused; the other sessions go on as before.
    pub fn start(&self) -> Result<Session, TrackError> {
        let session = self.session();
        session.start()?;
        Ok(session)
    }

    /// Ends tracking of this VM for good: every session stops, logging goes off, rings are unmapped, and memory and external
    /// sources are let go. Handles and sessions may outlive it and do nothing; the descriptor of the VM is closed with the last of them.
    ///
    /// # Errors
    ///
    /// The first thing that the kernel refused; tracking has ended all the same.
    pub fn end(&self) -> Result<(), TrackError> {
        let mut others = self.shared.others.lock();
        let was_tracking = {
            let state = &mut *self.shared.lock();
            state.ended = true;
            let was_tracking = state.pending.is_tracking();
            state.pending.stop_all();
            was_tracking
        };
        let stopped = if was_tracking { self.shared.stop_logging(&mut others) } else { Ok(()) };
        *others = Others::new();
        let state = &mut *self.shared.lock();
        if let Backend::Ring { rings, .. } = &mut state.backend {
            *rings = Rings::default();
        }
        state.slots = Slots::default();
        stopped
    }

    /// The gates of all vCPUs, in the order of attachment: for whoever throttles.
    pub fn vcpus(&self) -> Vec<VcpuThrottle> {
        self.shared.throttles()
    }

    /// Whether a full ring is recycled without protecting its pages, as far as is known: whether KVM plays along shows with
    /// the first full ring, and until then [`Figures::full_rings`] says so.
    ///
    /// # Errors
    ///
    /// Why each of them is protected, which costs the guest a fault: the backend is the bitmap, nobody has tracked yet, pages cannot be
    /// protected one by one here, or KVM was seen not to play along.
    pub fn recycles_without_protecting(&self) -> Result<(), UnmapError> {
        self.shared.lock().pending.why_none_is_left()
    }

    /// The gate of the vCPU that was attached with this index of the VMM's.
    pub fn vcpu(&self, index: usize) -> Option<VcpuThrottle> {
        let state = self.shared.lock();
        let vcpu = state.vcpus.iter().find(|vcpu| vcpu.index == index)?;
        Some(VcpuThrottle::new(Arc::clone(vcpu)))
    }

    /// What tracking did so far and what it cost.
    pub fn snapshot(&self) -> Figures {
        let state = self.shared.lock();
        let vcpus = state.vcpus.iter().map(|vcpu| vcpu.figures()).collect();
        self.shared.counters.figures(vcpus, state.pending.full_rings())
    }
}
