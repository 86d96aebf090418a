//! A VM that is lent while its rings stay with the VMM: whoever has a session sees each page once.

use std::collections::BTreeSet;

use super::*;
use crate::layout::GuestMemory;
use crate::track::{DirtySource, Initially, Observed, Redirtied, Session, VcpuHandle};

/// A VMM whose VM has memory and vCPUs in a kernel in memory.
struct Guest {
    kernel: FakeKernel,
    tracker: DirtyTracker,
    memory: [RegionFile; 1],
    vcpus: Vec<VcpuHandle>,
}

impl Guest {
    fn on_rings() -> Self {
        let kernel = FakeKernel::new();
        let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(1024).unwrap());
        Self::of(kernel, tracker)
    }

    fn on_bitmap() -> Self {
        let kernel = FakeKernel::new();
        let tracker = DirtyTracker::on_fake_bitmap(&kernel);
        Self::of(kernel, tracker)
    }

    fn of(kernel: FakeKernel, tracker: DirtyTracker) -> Self {
        tracker.add_memory(&kernel.create_slot(SLOT, ram())).unwrap();
        let vcpus = vec![tracker.attach_fake_vcpu(7, &kernel, 0, 0).unwrap()];
        Self { kernel, tracker, memory: [region()], vcpus }
    }

    fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            while !self.kernel.write(0, SLOT, page) {
                self.vcpus[0].ring_full().unwrap();
            }
        }
    }

    /// Lends the VM to `act`, and keeps its rings.
    fn keep_rings<T>(&self, act: impl FnOnce(BorrowedVm) -> T) -> (Result<Ended, OffloadError>, T) {
        let (near, far) = sockets();
        let (never, mut vm) = (AtomicBool::new(false), FakeVm::default());
        let lent = LentVm {
            tracker: &self.tracker,
            rings: Rings::Keep,
            memory: &self.memory,
            vcpus: &[],
            vm_id: "",
            description: b"",
        };
        thread::scope(|scope| {
            let serving = scope.spawn(|| lend(near, &mut vm, &lent, &never));
            let done = act(BorrowedVm::borrow(far).unwrap());
            (serving.join().unwrap(), done)
        })
    }
}

fn pages_of(dirty: &PageSet) -> BTreeSet<u64> {
    dirty.runs().flat_map(|run| run.first.0..run.end().0).map(|page| page - ram().first.0).collect()
}

fn harvest(session: &Session) -> BTreeSet<u64> {
    let mut dirty = PageSet::new(ram().end());
    session.harvest(&mut dirty).unwrap();
    pages_of(&dirty)
}

fn harvest_there(session: &mut dyn DirtySource) -> BTreeSet<u64> {
    let mut dirty = PageSet::new(ram().end());
    session.harvest(&mut dirty).unwrap();
    pages_of(&dirty)
}

#[test]
fn sessions_of_the_vmm_and_of_the_offload_process_see_each_page_once() {
    let guest = Guest::on_rings();
    let backup = guest.tracker.start().unwrap();
    guest.write([1]);
    let (ended, ()) = guest.keep_rings(|mut borrowed| {
        assert_eq!((borrowed.session.backend(), borrowed.vcpus), ("ring", 1));
        borrowed.session.start().unwrap();
        guest.write([2, 3]);
        let rate = guest.tracker.start().unwrap();
        guest.write([3, 4]);
        let mut redirtied = Redirtied::new(ram().end());
        let observed = borrowed.session.observe_into(&mut redirtied).unwrap();
        assert_eq!((observed, redirtied.len()), (Observed::per_vcpu(vec![3]), 3));
        assert_eq!(harvest_there(borrowed.session.as_mut()), BTreeSet::from([2, 3, 4]));
        assert_eq!(harvest(&backup), BTreeSet::from([1, 2, 3, 4]));
        assert_eq!(harvest(&rate), BTreeSet::from([3, 4]));
        let mut given_back = PageSet::new(ram().end());
        given_back.insert_run(PageRun { first: PageIndex(ram().first.0 + 9), pages: 2 });
        borrowed.session.give_back(&given_back);
        assert_eq!(harvest_there(borrowed.session.as_mut()), BTreeSet::from([9, 10]));
        assert_eq!(borrowed.figures().unwrap()[0].index, 7);
        borrowed.end(End::Stays, "enough").unwrap();
    });
    assert!(matches!(ended, Ok(Ended::StaysHere { .. })), "{ended:?}");
    guest.write([5]);
    assert_eq!(harvest(&backup), BTreeSet::from([5]));
}

