//! What a vCPU waits for whose ring is full while another thread is at work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::kvm::Granule;

/// Time that switching a slot's logging takes, off or on.
const SWITCH: Duration = Duration::from_millis(15);
const MANY: u32 = 30;

/// A kernel whose vCPU 1 has overrun its ring, so that all of memory has to be protected anew.
fn overrun() -> (FakeKernel, DirtyTracker, [VcpuHandle; 2], Session) {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(RING).unwrap());
    let pages = |slot: u32| PageRun { first: PageIndex(u64::from(slot) * SLOT_PAGES), pages: SLOT_PAGES };
    for slot in 0..MANY {
        tracker.add_memory(&kernel.create_slot(SlotId(slot), pages(slot))).unwrap();
    }
    let vcpus = [0, 1].map(|index| tracker.attach_fake_vcpu(index, &kernel, 0, 0).unwrap());
    let session = tracker.start().unwrap();
    assert!(kernel.emulate_writes(1, SlotId(0), (0..SLOT_PAGES).chain(0..SLOT_PAGES)));
    kernel.logging_takes(SWITCH);
    (kernel, tracker, vcpus, session)
}

#[test]
fn a_vcpu_whose_ring_is_full_waits_for_one_slot_while_all_of_memory_is_protected_anew() {
    let (kernel, tracker, vcpus, session) = overrun();
    let done = AtomicBool::new(false);
    let (began, mut longest, mut calls) = (Instant::now(), Duration::ZERO, 0);
    let mut dirty = PageSet::new(PageIndex(u64::from(MANY) * SLOT_PAGES));
    thread::scope(|scope| {
        scope.spawn(|| {
            session.harvest(&mut dirty).unwrap();
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            kernel.write(0, SlotId(1), calls % SLOT_PAGES);
            let started = Instant::now();
            vcpus[0].ring_full().unwrap();
            longest = longest.max(started.elapsed());
            calls += 1;
            thread::sleep(Duration::from_millis(1));
        }
    });
    let whole = began.elapsed();
    assert_eq!(tracker.snapshot().rearms, 1);
    assert_eq!(dirty.len(), u64::from(MANY) * SLOT_PAGES, "all of it is dirty, and handed out");
    assert!(whole > SWITCH * 2 * MANY, "it took {whole:?}");
    assert!(longest < whole / 4, "a vCPU waited {longest:?} of {whole:?}, in {calls} calls");
}

#[test]
fn a_vcpu_whose_ring_is_full_waits_for_no_slot_while_logging_is_switched_on_for_all_of_them() {
    let (kernel, tracker, vcpus, session) = overrun();
    session.stop().unwrap();
    let done = AtomicBool::new(false);
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    thread::scope(|scope| {
        scope.spawn(|| {
            session.start().unwrap();
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let started = Instant::now();
            vcpus[0].ring_full().unwrap();
            longest = longest.max(started.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
    });
    let whole = began.elapsed();
    assert!(whole > SWITCH * 2 * MANY, "it took {whole:?}");
    assert!(longest < whole / 4, "a vCPU waited {longest:?} of {whole:?}");
    assert!(kernel.is_logging(SlotId(MANY - 1)));
    tracker.end().unwrap();
}

/// What is written and taken between two slots is dirty once more, protected or not.
#[test]
fn what_a_vcpu_writes_while_memory_is_protected_anew_is_in_this_harvest_or_the_next() {
    let (kernel, _tracker, vcpus, session) = overrun();
    kernel.can_take_pages(Granule::new(1));
    let done = AtomicBool::new(false);
    let set = || PageSet::new(PageIndex(u64::from(MANY) * SLOT_PAGES));
    let (mut dirty, mut next) = (set(), set());
    thread::scope(|scope| {
        scope.spawn(|| {
            session.harvest(&mut dirty).unwrap();
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            for page in 0..SLOT_PAGES {
                if !kernel.write(0, SlotId(MANY - 1), page) {
                    vcpus[0].ring_full().unwrap();
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        // After the harvest has returned: each page is protected, or known.
        for page in 0..SLOT_PAGES {
            while !kernel.write(0, SlotId(MANY - 1), page) {
                vcpus[0].ring_full().unwrap();
            }
        }
    });
    session.harvest(&mut next).unwrap();
    let run = PageRun { first: PageIndex(u64::from(MANY - 1) * SLOT_PAGES), pages: SLOT_PAGES };
    assert_eq!(next.count_within(run), SLOT_PAGES);
}
