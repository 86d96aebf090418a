//! Tracking on real KVM when the VMM has done what it should not have: nothing is lost in silence.
#![expect(unsafe_code, reason = "a VMM creates slots, and gives their memory to KVM")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use bare::{BareVcpu, BareVm, DATA, Privilege, Work, kvm};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region,
};
use ringferry::kvm::{KvmError, RingSize};
use ringferry::track::{DirtyTracker, Session};
use ringferry::{PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId, TrackError};

const PAGES: u64 = 2000;

fn slot_of(region: &Region, flags: u32) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot: region.slot.0,
        flags,
        guest_phys_addr: region.pages.first.address().0,
        memory_size: region.pages.pages * PAGE_SIZE as u64,
        userspace_addr: region.host.addr() as u64,
    }
}

fn set_slot(vm: &BareVm, region: &Region, flags: u32) {
    // SAFETY: the memory of a slot, which belongs to the VM and outlives its descriptor.
    unsafe { vm.fd().set_user_memory_region(slot_of(region, flags)) }.unwrap();
}

fn delete_slot(vm: &BareVm, region: &Region) {
    let nothing = kvm_userspace_memory_region { memory_size: 0, ..slot_of(region, 0) };
    // SAFETY: a slot that is deleted gives no memory to anybody.
    unsafe { vm.fd().set_user_memory_region(nothing) }.unwrap();
}

fn set_initially_set(vm: &BareVm) {
    let flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [flags, 0, 0, 0],
        ..Default::default()
    };
    vm.fd().enable_cap(&cap).unwrap();
}

fn log_every_slot(vm: &BareVm) {
    vm.memory().regions().iter().for_each(|region| set_slot(vm, region, KVM_MEM_LOG_DIRTY_PAGES));
}

fn memfd() -> File {
    // SAFETY: a name that is a string, and a descriptor that nobody else knows.
    unsafe { File::from_raw_fd(libc::memfd_create(c"edge".as_ptr(), libc::MFD_CLOEXEC)) }
}

fn pages(set: &PageSet) -> BTreeSet<u64> {
    set.runs().flat_map(|run| run.first.0..run.end().0).collect()
}

/// `KVM_DIRTY_LOG_INITIALLY_SET` protects no page when logging goes on, as all count as dirty in the bitmap; and KVM
/// accepts it where there is no bitmap to ask.
#[test]
fn a_vmm_that_wants_all_pages_dirty_at_first_cannot_make_the_tracker_blind() {
    type Act = fn(&BareVm);
    let nothing: Act = |_| {};
    let both: Act = |vm| {
        set_initially_set(vm);
        log_every_slot(vm);
    };
    let Some(kvm) = kvm() else { return };
    for (name, before_enable, before_start) in [
        ("set before enable", set_initially_set as Act, nothing),
        ("set after enable", nothing, set_initially_set),
        ("set before enable, and slots are logged", both, nothing),
        ("set after enable, and slots are logged", nothing, both),
        ("slots are logged", log_every_slot, nothing),
    ] {
        for rings in [true, false] {
            let vm = BareVm::new(&kvm, &[PAGES]).unwrap();
            before_enable(&vm);
            let tracker = match rings {
                true => DirtyTracker::enable(vm.fd(), RingSize::default()),
                false => DirtyTracker::enable_bitmap(vm.fd()),
            };
            let tracker = tracker.unwrap();
            tracker.add_memory(vm.memory()).unwrap();
            let mut vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
            before_start(&vm);
            let mut write = |value| {
                let all = (DATA.0..DATA.0 + PAGES).map(PageIndex).collect();
                vcpu.set_work(&Work::List(all), value).unwrap();
                vcpu.run_to_end(Some(&handle)).unwrap();
            };
            let harvest = |session: &Session| {
                let mut dirty = PageSet::new(vm.memory().end());
                session.harvest(&mut dirty).unwrap();
                pages(&dirty)
            };
            write(1);
            let session = tracker.start().unwrap();
            assert!(harvest(&session).is_empty(), "{name}: written before the start");
            for value in [2, 3] {
                write(value);
                assert_eq!(harvest(&session).len() as u64, PAGES, "{name}, rings: {rings}");
            }
        }
    }
}

/// Whether any slot of KVM's has these pages: another slot is refused if one has.
fn is_taken(vm: &BareVm, region: &Region) -> bool {
    let other = Region { slot: SlotId(77), ..*region };
    // SAFETY: the memory of a slot, which belongs to the VM and outlives its descriptor.
    let created = unsafe { vm.fd().set_user_memory_region(slot_of(&other, 0)) };
    if created.is_ok() {
        delete_slot(vm, &other);
    }
    created.is_err()
}

