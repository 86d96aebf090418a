//! Tracking on real KVM: what a guest wrote is what is harvested, on good days and on bad ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;
mod guest;

use std::collections::BTreeSet;

use bare::{BareVm, DATA, Exit, Pages, Privilege, Work, kvm, take_and_give_back};
use guest::{Guest, pages};
use kvm_ioctls::Kvm;
use ringferry::kvm::{KvmError, RingSize};
use ringferry::track::{DirtyTracker, Leftover, Observed, Session};
use ringferry::{PageIndex, PageRun, PageSet, Paused, Redirtied, SlotId, TrackError};

const SLOT_PAGES: [u64; 2] = [4096, 1000];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backend {
    Ring,
    Bitmap,
}

const BACKENDS: [Backend; 2] = [Backend::Ring, Backend::Bitmap];

impl Guest {
    /// A VM of two data slots and one vCPU, known to a tracker that has not started.
    fn new(kvm: &Kvm, backend: Backend, size: RingSize) -> Self {
        let vm = BareVm::new(kvm, &SLOT_PAGES).unwrap();
        let tracker = match backend {
            Backend::Ring => DirtyTracker::enable(vm.fd(), size),
            Backend::Bitmap => DirtyTracker::enable_bitmap(vm.fd()),
        };
        Self::tracked(vm, tracker.unwrap())
    }

    fn harvest_final(&mut self) -> BTreeSet<PageIndex> {
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        let mut dirty = PageSet::new(self.vm.memory().end());
        self.session.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
        pages(&dirty)
    }
}

/// Every `step`-th data page, from the `first` on.
fn every(step: usize, first: u64) -> BTreeSet<PageIndex> {
    (first..SLOT_PAGES.iter().sum()).step_by(step).map(|i| PageIndex(DATA.0 + i)).collect()
}

fn only(page: u64) -> BTreeSet<PageIndex> {
    BTreeSet::from([PageIndex(DATA.0 + page)])
}

#[test]
fn what_a_guest_writes_is_what_is_harvested_by_every_backend() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        guest.write(&every(1, 0));
        guest.session.start().unwrap();
        assert_eq!(guest.harvest(), BTreeSet::new(), "{backend:?}: written before the start");
        for step in [1, 2, 7, 64, 5000] {
            let written = every(step, 3);
            guest.write(&written);
            assert_eq!(guest.harvest(), written, "{backend:?}: every {step}th page");
            assert_eq!(guest.harvest(), BTreeSet::new(), "{backend:?}: nothing is handed out twice");
        }
        let (early, late) = (every(3, 0), every(5, 1));
        guest.write(&early);
        guest.write(&late);
        assert_eq!(guest.harvest_final(), &early | &late, "{backend:?}");
        guest.session.stop().unwrap();
        assert_eq!(guest.tracker.snapshot().harvests, 12);
    }
}

#[test]
fn writes_of_the_vmm_are_harvested_with_those_of_the_guest() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        let run = PageRun { first: PageIndex(DATA.0 + 10), pages: 3 };
        guest.tracker.mark_dirty(run);
        guest.session.start().unwrap();
        assert_eq!(guest.harvest(), BTreeSet::new(), "{backend:?}: marked before the start");
        guest.tracker.mark_dirty(run);
        guest.tracker.mark_dirty(PageRun { first: PageIndex(0), pages: 1 });
        guest.write(&only(20));
        let expected = [10, 11, 12, 20].into_iter().flat_map(only).collect();
        assert_eq!(guest.harvest(), expected, "{backend:?}: and what is no RAM is left out");
    }
}

#[test]
fn observing_costs_the_guest_nothing_and_counts_by_vcpu() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::MAX);
    guest.session.start().unwrap();
    for written in [every(2, 0), every(2, 0), every(1, 0)] {
        guest.write(&written);
        assert_eq!(guest.session.observe().unwrap(), Observed::per_vcpu(vec![written.len() as u64]));
    }
    assert_eq!(guest.tracker.snapshot().resets, 0, "pages stayed writable");
    assert_eq!(guest.harvest(), every(1, 0));
    assert_eq!(guest.session.observe().unwrap(), Observed::per_vcpu(vec![0]));
    let figures = guest.tracker.snapshot().vcpus[0];
    assert_eq!((figures.pages, figures.duplicate_entries), (every(1, 0).len() as u64, 0));
    assert_eq!(figures.ring_entries_max, figures.pages);
}

