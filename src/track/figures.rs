//! What tracking did and what it cost, counted while it happens and readable at any time from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::gate::Gate;

/// A count that many threads may add to. Relaxed throughout: a figure orders nothing.
#[derive(Default, Debug)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The time since `started`, in nanoseconds; returns it.
    pub(super) fn add_since(&self, started: Instant) -> u64 {
        let ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.add(ns);
        ns
    }

    pub(super) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(super) fn raise_to(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One vCPU's counters. Sums are since it was attached.
#[derive(Default, Debug)]
pub(super) struct VcpuCounters {
    pub(super) pages: Counter,
    pub(super) duplicates: Counter,
    pub(super) ring_full_exits: Counter,
    pub(super) harvest_ns: Counter,
    pub(super) occupancy: Counter,
    pub(super) occupancy_max: Counter,
    pub(super) overflows: Counter,
}

/// The VM's counters, for what cannot be told apart by vCPU.
#[derive(Default, Debug)]
pub(super) struct VmCounters {
    pub(super) harvests: Counter,
    pub(super) harvest_ns: Counter,
    pub(super) resets: Counter,
    pub(super) reset_ns: Counter,
    pub(super) entries_reset: Counter,
    pub(super) short_resets: Counter,
    pub(super) foreign_resets: Counter,
    pub(super) unknown_slot_entries: Counter,
    pub(super) rearms: Counter,
    pub(super) protects: Counter,
    pub(super) protect_ns: Counter,
}

/// What becomes of the pages of a ring that is full, or nearly, before anybody wants to read them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum FullRings {
    /// Each is protected, and costs its guest a fault at its next write:
    /// [`recycles_without_protecting`](super::DirtyTracker::recycles_without_protecting) says why. So it is before anybody tracks, too.
    #[default]
    Protected,
    /// They are to stay writable, and no ring was full yet. Only a ring that a vCPU has filled can show whether KVM plays along; if it
    /// does not, this and all later ones are recycled with protection, and nothing is lost.
    NotYetSeen,
    /// They stay writable, and KVM was seen to play along.
    LeftWritable,
}

/// What one vCPU did. Sums are since it was attached.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct VcpuFigures {
    /// The VMM's index of the vCPU.
    pub index: usize,
    /// Entries taken whose page was not dirty yet: pages that this vCPU was the first to dirty since a harvest.
    pub pages: u64,
    /// Entries taken whose page was dirty already: emulated writes, or a ring recycled between two harvests.
    pub duplicate_entries: u64,
    /// Times that the vCPU left the guest because its ring was full.
    pub ring_full_exits: u64,
    /// Time spent in taking its entries, on whatever thread, in nanoseconds.
    pub harvest_ns: u64,
    /// Entries in the ring at the last observation.
    pub ring_entries: u64,
    /// The most that `ring_entries` ever was.
    pub ring_entries_max: u64,
    /// Times that the ring overflowed, so that every page was declared dirty.
    pub overflows: u64,
    /// Time for which its gate was closed to it, in nanoseconds.
    pub throttled_ns: u64,
    /// Times that it found its gate closed and waited.
    pub stalls: u64,
    /// Of these, stalls that began in the guest's kernel, and in a program of it. Of the others nobody said where:
    /// [`before_run_in`](super::VcpuHandle::before_run_in) does.
    pub stalls_in_kernel: u64,
    /// See `stalls_in_kernel`.
    pub stalls_in_user: u64,
    /// Stalls that were put off for a moment because the guest was in its kernel.
    pub stalls_put_off: u64,
}

/// What tracking did. Sums are since the tracker was made.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct Figures {
    /// Each vCPU, in the order of attachment.
    pub vcpus: Vec<VcpuFigures>,
    /// Harvests handed out, of all memory or of one slot.
    pub harvests: u64,
    /// Time spent in taking entries, of all vCPUs, or in getting and scanning bitmaps, in nanoseconds.
    pub harvest_ns: u64,
    /// Calls of `KVM_RESET_DIRTY_RINGS`, or of `KVM_CLEAR_DIRTY_LOG`.
    pub resets: u64,
    /// Time spent in them, in nanoseconds.
    pub reset_ns: u64,
    /// Entries that they reset.
    pub entries_reset: u64,
    /// How many of them were interrupted: they reset fewer entries than were flagged.
    pub short_resets: u64,
    /// Times that another thread of the VMM had reset entries that the tracker had flagged, so that every page was
    /// declared dirty: the VMM must leave `KVM_RESET_DIRTY_RINGS` to the tracker.
    pub foreign_resets: u64,
    /// Entries that named a slot the tracker does not have, or a page beyond its end.
    pub unknown_slot_entries: u64,
    /// Times that memory was declared dirty and protected anew: all of it after an overflow, or the slots in which
    /// interrupted resets had left pages unprotected.
    pub rearms: u64,
    /// What becomes of the pages of a full ring.
    pub full_rings: FullRings,
    /// Calls that protected pages which rings had been recycled without.
    pub protects: u64,
    /// Time spent in them, in nanoseconds.
    pub protect_ns: u64,
}

impl VmCounters {
    pub(super) fn figures(&self, vcpus: Vec<VcpuFigures>, full_rings: FullRings) -> Figures {
        Figures {
            vcpus,
            full_rings,
            harvests: self.harvests.get(),
            harvest_ns: self.harvest_ns.get(),
            resets: self.resets.get(),
            reset_ns: self.reset_ns.get(),
            entries_reset: self.entries_reset.get(),
            short_resets: self.short_resets.get(),
            foreign_resets: self.foreign_resets.get(),
            unknown_slot_entries: self.unknown_slot_entries.get(),
            rearms: self.rearms.get(),
            protects: self.protects.get(),
            protect_ns: self.protect_ns.get(),
        }
    }
}

impl VcpuCounters {
    pub(super) fn figures(&self, index: usize, gate: &Gate) -> VcpuFigures {
        let stalls = gate.stalls();
        VcpuFigures {
            index,
            pages: self.pages.get(),
            duplicate_entries: self.duplicates.get(),
            ring_full_exits: self.ring_full_exits.get(),
            harvest_ns: self.harvest_ns.get(),
            ring_entries: self.occupancy.get(),
            ring_entries_max: self.occupancy_max.get(),
            overflows: self.overflows.get(),
            throttled_ns: gate.throttled_ns(),
            stalls: stalls.in_kernel + stalls.in_user + stalls.anywhere,
            stalls_in_kernel: stalls.in_kernel,
            stalls_in_user: stalls.in_user,
            stalls_put_off: stalls.put_off,
        }
    }
}