#[test]
fn a_session_of_the_vmm_loses_no_page_when_the_offload_process_dies() {
    let guest = Guest::on_rings();
    let backup = guest.tracker.start().unwrap();
    let (ended, ()) = guest.keep_rings(|mut borrowed| {
        borrowed.session.start().unwrap();
        guest.write([1, 2]);
        harvest_there(borrowed.session.as_mut());
        guest.write([2]);
        borrowed.session.vcpus()[0].close_for(Duration::from_millis(10));
    });
    assert!(matches!(ended, Err(OffloadError::Gone { .. })), "{ended:?}");
    guest.write([3]);
    assert_eq!(harvest(&backup), BTreeSet::from([1, 2, 3]));
    let (ended, ()) = guest.keep_rings(|borrowed| borrowed.end(End::Stays, "").unwrap());
    assert!(ended.is_ok(), "it can be lent again: {ended:?}");
}

#[test]
fn rings_that_a_session_needs_are_kept_without_a_word() {
    let guest = Guest::on_rings();
    let backup = guest.tracker.start().unwrap();
    assert!(guest.tracker.lend().unwrap().is_none());
    drop(backup);
    let (_, ()) = guest.keep_rings(|borrowed| {
        assert!(matches!(guest.tracker.lend(), Err(TrackError::Lent)), "one migration at a time");
        borrowed.end(End::Stays, "").unwrap();
    });
    assert!(guest.tracker.lend().unwrap().is_some());
}

#[test]
fn a_vcpu_that_is_plugged_in_is_counted_and_held_back_from_the_other_process() {
    let guest = Guest::on_rings();
    let (_, ()) = guest.keep_rings(|mut borrowed| {
        let session = borrowed.session.as_mut();
        session.start().unwrap();
        assert_eq!(session.vcpus().iter().map(|vcpu| vcpu.index()).collect::<Vec<_>>(), [7]);
        let plugged = guest.tracker.attach_fake_vcpu(2, &guest.kernel, 0, 0).unwrap();
        assert!(guest.kernel.write(1, SLOT, 5));
        assert_eq!(session.observe().unwrap(), Observed::per_vcpu(vec![0, 1]));
        let throttles = session.vcpus();
        assert_eq!(throttles.iter().map(|vcpu| vcpu.index()).collect::<Vec<_>>(), [7, 2]);
        throttles[1].close_for(Duration::from_millis(3));
        let _ = plugged.before_run();
        let waited = guest.tracker.vcpu(2).unwrap().throttled();
        assert!(waited > Duration::ZERO && throttles[1].throttled() == waited, "{waited:?}");
        guest.tracker.detach_vcpu(7).unwrap();
        session.observe().unwrap();
        assert_eq!(session.vcpus().iter().map(|vcpu| vcpu.index()).collect::<Vec<_>>(), [2]);
        borrowed.end(End::Stays, "").unwrap();
    });
}

