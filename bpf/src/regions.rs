//! Which parts of a guest's memory are written: unique pages and hot regions of one interval.
//!
//! The eBPF program keeps 512 page bits for each 2 MiB that was pushed; here they get guest addresses.

use std::collections::HashMap;

use crate::layout::{RegionCounts, RegionKey};
use crate::{Inventory, Vm, VmId};

/// Pages that one region counter stands for: 2 MiB.
pub const PAGES_PER_REGION: u64 = 512;

/// 2 MiB of a slot, with what was pushed there during an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first guest page; the last region of a slot may be shorter than the others.
    pub first_page: u64,
    /// Different pages that were pushed.
    pub unique_pages: u64,
    /// Pushes.
    pub pushes: u64,
}

/// What a VM wrote during an interval.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Different pages.
    pub unique_pages: u64,
    /// Pushes: more than `unique_pages` if pages were recycled and written again.
    pub pushes: u64,
    /// Written regions, in the order of their addresses.
    pub regions: Vec<Region>,
}

impl WorkingSet {
    pub(crate) fn per_vm(
        taken: Vec<(RegionKey, RegionCounts)>,
        inventory: &Inventory,
    ) -> HashMap<VmId, Self> {
        let slots: HashMap<(u64, u32), u64> = inventory
            .vms
            .iter()
            .flat_map(|vm| vm.slots.iter().map(|slot| ((vm.id.0, slot.slot), slot.first_page)))
            .collect();
        let mut sets: HashMap<VmId, Self> = HashMap::new();
        for (key, counts) in taken {
            let unique_pages = counts.pages.iter().map(|word| u64::from(word.count_ones())).sum();
            let set = sets.entry(VmId(key.kvm)).or_default();
            set.unique_pages += unique_pages;
            set.pushes += counts.pushes;
            // A slot that is gone by now has no address any more.
            if let Some(slot) = slots.get(&(key.kvm, key.slot)) {
                let first_page = slot + u64::from(key.region) * PAGES_PER_REGION;
                set.regions.push(Region { first_page, unique_pages, pushes: counts.pushes });
            }
        }
        for set in sets.values_mut() {
            set.regions.sort_by_key(|region| region.first_page);
        }
        sets
    }

    /// The hottest regions first, at most `count`.
    pub fn hottest(&self, count: usize) -> Vec<Region> {
        let mut regions = self.regions.clone();
        regions.sort_by_key(|region| (std::cmp::Reverse(region.pushes), region.first_page));
        regions.truncate(count);
        regions
    }

    /// Pushes over the guest's memory as a strip of `cells` characters, from its lowest address to its highest
    /// without the holes. A blank had none; the height of the others is relative to the hottest.
    pub fn strip(&self, vm: &Vm, cells: usize) -> String {
        let memory: Vec<_> = vm.slots.iter().filter(|slot| slot.slot >> 16 == 0).collect();
        let pages: u64 = memory.iter().map(|slot| slot.pages).sum();
        let mut heat = vec![0_u64; cells];
        for region in &self.regions {
            let mut before = 0;
            for slot in &memory {
                if (slot.first_page..slot.first_page + slot.pages).contains(&region.first_page) {
                    let at = u128::from(before + region.first_page - slot.first_page);
                    let cell = at * cells as u128 / u128::from(pages.max(1));
                    if let Some(heat) = usize::try_from(cell).ok().and_then(|cell| heat.get_mut(cell)) {
                        *heat += region.pushes;
                    }
                    break;
                }
                before += slot.pages;
            }
        }
        bars(&heat)
    }
}

/// One bar per number, relative to the largest; a blank for 0.
pub fn bars(heights: &[u64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = u128::from(heights.iter().copied().max().unwrap_or(0).max(1));
    let bar = |&height: &u64| match height {
        0 => ' ',
        _ => usize::try_from((u128::from(height) * 8).div_ceil(most) - 1)
            .map_or('█', |index| BARS[index.min(7)]),
    };
    heights.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Slot;

    fn vm() -> Vm {
        let slot = |slot, first_page, pages| Slot { slot, first_page, pages, address: 0, logs: true };
        // A hole from page 2048 to page 1 << 20, and the first slot again for system management mode.
        let slots = vec![slot(0, 0, 2048), slot(1 << 16, 0, 2048), slot(1, 1 << 20, 2048)];
        Vm { id: VmId(7), pid: 1, fd: None, creator_tid: 1, vcpus: Vec::new(), slots }
    }

    #[test]
    fn regions_get_the_addresses_of_their_slot_and_unique_pages_are_bits() {
        let inventory = Inventory { vms: vec![vm()] };
        let key = |slot, region| RegionKey { kvm: 7, slot, region };
        let counts = |pushes, page| RegionCounts { pushes, pages: [page, 0, 0, 0, 0, 0, 0, 1] };
        let taken = vec![(key(1, 3), counts(9, 0b110)), (key(0, 0), counts(2, 0)), (key(5, 0), counts(1, 0))];
        let set = WorkingSet::per_vm(taken, &inventory).remove(&VmId(7)).unwrap();
        assert_eq!((set.unique_pages, set.pushes), (5, 12));
        let low = Region { first_page: 0, unique_pages: 1, pushes: 2 };
        let high = Region { first_page: (1 << 20) + 3 * 512, unique_pages: 3, pushes: 9 };
        assert_eq!(set.regions, [low, high]);
        assert_eq!(set.hottest(1), [high]);
        assert_eq!(set.strip(&vm(), 8), "▂      █");
    }

    #[test]
    fn the_smallest_count_is_visible_and_the_largest_is_full() {
        assert_eq!(bars(&[0, 1, 1_000_000, u64::MAX]), " ▁▁█");
        assert_eq!(bars(&[]), "");
        assert_eq!(bars(&[0, 0]), "  ");
    }
}
