//! Pages known to be dirty and not yet handed out, by session, behind the one rule: out only against proof that they are
//! write-protected again, or that the guest stands still.
//!
//! A backend puts what it finds where [`Pending::sink`] says, and [`Pending::distribute`] then gives it to every session.
//! So a page is in the set of each session from the moment in which it may become protected until that session has
//! harvested it, whatever the others do.
//!
//! A page that a ring was recycled without is dirty and unprotected: it stays in the set of every session, known and silent,
//! until one of them wants to read it. Then `unprotected` protects it.

use super::error::TrackError;
use super::figures::FullRings;
use super::redirtied::Redirtied;
use super::session_pages::{SessionKey, SessionPages};
use super::slots::Slots;
use crate::kvm::UnmapError;
use crate::kvm::ring::Recycle;
use crate::layout::{PageIndex, PageRun, Region};
use crate::page_set::PageSet;
use crate::vm::Paused;

/// Proof that every page of every session may be read: it is write-protected. Only a backend makes one, at the end of its
/// collecting, and it is used up before the tracker's lock is released.
pub(super) trait AllReadable {}

/// Proof that every page may be read that is not unprotected.
pub(super) trait ProtectedReadable {}

/// Proof that the pages that come with it may be read.
pub(super) trait TheseReadable {}

