//! What tracking did and what it cost, in structs that may grow with the ABI's minor version.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::ptr;

use crate::handle::borrow;
use crate::status::{Failure, Status, done};
use crate::tracker::Tracker;

/// What tracking did. Sums are since the tracker was made.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Figures {
    /// vCPUs that were attached.
    pub vcpus: u64,
    /// Harvests handed out, of all memory or of one slot.
    pub harvests: u64,
    /// Time spent in taking entries, or in getting and scanning bitmaps, in nanoseconds.
    pub harvest_ns: u64,
    /// Calls of KVM_RESET_DIRTY_RINGS, or of KVM_CLEAR_DIRTY_LOG.
    pub resets: u64,
    /// Time spent in them, in nanoseconds.
    pub reset_ns: u64,
    /// Entries that they reset.
    pub entries_reset: u64,
    /// How many of them were interrupted.
    pub short_resets: u64,
    /// Entries that named a slot the tracker does not have, or a page beyond its end: rf_tracker_add_slot() was forgotten.
    pub unknown_slot_entries: u64,
    /// Times that memory was declared dirty and protected anew, after an overflow or interrupted resets.
    pub rearms: u64,
}

/// What one vCPU did. Sums are since it was attached.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct VcpuFigures {
    /// Its index, as rf_vcpu_attach() was given it.
    pub index: u64,
    /// Pages that it was the first to dirty since a harvest.
    pub pages: u64,
    /// Entries whose page was dirty already.
    pub duplicate_entries: u64,
    /// Times that it left the guest because its ring was full.
    pub ring_full_exits: u64,
    /// Time spent in taking its entries, on whatever thread, in nanoseconds.
    pub harvest_ns: u64,
    /// Entries in the ring at the last look.
    pub ring_entries: u64,
    /// The most that `ring_entries` ever was.
    pub ring_entries_max: u64,
    /// Times that the ring overflowed, so that every page was declared dirty.
    pub overflows: u64,
    /// Time for which its gate was closed to it, in nanoseconds.
    pub throttled_ns: u64,
}

/// Copies the first `bytes` bytes of a struct, 0 behind it: a caller that was compiled with another minor version gets what it
/// knows.
///
/// # Safety
///
/// `to` is NULL, or `bytes` bytes behind it can be written.
unsafe fn copy<T: Copy>(from: &T, to: *mut T, bytes: usize, name: &'static str) -> Result<(), Failure> {
    if to.is_null() {
        return Err(Failure::Null(name));
    }
    let known = bytes.min(size_of::<T>());
    let to = to.cast::<u8>();
    // SAFETY: `from` has `known` bytes, none of them padding, as all fields are 8 bytes long; `to` has `bytes`, by the
    // caller's promise, and is no Rust value.
    unsafe {
        ptr::copy_nonoverlapping(ptr::from_ref(from).cast::<u8>(), to, known);
        ptr::write_bytes(to.add(known), 0, bytes - known);
    }
    Ok(())
}

/// The figures of the whole VM. Pass `sizeof *figures` as `bytes`.
///
/// # Safety
///
/// `tracker` is a tracker or NULL; `bytes` bytes of `figures` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_figures(
    tracker: *const Tracker,
    figures: *mut Figures,
    bytes: usize,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let now = tracker.shared.tracker.snapshot();
        let found = Figures {
            vcpus: now.vcpus.len() as u64,
            harvests: now.harvests,
            harvest_ns: now.harvest_ns,
            resets: now.resets,
            reset_ns: now.reset_ns,
            entries_reset: now.entries_reset,
            short_resets: now.short_resets,
            unknown_slot_entries: now.unknown_slot_entries,
            rearms: now.rearms,
        };
        // SAFETY: the caller's promise.
        unsafe { copy(&found, figures, bytes, "figures") }
    })
}

/// The figures of the `nth` vCPU in the order of attachment, from 0; RF_VCPU_UNKNOWN if there are fewer. Pass
/// `sizeof *figures` as `bytes`.
///
/// # Safety
///
/// `tracker` is a tracker or NULL; `bytes` bytes of `figures` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_vcpu_figures(
    tracker: *const Tracker,
    nth: usize,
    figures: *mut VcpuFigures,
    bytes: usize,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let now = tracker.shared.tracker.snapshot();
        let Some(vcpu) = now.vcpus.get(nth) else {
            return Err(Failure::With(Status::VcpuUnknown, "fewer vCPUs are attached", nth as u64));
        };
        let found = VcpuFigures {
            index: vcpu.index as u64,
            pages: vcpu.pages,
            duplicate_entries: vcpu.duplicate_entries,
            ring_full_exits: vcpu.ring_full_exits,
            harvest_ns: vcpu.harvest_ns,
            ring_entries: vcpu.ring_entries,
            ring_entries_max: vcpu.ring_entries_max,
            overflows: vcpu.overflows,
            throttled_ns: vcpu.throttled_ns,
        };
        // SAFETY: the caller's promise.
        unsafe { copy(&found, figures, bytes, "figures") }
    })
}
