//! Tracking on real KVM: what a guest wrote is what is harvested, on the good days.

mod mini_vm;

use std::collections::BTreeSet;

use mini_vm::{DATA, MiniVm, Privilege, Work, kvm};
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry::{DirtySource, PageIndex, PageSet, Paused};

fn pages(set: &PageSet) -> BTreeSet<PageIndex> {
    set.runs().flat_map(|run| (run.first.0..run.end().0).map(PageIndex)).collect()
}

#[test]
fn the_pages_that_a_guest_writes_are_the_pages_harvested() {
    let Some(kvm) = kvm() else { return };
    let vm = MiniVm::new(&kvm, &[4096, 1000]);
    let mut tracker = DirtyTracker::enable(&vm.fd, RingSize::default()).unwrap();
    tracker.add_memory(&vm.memory).unwrap();
    let mut vcpu = vm.create_vcpu(0, Privilege::User);
    let handle = tracker.attach_vcpu(0, &vcpu.fd).unwrap();
    tracker.start().unwrap();
    let mut dirty = PageSet::new(vm.memory.end());
    for round in 1..=3 {
        let list: Vec<PageIndex> =
            (0..5096).filter(|i| i % (round + 1) == 0).map(|i| PageIndex(DATA.0 + i)).collect();
        vcpu.set_work(&Work::List(list.clone()), round);
        vcpu.run_to_end(&handle);
        dirty.clear();
        tracker.harvest(&mut dirty).unwrap();
        assert_eq!(pages(&dirty), list.into_iter().collect());
    }
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    dirty.clear();
    tracker.harvest_final(&paused, &mut dirty).unwrap();
    assert!(dirty.is_empty(), "{dirty:?}");
    tracker.stop().unwrap();
}
