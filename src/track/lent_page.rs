//! The page of words that a VMM shares with the process that follows its rings: the gates, who waits for room in its
//! ring, and how far each ring has been taken. No message is needed to throttle a vCPU, and nothing has to be asked of a
//! process that died.

use std::sync::atomic::{AtomicU32, AtomicU64};
#[cfg(feature = "offload")]
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

#[cfg(feature = "offload")]
use crate::os::futex::{self, Waiters, monotonic_ns};
#[cfg(feature = "offload")]
use crate::os::shared::{Record, Shared};

/// The words of one gate, in a heap or in a lent page.
#[repr(C)]
#[derive(Default, Debug)]
pub(super) struct GateWords {
    /// `CLOCK_MONOTONIC` in nanoseconds at which the gate opens by itself; some values are names, see `gate`.
    pub(super) opens_at_ns: AtomicU64,
    pub(super) throttled_ns: AtomicU64,
    pub(super) counted_passes: AtomicU64,
    /// The futex: changes when `opens_at_ns` does.
    pub(super) changes: AtomicU32,
}

/// The words of one gate that times its vCPU's runs, and what it counts of stalls. Zero: it does not.
#[repr(C)]
#[derive(Default, Debug)]
pub(super) struct RunWords {
    /// 1 if the vCPU's thread has a timer.
    pub(super) timed: AtomicU32,
    /// 1 while the vCPU waits at its gate: it need not be kicked.
    pub(super) waits: AtomicU32,
    /// How long the vCPU runs once its gate has opened, and how long its gate then stays closed if nobody says otherwise.
    /// The first is 0 if it runs as long as it likes, and again once the run has begun.
    pub(super) run_ns: AtomicU64,
    pub(super) stall_ns: AtomicU64,
    /// How long the vCPU had a CPU in timed runs that came to their end.
    pub(super) ran_ns: AtomicU64,
    /// Stalls that began in the guest's user mode, in its kernel mode, and where nobody knows.
    pub(super) stalls_in_user: AtomicU64,
    pub(super) stalls_in_kernel: AtomicU64,
    pub(super) stalls_anywhere: AtomicU64,
    /// Stalls that were put off because the guest was in its kernel.
    pub(super) stalls_put_off: AtomicU64,
}

/// One vCPU's part of the page. The first one's `bell` is the page's. New words go to its end.
#[cfg(feature = "offload")]
#[repr(C, align(128))]
#[derive(Default, Debug)]
pub(crate) struct LentVcpu {
    pub(super) gate: GateWords,
    /// 1 while the vCPU waits for room in its ring; a futex.
    full: AtomicU32,
    /// Entries taken from its ring, modulo 2³². What was taken since then is still flagged: KVM resets nothing that the
    /// VMM was not asked to reset after this was stored.
    pub(super) taken: AtomicU32,
    /// Counts vCPUs that began to wait; a futex.
    bell: AtomicU32,
    /// Counts signs of life of the process that follows the rings.
    alive: AtomicU32,
    pub(super) run: RunWords,
}

#[cfg(feature = "offload")]
const _: () = assert!(size_of::<LentVcpu>() == 128);

#[cfg(feature = "offload")]
#[expect(unsafe_code, reason = "the trait is a promise about the layout")]
// SAFETY: `repr(C)`, of atomics only, and 32 of them make a page.
unsafe impl Record for LentVcpu {}

/// One page (or a few) for all vCPUs of a VM, in the order of their attachment.
#[cfg(feature = "offload")]
pub(crate) type LentPage = Shared<LentVcpu>;

/// A vCPU waits so long for room at a time: a signal ends the wait, and KVM says "full" again if there is none.
#[cfg(feature = "offload")]
const ROOM_WAIT: Duration = Duration::from_millis(5);

#[cfg(feature = "offload")]
fn after(wait: Duration) -> u64 {
    monotonic_ns().saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX))
}

/// The calling vCPU, number `at` of the page, has a full ring: tells whoever follows it, and waits a moment.
#[cfg(feature = "offload")]
pub(super) fn wait_for_room(page: &LentPage, at: usize) {
    let Some(vcpu) = page.get(at) else { return };
    // Release, pairs with the acquire of `next_full`: who hears the bell sees who rang.
    vcpu.full.store(1, Ordering::Release);
    ring_bell(page);
    futex::wait(&vcpu.full, Waiters::Everybody, 1, after(ROOM_WAIT));
}

/// Wakes whoever waits for the bell.
#[cfg(feature = "offload")]
pub(crate) fn ring_bell(page: &LentPage) {
    if let Some(first) = page.first() {
        first.bell.fetch_add(1, Ordering::Release);
        futex::wake_all(&first.bell, Waiters::Everybody);
    }
}

/// vCPU number `at` has room.
#[cfg(feature = "offload")]
pub(crate) fn has_room(page: &LentPage, at: usize) {
    if let Some(vcpu) = page.get(at)
        && vcpu.full.swap(0, Ordering::Release) == 1
    {
        futex::wake_all(&vcpu.full, Waiters::Everybody);
    }
}

/// The bell's count, to be waited with.
#[cfg(feature = "offload")]
pub(crate) fn bell(page: &LentPage) -> u32 {
    page.first().map_or(0, |first| first.bell.load(Ordering::Acquire))
}

/// Waits until the bell's count is another than `heard`, for `limit`.
#[cfg(feature = "offload")]
pub(crate) fn wait_for_bell(page: &LentPage, heard: u32, limit: Duration) {
    if let Some(first) = page.first() {
        futex::wait(&first.bell, Waiters::Everybody, heard, after(limit));
    }
}

/// Which vCPUs wait for room.
#[cfg(feature = "offload")]
pub(crate) fn full_vcpus(page: &LentPage) -> impl Iterator<Item = usize> {
    page.iter().enumerate().filter(|(_, vcpu)| vcpu.full.load(Ordering::Acquire) == 1).map(|(at, _)| at)
}

/// The process that follows the rings lives.
#[cfg(feature = "offload")]
pub(crate) fn show_life(page: &LentPage) {
    if let Some(first) = page.first() {
        first.alive.fetch_add(1, Ordering::Relaxed);
    }
}

/// How often it has shown that.
#[cfg(feature = "offload")]
pub(crate) fn signs_of_life(page: &LentPage) -> u32 {
    page.first().map_or(0, |first| first.alive.load(Ordering::Relaxed))
}

/// A gate's place in a lent page.
#[cfg(feature = "offload")]
#[derive(Clone, Debug)]
pub(super) struct LentGate {
    page: Arc<LentPage>,
    at: usize,
}

#[cfg(feature = "offload")]
impl LentGate {
    /// Number `at` of the page, if it has so many.
    pub(super) fn new(page: &Arc<LentPage>, at: usize) -> Option<Self> {
        (at < page.len()).then(|| Self { page: Arc::clone(page), at })
    }

    pub(super) fn words(&self) -> (&GateWords, &RunWords) {
        // In range since `new`, and a page keeps its length.
        let vcpu = &self.page[self.at];
        (&vcpu.gate, &vcpu.run)
    }
}
