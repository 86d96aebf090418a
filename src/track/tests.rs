//! Tracking against a kernel in memory: every event in any order, against a model that counts versions.

mod edges;
mod model;
mod sessions;

use proptest::prelude::*;

use self::model::{Event, Model, RING, SLOT_PAGES, SLOTS, emulation, end, event, slot_pages};
use super::*;
use crate::kvm::RingSize;
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::page_set::PageSet;
use crate::testing::{FakeKernel, Interruption};
use crate::vm::{Paused, VmError};

fn run(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool, events: &[Event]) {
    let mut model = Model::new(vcpus, position, cpu_log_entries, bitmap);
    events.iter().for_each(|event| model.apply(event));
    model.check_nothing_is_lost();
}

/// Rings that begin anywhere, and often shortly before the index wraps at 2³².
fn position() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..2000_u32).prop_map(|before| before.wrapping_neg()), any::<u32>()]
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
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, position, cpu_log_entries, false, &events);
    }

    #[test]
    fn rings_lose_nothing_when_emulation_overruns_them(
        vcpus in 1..5_usize,
        position in position(),
        events in prop::collection::vec(prop_oneof![1 => emulation(), 5 => event()], 1..60),
    ) {
        run(vcpus, position, 0, false, &events);
    }

    #[test]
    fn the_bitmap_loses_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, 0, 0, true, &events);
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

/// A log that a test fills; it can be reported to refuse its start.
#[derive(Default)]
struct Log {
    pages: std::sync::Arc<std::sync::Mutex<Option<Vec<u64>>>>,
    refuses: bool,
}

impl external::ExternalSource for Log {
    fn name(&self) -> &'static str {
        "test"
    }

    fn start(&mut self) -> Result<(), VmError> {
        if self.refuses {
            return Err("no room".into());
        }
        *self.pages.lock().unwrap() = Some(Vec::new());
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let mut pages = self.pages.lock().unwrap();
        dirty.extend(pages.as_mut().unwrap().drain(..).map(PageIndex));
    }

    fn stop(&mut self) {
        *self.pages.lock().unwrap() = None;
    }
}

#[test]
fn external_logs_begin_end_and_are_harvested_with_the_tracker() {
    let mut model = Model::new(1, 0, 0, false);
    let log = Log::default();
    let pages = std::sync::Arc::clone(&log.pages);
    let id = model.tracker.add_external(Box::new(log)).unwrap();
    pages.lock().unwrap().as_mut().expect("started, as tracking is on").extend([5, SLOT_PAGES, u64::MAX]);
    model.write(0, 0, 7);
    let mut dirty = PageSet::new(end());
    model.session().harvest(&mut dirty).unwrap();
    assert_eq!(
        dirty.runs().map(|run| run.first.0).collect::<Vec<_>>(),
        [5, 7],
        "and no page that is not RAM"
    );

    model.session().stop().unwrap();
    assert!(pages.lock().unwrap().is_none());
    let refusing = Log { refuses: true, ..Log::default() };
    let refusing = model.tracker.add_external(Box::new(refusing)).unwrap();
    let error = model.session().start().unwrap_err();
    assert!(matches!(error, TrackError::External { name: "test", .. }), "{error:?}");
    assert!(pages.lock().unwrap().is_none(), "the first log was stopped again");
    assert!(model.tracker.remove_external(refusing).is_some());
    assert!(model.tracker.remove_external(refusing).is_none());

    model.session().start().unwrap();
    pages.lock().unwrap().as_mut().unwrap().push(9);
    assert!(model.tracker.remove_external(id).is_some());
    dirty.clear();
    model.session().harvest(&mut dirty).unwrap();
    assert!(dirty.contains(PageIndex(9)), "what it had logged when it went");
}

/// On arm64, pages that no vCPU dirtied are in a bitmap beside the rings, to be collected last.
#[test]
fn what_no_vcpu_wrote_comes_from_the_bitmap_beside_the_rings_with_the_final_harvest() {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings_with_bitmap(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
    let session = tracker.start().unwrap();
    kernel.write_without_vcpu(SlotId(1), 70);
    assert!(kernel.write(0, SlotId(1), 5));
    let mut dirty = PageSet::new(end());
    session.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.len(), 1, "while vCPUs run, the rings only");
    kernel.write_without_vcpu(SlotId(1), 71);
    session
        .harvest_final(
            &Paused::declare_every_vcpu_is_outside_kvm_run().declare_nothing_else_writes(),
            &mut dirty,
        )
        .unwrap();
    let first = slot_pages(1).first.0;
    let pages: Vec<u64> = dirty.runs().flat_map(|run| run.first.0..run.end().0).collect();
    assert_eq!(pages, [first + 5, first + 70, first + 71]);
}

#[test]
fn what_was_given_back_outlasts_everything_but_a_harvest() {
    let model = Model::new(1, 0, 0, false);
    let (kept, other) = (slot_pages(1).first, slot_pages(2).first);
    let mut given_back = PageSet::new(end());
    given_back.extend([kept, other, PageIndex(slot_pages(0).end().0)]);
    model.session().give_back(&given_back);
    model.session().stop().unwrap();
    let beyond = PageRun { first: PageIndex(50_000), pages: 10 };
    model.tracker.add_memory(&model.kernel.create_slot(SlotId(9), beyond)).unwrap();
    model.session().start().unwrap();
    assert_eq!(model.session().take_slot_bitmap(SlotId(2)).unwrap()[0], 1);
    model.session().stop().unwrap();
    model.session().start().unwrap();
    let mut dirty = PageSet::new(beyond.end());
    model.session().harvest(&mut dirty).unwrap();
    let pages: Vec<PageIndex> = dirty.runs().map(|run| run.first).collect();
    assert_eq!((dirty.len(), pages), (1, vec![kept]), "once, and no page that is not RAM");
    dirty.clear();
    model.session().harvest(&mut dirty).unwrap();
    assert!(dirty.is_empty());
}
