//! Several sessions over one guest: each sees each page once, whatever the others do.

use std::collections::{BTreeMap, BTreeSet};

use proptest::sample::Index;

use super::model::write;
use super::*;

/// What may happen without making any page dirty that nobody wrote.
#[derive(Clone, Debug)]
enum Exact {
    Guest(Event),
    Observe(Index),
    Harvest(Index),
    AddSession,
    DropSession(Index),
    AddVcpu,
}

fn exact() -> impl Strategy<Value = Exact> {
    let any_one = any::<Index>();
    prop_oneof![
        6 => write().prop_map(Exact::Guest),
        3 => any_one.clone().prop_map(Exact::Observe),
        4 => any_one.clone().prop_map(Exact::Harvest),
        1 => Just(Exact::AddSession),
        1 => any_one.prop_map(Exact::DropSession),
        1 => Just(Exact::AddVcpu),
    ]
}

proptest! {
    #![proptest_config(cases())]

    /// The naive model: by session, each page with the vCPU that dirtied it first.
    #[test]
    fn each_session_sees_each_page_once_and_counts_it_for_the_vcpu_that_was_first(
        events in prop::collection::vec(exact(), 1..60),
    ) {
        let mut model = Model::new(2, 0, 0, false);
        let mut dirty: Vec<BTreeMap<u64, usize>> = vec![BTreeMap::new()];
        for event in events {
            let count = model.views.len();
            match event {
                Exact::Guest(event) => {
                    model.apply(&event);
                    let Event::Write { vcpu, slot, first, pages, step } = event else { unreachable!() };
                    let vcpu = vcpu.index(model.vcpus.len());
                    for i in 0..pages {
                        let page = slot_pages(slot).first.0 + (first + i * step) % SLOT_PAGES;
                        for pages in &mut dirty {
                            pages.entry(page).or_insert(vcpu);
                        }
                    }
                }
                Exact::Observe(view) => {
                    let view = view.index(count);
                    let mut expected = vec![0; model.vcpus.len()];
                    dirty[view].values().for_each(|vcpu| expected[*vcpu] += 1);
                    let model::View { session, redirtied, .. } = &mut model.views[view];
                    let observed = session.observe_into(redirtied).unwrap();
                    prop_assert_eq!(observed, Observed::per_vcpu(expected));
                    let told: BTreeSet<u64> = model::pages(redirtied.pages_mut());
                    prop_assert_eq!(&told, &dirty[view].keys().copied().collect());
                }
                Exact::Harvest(view) => {
                    let view = view.index(count);
                    let harvested = model.harvest_of(view);
                    prop_assert_eq!(harvested, dirty[view].keys().copied().collect());
                    dirty[view].clear();
                }
                Exact::AddSession => {
                    model.apply(&Event::AddSession);
                    dirty.resize(model.views.len(), BTreeMap::new());
                }
                Exact::DropSession(view) => {
                    model.apply(&Event::DropSession(view));
                    if model.views.len() < count {
                        dirty.remove(view.index(count));
                    }
                }
                Exact::AddVcpu => model.apply(&Event::AddVcpu),
            }
        }
        model.check_nothing_is_lost();
    }
}

#[test]
fn the_harvest_of_one_session_changes_nothing_of_what_another_observes() {
    let mut model = Model::new(2, 0, 0, false);
    let second = model.tracker.start().unwrap();
    for turn in 0..3 {
        (0..100).for_each(|offset| model.write(0, 1, offset));
        (0..30).for_each(|offset| model.write(1, 2, offset));
        assert_eq!(model.observe(), Observed::per_vcpu(vec![100, 30]), "turn {turn}");
        let mut dirty = PageSet::new(end());
        second.harvest(&mut dirty).unwrap();
        assert_eq!(dirty.len(), 130, "turn {turn}");
    }
    assert_eq!(model.harvest_of(0).len(), 130);
    model.write(0, 1, 5);
    assert_eq!(model.observe(), Observed::per_vcpu(vec![1, 0]));
    assert_eq!(second.observe().unwrap(), Observed::per_vcpu(vec![1, 0]));
}

#[test]
fn what_others_than_vcpus_dirty_is_observed_as_theirs_by_each_session() {
    let mut model = Model::new(1, 0, 0, false);
    let second = model.tracker.start().unwrap();
    let log = external::RegionLog::new(4096 * 300);
    model.tracker.add_external(Box::new(log.source(slot_pages(1).first))).unwrap();
    model.write(0, 0, 1);
    log.mark_dirty(4096 * 7, 1);
    model.tracker.mark_dirty(PageRun { first: slot_pages(2).first, pages: 3 });
    let observed = |others| Observed::PerVcpu { vcpus: vec![1], others };
    assert_eq!(model.observe(), observed(4));
    assert_eq!(second.observe().unwrap(), observed(4));
    // The guest writes one of them too: it was dirty before.
    model.write(0, 1, 7);
    assert_eq!(model.observe(), observed(4));
    assert_eq!(model.harvest_of(0).len(), 5);
    assert_eq!(model.observe(), Observed::per_vcpu(vec![0]));
    model.tracker.mark_dirty(PageRun { first: slot_pages(2).first, pages: 3 });
    assert_eq!(model.session().take_slot_runs(SlotId(2)).unwrap().len(), 1);
    assert_eq!(model.observe(), Observed::per_vcpu(vec![0]));
    let mut dirty = PageSet::new(end());
    second.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.len(), 5);
}

/// A log that is read for as long as a test wants.
struct SlowLog {
    began: std::sync::mpsc::Sender<()>,
    go_on: std::sync::mpsc::Receiver<()>,
}

impl external::ExternalSource for SlowLog {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn drain_into(&mut self, _: &mut PageSet) {
        let _ = self.began.send(());
        let _ = self.go_on.recv();
    }

    fn stop(&mut self) {}
}

#[test]
fn a_vcpu_whose_ring_is_full_waits_for_no_device_log_and_an_observation_passes_it_by() {
    let mut model = Model::new(1, 0, 0, false);
    let ((began, has_begun), (go_on, may_go_on)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let source = std::sync::Arc::new(std::sync::Mutex::new(SlowLog { began, go_on: may_go_on }));
    model.tracker.add_external(Box::new(std::sync::Arc::clone(&source))).unwrap();
    std::thread::scope(|scope| {
        let tracker = &model.tracker;
        scope.spawn(move || {
            // Begins while the first runs: all is collected.
            tracker.start().unwrap();
        });
        has_begun.recv().unwrap();
        model.vcpus[0].ring_full().unwrap();
        model.session().observe().unwrap();
        go_on.send(()).unwrap();
        drop(go_on);
    });
    model.write(0, 1, 7);
    model.check_nothing_is_lost();
}

#[test]
fn logging_goes_on_with_the_first_session_and_off_with_the_last() {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
    assert!(!kernel.is_logging(SlotId(1)));
    let first = tracker.start().unwrap();
    let second = tracker.start().unwrap();
    drop(first);
    assert!(kernel.is_logging(SlotId(1)));
    second.stop().unwrap();
    assert!(!kernel.is_logging(SlotId(1)));
    second.start().unwrap();
    assert!(kernel.is_logging(SlotId(1)));
    drop(second);
    assert!(!kernel.is_logging(SlotId(1)));
}
