//! One consumer's view of a tracker: what was dirtied since it last asked, whoever else asks meanwhile.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, MutexGuard};

use super::collect::Collecting;
use super::error::TrackError;
use super::others::Others;
use super::redirtied::Redirtied;
use super::session_pages::SessionKey;
use super::shared::{Backend, Shared, State};
use super::source::{DirtySource, Observed};
use super::throttle::VcpuThrottle;
use super::unprotected::protect_some;
use crate::layout::{PageRun, SlotId};
use crate::page_set::PageSet;
use crate::vm::{Paused, Settled};

/// An exclusive view of a [`DirtyTracker`](super::DirtyTracker), with a set of dirty pages of its own.
///
/// Several run at once, and each sees every page that was dirtied since it began or last harvested, once. It cannot be
/// cloned, so that nobody else can take its pages. Logging goes on in KVM with the first session that starts, and off with the last that stops. Each
/// session costs the others the protecting of its harvests: a page that any of them has harvested faults at its next write.
///
/// ```compile_fail,E0599
/// # fn f(session: ringferry::track::Session) {
/// let another = session.clone().harvest(&mut ringferry::PageSet::default()); // whose pages?
/// # }
/// ```
///
/// Dropping a session stops it and forgets its pages. [`end`](Self::end) can give them back instead.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    key: SessionKey,
}

/// What becomes of the pages that a session has and nobody harvested.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leftover {
    /// They are forgotten: the next session does not know of them.
    Forget,
    /// They are dirty in the session that starts next, with those that were given back to this one: for a chain of
    /// backups, of which the next one has to have what this one leaves.
    GiveBack,
}

