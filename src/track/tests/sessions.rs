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
                    prop_assert_eq!(observed, Observed::PerVcpu(expected));
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
        assert_eq!(model.observe(), Observed::PerVcpu(vec![100, 30]), "turn {turn}");
        let mut dirty = PageSet::new(end());
        second.harvest(&mut dirty).unwrap();
        assert_eq!(dirty.len(), 130, "turn {turn}");
    }
    assert_eq!(model.harvest_of(0).len(), 130);
    model.write(0, 1, 5);
    assert_eq!(model.observe(), Observed::PerVcpu(vec![1, 0]));
    assert_eq!(second.observe().unwrap(), Observed::PerVcpu(vec![1, 0]));
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
