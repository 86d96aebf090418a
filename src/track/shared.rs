//! What all clones of a tracker and all vCPU handles share: one lock, and the way that dirty pages take under it.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::bitmap::{AllCleared, BitmapLog};
use super::error::TrackError;
use super::external::ExternalSource;
use super::figures::VmCounters;
#[cfg(feature = "offload")]
use super::lent::Lent;
#[cfg(feature = "offload")]
use super::lent_page;
use super::pending::{Pending, Protected};
use super::rings::{AllReset, Context, Rings};
use super::slots::{Slots, log_anew};
use super::vcpu::Vcpu;
use crate::kvm::{Kernel, RingSize};
use crate::page_set::AtomicPageSet;

/// What the tracker's clones and the vCPU handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) kernel: Box<dyn Kernel>,
    pub(super) counters: VmCounters,
    /// Whether marks are of interest. Ordered against the marks by fences: see `mark_dirty`.
    pub(super) tracking: AtomicBool,
    /// Marks from outside the guest; replaced by a larger one when memory grows.
    pub(super) marks: RwLock<AtomicPageSet>,
    /// The recycle lock. A `std` mutex is one futex word: unlike others it never allocates.
    pub(super) state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) backend: Backend,
    pub(super) slots: Slots,
    pub(super) vcpus: Vec<Arc<Vcpu>>,
    pub(super) externals: Vec<External>,
    pub(super) next_external: u64,
    pub(super) pending: Pending,
    pub(super) tracking: bool,
    /// Another process follows the rings.
    #[cfg(feature = "offload")]
    pub(super) lent: Option<Lent>,
}

/// An external source that was added to a tracker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExternalId(pub(super) u64);

pub(super) struct External {
    pub(super) id: ExternalId,
    pub(super) source: Box<dyn ExternalSource>,
}

impl External {
    pub(super) fn start(&mut self) -> Result<(), TrackError> {
        let name = self.source.name();
        self.source.start().map_err(|source| TrackError::External { name, source })
    }
}

impl fmt::Debug for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.id.0, self.source.name())
    }
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

/// Proof from whichever backend it is.
pub(super) enum Collected {
    Ring { _proof: AllReset },
    Bitmap { _proof: AllCleared },
}

impl Protected for Collected {}

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

    /// Starts every external source; none is left on when one cannot.
    pub(super) fn start_externals(&mut self) -> Result<(), TrackError> {
        for at in 0..self.externals.len() {
            if let Err(error) = self.externals[at].start() {
                self.externals[..at].iter_mut().for_each(|external| external.source.stop());
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn stop_externals(&mut self) {
        self.externals.iter_mut().for_each(|external| external.source.stop());
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves pages in `pending` or in the rings: taking them again is harmless.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ring_full(&self, vcpu: &Arc<Vcpu>) -> Result<(), TrackError> {
        let mut state = self.lock();
        #[cfg(feature = "offload")]
        if let Some(Lent::Followed(page)) = &state.lent {
            let page = Arc::clone(page);
            let at = state.vcpus.iter().position(|known| Arc::ptr_eq(known, vcpu));
            drop(state);
            at.into_iter().for_each(|at| lent_page::wait_for_room(&page, at));
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

    /// Brings all that is dirty into `pending`, protected.
    pub(super) fn collect(&self, state: &mut State, quiet: bool) -> Result<Collected, TrackError> {
        let State { backend, slots, externals, pending, .. } = state;
        let cx = self.context(slots);
        let collected = match backend {
            Backend::Ring { rings, .. } if quiet => {
                Collected::Ring { _proof: rings.recycle_quiet(cx, pending)? }
            }
            Backend::Ring { rings, .. } => Collected::Ring { _proof: rings.recycle(cx, pending)? },
            Backend::Bitmap(log) => Collected::Bitmap { _proof: log.collect(cx, pending.pages_mut())? },
        };
        // After the guest's: what a device wrote because of what the guest wrote is then in the same harvest.
        self.marks.read().unwrap_or_else(PoisonError::into_inner).drain_into(pending.pages_mut());
        externals.iter_mut().for_each(|external| external.source.drain_into(pending.pages_mut()));
        // Last of all: it has what the kernel wrote with no vCPU at hand, on behalf of whatever stopped just now.
        if let Backend::Ring { beside: Some(log), .. } = backend
            && quiet
        {
            log.collect_beside_rings(cx, pending.pages_mut())?;
        }
        pending.remove_runs(slots.holes(pending.capacity()));
        if pending.everything {
            slots.log_anew(&*self.kernel)?;
            for region in slots.regions() {
                pending.pages_mut().insert_run(region.pages);
            }
            pending.rearmed();
            self.counters.rearms.add(1);
        } else if !quiet {
            self.protect_unsure(slots, pending)?;
        }
        Ok(collected)
    }

    /// Protects anew the slots with unsure pages, when that costs no more than what these have cost already.
    fn protect_unsure(&self, slots: &Slots, pending: &mut Pending) -> Result<(), TrackError> {
        let regions = pending.slots_better_protected_anew(slots);
        for region in &regions {
            if let Err(error) = log_anew(&*self.kernel, region) {
                // Its logging may be off now.
                pending.everything = true;
                return Err(error.into());
            }
            pending.pages_mut().insert_run(region.pages);
        }
        if !regions.is_empty() {
            pending.rearmed();
            self.counters.rearms.add(1);
        }
        Ok(())
    }
}