#[test]
fn a_page_that_the_host_took_away_and_gave_back_counts_once() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::MAX);
    guest.session.start().unwrap();
    let mut redirtied = Redirtied::new(guest.vm.memory().end());
    let all = every(1, 0);
    for _ in 0..3 {
        guest.write(&all);
        let counted = guest.session.observe_into(&mut redirtied).unwrap();
        assert_eq!(counted, Observed::per_vcpu(vec![all.len() as u64]));
        for region in guest.vm.memory().regions() {
            take_and_give_back(guest.vm.memory(), region.pages);
        }
    }
    assert_eq!(guest.harvest(), all);
    let figures = guest.tracker.snapshot().vcpus[0];
    assert_eq!(figures.pages, all.len() as u64);
    assert!(figures.duplicate_entries >= figures.pages, "KVM named them once: {figures:?}");
}

#[test]
fn a_full_ring_is_recycled_by_its_own_vcpu() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::from_entries(1024).unwrap());
    guest.session.start().unwrap();
    guest.write(&every(1, 0));
    let figures = guest.tracker.snapshot().vcpus[0];
    assert!(figures.ring_full_exits >= 5, "{figures:?}");
    assert_eq!(guest.harvest(), every(1, 0));
}

#[test]
fn a_vcpu_that_says_full_for_no_reason_does_no_harm() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::from_entries(1024).unwrap());
    guest.session.start().unwrap();
    for _ in 0..20 {
        guest.handle.ring_full().unwrap();
        guest.write(&only(7));
        guest.handle.ring_full().unwrap();
        guest.handle.ring_full().unwrap();
    }
    assert_eq!(guest.harvest(), only(7));
    guest.write(&every(1, 0));
    assert_eq!(guest.harvest(), every(1, 0));
    assert_eq!(guest.tracker.snapshot().rearms, 0);
}

#[test]
fn a_session_that_is_started_twice_is_refused_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        assert!(matches!(guest.session.observe(), Err(TrackError::NotTracking)));
        guest.session.start().unwrap();
        guest.write(&only(1));
        assert!(matches!(guest.session.start(), Err(TrackError::AlreadyTracking)));
        assert_eq!(guest.harvest(), only(1), "{backend:?}");
        guest.session.stop().unwrap();
        guest.session.stop().unwrap();
        let mut dirty = PageSet::new(guest.vm.memory().end());
        assert!(matches!(guest.session.harvest(&mut dirty), Err(TrackError::NotTracking)));
    }
}

#[test]
fn a_session_that_begins_beside_another_sees_every_later_write_and_takes_no_page_of_it() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        guest.session.start().unwrap();
        guest.write(&every(1, 0));
        let second = guest.tracker.start().unwrap();
        let harvest = |guest: &Guest, session: &Session| {
            let mut dirty = PageSet::new(guest.vm.memory().end());
            session.harvest(&mut dirty).unwrap();
            pages(&dirty)
        };
        assert_eq!(harvest(&guest, &second), BTreeSet::new(), "{backend:?}: written before its start");
        guest.write(&every(3, 0));
        assert_eq!(harvest(&guest, &second), every(3, 0), "{backend:?}: still writable when it began");
        guest.write(&every(3, 1));
        assert_eq!(guest.harvest(), every(1, 0), "{backend:?}: whoever harvested in between");
        assert_eq!(harvest(&guest, &second), every(3, 1), "{backend:?}");
        guest.write(&every(3, 2));
        drop(second);
        assert_eq!(guest.harvest(), every(3, 2), "{backend:?}: logging outlasts the one that ended");
    }
}

#[test]
fn what_a_session_leaves_is_forgotten_or_comes_with_the_next_one_as_it_says() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        for (leftover, expected) in
            [(Leftover::Forget, BTreeSet::new()), (Leftover::GiveBack, &every(7, 0) | &only(1))]
        {
            let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
            let first = guest.tracker.start().unwrap();
            guest.write(&every(7, 0));
            let mut undelivered = PageSet::new(guest.vm.memory().end());
            undelivered.insert(PageIndex(DATA.0 + 1));
            first.give_back(&undelivered);
            first.end(leftover).unwrap();
            guest.session.start().unwrap();
            assert_eq!(guest.harvest(), expected, "{backend:?} {leftover:?}");
            assert_eq!(guest.harvest(), BTreeSet::new());
        }
    }
}

#[test]
fn a_second_migration_gets_everything_that_a_failed_one_took() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        guest.session.start().unwrap();
        let mut taken = PageSet::new(guest.vm.memory().end());
        for first in [5, 6] {
            guest.write(&every(9, first));
            guest.session.harvest(&mut taken).unwrap();
        }
        guest.session.give_back(&taken);
        guest.write(&only(8));
        assert_eq!(guest.harvest(), &(&every(9, 5) | &every(9, 6)) | &only(8), "{backend:?}");
        guest.session.give_back(&taken);
        guest.session.stop().unwrap();
        guest.write(&only(9));
        guest.session.start().unwrap();
        assert_eq!(guest.harvest(), &every(9, 5) | &every(9, 6), "{backend:?}: and after a new start");
    }
}

