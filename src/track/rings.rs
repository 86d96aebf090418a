//! The backend on KVM's per-vCPU dirty rings: take, flag, reset, check the count, and only then hand out.
//!
//! The reset is global: it covers the flagged entries of all rings, and any thread may have asked for it. So all
//! of this happens under the tracker's one lock, as the kernel serialises the reset anyway, and what is counted is
//! what *all* rings have outstanding. A vCPU with a full ring takes the same way, for its own ring only: the
//! pages of the others stay writable, so that their guests feel nothing.
//!
//! A ring that nears its limit between two harvests is recycled without protection, where such pages can be protected later
//! (`unprotected`): a guest that writes more pages than its ring has entries would otherwise be stopped by a fault for every
//! one of them, over and over.
//!
//! A ring that overflowed (possible where KVM emulates guest instructions in bulk) is the rest of this file:
//! `kernel-notes/dirty-ring.md` tells what such a ring looks like and why each step here is right.

#[cfg(feature = "offload")]
mod lent;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::error::TrackError;
use super::figures::VmCounters;
use super::pending::{Pending, ProtectedReadable};
use super::session_pages::SessionKey;
use super::slots::{SlotCursor, Slots};
use super::vcpu::Vcpu;
use crate::kvm::caps::RESERVED_ENTRIES;
use crate::kvm::ring::{DirtyRing, Prefix, Recycle};
use crate::kvm::{Kernel, ResetCount};
use crate::page_set::WordAtHand;

/// Resets in a row that reset nothing, before a ring is taken for stuck. A stop signal, a freezing cgroup or task
/// work interrupt one call each.
const IDLE_RESETS_MAX: u32 = 16;

/// How often in a row a vCPU may say that its ring is full when there is nothing to take, before it is given up.
const EMPTY_CALLS_MAX: u32 = 1_000;

/// So many of them are taken for a run of the vCPU in between, if it passes no gate that would count: a VMM calls once for
/// each exit.
const UNCOUNTED_CALLS: u32 = 16;

/// What the recycler needs of the rest of the tracker.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) kernel: &'a dyn Kernel,
    pub(super) slots: &'a Slots,
    pub(super) counters: &'a VmCounters,
}

/// Proof that every entry that was taken has been reset, and so every page protected that was not left unprotected.
pub(super) struct AllReset(());

impl ProtectedReadable for AllReset {}

/// One vCPU's ring and what we think of it.
#[derive(Debug)]
struct Ring {
    ring: DirtyRing,
    vcpu: Arc<Vcpu>,
    /// Its place among the rings, by which sessions count its pages.
    place: usize,
    /// Dirty entries at the last observation.
    observed: u32,
    /// Runs in a row that KVM ended with "full" when there was nothing to take.
    empty_fulls: u32,
    /// Calls of `ring_full` in a row with nothing to take.
    empty_calls: u32,
    /// The gate's count of passes at the last call of `ring_full`.
    passes: Option<u64>,
    /// What the last interrupted reset had got to.
    unflagged: Prefix,
    /// It may have overflowed, and entries that we cannot see may hide behind a gap.
    suspect: bool,
}

/// All rings of a VM.
#[derive(Default, Debug)]
pub(super) struct Rings {
    rings: Vec<Ring>,
    /// There is a ring, or was: the VM is known by its vCPUs.
    begun: bool,
}

