//! Geometry against looking up each page, and what is refused.

use proptest::prelude::*;

use super::*;

fn region(slot: u32, first: u64, pages: u64, host: usize) -> Region {
    let pages = PageRun { first: PageIndex(first), pages };
    Region::new(SlotId(slot), pages, std::ptr::without_provenance_mut(host))
}

fn memory(regions: Vec<Region>) -> Result<GuestMemory, LayoutError> {
    // SAFETY: nothing here or in this module's code under test dereferences a host pointer.
    unsafe { GuestMemory::new(regions) }
}

/// Regions with and without holes between them, guest order unrelated to host order.
fn layouts() -> impl Strategy<Value = Vec<Region>> {
    prop::collection::vec((0..3_u64, 1..6_u64, any::<u16>()), 1..6).prop_map(|parts| {
        let (mut next, mut regions) = (0, Vec::new());
        for (slot, (hole, pages, order)) in (0..).zip(parts) {
            let host = (usize::from(order) * 8 + slot as usize) << 20;
            regions.push(region(slot, next + hole, pages, host));
            next += hole + pages;
        }
        regions.sort_by_key(|region| region.host.addr());
        regions
    })
}

fn naive(regions: &[Region], page: u64) -> Option<(SlotId, usize)> {
    regions.iter().find(|r| (r.pages.first.0..r.pages.first.0 + r.pages.pages).contains(&page)).map(|r| {
        let offset = usize::try_from(page - r.pages.first.0).unwrap() * PAGE_SIZE;
        (r.slot, r.host.addr() + offset)
    })
}

proptest! {
    #[test]
    fn host_runs_are_what_looking_up_each_page_gives(regions in layouts(), first in 0..40_u64, pages in 1..40_u64) {
        let memory = memory(regions.clone()).unwrap();
        let lookup: Vec<_> = (first..first + pages).map(|page| naive(&regions, page)).collect();
        match memory.host_runs(PageRun { first: PageIndex(first), pages }) {
            Err(error) => {
                let outside = lookup.iter().position(Option::is_none).expect("refused a run that is all RAM");
                prop_assert_eq!(error, LayoutError::NotRam(PageIndex(first + outside as u64)));
            }
            Ok(runs) => {
                let mut given = Vec::new();
                for run in runs {
                    prop_assert_eq!(run.run.first.0, first + given.len() as u64);
                    prop_assert_eq!(run.len_bytes() as u64, run.run.pages * PAGE_SIZE as u64);
                    let slot = memory.regions()[run.region].slot;
                    given.extend((0..run.len_bytes()).step_by(PAGE_SIZE).map(|at| Some((slot, run.host.addr() + at))));
                }
                prop_assert_eq!(given, lookup);
            }
        }
    }

    #[test]
    fn regions_end_in_guest_order_and_are_counted_without_holes(regions in layouts()) {
        let memory = memory(regions.clone()).unwrap();
        prop_assert!(memory.regions().is_sorted_by_key(|region| region.pages.first));
        prop_assert_eq!(memory.pages(), (0..100).filter(|page| naive(&regions, *page).is_some()).count() as u64);
        let last = (0..100).rev().find(|page| naive(&regions, *page).is_some()).unwrap();
        prop_assert_eq!(memory.end(), PageIndex(last + 1));
    }
}

#[test]
fn what_cannot_be_ram_is_refused_by_name() {
    let refused = |regions: Vec<Region>| memory(regions).expect_err("an impossible layout was accepted");
    let (a, b) = (SlotId(1), SlotId(2));
    assert_eq!(refused(vec![]), LayoutError::Empty);
    assert_eq!(refused(vec![region(1, 0, 0, 0x1000)]), LayoutError::Empty);
    assert_eq!(refused(vec![region(1, 0, 1, 0x1008)]), LayoutError::Unaligned(a));
    assert_eq!(refused(vec![region(1, RAM_END_MAX.0, 1, 0x1000)]), LayoutError::TooLarge(a));
    assert_eq!(refused(vec![region(1, u64::MAX, u64::MAX, 0x1000)]), LayoutError::TooLarge(a));
    assert_eq!(refused(vec![region(1, 0, 16, usize::MAX - 0xfff)]), LayoutError::TooLarge(a));
    let overlap = vec![region(2, 9, 4, 0x100_0000), region(1, 0, 10, 0x200_0000)];
    assert_eq!(refused(overlap), LayoutError::Overlap(PageIndex(9)));
    let aliased = vec![region(2, 100, 4, 0x9000), region(1, 0, 10, 0x1000)];
    assert_eq!(refused(aliased), LayoutError::Aliased(a, b));
    let adjacent = vec![region(2, 10, 4, 0xb000), region(1, 0, 10, 0x1000)];
    assert_eq!(memory(adjacent).unwrap().pages(), 14);
}