/// While the guest runs.
const NOT_HARVESTED: Collecting = Collecting { quiet: false, for_harvest: false };
const HARVESTED: Collecting = Collecting { for_harvest: true, ..NOT_HARVESTED };

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let key = shared.lock().pending.add_session();
        Self { shared, key }
    }

    /// Begins: what is dirtied from here on is in the harvests of this session.
    ///
    /// # Errors
    ///
    /// [`TrackError::AlreadyTracking`] when started twice, or what the kernel or an external source refused. Every session is
    /// then as before.
    pub fn start(&self) -> Result<(), TrackError> {
        let (mut others, mut state) = self.shared.lock_all();
        state.check_not_ended()?;
        if state.pending.session(self.key)?.running {
            return Err(TrackError::AlreadyTracking);
        }
        if state.pending.is_tracking() {
            // A page that was dirtied before, and is still writable, makes no entry when it is written after the start. So
            // everything that is dirty goes to the others first, which protects it: its next write is then seen. What is
            // dirtied while this collects is still in a ring when it is done, and comes to this session too.
            let (mut state, _) = self.shared.collect_all(state, &mut others, NOT_HARVESTED)?;
            state.pending.begin(self.key)?;
        } else {
            drop(state);
            self.shared.start_logging(&mut others, self.key)?;
        }
        self.shared.tracking.store(true, Ordering::Relaxed);
        // Before anybody reads a page: see `mark_dirty`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// What was dirtied since the last harvest of this session: see [`DirtySource::observe`].
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], or what the kernel refused.
    pub fn observe(&self) -> Result<Observed, TrackError> {
        self.observe_and_tell(None)
    }

    /// [`observe`](Self::observe), and adds the pages of which no earlier call told: see [`DirtySource::observe_into`].
    ///
    /// # Errors
    ///
    /// As for `observe`.
    pub fn observe_into(&self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        self.observe_and_tell(Some(redirtied))
    }

    /// Adds to `dirty` all pages dirtied since the last harvest of this session, each write-protected again: see
    /// [`DirtySource::harvest`].
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], [`TrackError::SetTooSmall`], or what the kernel refused; nothing is lost then.
    pub fn harvest(&self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.shared.protect_in_steps();
        self.harvest_by(dirty, |state, others, dirty| {
            let (mut state, all) = self.shared.collect_all(state, others, HARVESTED)?;
            state.pending.hand_out(all, self.key, dirty)
        })
    }

    /// [`harvest`](Self::harvest) of what is protected; the rest goes to `behind`: see [`DirtySource::harvest_protected`].
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    pub fn harvest_protected(&self, dirty: &mut PageSet, behind: &mut Redirtied) -> Result<(), TrackError> {
        self.harvest_by(dirty, |state, others, dirty| {
            let (mut state, collected) = self.shared.collect(state, others, HARVESTED)?;
            state.pending.hand_out_protected(collected, self.key, dirty, behind)
        })
    }

    /// Protects some of what stayed behind and hands it out: see [`DirtySource::protect`].
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], [`TrackError::SetTooSmall`].
    pub fn protect(&self, behind: &mut Redirtied, pages: u64, dirty: &mut PageSet) -> Result<(), TrackError> {
        let State { slots, pending, .. } = &mut *self.shared.lock();
        pending.running_session(self.key)?;
        pending.check_fits(dirty)?;
        protect_some(self.shared.context(slots), pending, self.key, &behind.take_highest(pages), dirty)
    }

    /// [`harvest`](Self::harvest) when the guest stands still: see [`DirtySource::harvest_paused`].
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    pub fn harvest_paused(&self, paused: &Paused, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_by(dirty, |state, others, dirty| {
            let how = Collecting { quiet: true, ..HARVESTED };
            let (mut state, _) = self.shared.collect(state, others, how)?;
            state.pending.hand_out_paused(paused, self.key, dirty)
        })
    }

    /// [`harvest`](Self::harvest) when nothing writes guest memory any more: see [`DirtySource::harvest_final`].
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    pub fn harvest_final(&self, settled: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_paused(settled.paused(), dirty)
    }

    /// What `KVM_GET_DIRTY_LOG` would say of one slot: bit 0 of word 0 is its first page. The pages of other slots
    /// stay for their own turn. It costs by the size of the slot: [`take_slot_runs`](Self::take_slot_runs) by what is dirty.
    ///
    /// # Errors
    ///
    /// [`TrackError::SlotUnknown`], and as for [`harvest`](Self::harvest).
    pub fn take_slot_bitmap(&self, slot: SlotId) -> Result<Vec<u64>, TrackError> {
        self.take_slot(slot, false, PageSet::take_words)
    }

    /// [`take_slot_bitmap`](Self::take_slot_bitmap) when nothing writes guest memory any more: the last and complete view, on
    /// arm64 with what the kernel logged beside the rings.
    ///
    /// # Errors
    ///
    /// As for `take_slot_bitmap`.
    pub fn take_slot_bitmap_final(&self, _: &Settled<'_>, slot: SlotId) -> Result<Vec<u64>, TrackError> {
        self.take_slot(slot, true, PageSet::take_words)
    }

    /// The dirty pages of one slot as runs of guest frame numbers, in order. The pages of other slots stay for their own turn.
    ///
    /// # Errors
    ///
    /// [`TrackError::SlotUnknown`], and as for [`harvest`](Self::harvest).
    pub fn take_slot_runs(
        &self,
        slot: SlotId,
    ) -> Result<impl ExactSizeIterator<Item = PageRun> + use<>, TrackError> {
        self.take_slot(slot, false, PageSet::take_runs).map(Vec::into_iter)
    }

    /// [`take_slot_runs`](Self::take_slot_runs) when nothing writes guest memory any more.
    ///
    /// # Errors
    ///
    /// As for `take_slot_runs`.
    pub fn take_slot_runs_final(
        &self,
        _: &Settled<'_>,
        slot: SlotId,
    ) -> Result<impl ExactSizeIterator<Item = PageRun> + use<>, TrackError> {
        self.take_slot(slot, true, PageSet::take_runs).map(Vec::into_iter)
    }

    fn take_slot<T>(
        &self,
        slot: SlotId,
        quiet: bool,
        take: impl FnOnce(&mut PageSet, PageRun) -> T,
    ) -> Result<T, TrackError> {
        self.shared.protect_in_steps();
        let (mut others, mut state) = self.shared.lock_all();
        let run = state.slots.get(slot).ok_or(TrackError::SlotUnknown(slot))?.pages;
        state.pending.running_session(self.key)?;
        let how = Collecting { quiet, ..NOT_HARVESTED };
        let (mut state, collected) = self.shared.collect_all(state, &mut others, how)?;
        let taken = state.pending.hand_out_run(collected, self.key, run, take)?;
        self.shared.counters.harvests.add(1);
        Ok(taken)
    }

    /// Marks pages dirty again that were harvested and never arrived: see [`DirtySource::give_back`].
    pub fn give_back(&self, pages: &PageSet) {
        if let Ok(session) = self.shared.lock().pending.session(self.key) {
            session.given_back.union(pages);
        }
    }

    /// Stops. Pages dirtied and not harvested are forgotten; pages given back come when it is started again.
    ///
    /// # Errors
    ///
    /// The first thing that the kernel refused; the session has stopped all the same.
    pub fn stop(&self) -> Result<(), TrackError> {
        let mut others = self.shared.others.lock();
        let mut state = self.shared.lock();
        if !state.pending.session(self.key)?.running {
            return Ok(());
        }
        state.pending.stop(self.key)?;
        let is_last = !state.pending.is_tracking();
        drop(state);
        if is_last { self.shared.stop_logging(&mut others) } else { Ok(()) }
    }

    /// Stops, and forgets its pages or leaves them to the session that starts next.
    ///
    /// # Errors
    ///
    /// The first thing that the kernel refused. The session has ended all the same; if its pages were to be given back and
    /// the newest of them could not be had, all of memory is.
    pub fn end(self, leftover: Leftover) -> Result<(), TrackError> {
        let mut collected = Ok(());
        if leftover == Leftover::GiveBack {
            let (mut others, mut state) = self.shared.lock_all();
            if state.pending.session(self.key)?.running {
                (state, collected) = match self.shared.collect(state, &mut others, NOT_HARVESTED) {
                    Ok((state, _)) => (state, Ok(())),
                    Err(error) => (self.shared.lock(), Err(error)),
                };
                let State { slots, pending, .. } = &mut *state;
                if collected.is_err() || pending.everything {
                    slots.logged().for_each(|region| pending.insert_run(region.pages));
                }
            }
            state.pending.leave_behind(self.key)?;
        }
        collected.and(self.stop())
    }

    fn observe_and_tell(&self, redirtied: Option<&mut Redirtied>) -> Result<Observed, TrackError> {
        // Another session may be at them, and then has what they log.
        let mut others = self.shared.others.try_lock();
        if let Some(others) = &mut others {
            others.drain_if_rested();
        }
        let state = &mut *self.shared.lock();
        state.pending.running_session(self.key)?;
        self.shared.collect_others(state, others.as_deref_mut());
        let State { backend, slots, pending, .. } = state;
        let Backend::Ring { rings, .. } = backend else { return Ok(Observed::Unobservable) };
        let vcpus = rings.observe(self.shared.context(slots), pending, self.key, redirtied.is_some())?;
        let session = pending.running_session(self.key)?;
        if let Some(redirtied) = redirtied {
            session.tell(redirtied);
        }
        Ok(Observed::PerVcpu { vcpus, others: session.others })
    }

    /// One harvest, collected and handed out by `collect`.
    fn harvest_by(
        &self,
        dirty: &mut PageSet,
        collect: impl FnOnce(MutexGuard<'_, State>, &mut Others, &mut PageSet) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let (mut others, mut state) = self.shared.lock_all();
        state.pending.running_session(self.key)?;
        state.pending.check_fits(dirty)?;
        collect(state, &mut others, dirty)?;
        self.shared.counters.harvests.add(1);
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "a tracking session could not be stopped");
        }
        self.shared.lock().pending.remove_session(self.key);
    }
}