impl Ring {
    fn take_entries(&mut self, recycle: Recycle, cx: Context<'_>, pending: &mut Pending) -> u32 {
        let mut slots = SlotCursor::new(cx.slots);
        let mut unknown = 0;
        let (sink, unprotected) = pending.sinks();
        let (mut words, mut word) = (sink.insert_prefetched(), WordAtHand::NONE);
        // Two loops, so that the usual one does not pay for the other.
        let taken = match recycle {
            Recycle::Protecting => {
                self.ring.take(Recycle::Protecting, |slot, offset| match slots.page(slot, offset) {
                    Some(page) => word.add(page, &mut words),
                    // The slot is gone, and its memory with it. KVM ignores such an entry too.
                    None => unknown += 1,
                })
            }
            Recycle::Leaving => {
                let (mut words_left, mut word_left) = (unprotected.insert_prefetched(), WordAtHand::NONE);
                let taken = self.ring.take(Recycle::Leaving, |slot, offset| match slots.page(slot, offset) {
                    Some(page) => {
                        word.add(page, &mut words);
                        word_left.add(page, &mut words_left);
                    }
                    None => unknown += 1,
                });
                words_left.finish(word_left);
                taken
            }
        };
        let new = words.finish(word);
        if taken > 0 {
            let new = pending.distribute(Some(self.place), new);
            self.vcpu.counters.pages.add(new);
            self.vcpu.counters.duplicates.add(u64::from(taken) - new - unknown);
            cx.counters.unknown_slot_entries.add(unknown);
            (self.empty_fulls, self.empty_calls, self.passes) = (0, 0, None);
        }
        taken
    }

    /// Takes all that is in the ring. What it gave is not protected yet.
    fn take(&mut self, recycle: Recycle, cx: Context<'_>, pending: &mut Pending) {
        let started = Instant::now();
        let taken = self.take_entries(recycle, cx, pending);
        self.note_occupancy(taken);
        if self.ring.unconfirmed() == self.ring.size().entries() {
            // KVM stops a vCPU short of that, so it may as well have gone beyond, over its own entries.
            self.overflowed("every entry of its ring was dirty");
        }
        if self.suspect {
            match self.ring.gap() {
                Some(gap) => {
                    pending.everything = true;
                    self.ring.skip(gap);
                    self.take_entries(recycle, cx, pending);
                    self.suspect = self.ring.unconfirmed() == self.ring.size().entries();
                }
                // Nothing is dirty anywhere in the ring: KVM has pushed nothing since memory was protected anew.
                None if taken == 0 => {}
                // Entries stood where they should, and none stands elsewhere.
                None => {
                    pending.everything = true;
                    self.suspect = taken == self.ring.size().entries();
                }
            }
        }
        self.observed = 0;
        self.vcpu.counters.occupancy.set(0);
        let harvest_ns = self.vcpu.counters.harvest_ns.add_since(started);
        cx.counters.harvest_ns.add(harvest_ns);
    }

    /// Tells every session of the pages of entries that were not reported yet.
    fn report(&mut self, slots: &Slots, pending: &mut Pending) {
        let mut slots = SlotCursor::new(slots);
        let place = self.place;
        self.ring.report(|slot, offset| {
            if let Some(page) = slots.page(slot, offset) {
                pending.report(place, page);
            }
        });
    }

    fn note_occupancy(&self, entries: u32) {
        self.vcpu.counters.occupancy.set(u64::from(entries));
        self.vcpu.counters.occupancy_max.raise_to(u64::from(entries));
    }

    /// The vCPU says "full", and there is no dirty entry. The first time, another thread may have recycled the ring
    /// between the exit and the call. But when KVM has run the vCPU since, still says "full", and nobody has
    /// taken anything in between, then it counts entries that are not there any more.
    fn nothing_to_take(&mut self) -> Result<(), TrackError> {
        if !self.ring.exited_full() {
            // The VMM says so, KVM does not.
            return Ok(());
        }
        self.empty_calls += 1;
        if self.empty_calls > EMPTY_CALLS_MAX {
            return Err(TrackError::RingLost(self.vcpu.index));
        }
        let passes = Some(self.vcpu.gate.count_next_pass());
        if self.passes != passes || self.empty_calls.is_multiple_of(UNCOUNTED_CALLS) {
            self.empty_fulls += 1;
        }
        self.passes = passes;
        if self.empty_fulls >= 2 {
            self.overflowed("KVM says full and the ring is empty");
            self.empty_fulls = 0;
            // How many is unknown; what KVM calls full is more than a quarter of the ring on any host.
            self.ring.skip(self.ring.size().entries() / 4);
        }
        Ok(())
    }

