//! Slots and memory that come and go, and what else a VMM may do at the edges of tracking.
#![expect(unsafe_code, reason = "a slot's memory is named by address")]

use std::time::Duration;

use super::*;
use crate::layout::{GuestAddress, GuestMemory, LayoutError, RegionKind};
use crate::testing::{AnonymousRam, Backing, WriteDuringReset};

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
        Observed::PerVcpu { vcpus, .. } => vcpus,
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
    assert_eq!(session.observe().unwrap(), Observed::per_vcpu(vec![0, 1, 0]));
    assert_eq!(tracker.vcpus().iter().map(VcpuThrottle::index).collect::<Vec<_>>(), given);
    assert_eq!(tracker.vcpu(40).map(|vcpu| vcpu.index()), Some(40));
    assert!(tracker.vcpu(1).is_none());
    assert_eq!(tracker.snapshot().vcpus.iter().map(|vcpu| vcpu.index).collect::<Vec<_>>(), given);
}

#[test]
fn a_vcpu_that_is_unplugged_leaves_its_pages_to_every_session_and_its_place_to_the_next() {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    let handles = [7, 2, 40].map(|index| tracker.attach_fake_vcpu(index, &kernel, 0, 0).unwrap());
    let (session, other) = (tracker.start().unwrap(), tracker.start().unwrap());
    let throttle = tracker.vcpu(2).unwrap();
    throttle.close_for(VcpuThrottle::CLOSED_MAX);
    for (vcpu, offset) in [(0, 1), (1, 2), (1, 3), (2, 4)] {
        assert!(kernel.write(vcpu, SlotId(1), offset));
    }
    assert_eq!(session.observe().unwrap(), Observed::per_vcpu(vec![1, 2, 1]));
    tracker.detach_vcpu(2).unwrap();
    assert!(matches!(tracker.detach_vcpu(2), Err(TrackError::VcpuUnknown(2))));
    assert!(matches!(handles[1].ring_full(), Err(TrackError::VcpuUnknown(2))));
    assert_eq!(handles[1].before_run(), BeforeRun::Run);
    assert_eq!(throttle.throttled(), Duration::ZERO, "its gate is open");
    assert_eq!(tracker.vcpus().iter().map(VcpuThrottle::index).collect::<Vec<_>>(), [7, 40]);

    // Its index is free, and those behind it have moved up.
    let _plugged = tracker.attach_fake_vcpu(2, &kernel, 0, 0).unwrap();
    for (vcpu, offset) in [(2, 5), (3, 6), (3, 7), (3, 8)] {
        assert!(kernel.write(vcpu, SlotId(1), offset));
    }
    let expected = Observed::PerVcpu { vcpus: vec![1, 2, 3], others: 2 };
    assert_eq!(session.observe().unwrap(), expected);
    for session in [&session, &other] {
        let mut dirty = PageSet::new(slot_pages(1).end());
        session.harvest(&mut dirty).unwrap();
        assert_eq!(dirty.len(), 8, "{dirty:?}");
    }
    assert_eq!(session.observe().unwrap(), Observed::per_vcpu(vec![0; 3]));
    assert!(kernel.write(2, SlotId(1), 4));
    assert_eq!(session.observe().unwrap(), Observed::per_vcpu(vec![0, 1, 0]), "it was protected again");
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
        assert!(!model.tracker.remove_slot(slot).unwrap());
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

#[test]
fn memory_of_which_one_slot_cannot_be_logged_is_not_added_and_none_of_it_is_logged() {
    let mut model = Model::new(1, 0, 0, false);
    let run = |first| PageRun { first: PageIndex(first), pages: 10 };
    let ram = AnonymousRam::with_slots(
        &[(SlotId(7), run(50_000)), (SlotId(8), run(60_000)), (SlotId(9), run(70_000))],
        Backing::SmallPages,
    );
    let ram = ram.unwrap();
    model.kernel.create_slots(ram.memory());
    model.kernel.refuse_to_log(SlotId(8));
    let refused = model.tracker.add_memory(ram.memory());
    assert!(matches!(refused, Err(TrackError::Kvm(_))), "{refused:?}");
    for slot in [7, 8, 9].map(SlotId) {
        assert!(!model.kernel.is_logging(slot), "{slot:?}");
        assert!(!model.tracker.remove_slot(slot).unwrap(), "{slot:?} was added");
    }
    model.write(0, 1, 7);
    model.check_nothing_is_lost();
}

#[test]
fn a_slot_whose_removal_fails_half_way_is_logged_again_and_loses_nothing() {
    let mut model = Model::new(1, 0, 0, false);
    model.write(0, 1, 7);
    model.kernel.fail_the_next_reset();
    assert!(matches!(model.tracker.remove_slot(SlotId(1)), Err(TrackError::Kvm(_))));
    // Nobody sees this one.
    model.write(0, 1, 8);
    model.harvest();
    assert!(model.kernel.is_logging(SlotId(1)));
    model.write(0, 1, 9);
    model.check_nothing_is_lost();
    model.remove_slot(1);
}

#[test]
fn memory_that_is_plugged_in_clean_is_dirty_where_it_is_written() {
    let model = Model::new(1, 0, 0, false);
    let second = model.tracker.start().unwrap();
    let pages = PageRun { first: PageIndex(50_000), pages: 100 };
    let memory = model.kernel.create_slot(SlotId(9), pages);
    let host = memory.regions()[0].host;
    let add = |address, len| {
        // SAFETY: the mapping has this length, and `memory` outlives the tracker's use of it.
        unsafe { model.tracker.add_slot(SlotId(9), address, len, host, Initially::Clean) }
    };
    let address = pages.first.address();
    for (address, len) in [(GuestAddress(address.0 + 8), 4096), (address, 4095)] {
        assert!(matches!(add(address, len), Err(TrackError::Layout(LayoutError::Unaligned(SlotId(9))))));
    }
    add(address, 100 * 4096).unwrap();
    assert!(model.kernel.write(0, SlotId(9), 3));
    for session in [model.session(), &second] {
        let runs: Vec<PageRun> = session.take_slot_runs(SlotId(9)).unwrap().collect();
        assert_eq!(runs, [PageRun { first: PageIndex(50_003), pages: 1 }]);
        assert_eq!(session.take_slot_runs(SlotId(9)).unwrap().len(), 0);
    }
    assert!(model.tracker.remove_slot(SlotId(9)).unwrap());
}

/// Of a VMM that takes its dirty log slot by slot, as it did from KVM.
#[test]
fn a_slot_is_taken_a_last_time_with_what_no_vcpu_wrote() {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings_with_bitmap(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
    let session = tracker.start().unwrap();
    kernel.write_without_vcpu(SlotId(1), 70);
    assert!(kernel.write(0, SlotId(1), 5));
    assert_eq!(session.take_slot_bitmap(SlotId(1)).unwrap()[..2], [1 << 5, 0]);
    kernel.write_without_vcpu(SlotId(1), 71);
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    let settled = paused.declare_nothing_else_writes();
    assert_eq!(session.take_slot_bitmap_final(&settled, SlotId(1)).unwrap()[..2], [0, 3 << 6]);
}

#[test]
fn a_vcpu_that_passes_no_gate_gets_its_overrun_ring_back_all_the_same() {
    let mut model = Model::new(1, 0, 0, false);
    // So far over its end that KVM still says full when all entries have been taken and reset.
    let over: Vec<u64> = (0..SLOT_PAGES).cycle().take(2 * RING as usize).collect();
    model.emulate(0, 1, &over);
    let calls = (1..1_000).find(|_| {
        model.vcpus[0].ring_full().unwrap();
        model.kernel.write(0, SlotId(1), 7)
    });
    assert!(calls.is_some_and(|calls| calls > 10), "{calls:?}");
    assert_eq!(model.tracker.snapshot().vcpus[0].overflows, 1);
    model.harvest();
    model.write(0, 1, 8);
    model.check_nothing_is_lost();
}

#[test]
fn what_kvm_cannot_log_is_left_alone_and_what_it_must_is_refused() {
    let mut model = Model::new(1, 0, 0, false);
    let pages = PageRun { first: PageIndex(50_000), pages: 10 };
    let ram = AnonymousRam::with_slots(&[(SlotId(8), pages)], Backing::SmallPages).unwrap();
    let of_kind = |kind| {
        let region = ram.memory().regions()[0].of_kind(kind);
        // SAFETY: as of `ram`, which outlives the tracker's use of it.
        unsafe { GuestMemory::new(vec![region]) }.unwrap()
    };
    let private = model.tracker.add_memory(&of_kind(RegionKind::GuestMemfd));
    assert!(matches!(private, Err(TrackError::Private(SlotId(8)))), "{private:?}");
    model.kernel.create_slots(ram.memory());
    model.kernel.refuse_to_log(SlotId(8));
    model.tracker.add_memory_as(&of_kind(RegionKind::ReadOnly), Initially::Dirty).unwrap();
    assert_eq!(model.session().take_slot_runs(SlotId(8)).unwrap().len(), 1, "all of it, once");
    model.session().stop().unwrap();
    model.session().start().unwrap();
    assert!(!model.kernel.is_logging(SlotId(8)));
    model.write(0, 1, 7);
    assert_eq!(model.session().take_slot_runs(SlotId(8)).unwrap().len(), 0);
    assert_eq!(model.session().take_slot_runs(SlotId(1)).unwrap().len(), 1);
    assert!(model.tracker.remove_slot(SlotId(8)).unwrap());
}

#[test]
fn a_look_says_how_many_pages_of_each_vcpu_it_may_lag_behind() {
    for (entries, bitmap, unseen) in [(0, false, 0), (16, false, 16), (16, true, 0)] {
        let mut model = Model::new(2, 0, entries, bitmap);
        assert_eq!(model.session().unseen_per_vcpu(), unseen);
        if !bitmap {
            (0..10).for_each(|page| model.write(1, 1, page));
            let seen = if unseen == 0 { 10 } else { 0 };
            assert_eq!(model.observe(), Observed::per_vcpu(vec![0, seen]));
        }
    }
}

/// Once when its entries were taken, and once when they were flagged again.
#[test]
fn an_overrun_ring_that_another_thread_resets_is_in_step_again() {
    let mut model = Model::new(1, 0, 0, false);
    model.emulate(0, 0, &[0; 15].repeat(26));
    model.emulate(
        0,
        2,
        &[
            220, 61, 124, 192, 168, 64, 277, 69, 46, 233, 64, 133, 0, 93, 145, 24, 108, 272, 98, 159, 110,
            230, 215, 38, 199, 89, 264, 190, 72,
        ],
    );
    model.kernel.foreign_reset_before_the_next();
    model.emulate(0, 1, &[44, 222, 284, 174, 58, 266, 219, 74].repeat(16));
    model.kernel.write_during_reset(WriteDuringReset {
        vcpu: 0,
        slot: SlotId(2),
        offset: 39,
        after: true,
        emulated: None,
    });
    model.emulate(0, 2, &[287, 217, 154, 288, 92, 104, 216, 3, 243, 76, 70, 4, 295, 70, 47, 148].repeat(26));
    model.kernel.foreign_reset_before_the_next();
    model.emulate(0, 0, &[192, 38, 97].repeat(3));
    model.check_nothing_is_lost();
}