#[test]
fn slots_of_one_vm_share_a_page_only_as_the_same_memory_in_two_address_spaces() {
    let (one, smm) = (region(1, 10, 10, 0x10_0000), SlotId(0x1_0001));
    assert_eq!(smm.address_space(), 1);
    let conflict = |slot, first, pages, host| one.conflict(&region(slot, first, pages, host));
    let overlap = |page| Some(LayoutError::Overlap(PageIndex(page)));
    assert_eq!(conflict(2, 20, 4, 0x11_0000), None);
    assert_eq!(conflict(2, 5, 5, 0x20_0000), None);
    assert_eq!(conflict(2, 19, 4, 0x20_0000), overlap(19));
    assert_eq!(conflict(2, 5, 6, 0x20_0000), overlap(10));
    assert_eq!(conflict(2, 12, 2, 0x10_2000), overlap(12));
    assert_eq!(conflict(2, 30, 4, 0x10_9000), Some(LayoutError::Aliased(one.slot, SlotId(2))));
    assert_eq!(conflict(smm.0, 12, 2, 0x10_2000), None);
    assert_eq!(conflict(smm.0, 12, 2, 0x20_0000), overlap(12));
    assert_eq!(conflict(smm.0, 30, 2, 0x10_2000), Some(LayoutError::Aliased(one.slot, smm)));
}

#[test]
fn a_run_that_wraps_or_is_empty_gives_no_memory() {
    let memory = memory(vec![region(1, 0, 10, 0x1000)]).unwrap();
    let runs = |first, pages| memory.host_runs(PageRun { first: PageIndex(first), pages }).map(|_| ()).err();
    assert_eq!(runs(3, u64::MAX), Some(LayoutError::NotRam(PageIndex(10))));
    assert_eq!(runs(u64::MAX, 2), Some(LayoutError::NotRam(PageIndex(u64::MAX))));
    assert_eq!(runs(u64::MAX, u64::MAX), Some(LayoutError::NotRam(PageIndex(u64::MAX))));
    assert_eq!(runs(3, 0), Some(LayoutError::Empty));
}

#[test]
fn blocks_outside_guest_physical_space_are_listed_by_name() {
    let mut memory =
        memory(vec![region(0, 0, 16, 0x1000), region(1, 0x100, 4, 0x2_0000), region(2, 0x200, 8, 0x4_0000)])
            .unwrap();
    assert_eq!(memory.blocks().count(), 0);
    memory.name_block(PageIndex(0x200), "vga.vram").unwrap();
    memory.name_block(PageIndex(0x100), &"b".repeat(BLOCK_NAME_BYTES_MAX)).unwrap();
    let blocks: Vec<_> = memory.blocks().map(|(name, run)| (name.len(), run.first.0, run.pages)).collect();
    assert_eq!(blocks, [(64, 0x100, 4), (8, 0x200, 8)]);
    assert_eq!(memory.clone().blocks().count(), 2);
}

#[test]
fn a_name_that_is_no_name_or_names_no_block_is_refused_and_changes_nothing() {
    let mut memory = memory(vec![region(0, 0, 16, 0x1000), region(1, 0x100, 4, 0x2_0000)]).unwrap();
    let (first, second) = (PageIndex(0), PageIndex(0x100));
    assert_eq!(memory.name_block(PageIndex(1), "rom"), Err(LayoutError::NoBlock(PageIndex(1))));
    for name in ["", &"n".repeat(BLOCK_NAME_BYTES_MAX + 1), "ro\nm"] {
        assert_eq!(memory.name_block(second, name), Err(LayoutError::BlockName(second)));
    }
    assert_eq!(memory.blocks().count(), 0);
    memory.name_block(second, "rom").unwrap();
    assert_eq!(memory.name_block(second, "other"), Err(LayoutError::BlockNamed(second)));
    assert_eq!(memory.name_block(first, "rom"), Err(LayoutError::BlockNamed(first)));
    assert_eq!(memory.blocks().count(), 1);
}

#[test]
fn addresses_pages_and_slots_print_as_the_field_writes_them() {
    assert_eq!(GuestAddress(0x1_2fff).page(), PageIndex(0x12));
    assert_eq!(PageIndex(0x12).address().to_string(), "0x12000");
    assert_eq!(format!("{:?} {:?}", SlotId(0x1_0003), PageIndex(18)), "SlotId(1:3) PageIndex(0x12)");
}