    /// At the last interrupted reset, it was reset in part.
    fn is_half_done(&self) -> bool {
        (1..self.ring.unconfirmed()).contains(&self.unflagged.entries)
    }

    /// A reset that got to the first `entries` of those taken may have been interrupted there, and so may have counted the
    /// last of them and not protected their pages.
    fn doubt_batch(&self, entries: u32, cx: Context<'_>, pending: &mut Pending) {
        let mut slots = SlotCursor::new(cx.slots);
        let is_known = self.ring.last_batch(entries, |slot, offset| {
            if let Some(page) = slots.page(slot, offset) {
                pending.insert_unsure(page);
            }
        });
        // A page that is no longer known may be any.
        pending.everything |= !is_known;
    }

    fn overflowed(&mut self, sign: &'static str) {
        if !self.suspect {
            self.suspect = true;
            self.vcpu.counters.overflows.add(1);
            tracing::warn!(
                vcpu = self.vcpu.index,
                ring_entries = self.ring.size().entries(),
                sign,
                "dirty ring overflowed: every page is taken for dirty until it is in step again"
            );
        }
    }

    /// Whether the ring, if it fills on as it does, will be full before the next observation, so that it is better recycled
    /// here and now than in an exit of its vCPU. Only in its last sixteenth: one large step says little about the next.
    fn nears_its_limit(&self, entries: u32) -> bool {
        let limit = match self.ring.size().entries() {
            size @ 0..1024 => size - 64,
            size => size - RESERVED_ENTRIES,
        };
        let grown = entries.saturating_sub(self.observed);
        grown > 0 && entries + grown.min(limit / 16) >= limit
    }
}

impl Rings {
    pub(super) fn push(&mut self, ring: DirtyRing, vcpu: Arc<Vcpu>) {
        self.begun = true;
        self.rings.push(Ring {
            suspect: ring.was_left_suspect(),
            ring,
            vcpu,
            place: self.rings.len(),
            observed: 0,
            empty_fulls: 0,
            empty_calls: 0,
            passes: None,
            unflagged: Prefix::default(),
        });
    }

    /// Whether no vCPU was attached yet.
    pub(super) fn none_yet(&self) -> bool {
        !self.begun
    }

    /// Takes and resets what a vCPU's ring still holds, and forgets the ring. The vCPU is outside the guest.
    pub(super) fn detach(
        &mut self,
        vcpu: &Arc<Vcpu>,
        cx: Context<'_>,
        pending: &mut Pending,
    ) -> Result<(), TrackError> {
        let Some(at) = self.place_of(vcpu) else { return Ok(()) };
        self.unstick(at, cx, pending)?;
        self.recycle_these(at..at + 1, pending.recycle_early(), cx, pending)?;
        if self.rings[at].ring.unconfirmed() > 0 {
            // KVM may reset them later, and would count them with those of the others.
            return Err(TrackError::RingLost(vcpu.index));
        }
        let Ring { ring, suspect, .. } = self.rings.remove(at);
        ring.leave(suspect);
        (0..).zip(&mut self.rings).for_each(|(place, ring)| ring.place = place);
        Ok(())
    }

    /// Takes and resets what is in every ring.
    pub(super) fn recycle(&mut self, cx: Context<'_>, pending: &mut Pending) -> Result<AllReset, TrackError> {
        self.recycle_these(0..self.rings.len(), Recycle::Protecting, cx, pending)
    }

    /// The same when every vCPU is outside the guest: rings that are stuck can be brought in step, and no page is protected
    /// if it can be later, should the guest run on.
    pub(super) fn recycle_quiet(
        &mut self,
        cx: Context<'_>,
        pending: &mut Pending,
    ) -> Result<AllReset, TrackError> {
        for at in 0..self.rings.len() {
            self.unstick(at, cx, pending)?;
        }
        self.recycle_these(0..self.rings.len(), pending.recycle_early(), cx, pending)
    }

