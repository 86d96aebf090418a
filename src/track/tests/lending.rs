//! Rings that another process follows and gives back, in whatever state it dies: what the VMM tracks afterwards is exact.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::super::Lending;
use super::super::gate::{BeforeRun, Gate};
use super::super::lent_page::{LentGate, LentPage};
use super::*;
use crate::kvm::ring::{DirtyRing, Recycle};

const VCPUS: usize = 2;
const SLOT: SlotId = SlotId(0);

#[derive(Clone, Debug)]
enum Event {
    Write(usize, u64),
    /// The borrower takes what is in a ring, and says so.
    Take(usize),
    /// It has all that is flagged reset.
    Reset,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..VCPUS, 0..SLOT_PAGES).prop_map(|(vcpu, page)| Event::Write(vcpu, page)),
        1 => (0..VCPUS).prop_map(Event::Take),
        1 => Just(Event::Reset),
    ]
}

struct Vmm {
    kernel: FakeKernel,
    tracker: DirtyTracker,
    vcpus: Vec<VcpuHandle>,
}

impl Vmm {
    fn new(position: u32) -> Self {
        let kernel = FakeKernel::new();
        let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(RING).unwrap());
        tracker.add_memory(&kernel.create_slot(SLOT, slot_pages(0))).unwrap();
        let attach = |index| tracker.attach_fake_vcpu(index, &kernel, position, 0).unwrap();
        let vcpus = (0..VCPUS).map(attach).collect();
        Self { kernel, tracker, vcpus }
    }

    /// The rings are lent.
    fn lend(&self) -> Lending {
        self.tracker.lend().unwrap().unwrap()
    }

    /// The guest writes; a ring that is full is recycled as its vCPU's thread does.
    fn write(&self, vcpu: usize, page: u64) {
        while !self.kernel.write(vcpu, SLOT, page) {
            self.vcpus[vcpu].ring_full().unwrap();
        }
    }
}

