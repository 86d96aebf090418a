//! KVM's end of a ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_UNKNOWN};

use crate::kvm::ring::{DIRTY, Entry, RESET};
use crate::layout::SlotId;

/// Of x86, with system management mode.
pub(super) const ADDRESS_SPACES: u32 = 2;

/// What a kernel does with ring entries that are to be reset and name no slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum UnnamedEntries {
    /// It frees them, as all released kernels do.
    Freed,
    /// It frees them and protects their pages: it has kept to itself which they are.
    Protected,
    /// It stops at them.
    Kept,
    /// It stops at them, and refuses the reset.
    Refused,
}

/// One ring, as KVM has it.
pub(super) struct FakeRing {
    pub(super) entries: Arc<[Entry]>,
    pub(super) exit_reason: Arc<AtomicU32>,
    pub(super) dirty_index: u32,
    pub(super) reset_index: u32,
    pub(super) soft_limit: u32,
    /// What the CPU has logged and KVM has not yet pushed.
    pub(super) cpu_log: Vec<(SlotId, u64)>,
    pub(super) cpu_log_entries: usize,
    /// The slot of what was pushed last, by place in the ring.
    pushed: Vec<u32>,
}

impl FakeRing {
    pub(super) fn new(
        entries: Arc<[Entry]>,
        exit_reason: Arc<AtomicU32>,
        position: u32,
        soft_limit: u32,
        cpu_log_entries: usize,
    ) -> Self {
        let pushed = vec![0; entries.len()];
        let (dirty_index, reset_index, cpu_log) = (position, position, Vec::new());
        Self { entries, exit_reason, dirty_index, reset_index, soft_limit, cpu_log, cpu_log_entries, pushed }
    }

    pub(super) fn used(&self) -> u32 {
        self.dirty_index.wrapping_sub(self.reset_index)
    }

    pub(super) fn entry(&self, position: u32) -> &Entry {
        &self.entries[position as usize % self.entries.len()]
    }

    /// `kvm_dirty_ring_push`, which does not look whether there is room.
    pub(super) fn push(&mut self, slot: SlotId, offset: u64) {
        let entry = &self.entries[self.dirty_index as usize % self.entries.len()];
        entry.slot.store(slot.0, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        let at = self.dirty_index as usize % self.entries.len();
        self.pushed[at] = slot.0;
        // As strong as `smp_wmb()` and a plain store.
        entry.flags.store(DIRTY, Ordering::Release);
        self.dirty_index = self.dirty_index.wrapping_add(1);
    }

    /// `KVM_RUN` up to the check of the soft limit; false if the vCPU comes back at once.
    pub(super) fn enters_guest(&mut self) -> bool {
        let full = self.used() >= self.soft_limit;
        let reason = if full { KVM_EXIT_DIRTY_RING_FULL } else { KVM_EXIT_UNKNOWN };
        self.exit_reason.store(reason, Ordering::Relaxed);
        if full {
            self.flush_cpu_log();
        }
        !full
    }

    pub(super) fn flush_cpu_log(&mut self) {
        for (slot, offset) in std::mem::take(&mut self.cpu_log) {
            self.push(slot, offset);
        }
    }

    /// The slot that KVM itself gave the entry.
    pub(super) fn pushed(&self, position: u32) -> u32 {
        self.pushed[position as usize % self.entries.len()]
    }

    /// Whether the next entry to reset names no slot.
    pub(super) fn waits_at_unnamed(&self) -> bool {
        let entry = self.entry(self.reset_index);
        entry.flags.load(Ordering::Acquire) & RESET != 0
            && entry.slot.load(Ordering::Relaxed) >> 16 >= ADDRESS_SPACES
    }
}
