//! Entries that KVM frees without protecting their pages, because they name no slot.
//!
//! KVM's reset reads slot and offset from the entry, which user space may write, and passes over an entry whose address space
//! does not exist: it is counted and free (`kvm_reset_dirty_gfn`, 5.11 to 6.18). That is outside the documented ABI. So the name is
//! not overwritten but marked: where a kernel does not free such an entry, it gets its name back, and is then any other.

use std::sync::atomic::Ordering;

use super::{DirtyRing, Entry, RESET};

/// Makes the address space of a slot, its upper half, one that no KVM has: x86 has two, the others one.
const UNNAMED: u32 = 1 << 31;

impl Entry {
    /// From now on the entry names no slot.
    pub(super) fn take_name(&self) {
        let slot = self.slot.load(Ordering::Relaxed);
        self.slot.store(slot | UNNAMED, Ordering::Relaxed);
    }

    fn is_unnamed(&self) -> bool {
        self.slot.load(Ordering::Relaxed) & UNNAMED != 0
    }

    /// It names its slot again, if it named none.
    pub(super) fn give_name(&self) {
        let slot = self.slot.load(Ordering::Relaxed);
        if slot & UNNAMED != 0 {
            // Should KVM have freed the entry and filled it anew meanwhile, it has a name, and keeps that. The reset that is
            // to see this one is a system call of this thread.
            let (relaxed, named) = (Ordering::Relaxed, slot & !UNNAMED);
            let _ = self.slot.compare_exchange(slot, named, relaxed, relaxed);
        }
    }
}

impl DirtyRing {
    /// Whether entries that name no slot were taken since all were last confirmed.
    pub(crate) fn has_unnamed(&self) -> bool {
        self.unnamed
    }

    /// Whether the first of the taken entries that KVM has not reset names no slot.
    pub(crate) fn waits_at_unnamed(&self) -> bool {
        let taken = (0..self.unconfirmed()).map(|at| self.memory.entry(self.reset.wrapping_add(at)));
        let mut flagged = taken.filter(|entry| entry.flags.load(Ordering::Acquire) == RESET);
        flagged.next().is_some_and(Entry::is_unnamed)
    }

    /// Gives the entries that were taken and not confirmed their names back: a reset protects their pages now.
    pub(crate) fn name_again(&mut self) {
        for at in 0..self.unconfirmed() {
            self.memory.entry(self.reset.wrapping_add(at)).give_name();
        }
        self.unnamed = false;
    }
}
