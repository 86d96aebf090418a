//! A ring that nobody follows for a while: a vCPU is unplugged, and VMMs keep its descriptor to plug it in again, as KVM never
//! frees a vCPU.
//!
//! KVM keeps its position in the ring to itself and goes on from there. So whoever leaves a ring notes in it how far it was
//! taken: in slot and offset of every empty entry, which KVM overwrites when it fills one, and does not read before.

use std::sync::atomic::Ordering;

use super::{DirtyRing, EMPTY, RingMemory};

/// A slot that no VM has: its address space is beyond all that KVM has, and its number beyond the highest.
const NO_SLOT: u32 = u32::MAX;

/// The lower half of a note's offset. No page has such a slot and offset.
const IN_STEP: u64 = 0x7266_6c65;
const SUSPECT: u64 = 0x7266_7375;

/// How a ring was left.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Left {
    pub(super) position: u32,
    /// Entries that nobody can see may hide in it.
    pub(super) suspect: bool,
}

impl RingMemory {
    /// What the note says. A ring that nobody has left begins at 0.
    pub(super) fn left(&self) -> Left {
        let entries = (0..self.size.entries()).map(|at| self.entry(at));
        // Acquire: the entry is KVM's until it fills it, and its note was there before.
        let mut empty = entries.filter(|entry| entry.flags.load(Ordering::Acquire) == EMPTY);
        // Every empty one has the note, or none.
        let Some(first) = empty.next() else { return Left { position: 0, suspect: true } };
        let note = first.offset.load(Ordering::Relaxed);
        let position = u32::try_from(note >> 32).unwrap_or(0);
        match (first.slot.load(Ordering::Relaxed), note & u64::from(u32::MAX)) {
            (NO_SLOT, IN_STEP) => Left { position, suspect: false },
            (NO_SLOT, SUSPECT) => Left { position, suspect: true },
            _ => Left::default(),
        }
    }
}

impl DirtyRing {
    /// Leaves the ring, all of whose entries were taken and reset, while its vCPU is outside the guest.
    pub(crate) fn leave(self, suspect: bool) {
        let note = u64::from(self.fetch) << 32 | if suspect { SUSPECT } else { IN_STEP };
        for at in 0..self.size().entries() {
            let entry = self.memory.entry(at);
            if entry.flags.load(Ordering::Acquire) == EMPTY {
                entry.slot.store(NO_SLOT, Ordering::Relaxed);
                entry.offset.store(note, Ordering::Relaxed);
            }
        }
    }

    /// Whether it was suspect when it was left.
    pub(crate) fn was_left_suspect(&self) -> bool {
        self.left_suspect
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::super::{DIRTY, Entry};
    use super::*;
    use crate::kvm::RingSize;

    fn ring(entries: &Arc<[Entry]>, position: u32) -> DirtyRing {
        DirtyRing::over(Arc::clone(entries), Arc::new(AtomicU32::new(0)), RingSize::MIN, position)
    }

    #[test]
    fn a_ring_that_was_left_says_how_far_it_was_taken() {
        let entries: Arc<[Entry]> = (0..RingSize::MIN.entries()).map(|_| Entry::default()).collect();
        assert_eq!(ring(&entries, 0).memory.left(), Left::default(), "a new ring");
        let position = u32::MAX - 3;
        ring(&entries, position).leave(false);
        // KVM goes on with the entry that is next, and with all that has room.
        for at in 0..RingSize::MIN.entries() - 1 {
            assert_eq!(ring(&entries, 0).memory.left(), Left { position, suspect: false });
            let next = ring(&entries, 0);
            let entry = next.memory.entry(position.wrapping_add(at));
            entry.slot.store(1, Ordering::Relaxed);
            entry.offset.store(7, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
        }
    }

    #[test]
    fn a_ring_that_was_suspect_or_is_full_of_entries_is_suspect_afterwards() {
        let entries: Arc<[Entry]> = (0..RingSize::MIN.entries()).map(|_| Entry::default()).collect();
        ring(&entries, 12).leave(true);
        assert_eq!(ring(&entries, 0).memory.left(), Left { position: 12, suspect: true });
        entries.iter().for_each(|entry| entry.flags.store(DIRTY, Ordering::Release));
        assert!(ring(&entries, 0).memory.left().suspect);
    }
}
