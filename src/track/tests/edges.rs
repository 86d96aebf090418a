//! Slots and memory that come and go, and what else a VMM may do at the edges of tracking.

use super::*;
use crate::layout::LayoutError;

#[test]
fn when_the_topmost_memory_is_unplugged_a_set_of_what_is_left_is_large_enough() {
    let mut model = Model::new(1, 0, 0, false);
    model.write(0, 1, 7);
    model.write(0, 2, 7);
    model.tracker.mark_dirty(PageRun { first: slot_pages(2).first, pages: 2 });
    model.remove_slot(2);
    let left = PageIndex(slot_pages(1).end().0);
    for expected in [1, 0] {
        let mut dirty = PageSet::new(left);
        model.session().harvest(&mut dirty).unwrap();
        assert_eq!(dirty.len(), expected);
        model.send(&dirty);
    }
    let too_small = model.session().harvest(&mut PageSet::new(PageIndex(left.0 - 1)));
    assert!(matches!(too_small, Err(TrackError::SetTooSmall { needed, .. }) if needed == left));
    model.add_slot(2);
    model.harvest();
    model.write(0, 2, 299);
    model.check_nothing_is_lost();
}

#[test]
fn an_overflowed_ring_whose_vcpu_idles_makes_all_of_ram_dirty_once() {
    let mut model = Model::new(2, 0, 0, false);
    let over: Vec<u64> = (0..u64::from(RING) + 40).collect();
    model.emulate(0, 1, &over);
    let harvested = |model: &mut Model| {
        let mut dirty = PageSet::new(end());
        model.session().harvest(&mut dirty).unwrap();
        model.send(&dirty);
        dirty.len()
    };
    let all = u64::from(SLOTS) * SLOT_PAGES;
    assert_eq!(harvested(&mut model), all);
    model.write(1, 2, 9);
    assert_eq!((harvested(&mut model), harvested(&mut model)), (1, 0));
    // What it writes now stands behind a gap of entries that were overwritten.
    model.write(0, 1, 5);
    assert_eq!((harvested(&mut model), harvested(&mut model)), (all, 0));
    let figures = model.tracker.snapshot();
    assert_eq!((figures.vcpus[0].overflows, figures.rearms), (1, 2));
    model.write(0, 1, 6);
    model.check_nothing_is_lost();
}

#[test]
fn an_interrupted_reset_makes_dirty_again_what_it_may_have_left_unprotected_and_no_more() {
    let mut model = Model::new(8, 0, 0, false);
    let harvested = |model: &mut Model| {
        let mut dirty = PageSet::new(end());
        model.session().harvest(&mut dirty).unwrap();
        model.send(&dirty);
        dirty.runs().flat_map(|run| run.first.0..run.end().0).collect::<Vec<_>>()
    };
    for vcpu in 0..8 {
        // Two batches, of one page and of three.
        [0, 100, 130, 101].into_iter().for_each(|offset| model.write(vcpu, 1, offset + vcpu as u64 * 2));
    }
    // Within the third ring, in its second batch.
    model.kernel.interrupt_a_reset(Interruption { after_entries: 4 + 4 + 3 });
    assert_eq!(harvested(&mut model).len(), 32);
    let unsure = [100 + 4, 130 + 4].map(|offset| slot_pages(1).first.0 + offset);
    assert_eq!(harvested(&mut model), unsure);

    // At the end of a ring: which one, KVM does not say.
    (0..8).for_each(|vcpu| model.write(vcpu, 2, 30 * vcpu as u64));
    model.kernel.interrupt_a_reset(Interruption { after_entries: 2 });
    assert_eq!(harvested(&mut model).len(), 8 + 2);
    assert_eq!(harvested(&mut model).len(), 2 + 2);
    model.check_nothing_is_lost();
}

#[test]
fn pages_that_resets_left_unprotected_are_protected_once_that_is_cheaper() {
    let mut model = Model::new(1, 0, 0, false);
    for offset in 0..60 {
        model.write(0, 1, offset);
    }
    model.kernel.interrupt_a_reset(Interruption { after_entries: 50 });
    let mut harvested = Vec::new();
    for _ in 0..20 {
        let mut dirty = PageSet::new(end());
        model.session().harvest(&mut dirty).unwrap();
        model.send(&dirty);
        harvested.push(dirty.len());
    }
    // 50 pages six times over are the 300 of the slot.
    assert_eq!(harvested[..8], [60, 50, 50, 50, 50, 50, SLOT_PAGES, 0]);
    assert_eq!((harvested[8..].iter().sum::<u64>(), model.tracker.snapshot().rearms), (0, 1));
    for offset in 0..60 {
        model.write(0, 1, offset);
    }
    model.check_nothing_is_lost();
}

