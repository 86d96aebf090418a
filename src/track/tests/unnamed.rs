//! Kernels that do not free ring entries which name no slot, as no released one does.

use super::*;
use crate::kvm::UnmapError;

/// A guest whose ring was full after so many writes, on such a kernel.
fn after_a_full_ring(unnamed: UnnamedEntries) -> Model {
    let mut model = Model::leaving(2, 0, 0, false, 1);
    model.kernel.treats_unnamed_entries(unnamed);
    assert_eq!(model.tracker.snapshot().full_rings, FullRings::NotYetSeen);
    model.tracker.recycles_without_protecting().unwrap();
    for page in 0..SLOT_PAGES {
        model.write(0, 1, page);
        model.write(1, 2, page);
    }
    model
}

#[test]
fn a_kernel_that_frees_entries_without_a_slot_is_known_to_from_the_first_full_ring_on() {
    let mut model = after_a_full_ring(UnnamedEntries::Freed);
    assert_eq!(model.tracker.snapshot().full_rings, FullRings::LeftWritable);
    model.check_nothing_is_lost();
}

#[test]
fn a_kernel_that_does_not_is_asked_once_and_not_one_page_is_dirty_for_it() {
    for unnamed in [UnnamedEntries::Kept, UnnamedEntries::Refused] {
        let mut model = after_a_full_ring(unnamed);
        let why = |model: &Model| model.tracker.recycles_without_protecting();
        assert!(matches!(why(&model), Err(UnmapError::NotFreed)), "{unnamed:?}");
        let figures = model.tracker.snapshot();
        assert_eq!(figures.full_rings, FullRings::Protected);
        assert_eq!(figures.rearms, 0, "{unnamed:?}: nothing was lost, so nothing else is dirty");
        // What the first full ring named was protected in the old way: its next write makes an entry.
        model.harvest();
        for page in 0..SLOT_PAGES {
            model.write(0, 1, page);
        }
        assert_eq!(model.harvest_of(0).len() as u64, SLOT_PAGES);
        model.check_nothing_is_lost();

        // For good.
        model.session().stop().unwrap();
        model.session().start().unwrap();
        assert!(matches!(why(&model), Err(UnmapError::NotFreed)), "{unnamed:?}");
        let resets = model.tracker.snapshot().resets;
        for page in 0..SLOT_PAGES {
            model.write(0, 1, page);
        }
        assert_eq!(model.tracker.snapshot().resets - resets, SLOT_PAGES / u64::from(RING - 64));
    }
}

#[test]
fn a_ring_that_overflowed_is_brought_in_step_on_such_a_kernel_too() {
    let mut model = Model::leaving(1, 0, 0, false, 1);
    model.kernel.treats_unnamed_entries(UnnamedEntries::Kept);
    let many: Vec<u64> = (0..SLOT_PAGES).cycle().take(5 * RING as usize).collect();
    for _ in 0..3 {
        model.emulate(0, 1, &many);
        model.harvest();
        model.emulate(0, 2, &many);
    }
    model.check_nothing_is_lost();
}

/// It costs what it did before there was another way, and no page.
#[test]
fn a_kernel_that_protects_pages_whose_entries_name_no_slot_loses_none() {
    let mut model = after_a_full_ring(UnnamedEntries::Protected);
    assert_eq!(model.tracker.snapshot().full_rings, FullRings::LeftWritable);
    for page in 0..SLOT_PAGES {
        model.write(0, 1, page);
    }
    model.check_nothing_is_lost();
}
