//! Tracking on real KVM when the VMM has done what it should not have: nothing is lost in silence.
#![expect(unsafe_code, reason = "a VMM creates slots, and gives their memory to KVM")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::collections::BTreeSet;

use bare::{BareVm, DATA, Privilege, Work, kvm};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry::{DirtySource, PAGE_SIZE, PageIndex, PageSet, Region};

const PAGES: u64 = 2000;

fn set_slot(vm: &BareVm, region: &Region, flags: u32) {
    let slot = kvm_userspace_memory_region {
        slot: region.slot.0,
        flags,
        guest_phys_addr: region.pages.first.address().0,
        memory_size: region.pages.pages * PAGE_SIZE as u64,
        userspace_addr: region.host.addr() as u64,
    };
    // SAFETY: the same memory as before, which belongs to the VM and outlives its descriptor.
    unsafe { vm.fd().set_user_memory_region(slot) }.unwrap();
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
            let mut tracker = tracker.unwrap();
            tracker.add_memory(vm.memory()).unwrap();
            let mut vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
            before_start(&vm);
            let mut write = |value| {
                let all = (DATA.0..DATA.0 + PAGES).map(PageIndex).collect();
                vcpu.set_work(&Work::List(all), value).unwrap();
                vcpu.run_to_end(Some(&handle)).unwrap();
            };
            let harvest = |tracker: &mut DirtyTracker| {
                let mut dirty = PageSet::new(vm.memory().end());
                tracker.harvest(&mut dirty).unwrap();
                pages(&dirty)
            };
            write(1);
            tracker.start().unwrap();
            assert!(harvest(&mut tracker).is_empty(), "{name}: written before the start");
            for value in [2, 3] {
                write(value);
                assert_eq!(harvest(&mut tracker).len() as u64, PAGES, "{name}, rings: {rings}");
            }
        }
    }
}