#[test]
fn pages_that_were_taken_slot_by_slot_are_observed_no_more() {
    let mut model = Model::new(2, 0, 0, false);
    let observe = |model: &mut Model| match model.observe() {
        Observed::PerVcpu(pages) => pages,
        other => panic!("{other:?}"),
    };
    for turn in 1..=3 {
        (0..100).for_each(|offset| model.write(0, 1, offset));
        (0..30).for_each(|offset| model.write(1, 2, offset));
        assert_eq!(observe(&mut model), [100, 30]);
        model.take_slot_bitmap(1);
        // 30 of 130 are left.
        assert_eq!(observe(&mut model), [23, 6], "whose they are is not known");
        model.take_slot_bitmap(2);
        assert_eq!(observe(&mut model), [0, 0]);
        assert_eq!(model.tracker.snapshot().harvests, turn * 2);
    }
    // Taken with another slot and not reported yet.
    model.write(0, 1, 7);
    model.write(0, 2, 7);
    model.take_slot_bitmap(1);
    observe(&mut model);
    assert!(model.views[0].redirtied.pages_mut().contains(PageIndex(slot_pages(2).first.0 + 7)));
    model.check_nothing_is_lost();
}

#[test]
fn a_handle_knows_the_index_that_the_vmm_gave_its_vcpu() {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    let given = [7, 2, 40];
    for index in given {
        assert_eq!(tracker.attach_fake_vcpu(index, &kernel, 0, 0).unwrap().index(), index);
    }
    let session = tracker.start().unwrap();
    assert!(kernel.write(1, SlotId(1), 5));
    assert_eq!(session.observe().unwrap(), Observed::PerVcpu(vec![0, 1, 0]));
    assert_eq!(tracker.vcpus().iter().map(VcpuHandle::index).collect::<Vec<_>>(), given);
    assert_eq!(tracker.snapshot().vcpus.iter().map(|vcpu| vcpu.index).collect::<Vec<_>>(), given);
}

#[test]
fn memory_whose_place_is_taken_is_refused_wherever_it_was_added() {
    let model = Model::new(1, 0, 0, false);
    let taken = PageRun { first: PageIndex(slot_pages(1).end().0 - 1), pages: 4 };
    for slot in [SlotId(9), SlotId(0x1_0009)] {
        let refused = model.tracker.add_memory(&model.kernel.create_slot(slot, taken));
        assert!(
            matches!(refused, Err(TrackError::Layout(LayoutError::Overlap(page))) if page == taken.first),
            "{slot:?}: {refused:?}"
        );
        assert!(matches!(model.tracker.remove_slot(slot), Err(TrackError::SlotUnknown(_))));
    }
}

/// System management mode has slots of its own over the same memory.
#[test]
fn a_page_of_two_address_spaces_stays_dirty_when_one_of_its_slots_goes() {
    let model = Model::new(1, 0, 0, false);
    let pages = PageRun { first: PageIndex(slot_pages(SLOTS - 1).end().0 + 10), pages: 50 };
    let memory = model.kernel.create_slot(SlotId(9), pages);
    let smm = memory.in_address_space(1);
    model.kernel.create_slots(&smm);
    model.tracker.add_memory(&memory).unwrap();
    model.tracker.add_memory(&smm).unwrap();
    model.session().harvest(&mut PageSet::new(pages.end())).unwrap();
    for (slot, offset) in [(SlotId(9), 3), (SlotId(0x1_0009), 3), (SlotId(0x1_0009), 4)] {
        assert!(model.kernel.write(0, slot, offset));
    }
    model.tracker.remove_slot(SlotId(0x1_0009)).unwrap();
    let mut dirty = PageSet::new(pages.end());
    model.session().harvest(&mut dirty).unwrap();
    let found: Vec<u64> = dirty.runs().flat_map(|run| run.first.0..run.end().0).collect();
    assert_eq!(found, [pages.first.0 + 3, pages.first.0 + 4]);
}

/// A reset gives KVM's lock back before it flushes the TLBs. Whoever then finds its entries reset has not protected their
/// pages: a vCPU may go on writing them, and nothing tells of it.
#[test]
fn a_reset_of_another_thread_that_has_not_flushed_yet_makes_everything_dirty() {
    for kept in [0, 3] {
        let mut model = Model::new(1, 0, 0, false);
        for offset in 0..150 {
            model.write(0, 1, offset);
        }
        if kept > 0 {
            // It is interrupted, and ours does the rest.
            model.kernel.interrupt_a_reset(Interruption { after_entries: kept });
        }
        model.kernel.foreign_reset_before_the_next();
        model.harvest();
        model.write(0, 1, 5);
        model.kernel.foreign_flush();
        model.check_nothing_is_lost();
        assert_eq!(model.tracker.snapshot().foreign_resets, 1);
    }
}
