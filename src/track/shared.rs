//! What a tracker, its sessions and its vCPU handles share: the locks, and how logging begins and ends.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use super::bitmap::BitmapLog;
use super::error::TrackError;
use super::figures::VmCounters;
#[cfg(feature = "offload")]
use super::lent::Lent;
#[cfg(feature = "offload")]
use super::lent_gates::LentGates;
#[cfg(feature = "offload")]
use super::lent_page;
use super::others::Others;
use super::pending::Pending;
use super::rings::{Context, Rings};
use super::session_pages::SessionKey;
use super::slots::{Slots, log_these_anew, stop_logging};
use super::throttle::VcpuThrottle;
use super::unprotected::protect_step;
use super::vcpu::Vcpu;
use crate::kvm::{Kernel, RingSize, UnmapError};
use crate::layout::PageIndex;
use crate::page_set::AtomicPageSet;

/// Enough for a thread that waits for the lock to wake up and take it.
const TURN: Duration = Duration::from_micros(100);
/// On a busy host it wakes up later. A harvest waits for nobody longer than 5 ms each time.
const TURNS_MAX: u32 = 50;

/// What the tracker's clones, its sessions and the vCPU handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) kernel: Box<dyn Kernel>,
    pub(super) counters: VmCounters,
    /// Whether marks are of interest. Ordered against the marks by fences: see `mark_dirty`.
    pub(super) tracking: AtomicBool,
    /// Marks from outside the guest; replaced by a larger one when memory grows.
    pub(super) marks: RwLock<AtomicPageSet>,
    /// vCPUs that wait for the lock, because their rings are full.
    pub(super) full_rings: AtomicU32,
    /// Writers that KVM does not see. This lock is taken before `state`, never after.
    pub(super) others: parking_lot::Mutex<Others>,
    /// The recycle lock. A `std` mutex is one futex word: unlike others it never allocates.
    pub(super) state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) backend: Backend,
    pub(super) slots: Slots,
    pub(super) vcpus: Vec<Arc<Vcpu>>,
    pub(super) pending: Pending,
    /// For good.
    pub(super) ended: bool,
    /// Another process follows the rings.
    #[cfg(feature = "offload")]
    pub(super) lent: Option<Lent>,
    /// Another process has the gates, and not the rings.
    #[cfg(feature = "offload")]
    pub(super) gates: Option<LentGates>,
}

#[derive(Debug)]
pub(super) enum Backend {
    Ring {
        size: RingSize,
        rings: Rings,
        /// For the pages that no vCPU dirties, where KVM has it.
        beside: Option<BitmapLog>,
    },
    Bitmap(BitmapLog),
}

impl Backend {
    /// As reports show it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ring { .. } => "ring",
            Self::Bitmap(_) => "bitmap",
        }
    }
}

impl State {
    /// An error while another process follows the rings: what is asked is its business, or changes what it was told.
    pub(super) fn check_ours(&mut self) -> Result<(), TrackError> {
        #[cfg(feature = "offload")]
        match &self.lent {
            Some(lent) if lent.has_gone() => {
                // What it still did to the rings after they were taken back, nobody knows.
                if let Backend::Ring { rings, .. } = &mut self.backend {
                    rings.distrust();
                }
                self.lent = None;
            }
            Some(_) => return Err(TrackError::Lent),
            None => {}
        }
        Ok(())
    }

    /// An error while the VM is lent in any way.
    #[cfg(feature = "offload")]
    pub(super) fn check_not_lent(&mut self) -> Result<(), TrackError> {
        self.check_ours()?;
        if self.gates.is_some() { Err(TrackError::Lent) } else { Ok(()) }
    }

    /// Rings may be recycled without protecting their pages if pages of every slot can be protected later.
    pub(super) fn prepare_to_protect(&mut self, kernel: &dyn Kernel) {
        let prepared = match self.backend {
            Backend::Ring { .. } => self.slots.prepare_to_protect(kernel),
            Backend::Bitmap(_) => Err(UnmapError::NotAsked),
        };
        if let (Err(error), Backend::Ring { .. }) = (&prepared, &self.backend) {
            tracing::info!(%error, "a full dirty ring costs its guest a fault for every page in it");
        }
        self.pending.may_leave(prepared);
    }
}

