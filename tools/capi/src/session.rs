//! A session: from its start on, each page that is dirtied comes with one of its harvests.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::sync::Arc;

use ringferry::track::{Leftover, Observed, Session as RustSession};
use ringferry::{DirtySource, Paused, SlotId};

use crate::handle::{Handle, array, borrow, give, out, take_back};
use crate::set::Set;
use crate::status::{Failure, Status, call, done};
use crate::tracker::{Shared, Tracker};

/// A period of tracking, of one consumer: a migration, a backup, a measurement. Several may be open at once, and each gets every
/// page that is dirtied while it is. Any thread may use it; calls wait for each other.
#[derive(Debug)]
pub struct Session {
    period: Period,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Session {
    const MARK: [u8; 8] = *b"rf sessn";
}

/// Tracking is on as long as this exists.
#[derive(Debug)]
struct Period {
    shared: Arc<Shared>,
    source: RustSession,
}

impl Period {
    fn start(shared: &Arc<Shared>) -> Result<Self, Failure> {
        Ok(Self { shared: Arc::clone(shared), source: shared.tracker.start()? })
    }

    /// Takes pages into a set that has room for all of guest RAM.
    fn harvest(
        &self,
        set: &Set,
        harvest: impl FnOnce(&RustSession, &mut ringferry::PageSet) -> Result<(), ringferry::TrackError>,
    ) -> Result<(), Failure> {
        let slots = self.shared.slots.lock();
        Ok(set.fill(slots.end(), |pages| harvest(&self.source, pages))?)
    }
}

/// What one vCPU dirtied.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VcpuPages {
    /// Its index, as rf_vcpu_attach() was given it.
    pub index: u32,
    /// Pages since the last harvest that this vCPU was the first to dirty.
    pub pages: u64,
}

/// Begins a session: what is dirtied from here on will be harvested. Call it on a thread that no vCPU waits for: it
/// write-protects all memory.
///
/// # Safety
///
/// `tracker` is a tracker or NULL; `session` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_start(tracker: *const Tracker, session: *mut *mut Session) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let session = out(session, "session")?;
        let period = Period::start(&tracker.shared)?;
        // SAFETY: the caller's promise.
        unsafe { give(session, Session { period }) };
        Ok(())
    })
}

/// Ends the session and frees the handle, whatever it returns. Its pages are forgotten. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_end(session: *mut Session) -> Status {
    // SAFETY: the caller's promise.
    unsafe { end(session, Leftover::Forget) }
}

/// The same, but pages that were dirtied and not harvested, and those that were given back, are dirty in the session that begins
/// next.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_end_giving_back(session: *mut Session) -> Status {
    // SAFETY: the caller's promise.
    unsafe { end(session, Leftover::GiveBack) }
}

/// # Safety
///
/// As for rf_session_end().
unsafe fn end(session: *mut Session, leftover: Leftover) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let session = unsafe { take_back(session, "session") }?;
        Ok(session.map_or(Ok(()), |session| session.period.source.end(leftover))?)
    })
}

/// What was dirtied since the last harvest, by vCPU. The pages stay writable, and the guest feels nothing: look as often as you
/// like, a rate needs two looks. Up to `capacity` elements go to `vcpus`, in the order of attachment; `count` is the number
/// of vCPUs, which may be larger.
///
/// RF_UNOBSERVABLE: the bitmap knows nothing before a harvest; `count` is 0. A rate is then unknown, and not 0.
///
/// # Safety
///
/// `session` is a session or NULL. `vcpus` has `capacity` elements, or is NULL with `capacity` 0. `count` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_observe(
    session: *const Session,
    vcpus: *mut VcpuPages,
    capacity: usize,
    count: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let places = unsafe { array(vcpus, capacity, "vcpus") }?;
        let count = out(count, "count")?;
        let source = &period.source;
        let observed = source.observe()?;
        let (status, found) = match observed {
            Observed::PerVcpu { vcpus: pages, .. } => {
                let attached = source.vcpus();
                for ((place, pages), vcpu) in places.iter_mut().zip(&pages).zip(&attached) {
                    // `rf_vcpu_attach` takes no larger one.
                    let index = u32::try_from(vcpu.index()).unwrap_or(u32::MAX);
                    place.write(VcpuPages { index, pages: *pages });
                }
                (Status::Ok, pages.len())
            }
            _ => (Status::Unobservable, 0),
        };
        // SAFETY: the caller's promise.
        unsafe { count.put(found) };
        Ok(status)
    })
}

/// Adds to `set` all pages that were dirtied since the last harvest, each write-protected again by the time this returns: now
/// their content may be read. The guest may run meanwhile.
///
/// After an error the set is as before, and the next harvest hands the pages out.
///
/// # Safety
///
/// `session` is a session or NULL, `set` a set or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_harvest(session: *const Session, set: *const Set) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        period.harvest(set, |source, pages| source.harvest(pages))
    })
}

/// The last and complete harvest. Call it when nothing writes guest memory any more: every vCPU is outside KVM_RUN, devices have
/// stopped, and their state is saved, as saving writes guest memory itself. Whoever calls it earlier loses pages.
///
/// # Safety
///
/// As for rf_session_harvest().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_harvest_final(session: *const Session, set: *const Set) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        // The header demands what Rust has types for.
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        let settled = paused.declare_nothing_else_writes();
        period.harvest(set, |source, pages| source.harvest_final(&settled, pages))
    })
}

/// Marks the pages of `set` dirty again, because they were harvested and did not arrive. They come with the next harvest of this
/// session, or of the next one if it ends with rf_session_end_giving_back().
///
/// # Safety
///
/// As for rf_session_harvest().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_give_back(session: *const Session, set: *const Set) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        set.read(|pages| period.source.give_back(pages));
        Ok(())
    })
}

/// What KVM_GET_DIRTY_LOG would say of one slot, for code that has asked KVM so far: bit 0 of the first word is the slot's first
/// page. The pages are write-protected again, and leave the session; those of other slots stay. A slot of n pages has
/// (n + 63) / 64 words. RF_BUFFER_TOO_SMALL takes nothing; words behind the slot's last stay as they are.
///
/// # Safety
///
/// `session` is a session or NULL. `words` has `word_count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_take_slot_bitmap(
    session: *const Session,
    slot: u32,
    words: *mut u64,
    word_count: usize,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let places = unsafe { array(words, word_count, "words") }?;
        let slots = period.shared.slots.lock();
        let needed = slots.get(slot)?.pages.div_ceil(u64::BITS.into());
        if (places.len() as u64) < needed {
            let text = "the bitmap of the slot has more words than the buffer";
            return Err(Failure::With(Status::BufferTooSmall, text, needed));
        }
        let taken = period.source.take_slot_bitmap(SlotId(slot))?;
        for (place, word) in places.iter_mut().zip(taken) {
            place.write(word);
        }
        Ok(())
    })
}

/// The same as runs: adds the slot's dirty pages to `set`. A large slot with few of them costs what is dirty in it.
///
/// # Safety
///
/// As for rf_session_harvest().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_session_take_slot(session: *const Session, slot: u32, set: *const Set) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let period = &unsafe { borrow(session, "session") }?.period;
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        period.shared.slots.lock().get(slot)?;
        period.harvest(set, |source, pages| {
            source.take_slot_runs(SlotId(slot))?.for_each(|run| pages.insert_run(run));
            Ok(())
        })
    })
}