impl DirtySource for Session {
    fn backend(&self) -> &'static str {
        self.shared.lock().backend.name()
    }

    fn vcpus(&self) -> Vec<VcpuThrottle> {
        self.shared.throttles()
    }

    fn unseen_per_vcpu(&self) -> u64 {
        match self.shared.lock().backend {
            Backend::Ring { .. } => self.shared.kernel.unseen_per_vcpu(),
            Backend::Bitmap(_) => 0,
        }
    }

    fn start(&mut self) -> Result<(), TrackError> {
        Self::start(self)
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        Self::observe(self)
    }

    fn observe_into(&mut self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        Self::observe_into(self, redirtied)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::harvest(self, dirty)
    }

    fn harvest_protected(&mut self, dirty: &mut PageSet, behind: &mut Redirtied) -> Result<(), TrackError> {
        Self::harvest_protected(self, dirty, behind)
    }

    fn protect(&mut self, behind: &mut Redirtied, pages: u64, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::protect(self, behind, pages, dirty)
    }

    fn harvest_paused(&mut self, paused: &Paused, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::harvest_paused(self, paused, dirty)
    }

    fn harvest_final(&mut self, settled: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        Self::harvest_final(self, settled, dirty)
    }

    fn give_back(&mut self, pages: &PageSet) {
        Self::give_back(self, pages);
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        Self::stop(self)
    }
}