#[test]
fn memory_that_is_plugged_in_is_the_vmms_and_ends_the_migration_that_has_no_file_of_it() {
    let guest = Guest::on_rings();
    let backup = guest.tracker.start().unwrap();
    let (_, ()) = guest.keep_rings(|mut borrowed| {
        borrowed.session.start().unwrap();
        let more = PageRun { first: PageIndex(200), pages: 8 };
        let plugged: GuestMemory = guest.kernel.create_slot(SlotId(9), more);
        guest.tracker.add_memory_as(&plugged, Initially::Dirty).unwrap();
        let refused = borrowed.session.harvest(&mut PageSet::new(ram().end())).unwrap_err();
        assert!(matches!(refused, TrackError::SetTooSmall { needed: PageIndex(208), .. }), "{refused}");
        borrowed.end(End::Stays, &refused.to_string()).unwrap();
    });
    let mut dirty = PageSet::new(PageIndex(208));
    backup.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.len(), 8);
    assert!(guest.tracker.remove_slot(SlotId(9)).unwrap());
}

#[test]
fn what_a_ring_was_recycled_without_is_protected_when_the_offload_process_asks() {
    let guest = Guest::on_rings();
    guest.kernel.can_take_pages(Some(std::num::NonZeroU64::MIN));
    let (_, ()) = guest.keep_rings(|mut borrowed| {
        borrowed.session.start().unwrap();
        guest.write(0..40);
        guest.vcpus[0].ring_full().unwrap();
        guest.write([50]);
        let (mut dirty, mut behind) = (PageSet::new(ram().end()), Redirtied::new(ram().end()));
        borrowed.session.harvest_protected(&mut dirty, &mut behind).unwrap();
        assert_eq!((pages_of(&dirty), behind.len()), (BTreeSet::from([50]), 40));
        dirty.clear();
        borrowed.session.protect(&mut behind, 10, &mut dirty).unwrap();
        assert_eq!((pages_of(&dirty), behind.len()), ((30..40).collect(), 30));
        guest.write([35]);
        assert_eq!(harvest_there(borrowed.session.as_mut()), (0..30).chain([35]).collect());
        borrowed.end(End::Stays, "").unwrap();
    });
}

#[test]
fn a_bitmap_is_harvested_for_the_offload_process() {
    let guest = Guest::on_bitmap();
    let (_, ()) = guest.keep_rings(|mut borrowed| {
        assert_eq!((borrowed.session.backend(), borrowed.session.unseen_per_vcpu()), ("bitmap", 0));
        borrowed.session.start().unwrap();
        guest.write([3, 60]);
        assert_eq!(borrowed.session.observe().unwrap(), Observed::Unobservable);
        assert_eq!(harvest_there(borrowed.session.as_mut()), BTreeSet::from([3, 60]));
        borrowed.end(End::Stays, "").unwrap();
    });
}

#[test]
fn the_last_pages_are_handed_out_only_while_the_guest_stands_still() {
    let guest = Guest::on_rings();
    let (_, ()) = guest.keep_rings(|mut borrowed| {
        let BorrowedVm { vm, session, .. } = &mut borrowed;
        session.start().unwrap();
        guest.write([1]);
        let mut dirty = PageSet::new(ram().end());
        let never = Paused::declare_every_vcpu_is_outside_kvm_run();
        let refused = session.harvest_paused(&never, &mut dirty).unwrap_err().to_string();
        assert!(refused.contains("does not stand still"), "{refused}");
        let paused = vm.pause().unwrap();
        session.harvest_paused(&paused, &mut dirty).unwrap();
        assert_eq!(pages_of(&dirty), BTreeSet::from([1]));
        let settled = paused.declare_nothing_else_writes();
        assert!(session.harvest_final(&settled, &mut dirty).is_err(), "its devices were not stopped");
        let quiesced = vm.quiesce(&paused).unwrap();
        guest.tracker.mark_dirty(PageRun { first: PageIndex(ram().first.0 + 2), pages: 1 });
        dirty.clear();
        session.harvest_final(&quiesced.state_is_saved(), &mut dirty).unwrap();
        assert_eq!(pages_of(&dirty), BTreeSet::from([2]));
        vm.resume(paused).unwrap();
        borrowed.end(End::Stays, "").unwrap();
    });
}