/// The page as the other process maps it.
fn mapped(file: &File) -> Arc<LentPage> {
    Arc::new(LentPage::open(file, VCPUS).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn whenever_a_borrower_dies_the_next_harvest_is_exactly_what_was_written_since(
        position in prop_oneof![Just(0), Just(u32::MAX - 20), any::<u32>()],
        periods in prop::collection::vec((prop::collection::vec(event(), 0..150), 0..VCPUS, 0..40_u32), 1..4),
        written in prop::collection::vec((0..VCPUS, 0..SLOT_PAGES), 0..200),
    ) {
        let vmm = Vmm::new(position);
        for (events, dying, flagged) in periods {
            let lending = vmm.lend();
            lending.set_dirty_logging(SLOT, true).unwrap();
            let page = mapped(lending.page_file());
            let size = lending.terms().ring;
            let mut rings: Vec<DirtyRing> = (0..VCPUS).map(|vcpu| {
                let (page, position) = (Arc::clone(&page), lending.terms().vcpus[vcpu].1);
                let publish = move |position| page[vcpu].taken.store(position, Ordering::Release);
                vmm.kernel.ring_again(vcpu, size, position).borrow(publish)
            }).collect();
            for event in events {
                match event {
                    // A guest with a full ring waits.
                    Event::Write(vcpu, page) => drop(vmm.kernel.write(vcpu, SLOT, page)),
                    Event::Take(vcpu) => drop(rings[vcpu].take(Recycle::Protecting, |_, _| {})),
                    Event::Reset => drop(lending.reset_dirty_rings().unwrap()),
                }
            }
            // It dies in the middle of taking: so many entries are flagged, and it has not said so.
            vmm.kernel.flag(dying, rings[dying].position(), flagged);
            drop(lending);
        }
        let session = vmm.tracker.start().unwrap();
        for (vcpu, page) in &written {
            vmm.write(*vcpu, *page);
        }
        let mut harvested = PageSet::new(slot_pages(0).end());
        session.harvest(&mut harvested).unwrap();
        let expected: BTreeSet<u64> = written.iter().map(|(_, page)| *page).collect();
        let found: BTreeSet<u64> = harvested.runs().flat_map(|run| run.first.0..run.end().0).collect();
        prop_assert_eq!(found, expected);
        let figures = vmm.tracker.snapshot();
        prop_assert_eq!((figures.rearms, figures.vcpus.iter().map(|vcpu| vcpu.overflows).sum::<u64>()), (0, 0));
    }
}

#[test]
fn a_lent_tracker_refuses_what_the_borrower_was_not_told_of_and_is_as_before_once_it_is_back() {
    let vmm = Vmm::new(0);
    let lending = vmm.lend();
    let is_lent = |refused: Result<(), TrackError>| matches!(refused, Err(TrackError::Lent));
    assert!(is_lent(vmm.tracker.start().map(drop)));
    assert!(is_lent(vmm.tracker.lend().map(drop)));
    assert!(is_lent(vmm.tracker.remove_slot(SLOT).map(drop)));
    assert!(is_lent(vmm.tracker.add_memory(&vmm.kernel.create_slot(SlotId(1), slot_pages(1)))));
    assert!(is_lent(vmm.tracker.attach_fake_vcpu(7, &vmm.kernel, 0, 0).map(drop)));
    drop(lending);
    let session = vmm.tracker.start().unwrap();
    assert!(matches!(vmm.tracker.lend(), Ok(None)), "a session needs them here");
    session.stop().unwrap();
    drop(vmm.lend());
}

#[test]
fn marks_and_external_writes_are_gathered_while_the_rings_are_lent() {
    let vmm = Vmm::new(0);
    let run = |page| PageRun { first: PageIndex(page), pages: 1 };
    let lending = vmm.lend();
    vmm.tracker.mark_dirty(run(1));
    lending.start_writers().unwrap();
    vmm.tracker.mark_dirty(run(2));
    let drained = lending.drain_writers();
    assert_eq!(drained.runs().collect::<Vec<_>>(), [run(2)]);
    assert!(lending.drain_writers().is_empty());
    lending.stop_writers();
    vmm.tracker.mark_dirty(run(3));
    assert!(lending.drain_writers().is_empty());
}

#[test]
fn a_gate_that_is_lent_is_closed_from_the_other_mapping_and_open_once_it_is_back() {
    let vmm = Vmm::new(0);
    let (vcpu, throttle) = (&vmm.vcpus[1], vmm.tracker.vcpu(1).unwrap());
    let lending = vmm.lend();
    assert_eq!(vcpu.before_run(), BeforeRun::Run);
    let theirs = Gate::borrowed(LentGate::new(&mapped(lending.page_file()), 1).unwrap());
    theirs.close_for(Duration::from_millis(3));
    assert_eq!(vcpu.before_run(), BeforeRun::Run);
    let throttled = throttle.throttled();
    assert!(throttled > Duration::ZERO && theirs.throttled() == throttled);
    theirs.close_for(Gate::CLOSED_MAX);
    // As a pause does.
    throttle.open();
    assert_eq!(vcpu.before_run(), BeforeRun::Run);
    theirs.close_for(Gate::CLOSED_MAX);
    drop(lending);
    assert_eq!(vcpu.before_run(), BeforeRun::Run);
    theirs.close_for(Gate::CLOSED_MAX);
    let before = throttle.throttled();
    assert_eq!(vcpu.before_run(), BeforeRun::Run);
    assert_eq!(throttle.throttled(), before, "the other process closes it no more");
    assert!(before >= throttled);
}

#[test]
fn a_full_ring_waits_for_the_borrower_and_is_recycled_here_once_that_is_gone() {
    let vmm = Vmm::new(0);
    let lending = vmm.lend();
    lending.set_dirty_logging(SLOT, true).unwrap();
    let full = (0..SLOT_PAGES).find(|page| !vmm.kernel.write(0, SLOT, *page)).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            // KVM says "full" again and again.
            while !vmm.kernel.write(0, SLOT, full) {
                vmm.vcpus[0].ring_full().unwrap();
            }
        });
        thread::sleep(Duration::from_millis(30));
        assert!(!vcpu.is_finished(), "nobody has taken an entry");
        drop(lending);
        vcpu.join().unwrap();
    });
}
