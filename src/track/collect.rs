//! The way that dirty pages take from the kernel and from other writers to the sessions, and how memory is protected anew.
//!
//! Whoever collects holds both locks, and a vCPU with a full ring waits for one of them. So what takes long by the size of
//! memory, protecting all of it anew, is done slot by slot, and between two slots the vCPU has its turn.

use std::sync::{MutexGuard, PoisonError};

use super::bitmap::AllCleared;
use super::error::TrackError;
use super::others::Others;
use super::pending::{AllReadable, Pending, ProtectedReadable};
use super::rings::AllReset;
use super::shared::{Backend, Shared, State};
use super::slots::{Slots, log_anew};
use super::unprotected::protect_all;
use crate::layout::{PageIndex, PageRun, Region};

/// Who collects, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Collecting {
    /// Every vCPU is outside the guest.
    pub(super) quiet: bool,
    /// All of it is handed out to a session at once: nobody asks afterwards which of the pages are new.
    pub(super) for_harvest: bool,
}

/// So many pages at a time are declared dirty, by their logarithm: 64 GiB, a millisecond for each session.
const STEP_SHIFT: u32 = 24;

/// Proof from whichever backend it is.
pub(super) enum Collected {
    Ring { _proof: AllReset },
    Bitmap { _proof: AllCleared },
}

impl ProtectedReadable for Collected {}

/// Proof that pages were protected that the backend had left, too.
pub(super) struct AllProtected(());

impl AllReadable for AllProtected {}

/// The tracker's lock.
type Guard<'a> = MutexGuard<'a, State>;

impl Shared {
    /// Gives what others than vCPUs have written to every session. It is not protected against them: they log their next write
    /// in any case.
    pub(super) fn collect_others(&self, state: &mut State, others: Option<&mut Others>) {
        let State { slots, pending, .. } = state;
        self.marks.read().unwrap_or_else(PoisonError::into_inner).drain_into(pending.sink());
        if let Some(others) = others {
            others.move_into(pending.sink());
        }
        pending.remove_from_sink(slots);
        pending.distribute(None, 0);
    }

    /// Gives all that is dirty to every session, and protects all of it. The lock may have been released meanwhile, and is held
    /// from the last look on.
    pub(super) fn collect_all<'a>(
        &'a self,
        state: Guard<'a>,
        others: &mut Others,
        how: Collecting,
    ) -> Result<(Guard<'a>, AllProtected), TrackError> {
        let (mut state, _) = self.collect(state, others, how)?;
        let was_lost = state.pending.everything;
        let State { slots, pending, .. } = &mut *state;
        protect_all(self.context(slots), pending);
        if pending.everything && !was_lost {
            // Nothing is left unprotected any more, so that there is nothing more to protect afterwards.
            (state, _) = self.collect(state, others, how)?;
        }
        Ok((state, AllProtected(())))
    }

    /// Gives all that is dirty to every session, protected as far as it was not left unprotected on purpose. The lock may have been
    /// released meanwhile, and is held from the last look on.
    ///
    /// What was lost before that look is in it. Should a ring overflow while memory is protected anew, all of memory is dirty once more
    /// with the next call, whatever is handed out now.
    pub(super) fn collect<'a>(
        &'a self,
        mut state: Guard<'a>,
        others: &mut Others,
        how: Collecting,
    ) -> Result<(Guard<'a>, Collected), TrackError> {
        let collected = self.look(&mut state, others, how)?;
        let anew = {
            let State { slots, pending, .. } = &mut *state;
            better_protected_anew(slots, pending, how.quiet)
        };
        if anew.is_empty() {
            state.pending.everything = false;
            return Ok((state, collected));
        }
        state.pending.everything = false;
        self.counters.rearms.add(1);
        for region in &anew {
            self.protect_anew(&mut state, region)?;
            for step in steps(region.pages) {
                if !how.quiet {
                    drop(state);
                    self.let_full_rings_in();
                    state = self.lock();
                }
                state.pending.insert_run(step);
            }
        }
        state.pending.rearmed();
        if how.quiet {
            return Ok((state, collected));
        }
        let collected = self.look(&mut state, others, how)?;
        Ok((state, collected))
    }

    /// Takes what there is to take, and sees that it is protected.
    fn look(&self, state: &mut State, others: &mut Others, how: Collecting) -> Result<Collected, TrackError> {
        state.pending.harvesting(how.for_harvest);
        let collected = self.take_all(state, others, how.quiet);
        state.pending.harvesting(false);
        collected
    }

    fn take_all(&self, state: &mut State, others: &mut Others, quiet: bool) -> Result<Collected, TrackError> {
        let State { backend, slots, pending, .. } = state;
        let cx = self.context(slots);
        let collected = match backend {
            Backend::Ring { rings, .. } if quiet => {
                Collected::Ring { _proof: rings.recycle_quiet(cx, pending)? }
            }
            Backend::Ring { rings, .. } => Collected::Ring { _proof: rings.recycle(cx, pending)? },
            Backend::Bitmap(log) => Collected::Bitmap { _proof: log.collect(cx, pending.sink())? },
        };
        // After the guest's: what a device wrote because of what the guest wrote is then in the same harvest.
        self.marks.read().unwrap_or_else(PoisonError::into_inner).drain_into(pending.sink());
        others.move_into(pending.sink());
        // Last of all: it has what the kernel wrote with no vCPU at hand, on behalf of whatever stopped just now.
        if let Backend::Ring { beside: Some(log), .. } = backend
            && quiet
        {
            log.collect_beside_rings(cx, pending.sink())?;
        }
        pending.remove_runs(&slots.holes(pending.capacity()));
        pending.distribute(None, 0);
        Ok(collected)
    }

    /// Protects one slot anew, which is to be declared dirty before anything of it is handed out.
    fn protect_anew(&self, state: &mut State, region: &Region) -> Result<(), TrackError> {
        if let Err(error) = log_anew(&*self.kernel, region) {
            // Its logging may be off now.
            state.pending.everything = true;
            return Err(error.into());
        }
        state.pending.is_protected_anew(region.pages);
        Ok(())
    }
}

/// A run in parts of no more than 64 GiB.
fn steps(run: PageRun) -> impl Iterator<Item = PageRun> {
    (0..run.pages).step_by(1 << STEP_SHIFT).map(move |at| PageRun {
        first: PageIndex(run.first.0 + at),
        pages: (run.pages - at).min(1 << STEP_SHIFT),
    })
}

/// All slots, if nobody knows any more what is dirty; or those of which that costs no more than their unsure pages have
/// cost already.
fn better_protected_anew(slots: &Slots, pending: &Pending, quiet: bool) -> Vec<Region> {
    match pending.everything {
        true => slots.logged().copied().collect(),
        false if quiet => Vec::new(),
        false => pending.slots_better_protected_anew(slots),
    }
}