#[test]
fn what_a_vcpu_wrote_before_it_died_is_harvested() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::MAX);
    guest.session.start().unwrap();
    let mut plugged = guest.vm.create_vcpu(1, Privilege::User).unwrap();
    let handle = guest.tracker.attach_vcpu(1, plugged.fd()).unwrap();
    assert!(matches!(guest.tracker.attach_vcpu(1, plugged.fd()), Err(TrackError::VcpuKnown(1))));
    plugged.set_work(&Work::List(every(4, 2).into_iter().collect()), 77).unwrap();
    plugged.run_to_end(Some(&handle)).unwrap();
    drop((plugged, handle));
    guest.write(&only(1));
    assert_eq!(guest.session.observe().unwrap(), Observed::per_vcpu(vec![1, every(4, 2).len() as u64]));
    assert_eq!(guest.harvest(), &every(4, 2) | &only(1));
}

#[test]
fn what_a_vcpu_wrote_before_it_was_unplugged_is_harvested_and_it_goes_on_when_it_is_plugged_in_again() {
    let Some(kvm) = kvm() else { return };
    // A ring that is gone through several times.
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::from_entries(4096).unwrap());
    guest.session.start().unwrap();
    let mut plugged = guest.vm.create_vcpu(1, Privilege::User).unwrap();
    for turn in 1..=6 {
        let handle = guest.tracker.attach_vcpu(1, plugged.fd()).unwrap();
        let written = every(4, turn % 4);
        plugged.set_work(&Work::List(written.iter().copied().collect()), turn).unwrap();
        plugged.run_to_end(Some(&handle)).unwrap();
        let observed = Observed::per_vcpu(vec![0, written.len() as u64]);
        assert_eq!(guest.session.observe().unwrap(), observed, "{turn}");
        guest.tracker.detach_vcpu(1).unwrap();
        guest.write(&only(2));
        let observed = guest.session.observe().unwrap();
        let Observed::PerVcpu { vcpus, others } = observed else { panic!("{observed:?}") };
        assert_eq!((vcpus.len(), others), (1, written.len() as u64), "{turn}");
        assert_eq!(guest.harvest(), &written | &only(2), "{turn}");
        assert_eq!(guest.harvest(), BTreeSet::new(), "{turn}");
    }
    assert_eq!(guest.tracker.snapshot().rearms, 0, "its ring was in step each time");
}

#[test]
fn a_slot_id_that_is_used_again_tracks_its_new_pages() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        guest.session.start().unwrap();
        guest.write(&every(1, 0));
        guest.tracker.remove_slot(SlotId(2)).unwrap();
        assert!(!guest.tracker.remove_slot(SlotId(2)).unwrap(), "it is forgotten");
        let elsewhere = PageIndex(DATA.0 + 100_000);
        let memory = guest.vm.move_slot(SlotId(2), elsewhere).unwrap();
        guest.tracker.add_memory(&memory).unwrap();
        assert!(matches!(guest.tracker.add_memory(&memory), Err(TrackError::SlotKnown(SlotId(2)))));

        let mut small = PageSet::new(guest.vm.memory().end());
        let refused = guest.session.harvest(&mut small);
        assert!(matches!(refused, Err(TrackError::SetTooSmall { .. })), "{refused:?}");
        let mut dirty = PageSet::new(memory.end());
        guest.session.harvest(&mut dirty).unwrap();
        let first_slot = PageRun { first: DATA, pages: SLOT_PAGES[0] };
        let moved = PageRun { first: elsewhere, pages: SLOT_PAGES[1] };
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [first_slot, moved], "{backend:?}: new memory is dirty");

        let list = vec![DATA, elsewhere, PageIndex(elsewhere.0 + SLOT_PAGES[1] - 1)];
        guest.vcpu.set_work(&Work::List(list.clone()), 1).unwrap();
        guest.vcpu.run_to_end(Some(&guest.handle)).unwrap();
        dirty.clear();
        guest.session.harvest(&mut dirty).unwrap();
        assert_eq!(pages(&dirty), list.into_iter().collect(), "{backend:?}");
    }
}

#[test]
fn a_slot_bitmap_says_what_kvm_get_dirty_log_would() {
    let Some(kvm) = kvm() else { return };
    for backend in BACKENDS {
        let mut guest = Guest::new(&kvm, backend, RingSize::MAX);
        guest.session.start().unwrap();
        guest.write(&[0, 63, 64, 4095, 4096, 5095].into_iter().flat_map(only).collect());
        let first = guest.session.take_slot_bitmap(SlotId(1)).unwrap();
        assert_eq!(
            (first.len(), first[0], first[1], first[63]),
            (64, 1 << 63 | 1, 1, 1 << 63),
            "{backend:?}"
        );
        let second = guest.session.take_slot_bitmap(SlotId(2)).unwrap();
        assert_eq!((second.len(), second[0], second[15]), (16, 1, 1 << 39), "{backend:?}");
        assert!(guest.session.take_slot_bitmap(SlotId(1)).unwrap().iter().all(|word| *word == 0));
    }
}

