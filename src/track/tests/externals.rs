//! Pages that no vCPU dirtied, and pages that were given back: with the guest's in the same harvests.

use super::*;

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