#[test]
fn a_slot_that_the_vmm_deleted_is_named_and_does_not_come_back() {
    let Some(kvm) = kvm() else { return };
    for (pages, rings) in [(PAGES, true), (PAGES, false), (1, true)] {
        let vm = BareVm::new(&kvm, &[PAGES, pages]).unwrap();
        let tracker = match rings {
            true => DirtyTracker::enable(vm.fd(), RingSize::default()),
            false => DirtyTracker::enable_bitmap(vm.fd()),
        };
        let tracker = tracker.unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        let session = tracker.session();
        let deleted = vm.memory().regions()[1];
        let is_gone = |result| matches!(result, Err(TrackError::Kvm(KvmError::SlotGone(SlotId(2)))));
        delete_slot(&vm, &deleted);
        assert!(is_gone(session.start()));
        assert!(!is_taken(&vm, &deleted), "start brought it back");
        // With another slot in its place.
        set_slot(&vm, &Region { slot: SlotId(5), ..deleted }, 0);
        assert!(is_gone(session.start()));
        delete_slot(&vm, &Region { slot: SlotId(5), ..deleted });

        set_slot(&vm, &deleted, 0);
        session.start().unwrap();
        delete_slot(&vm, &deleted);
        assert!(is_gone(session.stop()));
        assert!(!is_taken(&vm, &deleted), "stop brought it back");
        set_slot(&vm, &deleted, 0);
        session.start().unwrap();
        delete_slot(&vm, &deleted);
        tracker.remove_slot(SlotId(2)).unwrap();
        assert!(!is_taken(&vm, &deleted), "remove_slot brought it back");
        session.stop().unwrap();
        session.start().unwrap();
    }
}

#[test]
fn a_slot_whose_logging_cannot_be_switched_is_named_with_the_reason() {
    let Some(kvm) = kvm() else { return };
    let vm = BareVm::new(&kvm, &[PAGES, PAGES]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::default()).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let slot = vm.memory().regions()[1];
    let half = Region { pages: PageRun { pages: PAGES / 2, ..slot.pages }, ..slot };
    for (region, flags) in [(slot, KVM_MEM_READONLY), (half, 0)] {
        delete_slot(&vm, &slot);
        set_slot(&vm, &region, flags);
        let refused = tracker.start().unwrap_err();
        assert!(matches!(refused, TrackError::Kvm(KvmError::SlotDiffers(SlotId(2)))), "{refused:?}");
        assert!(refused.to_string().contains("read-only"), "{refused}");
    }
    delete_slot(&vm, &slot);
    set_slot(&vm, &slot, 0);
    tracker.start().unwrap();
}

#[test]
fn what_is_no_vcpu_of_this_vm_is_not_attached() {
    let Some(kvm) = kvm() else { return };
    let vm = BareVm::new(&kvm, &[PAGES]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::default()).unwrap();
    let refused = |other: &dyn AsRawFd| match tracker.attach_vcpu(0, &other.as_raw_fd()) {
        Err(TrackError::Kvm(error)) => error,
        other => panic!("attached: {other:?}"),
    };
    let empty = memfd();
    assert!(matches!(refused(&empty), KvmError::NotVcpu), "access would be SIGBUS");
    empty.set_len(1 << 21).unwrap();
    assert!(matches!(refused(&empty), KvmError::NotVcpu));
    assert!(matches!(refused(vm.fd()), KvmError::NotVcpu));
    assert!(matches!(refused(&kvm), KvmError::Map(_)));

    let without_rings = BareVm::new(&kvm, &[PAGES]).unwrap().create_vcpu(0, Privilege::User).unwrap();
    assert!(matches!(refused(without_rings.fd()), KvmError::Map(_)), "access would be SIGBUS");
    let small = BareVm::new(&kvm, &[PAGES]).unwrap();
    let tracker_of_small = DirtyTracker::enable(small.fd(), RingSize::MIN).unwrap();
    let of_small = small.create_vcpu(0, Privilege::User).unwrap();
    assert!(matches!(refused(of_small.fd()), KvmError::Map(_)), "access to its end would be SIGBUS");
    tracker_of_small.attach_vcpu(0, of_small.fd()).unwrap();

    let vcpus = [0, 1].map(|number| vm.create_vcpu(number, Privilege::User).unwrap());
    tracker.attach_vcpu(0, vcpus[0].fd()).unwrap();
    let other = BareVm::new(&kvm, &[PAGES]).unwrap();
    let tracker_of_other = DirtyTracker::enable(other.fd(), RingSize::default()).unwrap();
    let of_other = other.create_vcpu(0, Privilege::User).unwrap();
    let refused = |tracker: &DirtyTracker, vcpu: &BareVcpu| {
        matches!(tracker.attach_vcpu(1, vcpu.fd()), Err(TrackError::Kvm(KvmError::VcpuOfOtherVm)))
    };
    assert!(refused(&tracker, &of_other), "before it is attached to its own");
    tracker_of_other.attach_vcpu(0, of_other.fd()).unwrap();
    assert!(refused(&tracker, &of_other));
    assert!(refused(&tracker_of_other, &vcpus[1]));
    tracker.attach_vcpu(1, vcpus[1].fd()).unwrap();
}