    /// Pages by vCPU since the last harvest of a session; recycles a ring that would be full before the next
    /// observation. If `reports`, every session is told of the pages that no earlier call reported.
    pub(super) fn observe(
        &mut self,
        cx: Context<'_>,
        pending: &mut Pending,
        key: SessionKey,
        reports: bool,
    ) -> Result<Vec<u64>, TrackError> {
        let mut entries_left = Vec::with_capacity(self.rings.len());
        for at in 0..self.rings.len() {
            let ring = &mut self.rings[at];
            let entries = ring.ring.scan();
            ring.note_occupancy(entries);
            if ring.nears_its_limit(entries) {
                self.recycle_these(at..at + 1, pending.recycle_early(), cx, pending)?;
                entries_left.push(0);
            } else {
                ring.observed = entries;
                if reports {
                    ring.report(cx.slots, pending);
                }
                entries_left.push(entries);
            }
        }
        let session = pending.running_session(key)?;
        Ok((0..).zip(entries_left).map(|(place, entries)| session.pages_of(place, entries)).collect())
    }

    /// The vCPU says that its ring is full. It is outside the guest: we are on its thread.
    pub(super) fn ring_full(
        &mut self,
        vcpu: &Arc<Vcpu>,
        cx: Context<'_>,
        pending: &mut Pending,
    ) -> Result<(), TrackError> {
        let at = self.place_of(vcpu).ok_or(TrackError::VcpuUnknown(vcpu.index))?;
        self.unstick(at, cx, pending)?;
        let ring = &mut self.rings[at];
        ring.take(pending.recycle_early(), cx, pending);
        if ring.ring.unconfirmed() == 0 {
            ring.nothing_to_take()?;
            if ring.suspect {
                pending.everything = true;
            }
        }
        self.reset(cx, pending).map(drop)
    }

    fn place_of(&self, vcpu: &Arc<Vcpu>) -> Option<usize> {
        self.rings.iter().position(|ring| Arc::ptr_eq(&ring.vcpu, vcpu))
    }

    fn recycle_these(
        &mut self,
        which: Range<usize>,
        recycle: Recycle,
        cx: Context<'_>,
        pending: &mut Pending,
    ) -> Result<AllReset, TrackError> {
        for ring in &mut self.rings[which] {
            ring.take(recycle, cx, pending);
        }
        self.reset(cx, pending)
    }

    /// Entries taken and not known to be reset, in all rings.
    fn unconfirmed(&self) -> u64 {
        self.rings.iter().map(|ring| u64::from(ring.ring.unconfirmed())).sum()
    }

    /// Has KVM reset everything that is flagged. Bounded: each turn either resets something or counts as idle.
    fn reset(&mut self, cx: Context<'_>, pending: &mut Pending) -> Result<AllReset, TrackError> {
        let mut idle = 0;
        let mut left = self.unconfirmed();
        while left > 0 {
            let ResetCount { entries, slept } = match timed_reset(cx) {
                Err(TrackError::Kvm(error)) if error.is_invalid() && self.name_again(true, pending) => {
                    continue;
                }
                count => count?,
            };
            let count = u64::from(entries);
            if count >= left {
                if slept {
                    // Stopped at the very last entry? Then all is counted, and the last batch is not protected.
                    self.doubt_last_batch(cx, pending);
                }
                if self.rings.iter().any(|ring| ring.ring.has_unnamed()) {
                    pending.frees_unnamed(true);
                }
                self.rings.iter_mut().for_each(|ring| ring.ring.confirm());
                break;
            }
            cx.counters.short_resets.add(1);
            tracing::debug!(entries, flagged = left, "a reset of dirty rings was interrupted");
            self.confirm_part(count, cx, pending);
            left = self.unconfirmed();
            if left == 0 {
                // Another thread's reset took the rest. It may still be at it; ours waits for its lock.
                timed_reset(cx)?;
            }
            idle = if count == 0 { idle + 1 } else { 0 };
            if idle == IDLE_RESETS_MAX {
                if self.name_again(false, pending) {
                    idle = 0;
                    continue;
                }
                for ring in self.rings.iter_mut().filter(|ring| ring.ring.unconfirmed() > 0) {
                    ring.overflowed("KVM does not reset the entries that are flagged");
                }
                pending.everything = true;
                break;
            }
        }
        Ok(AllReset(()))
    }

