//! Pushes read off the rings' own indices: what a vCPU pushed is how far its `dirty_index` went on.
//!
//! The kernel adds one to it in `kvm_dirty_ring_push` and nowhere else, and never takes it back while the vCPU exists: not
//! when logging is switched off and on, not when the ring is recycled or overflows. So this is exact and costs the guest
//! nothing. It can only be looked at while a descriptor of the vCPU is open: what it pushed after the last look, or the
//! last full ring or recycling, is not seen when it ends; and a vCPU that looks like the last one in the same memory is
//! taken for it, if its index is not behind. `profiler` feeds this from the inventory.

use std::collections::HashMap;

use crate::inventory::VmId;
use crate::{Inventory, RingId, Vcpu, Vm};

/// A vCPU, as it was when it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pushed {
    pub vm: VmId,
    pub pid: u32,
    pub creator_tid: u32,
    pub vcpu: u32,
    /// Pushes since the profiler was attached.
    pub pushes: u64,
    /// The index up to which they are counted.
    pub index: u32,
}

/// All vCPUs with rings.
#[derive(Debug, Default)]
pub(crate) struct RingIndices {
    running: HashMap<RingId, Pushed>,
}

impl RingIndices {
    /// What was pushed before `inventory` does not count.
    pub(crate) fn begin(inventory: &Inventory) -> Self {
        let mut indices = Self::default();
        indices.look(inventory);
        indices.running.values_mut().for_each(|pushed| pushed.pushes = 0);
        indices
    }

    /// Counts on. Returns the vCPUs that are gone.
    pub(crate) fn look(&mut self, inventory: &Inventory) -> Vec<(RingId, Pushed)> {
        let mut before = std::mem::take(&mut self.running);
        let mut gone = Vec::new();
        for (vm, vcpu) in with_rings(inventory) {
            // One that was not there before has pushed all of it since.
            let new = Pushed {
                vm: vm.id,
                pid: vm.pid,
                creator_tid: vm.creator_tid,
                vcpu: vcpu.vcpu,
                pushes: u64::from(vcpu.dirty_index),
                index: vcpu.dirty_index,
            };
            let now = match before.remove(&vcpu.ring) {
                Some(old) if old.goes_on_as(&new) => {
                    Pushed { pushes: old.pushes + u64::from(new.index.wrapping_sub(old.index)), ..new }
                }
                Some(old) => {
                    gone.push((vcpu.ring, old));
                    new
                }
                None => new,
            };
            self.running.insert(vcpu.ring, now);
        }
        gone.extend(before);
        gone
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = (RingId, Pushed)> {
        self.running.iter().map(|(ring, pushed)| (*ring, *pushed))
    }

    pub(crate) fn is_running(&self, ring: RingId) -> bool {
        self.running.contains_key(&ring)
    }
}

impl Pushed {
    /// Whether `later` can be the same vCPU. An index goes on, by less than half of its range between two looks.
    fn goes_on_as(&self, later: &Self) -> bool {
        let same = |it: &Self| (it.vm, it.pid, it.creator_tid, it.vcpu);
        same(self) == same(later) && later.index.wrapping_sub(self.index) < 1 << 31
    }

    /// Adds what was pushed up to `index`, which was seen after the last look, if it was.
    pub(crate) fn and_up_to(self, index: u32) -> Self {
        let more = index.wrapping_sub(self.index);
        if more < 1 << 31 { Self { pushes: self.pushes + u64::from(more), index, ..self } } else { self }
    }
}

fn with_rings(inventory: &Inventory) -> impl Iterator<Item = (&Vm, &Vcpu)> {
    let vcpus = inventory.vms.iter().flat_map(|vm| vm.vcpus.iter().map(move |vcpu| (vm, vcpu)));
    vcpus.filter(|(_, vcpu)| vcpu.ring_entries > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inventory(vcpus: &[(u64, u32, u32)]) -> Inventory {
        let vcpu = |&(ring, vcpu, dirty_index): &(u64, u32, u32)| Vcpu {
            ring: RingId(ring),
            vcpu,
            tid: None,
            ring_entries: 1024,
            dirty_index,
            ring_used: 0,
        };
        let vcpus = vcpus.iter().map(vcpu).collect();
        Inventory {
            vms: vec![Vm { id: VmId(1), pid: 1, fd: None, creator_tid: 1, vcpus, slots: Vec::new() }],
        }
    }

    fn pushes(indices: &RingIndices, ring: u64) -> Option<u64> {
        indices.running().find(|(id, _)| *id == RingId(ring)).map(|(_, pushed)| pushed.pushes)
    }

    #[test]
    fn pushes_are_how_far_the_index_went_across_its_wrap() {
        let mut indices = RingIndices::begin(&inventory(&[(1, 0, u32::MAX - 9)]));
        assert_eq!(pushes(&indices, 1), Some(0));
        assert!(indices.look(&inventory(&[(1, 0, u32::MAX)])).is_empty());
        assert_eq!(pushes(&indices, 1), Some(9));
        assert!(indices.look(&inventory(&[(1, 0, 4)])).is_empty());
        assert_eq!(pushes(&indices, 1), Some(14));
    }

    #[test]
    fn a_vcpu_that_came_meanwhile_counts_from_its_first_push_and_one_that_went_is_told_once() {
        let mut indices = RingIndices::begin(&inventory(&[(1, 0, 100)]));
        indices.look(&inventory(&[(1, 0, 130), (2, 1, 7)]));
        assert_eq!((pushes(&indices, 1), pushes(&indices, 2)), (Some(30), Some(7)));
        let gone = indices.look(&inventory(&[(2, 1, 8)]));
        assert_eq!(gone.iter().map(|(ring, old)| (*ring, old.pushes)).collect::<Vec<_>>(), [(RingId(1), 30)]);
        assert!(indices.look(&inventory(&[(2, 1, 8)])).is_empty());
    }

    #[test]
    fn a_vcpu_in_the_memory_of_another_is_not_taken_for_it() {
        let mut indices = RingIndices::begin(&inventory(&[(1, 0, 100)]));
        // Another number; then an index that went back.
        assert_eq!(indices.look(&inventory(&[(1, 3, 200)])).len(), 1);
        assert_eq!(pushes(&indices, 1), Some(200));
        assert_eq!(indices.look(&inventory(&[(1, 3, 5)])).len(), 1);
        assert_eq!(pushes(&indices, 1), Some(5));
    }

    #[test]
    fn what_was_seen_after_the_last_look_counts_and_an_older_mark_does_not() {
        let at = |index| Pushed { vm: VmId(1), pid: 1, creator_tid: 1, vcpu: 0, pushes: 50, index };
        assert_eq!(at(10).and_up_to(15).pushes, 55);
        assert_eq!(at(10).and_up_to(9).pushes, 50);
        assert_eq!(at(u32::MAX).and_up_to(1).pushes, 52);
    }
}
