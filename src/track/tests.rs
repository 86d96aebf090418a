//! Tracking against a kernel in memory: every event in any order, against a model that counts versions.

mod edges;
mod externals;
#[cfg(feature = "offload")]
mod lending;
mod model;
mod sessions;
mod unnamed;
mod waiting;

use proptest::prelude::*;

use self::model::{Event, Model, RING, SLOT_PAGES, SLOTS, emulation, end, event, slot_pages};
use super::*;
use crate::kvm::RingSize;
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::page_set::PageSet;
use crate::testing::{FakeKernel, Interruption, UnnamedEntries};
use crate::vm::{Paused, VmError};

fn run(
    (vcpus, position, cpu_log_entries): (usize, u32, usize),
    (granule, unnamed): (u64, UnnamedEntries),
    events: &[Event],
) {
    let mut model = Model::leaving(vcpus, position, cpu_log_entries, false, granule);
    model.kernel.treats_unnamed_entries(unnamed);
    events.iter().for_each(|event| model.apply(event));
    model.check_nothing_is_lost();
}

/// Rings that begin anywhere, and often shortly before the index wraps at 2³².
fn position() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..2000_u32).prop_map(|before| before.wrapping_neg()), any::<u32>()]
}

/// Whether rings are recycled without protection: not where the kernel cannot take pages from a guest later.
fn granule() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0_u64), Just(1), Just(4)]
}

/// What the kernel does with entries that name no slot.
fn unnamed() -> impl Strategy<Value = UnnamedEntries> {
    use UnnamedEntries::{Freed, Kept, Protected, Refused};
    prop_oneof![3 => Just(Freed), 1 => Just(Protected), 1 => Just(Kept), 1 => Just(Refused)]
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(cases.unwrap_or(100))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn rings_lose_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        position in position(),
        cpu_log_entries in prop_oneof![Just(0_usize), Just(16)],
        granule in granule(),
        unnamed in unnamed(),
        events in prop::collection::vec(event(), 1..60),
    ) {
        run((vcpus, position, cpu_log_entries), (granule, unnamed), &events);
    }

    #[test]
    fn rings_lose_nothing_when_emulation_overruns_them(
        vcpus in 1..5_usize,
        position in position(),
        granule in granule(),
        // One that stops at them has no overrun rings here: `unnamed` has one such test.
        unnamed in prop_oneof![Just(UnnamedEntries::Freed), Just(UnnamedEntries::Protected)],
        events in prop::collection::vec(prop_oneof![1 => emulation(), 5 => event()], 1..60),
    ) {
        run((vcpus, position, 0), (granule, unnamed), &events);
    }

    #[test]
    fn the_bitmap_loses_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        events in prop::collection::vec(event(), 1..60),
    ) {
        let mut model = Model::new(vcpus, 0, 0, true);
        events.iter().for_each(|event| model.apply(event));
        model.check_nothing_is_lost();
    }
}

#[test]
fn an_observation_reports_each_page_once_and_those_that_were_taken_early_too() {
    let mut model = Model::new(2, 0, 0, false);
    let reported = |model: &mut Model| {
        let mut redirtied = Redirtied::new(end());
        model.session().observe_into(&mut redirtied).unwrap();
        redirtied.pages_mut().runs().flat_map(|run| run.first.0..run.end().0).collect::<Vec<_>>()
    };
    for page in [3, 4, 90] {
        model.write(0, 0, page);
    }
    assert_eq!(reported(&mut model), [3, 4, 90]);
    assert!(reported(&mut model).is_empty());
    model.write(1, 0, 7);
    model.write(0, 0, 3);
    assert_eq!(reported(&mut model), [7]);
    // Its own vCPU recycles a ring that nobody has observed.
    model.write(0, 0, 8);
    model.vcpus[0].ring_full().unwrap();
    assert!(reported(&mut model).contains(&8));
    model.harvest();
    assert!(reported(&mut model).is_empty());
}

#[test]
fn an_observation_that_reports_counts_a_page_once_however_often_kvm_names_it() {
    let mut model = Model::new(2, 0, 0, false);
    let mut redirtied = Redirtied::new(end());
    let mut observe = |model: &mut Model| {
        redirtied.clear();
        model.session().observe_into(&mut redirtied).unwrap()
    };
    model.emulate(0, 1, &[5, 5, 9]);
    assert_eq!(observe(&mut model), Observed::per_vcpu(vec![2, 0]));
    // Again after an observation, and by the other vCPU.
    model.emulate(0, 1, &[9, 11]);
    model.emulate(1, 1, &[5, 12]);
    assert_eq!(observe(&mut model), Observed::per_vcpu(vec![3, 1]));
    // In another round they are new, wholly or a slot at a time.
    model.harvest();
    model.emulate(1, 1, &[9, 9]);
    assert_eq!(observe(&mut model), Observed::per_vcpu(vec![0, 1]));
    model.session().take_slot_bitmap(SlotId(1)).unwrap();
    model.emulate(1, 1, &[9]);
    assert_eq!(observe(&mut model), Observed::per_vcpu(vec![0, 1]));
}

/// A signal that comes after the last entry was counted leaves the count right and the last batch unprotected.
#[test]
fn a_reset_that_was_stopped_at_its_very_end_is_not_trusted() {
    let mut model = Model::new(1, 0, 0, false);
    for page in [3, 4, 200] {
        model.write(0, 1, page);
    }
    model.kernel.interrupt_a_reset(Interruption { after_entries: 3 });
    model.harvest();
    model.write(0, 1, 200);
    model.check_nothing_is_lost();
}

#[test]
fn a_short_reset_is_retried_until_every_entry_is_protected() {
    let mut model = Model::new(2, 0, 0, false);
    for page in 0..100 {
        model.write(0, 1, page);
        model.write(1, 2, page * 3);
    }
    for after_entries in [0, 10, 0, 150, 7] {
        model.kernel.interrupt_a_reset(Interruption { after_entries });
    }
    model.harvest();
    let figures = model.tracker.snapshot();
    assert_eq!((figures.short_resets, figures.entries_reset, figures.rearms), (5, 200, 0));
    for page in 0..100 {
        model.write(0, 1, page);
        model.write(1, 2, page * 3);
    }
    model.check_nothing_is_lost();
}

/// KVM's emulator pushes an entry for each write, PML may push two for one.
#[test]
fn a_page_that_is_named_again_and_again_is_one_page_and_duplicates() {
    let mut model = Model::new(1, 0, 0, false);
    model.emulate(0, 1, &[5, 5, 9, 5]);
    model.harvest();
    let vcpu = model.tracker.snapshot().vcpus[0];
    assert_eq!((vcpu.pages, vcpu.duplicate_entries), (2, 2));
    model.check_nothing_is_lost();
}

#[test]
fn a_ring_goes_on_when_its_index_wraps() {
    let mut model = Model::new(1, u32::MAX - 10, 0, false);
    for _ in 0..3 {
        (0..20).for_each(|page| model.write(0, 1, page));
        let observed = model.session().observe().unwrap();
        assert_eq!(observed, Observed::per_vcpu(vec![20]));
        model.harvest();
    }
    let figures = model.tracker.snapshot();
    assert_eq!((figures.entries_reset, figures.vcpus[0].pages, figures.rearms), (60, 60, 0));
    model.check_nothing_is_lost();
}