/// The pages between a backend and the next harvest of each session.
#[derive(Debug)]
pub(super) struct Pending {
    sessions: Vec<SessionPages>,
    next_key: u64,
    /// What was found and not yet distributed. Empty between two operations, unless one failed.
    fresh: PageSet,
    /// What sessions have left to the one that begins next.
    left_behind: PageSet,
    /// vCPUs, whose pages each session counts.
    vcpus: usize,
    /// A harvest collects: nobody asks afterwards which of the pages are new.
    harvesting: bool,
    /// Pages that an interrupted reset may have left writable with no entry to tell of later writes: dirty in
    /// every harvest, until their slots are protected anew.
    unsure: PageSet,
    /// How many pages of `unsure` were handed out since it was last empty.
    unsure_handed_out: u64,
    /// Dirty pages that may be written without an entry to tell of it. Every session has them, but those to which they were
    /// handed out while the guest stood still.
    unprotected: PageSet,
    /// Whether pages may be left unprotected, as they can be protected later; or why they cannot.
    may_leave: Result<(), UnmapError>,
    /// Whether KVM frees entries that name no slot, once it had to. For good.
    frees_unnamed: Option<bool>,
    /// An overflow lost entries: every page is dirty, and all of memory must be protected anew.
    pub(super) everything: bool,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self {
            sessions: Vec::new(),
            next_key: 0,
            fresh: PageSet::new(PageIndex(0)),
            left_behind: PageSet::new(PageIndex(0)),
            vcpus: 0,
            harvesting: false,
            unsure: PageSet::new(PageIndex(0)),
            unsure_handed_out: 0,
            unprotected: PageSet::new(PageIndex(0)),
            may_leave: Err(UnmapError::NotAsked),
            frees_unnamed: None,
            everything: false,
        }
    }

    /// Another session, which does not run yet.
    pub(super) fn add_session(&mut self) -> SessionKey {
        let key = SessionKey(self.next_key);
        self.next_key += 1;
        self.sessions.push(SessionPages::new(key, self.capacity(), self.vcpus));
        key
    }

    /// A session begins with an empty set, and with what was given back to it or left behind.
    pub(super) fn begin(&mut self, key: SessionKey) -> Result<(), TrackError> {
        let session = find(&mut self.sessions, key)?;
        session.forget();
        session.given_back.union(&self.left_behind);
        session.running = true;
        self.left_behind.clear();
        Ok(())
    }

    /// Every session stops and forgets its pages.
    pub(super) fn stop_all(&mut self) {
        for session in &mut self.sessions {
            session.running = false;
            session.forget();
        }
    }

    /// A session stops and forgets its pages.
    pub(super) fn stop(&mut self, key: SessionKey) -> Result<(), TrackError> {
        let session = find(&mut self.sessions, key)?;
        session.running = false;
        session.forget();
        Ok(())
    }

    /// The session that begins next has the pages of this one.
    pub(super) fn leave_behind(&mut self, key: SessionKey) -> Result<(), TrackError> {
        self.pauses_are_over();
        let session = find(&mut self.sessions, key)?;
        self.left_behind.union(&session.pages);
        self.left_behind.union(&session.given_back);
        // What may be dirty without a trace.
        self.left_behind.union(&self.unsure);
        Ok(())
    }

    /// The session and its pages are forgotten.
    pub(super) fn remove_session(&mut self, key: SessionKey) {
        self.sessions.retain(|session| session.key != key);
    }

    /// The session of this key.
    pub(super) fn session(&mut self, key: SessionKey) -> Result<&mut SessionPages, TrackError> {
        find(&mut self.sessions, key)
    }

    /// The session of this key, if it runs.
    pub(super) fn running_session(&mut self, key: SessionKey) -> Result<&mut SessionPages, TrackError> {
        let session = self.session(key)?;
        if session.running { Ok(session) } else { Err(TrackError::NotTracking) }
    }

    fn running(&mut self) -> impl Iterator<Item = &mut SessionPages> {
        self.sessions.iter_mut().filter(|session| session.running)
    }

    /// Whether any session runs.
    pub(super) fn is_tracking(&self) -> bool {
        self.sessions.iter().any(|session| session.running)
    }

    /// A vCPU more.
    pub(super) fn vcpu_attached(&mut self) {
        self.vcpus += 1;
        // Here, because nothing may be allocated on a vCPU's path.
        self.sessions.iter_mut().for_each(|session| session.vcpus.resize(self.vcpus, Default::default()));
    }

    /// The vCPU at this place is gone, and its ring is empty. Its pages are everybody's now.
    pub(super) fn vcpu_detached(&mut self, place: usize) {
        self.vcpus -= 1;
        for session in &mut self.sessions {
            session.others += session.vcpus.remove(place).taken;
        }
    }

    fn sets(&mut self) -> impl Iterator<Item = &mut PageSet> {
        let sets = self.sessions.iter_mut().flat_map(SessionPages::sets);
        sets.chain([&mut self.fresh, &mut self.left_behind, &mut self.unsure, &mut self.unprotected])
    }

    /// Guest RAM ends at `end` from now on; pages beyond have been removed.
    pub(super) fn resize(&mut self, end: PageIndex) {
        self.sets().for_each(|set| set.resize(end));
    }

    /// Where guest RAM ends.
    pub(super) fn capacity(&self) -> PageIndex {
        self.fresh.capacity()
    }

    /// These pages are no longer RAM.
    pub(super) fn remove_runs(&mut self, runs: &[PageRun]) {
        for set in self.sets() {
            runs.iter().for_each(|run| set.remove_run(*run));
        }
    }

    /// What was found and is no RAM leaves the sink.
    pub(super) fn remove_from_sink(&mut self, slots: &Slots) {
        let end = self.capacity();
        let sink = self.sink();
        if !sink.is_empty() {
            slots.holes(end).iter().for_each(|run| sink.remove_run(*run));
        }
    }

    /// All of these pages are dirty for every session.
    pub(super) fn insert_run(&mut self, run: PageRun) {
        self.running().for_each(|session| session.pages.insert_run(run));
    }

    /// While this is so, all that is dirty is collected, to be handed out to a session at once.
    pub(super) fn harvesting(&mut self, harvesting: bool) {
        self.harvesting = harvesting;
    }

    /// Whether what is found can go straight into the set of the only session. Else it goes through `fresh`, so that each
    /// session can tell what is new to it.
    fn goes_straight(&self) -> bool {
        self.harvesting && self.sessions.iter().filter(|session| session.running).count() == 1
    }

    /// Where a backend puts what it finds; [`distribute`](Self::distribute) must follow.
    pub(super) fn sink(&mut self) -> &mut PageSet {
        self.sinks().0
    }

    /// The same, and where it puts what it leaves unprotected as well.
    pub(super) fn sinks(&mut self) -> (&mut PageSet, &mut PageSet) {
        let straight = self.goes_straight();
        let session = self.sessions.iter_mut().find(|session| straight && session.running);
        (session.map_or(&mut self.fresh, |session| &mut session.pages), &mut self.unprotected)
    }

    /// Whether pages may be left unprotected from now on.
    pub(super) fn may_leave(&mut self, may_leave: Result<(), UnmapError>) {
        self.may_leave = match self.frees_unnamed {
            Some(false) => may_leave.and(Err(UnmapError::NotFreed)),
            _ => may_leave,
        };
    }

    /// KVM has freed entries that name no slot, or it has not.
    pub(super) fn frees_unnamed(&mut self, frees: bool) {
        if self.frees_unnamed.is_none() || !frees {
            self.frees_unnamed = Some(frees);
            self.may_leave(self.why_none_is_left());
        }
    }

    /// What becomes of the pages of a full ring.
    pub(super) fn full_rings(&self) -> FullRings {
        match (&self.may_leave, self.frees_unnamed) {
            (Err(_), _) => FullRings::Protected,
            (Ok(()), None) => FullRings::NotYetSeen,
            (Ok(()), Some(_)) => FullRings::LeftWritable,
        }
    }

    /// Why none may, if so.
    pub(super) fn why_none_is_left(&self) -> Result<(), UnmapError> {
        self.may_leave.clone()
    }

    /// How a ring is recycled when its pages are not about to be read.
    pub(super) fn recycle_early(&self) -> Recycle {
        if self.may_leave.is_ok() { Recycle::Leaving } else { Recycle::Protecting }
    }

    /// Pages could not be protected after all: all of memory is protected anew, and none is left unprotected any more.
    pub(super) fn cannot_protect(&mut self, error: UnmapError) {
        tracing::warn!(%error, "pages that a dirty ring was recycled without cannot be protected: every page is dirty");
        self.may_leave = Err(error);
        self.everything = true;
    }

    /// The pages that are unprotected.
    pub(super) fn unprotected(&self) -> &PageSet {
        &self.unprotected
    }

    /// These have been protected. Every session still has them.
    pub(super) fn these_are_protected(&mut self, _: &impl TheseReadable, runs: &[PageRun]) {
        self.pauses_are_over();
        runs.iter().for_each(|run| self.unprotected.remove_run(*run));
    }

    /// All have been protected.
    pub(super) fn all_are_protected(&mut self, _: &impl TheseReadable) {
        self.pauses_are_over();
        self.unprotected.clear();
    }

    /// What was handed out unprotected in a pause may have been written since.
    fn pauses_are_over(&mut self) {
        for session in self.sessions.iter_mut().filter(|session| session.running) {
            if session.handed_out_in.take().is_some() {
                session.pages.union(&self.unprotected);
            }
        }
    }

    /// Gives what is new to every session. It comes from the ring of the vCPU at place `vcpu`, of which `new` pages were
    /// not in the sink before; or not from a ring. Returns how many pages at least one session did not have.
    pub(super) fn distribute(&mut self, vcpu: Option<usize>, new: u64) -> u64 {
        let straight = if self.goes_straight() { new } else { 0 };
        let fresh = &mut self.fresh;
        let mut new_to_any = 0;
        for session in self.sessions.iter_mut().filter(|session| session.running) {
            let new = straight + if fresh.is_empty() { 0 } else { session.absorb(fresh) };
            new_to_any = new.max(new_to_any);
            match vcpu {
                Some(vcpu) => {
                    session.vcpus[vcpu].taken += new;
                    session.vcpus[vcpu].repeated = 0;
                }
                None => session.others += new,
            }
        }
        fresh.clear();
        new_to_any
    }

    /// An observation found the page in the ring of the vCPU at place `vcpu`, and it will come.
    pub(super) fn report(&mut self, vcpu: usize, page: PageIndex) {
        self.running().for_each(|session| session.report(vcpu, page));
    }

    pub(super) fn insert_unsure(&mut self, page: PageIndex) {
        self.unsure.insert(page);
    }

    /// The slots with unsure pages, once these have been handed out so often that handing out the slots once costs no more:
    /// then is the time to protect them anew. None before.
    pub(super) fn slots_better_protected_anew(&self, slots: &Slots) -> Vec<Region> {
        if self.unsure.is_empty() {
            return Vec::new();
        }
        let mut regions: Vec<Region> = slots.logged().copied().collect();
        regions.retain(|region| self.unsure.count_within(region.pages) > 0);
        let pages: u64 = regions.iter().map(|region| region.pages.pages).sum();
        if self.unsure_handed_out < pages {
            regions.clear();
        }
        regions
    }

    /// These pages have been protected, all of them, and may have been written before: whoever says so also says that they are
    /// dirty ([`insert_run`](Self::insert_run)), before any page is handed out.
    pub(super) fn is_protected_anew(&mut self, run: PageRun) {
        self.unsure.remove_run(run);
        self.unprotected.remove_run(run);
    }

    /// All slots were that had to be.
    pub(super) fn rearmed(&mut self) {
        self.unsure_handed_out = 0;
    }

    /// No session runs, and all of memory is protected anew or no longer logged.
    pub(super) fn forget(&mut self) {
        self.fresh.clear();
        self.unprotected.clear();
        self.unsure.clear();
        self.unsure_handed_out = 0;
        self.everything = false;
    }

    /// Whether a set of this capacity can take everything.
    pub(super) fn check_fits(&self, dirty: &PageSet) -> Result<(), TrackError> {
        let (capacity, needed) = (dirty.capacity(), self.capacity());
        if capacity < needed { Err(TrackError::SetTooSmall { capacity, needed }) } else { Ok(()) }
    }

    /// Adds all pages of a session to `dirty`.
    pub(super) fn hand_out(
        &mut self,
        _: impl AllReadable,
        key: SessionKey,
        dirty: &mut PageSet,
    ) -> Result<(), TrackError> {
        find(&mut self.sessions, key)?.hand_out(&self.unsure, dirty);
        self.unsure_handed_out += self.unsure.len();
        Ok(())
    }

    /// Adds all pages of a session to `dirty` while the guest stands still: then they may be read, protected or not. Others
    /// that write its memory do not heed its protection, and are logged without it.
    pub(super) fn hand_out_paused(
        &mut self,
        paused: &Paused,
        key: SessionKey,
        dirty: &mut PageSet,
    ) -> Result<(), TrackError> {
        let session = find(&mut self.sessions, key)?;
        let before = session.handed_out_in.replace(paused.number);
        if before.is_some_and(|before| before != paused.number) {
            session.pages.union(&self.unprotected);
        }
        session.hand_out(&self.unsure, dirty);
        self.unsure_handed_out += self.unsure.len();
        Ok(())
    }

    /// Adds the pages of a session that are protected to `dirty`, and the others, which stay with it, to `behind`.
    pub(super) fn hand_out_protected(
        &mut self,
        _: impl ProtectedReadable,
        key: SessionKey,
        dirty: &mut PageSet,
        behind: &mut Redirtied,
    ) -> Result<(), TrackError> {
        self.pauses_are_over();
        behind.add(&self.unprotected);
        find(&mut self.sessions, key)?.hand_out_all_but(&self.unprotected, &self.unsure, dirty);
        self.unsure_handed_out += self.unsure.len();
        Ok(())
    }

    /// Adds `runs` to `dirty`, which have just been protected. The other sessions still have them.
    pub(super) fn hand_out_these(
        &mut self,
        proof: &impl TheseReadable,
        key: SessionKey,
        runs: &[PageRun],
        dirty: &mut PageSet,
    ) -> Result<(), TrackError> {
        self.these_are_protected(proof, runs);
        find(&mut self.sessions, key)?.hand_out_runs(runs, dirty);
        Ok(())
    }

    /// The pages that a session has in one run, as `take` takes them out of its set.
    pub(super) fn hand_out_run<T>(
        &mut self,
        _: impl AllReadable,
        key: SessionKey,
        run: PageRun,
        take: impl FnOnce(&mut PageSet, PageRun) -> T,
    ) -> Result<T, TrackError> {
        self.unsure_handed_out += self.unsure.count_within(run);
        Ok(find(&mut self.sessions, key)?.hand_out_run(&self.unsure, run, take))
    }
}

fn find(sessions: &mut [SessionPages], key: SessionKey) -> Result<&mut SessionPages, TrackError> {
    sessions.iter_mut().find(|session| session.key == key).ok_or(TrackError::NotTracking)
}
