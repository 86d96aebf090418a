//! Guests that write more pages than their rings have entries, on real KVM: they are not slowed by it, no write of theirs is
//! lost, and what is not protected is not handed out.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;
mod guest;

use std::collections::BTreeSet;

use bare::{BareVm, DATA, kvm};
use guest::{Guest, pages};
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry::{PageIndex, PageSet, Paused, Redirtied};

const SLOT_PAGES: [u64; 2] = [5000, 1000];

impl Guest {
    /// With a ring that is full after 192 pages, and logging on.
    fn new(kvm: &kvm_ioctls::Kvm) -> Self {
        let vm = BareVm::new(kvm, &SLOT_PAGES).unwrap();
        let tracker = DirtyTracker::enable(vm.fd(), RingSize::MIN).unwrap();
        let guest = Self::tracked(vm, tracker);
        guest.session.start().unwrap();
        guest
    }

    fn set(&self) -> PageSet {
        PageSet::new(self.vm.memory().end())
    }

    /// Ring entries that the vCPU has made so far, as far as they were taken.
    fn entries(&mut self) -> u64 {
        self.session.observe().unwrap();
        let vcpu = self.tracker.snapshot().vcpus[0];
        vcpu.pages + vcpu.duplicate_entries + vcpu.ring_entries
    }
}

fn every(step: usize, first: u64) -> BTreeSet<PageIndex> {
    (first..SLOT_PAGES.iter().sum()).step_by(step).map(|i| PageIndex(DATA.0 + i)).collect()
}

#[test]
fn a_page_that_left_a_full_ring_costs_its_guest_no_further_fault_until_it_is_harvested() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    for step in [1, 3] {
        let written = every(step, 0);
        guest.write(&written);
        let entries = guest.entries();
        for _ in 0..5 {
            guest.write(&written);
        }
        let more = guest.entries() - entries;
        // Those that were still in the ring were protected by nobody either.
        assert_eq!(more, 0, "every {step}th page: entries for pages that were dirty already");
        assert_eq!(guest.harvest(), written, "every {step}th page");
        assert_eq!(guest.harvest(), BTreeSet::new(), "every {step}th page: once");
    }
    assert!(guest.tracker.snapshot().protects > 0);
    assert_eq!(guest.tracker.snapshot().rearms, 0);
}

#[test]
fn a_page_is_seen_again_once_it_was_harvested_however_it_lies() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    for (step, again) in [(1, 1), (2, 3), (7, 2), (40, 1), (1, 40)] {
        guest.write(&every(step, 1));
        assert_eq!(guest.harvest(), every(step, 1), "every {step}th page");
        // With pages between those that were protected, which may have been taken from the guest with them.
        guest.write(&every(again, 0));
        assert_eq!(guest.harvest(), every(again, 0), "every {again}th page after every {step}th");
    }
}

#[test]
fn what_is_left_behind_is_handed_out_when_it_was_protected_and_not_before() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    let written = every(1, 0);
    guest.write(&written);
    let (mut dirty, mut behind) = (guest.set(), Redirtied::new(guest.vm.memory().end()));
    guest.session.harvest_protected(&mut dirty, &mut behind).unwrap();
    let mut out = pages(&dirty);
    assert_eq!(out.len() as u64 + behind.len(), written.len() as u64);
    assert!(behind.len() > 4000, "{} pages stayed behind", behind.len());
    while !behind.is_empty() {
        let mut some = guest.set();
        guest.session.protect(&mut behind, 700, &mut some).unwrap();
        assert!((1..=700).contains(&some.len()), "{some:?}");
        let some = pages(&some);
        assert!(out.is_disjoint(&some), "no page twice");
        // Each of them is seen again, and the others are dirty still.
        guest.write(&some);
        out.extend(&some);
    }
    assert_eq!(out, written);
    guest.write(&every(9, 0));
    let again = guest.harvest();
    assert!(again.is_superset(&every(9, 0)), "a write after it was handed out");
    assert!(again.is_subset(&written));
}

#[test]
fn what_was_handed_out_in_a_pause_unprotected_comes_again_if_the_guest_runs_on() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.write(&every(1, 0));
    let mut dirty = guest.set();
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    guest.session.harvest_paused(&paused, &mut dirty).unwrap();
    assert_eq!(pages(&dirty), every(1, 0));
    assert_eq!(guest.tracker.snapshot().protects, 0, "nobody writes: nothing is protected");
    dirty.clear();
    let settled = paused.declare_nothing_else_writes();
    guest.session.harvest_final(&settled, &mut dirty).unwrap();
    assert_eq!(pages(&dirty), BTreeSet::new(), "once in a pause");

    guest.write(&every(5, 2));
    let again = Paused::declare_every_vcpu_is_outside_kvm_run();
    guest.session.harvest_paused(&again, &mut dirty).unwrap();
    assert!(pages(&dirty).is_superset(&every(5, 2)), "another pause");
    guest.write(&every(6, 1));
    assert!(guest.harvest().is_superset(&every(6, 1)), "no pause");
    assert_eq!(guest.harvest(), BTreeSet::new());
}

#[test]
fn memory_that_is_unplugged_with_pages_unprotected_takes_them_along() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm);
    guest.write(&every(1, 0));
    let second = guest.vm.memory().regions()[1];
    guest.tracker.remove_slot(second.slot).unwrap();
    let first: BTreeSet<PageIndex> = (0..SLOT_PAGES[0]).map(|i| PageIndex(DATA.0 + i)).collect();
    assert_eq!(guest.harvest(), first);
}