#[test]
fn a_closed_gate_keeps_a_vcpu_out_of_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Backend::Ring, RingSize::MAX);
    guest.tracker.vcpu(0).unwrap().close_for(std::time::Duration::from_millis(2));
    guest.write(&only(0));
    assert!(guest.tracker.snapshot().vcpus[0].throttled_ns > 0);
}

#[test]
fn what_kvm_refuses_is_explained() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let late = DirtyTracker::enable(&vm, RingSize::MAX).unwrap_err();
    assert!(matches!(late, TrackError::Kvm(KvmError::RingRefused { .. })), "{late:?}");
    assert!(late.to_string().contains("before the first vCPU"), "{late}");
    drop(vcpu);

    let vm = kvm.create_vm().unwrap();
    let _tracker = DirtyTracker::enable(&vm, RingSize::MIN).unwrap();
    let twice = DirtyTracker::enable(&vm, RingSize::MIN).unwrap_err();
    assert!(matches!(twice, TrackError::Kvm(KvmError::RingRefused { .. })), "{twice:?}");

    let not_kvm = std::fs::File::open("/dev/null").unwrap();
    let error = DirtyTracker::enable(&not_kvm, RingSize::MIN).unwrap_err();
    assert!(error.to_string().contains("KVM_CHECK_EXTENSION"), "{error}");
}

#[test]
fn the_bitmap_of_a_vm_with_rings_is_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let vm = BareVm::new(&kvm, &SLOT_PAGES).unwrap();
    let _rings = DirtyTracker::enable(vm.fd(), RingSize::MIN).unwrap();
    let bitmap = DirtyTracker::enable_bitmap(vm.fd()).unwrap();
    bitmap.add_memory(vm.memory()).unwrap();
    let bitmap = bitmap.start().unwrap();
    let error = bitmap.harvest(&mut PageSet::new(vm.memory().end())).unwrap_err();
    assert!(matches!(error, TrackError::Kvm(KvmError::RingInUse)), "{error:?}");
}

/// Emulated guests check the soft limit only every so many instructions, and run over their rings.
#[test]
fn an_emulated_guest_that_overruns_its_ring_neither_hangs_nor_loses_a_page() {
    let Some(kvm) = kvm() else { return };
    let vm = BareVm::new(&kvm, &[2048]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::MIN).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let mut vcpu = vm.create_vcpu(0, Privilege::Kernel).unwrap();
    let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
    let session = tracker.start().unwrap();
    let end = vm.memory().end();
    // What was "sent": each page's word as read after the harvest that handed the page out.
    let mut sent = vec![0; 2048];
    let mut send = |dirty: &PageSet| {
        for page in pages(dirty) {
            sent[usize::try_from(page.0 - DATA.0).unwrap()] = vm.word(page).unwrap();
        }
    };
    let mut full_in_a_row = 0;
    let work = Work::Loop(Pages { first: DATA, pages: 2048, stride: 1, passes: 40 });
    vcpu.set_work(&work, 1).unwrap();
    for turn in 0_u32.. {
        assert_eq!(handle.before_run(), ringferry::track::BeforeRun::Run);
        match vcpu.run().unwrap() {
            Exit::Done => break,
            Exit::Kicked => {}
            Exit::RingFull => {
                handle.ring_full().unwrap();
                full_in_a_row += 1;
                assert!(full_in_a_row < 100_000, "the vCPU is stuck");
            }
        }
        if turn % 16 == 0 {
            let mut dirty = PageSet::new(end);
            session.harvest(&mut dirty).unwrap();
            send(&dirty);
        }
    }
    let mut dirty = PageSet::new(end);
    session
        .harvest_final(
            &Paused::declare_every_vcpu_is_outside_kvm_run().declare_nothing_else_writes(),
            &mut dirty,
        )
        .unwrap();
    send(&dirty);
    for (i, word) in sent.iter().enumerate() {
        let page = PageIndex(DATA.0 + i as u64);
        assert_eq!(*word, vm.word(page).unwrap(), "page {i} was sent in an old version");
    }
    let figures = tracker.snapshot();
    assert_eq!(vm.passes(0), 40);
    if figures.vcpus[0].overflows == 0 {
        ringferry_testvm::skip("this KVM runs CPL 0 natively: no ring could be overrun");
    }
}