impl State {
    pub(super) fn check_not_ended(&self) -> Result<(), TrackError> {
        if self.ended { Err(TrackError::Ended) } else { Ok(()) }
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves pages in `pending` or in the rings: taking them again is harmless.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a throttle holds of each vCPU, in the order of attachment.
    pub(super) fn throttles(&self) -> Vec<VcpuThrottle> {
        self.lock().vcpus.iter().map(Arc::clone).map(VcpuThrottle::new).collect()
    }

    /// Both locks, with all that external sources have logged found.
    pub(super) fn lock_all(&self) -> (parking_lot::MutexGuard<'_, Others>, MutexGuard<'_, State>) {
        let mut others = self.others.lock();
        others.drain();
        (others, self.lock())
    }

    pub(super) fn ring_full(&self, vcpu: &Arc<Vcpu>) -> Result<(), TrackError> {
        // Relaxed: a hint to who holds the lock.
        self.full_rings.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        self.full_rings.fetch_sub(1, Ordering::Relaxed);
        if state.ended {
            return Ok(());
        }
        #[cfg(feature = "offload")]
        if let Some(Lent::Followed(page)) = &state.lent {
            let page = Arc::clone(page);
            let at = state.vcpus.iter().position(|known| Arc::ptr_eq(known, vcpu));
            drop(state);
            lent_page::wait_for_room(&page, at.ok_or(TrackError::VcpuUnknown(vcpu.index))?);
            return Ok(());
        }
        let State { backend, slots, pending, .. } = &mut *state;
        match backend {
            Backend::Ring { rings, .. } => rings.ring_full(vcpu, self.context(slots), pending),
            Backend::Bitmap(_) => Ok(()),
        }
    }

    pub(super) fn context<'a>(&'a self, slots: &'a Slots) -> Context<'a> {
        Context { kernel: &*self.kernel, slots, counters: &self.counters }
    }

    /// The first session begins. Slots are switched on one by one and without the tracker's lock, so that a vCPU whose ring fills
    /// meanwhile waits for KVM at most: what comes out of it is the session's. With the lock of the others held, no slot
    /// comes or goes.
    pub(super) fn start_logging(&self, others: &mut Others, key: SessionKey) -> Result<(), TrackError> {
        self.lock().check_ours()?;
        others.start()?;
        let regions = {
            let state = &mut *self.lock();
            if let Backend::Ring { rings, .. } = &mut state.backend
                // What an earlier period left behind.
                && let Err(error) = rings.recycle(self.context(&state.slots), &mut state.pending)
            {
                others.stop();
                return Err(error);
            }
            state.pending.forget();
            state.pending.may_leave(Err(UnmapError::NotAsked));
            state.pending.begin(key)?;
            state.slots.logged().copied().collect::<Vec<_>>()
        };
        let logging_on = log_these_anew(&*self.kernel, &regions);
        let state = &mut *self.lock();
        if let Err(error) = logging_on {
            others.stop();
            state.pending.stop(key)?;
            state.pending.forget();
            return Err(error.into());
        }
        state.prepare_to_protect(&*self.kernel);
        Ok(())
    }

    /// The last session has stopped. Slots are switched off as they were switched on.
    pub(super) fn stop_logging(&self, others: &mut Others) -> Result<(), TrackError> {
        self.tracking.store(false, Ordering::Relaxed);
        others.stop();
        let regions: Vec<_> = self.lock().slots.logged().copied().collect();
        let logging_off = stop_logging(&*self.kernel, &regions);
        let state = &mut *self.lock();
        if let Backend::Ring { rings, .. } = &mut state.backend {
            rings.recycle(self.context(&state.slots), &mut state.pending)?;
        }
        state.pending.forget();
        Ok(logging_off?)
    }

    /// Protects what is unprotected, step by step: a vCPU whose ring is full waits for one step, not for all. What is left
    /// unprotected meanwhile, [`collect_all`](Self::collect_all) protects; it is what a ring's worth of time leaves.
    pub(super) fn protect_in_steps(&self) {
        let mut from = Some(PageIndex(0));
        while let Some(first) = from {
            let mut state = self.lock();
            let State { slots, pending, .. } = &mut *state;
            from = protect_step(self.context(slots), pending, first);
            drop(state);
            self.let_full_rings_in();
        }
    }

    /// The vCPUs that wait for the lock, which this thread has just released, have their turn.
    pub(super) fn let_full_rings_in(&self) {
        // The lock does not queue: without a pause this thread would have it again before any other wakes up.
        for _ in 0..TURNS_MAX {
            if self.full_rings.load(Ordering::Relaxed) == 0 {
                break;
            }
            std::thread::sleep(TURN);
        }
    }
}