    /// If KVM does not free entries that name no slot: they get their names back, so that it protects their pages, and none loses it
    /// any more.
    fn name_again(&mut self, refused: bool, pending: &mut Pending) -> bool {
        // A ring that has overflowed may be stuck there for that reason.
        let is_kept = |ring: &Ring| (refused || !ring.suspect) && ring.ring.waits_at_unnamed();
        let is_kept = self.rings.iter().any(is_kept);
        if is_kept {
            tracing::warn!(
                "KVM does not free ring entries without a slot: every page of a full ring is protected from now on"
            );
            self.rings.iter_mut().for_each(|ring| ring.ring.name_again());
            pending.frees_unnamed(false);
        }
        is_kept
    }

    /// One of the rings was cut off at its end, and KVM does not say which.
    fn doubt_last_batch(&self, cx: Context<'_>, pending: &mut Pending) {
        self.rings.iter().for_each(|ring| ring.doubt_batch(ring.ring.unconfirmed(), cx, pending));
    }

    /// An interrupted reset: finds out which of the flagged entries it got to.
    fn confirm_part(&mut self, count: u64, cx: Context<'_>, pending: &mut Pending) {
        let (mut unflagged, mut is_one_half_done) = (0, false);
        for ring in &mut self.rings {
            ring.unflagged = ring.ring.unflagged_prefix();
            unflagged += u64::from(ring.unflagged.entries);
            is_one_half_done |= ring.is_half_done();
        }
        // Else another thread's reset did some of them.
        let is_ours = unflagged == count;
        if !is_ours {
            // It flushes the TLBs only after it has let go of KVM's lock, and ours had nothing to flush: whether the pages are
            // protected for every vCPU by now, nobody knows.
            cx.counters.foreign_resets.add(1);
            tracing::warn!("another thread has reset the dirty rings: every page is taken for dirty");
            pending.everything = true;
        }
        for ring in &mut self.rings {
            let Prefix { entries, dirty_again } = ring.unflagged;
            if dirty_again && !is_ours {
                // Overwritten before they were reset, or reset by another thread and used again: no telling.
                ring.overflowed("entries were overwritten before they were reset");
                pending.everything = true;
            } else if entries > 0 {
                // KVM goes from ring to ring: if it was cut off within one, it had finished the others before.
                if !(is_ours && is_one_half_done) || ring.is_half_done() {
                    ring.doubt_batch(entries, cx, pending);
                }
                ring.ring.confirm_prefix(entries);
            }
        }
    }

    /// Brings a ring in step whose taken entries KVM has overwritten and so never resets.
    fn unstick(&mut self, at: usize, cx: Context<'_>, pending: &mut Pending) -> Result<(), TrackError> {
        let ring = &mut self.rings[at];
        if ring.ring.unconfirmed() == 0 {
            return Ok(());
        }
        ring.overflowed("entries were overwritten before they were reset");
        pending.everything = true;
        ring.ring.name_again();
        let mut left = ring.ring.flag_again();
        let mut idle = 0;
        while left > 0 {
            let count = timed_reset(cx)?.entries;
            let ring = &self.rings[at].ring;
            if ring.unflagged_prefix().entries == ring.unconfirmed() {
                // All of them, by whomever: another thread may have been faster.
                break;
            }
            left = left.saturating_sub(count);
            idle = if count == 0 { idle + 1 } else { 0 };
            if idle == IDLE_RESETS_MAX {
                return Err(TrackError::RingLost(self.rings[at].vcpu.index));
            }
        }
        self.rings[at].ring.confirm();
        Ok(())
    }
}

fn timed_reset(cx: Context<'_>) -> Result<ResetCount, TrackError> {
    let started = Instant::now();
    let count = cx.kernel.reset_dirty_rings()?;
    cx.counters.resets.add(1);
    cx.counters.reset_ns.add_since(started);
    cx.counters.entries_reset.add(u64::from(count.entries));
    Ok(count)
}
