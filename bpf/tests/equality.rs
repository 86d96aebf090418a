//! What the kernel pushed is what the library took, entry for entry: the eBPF program counts the one, the tracker's
//! figures the other, and they share nothing but the kernel.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::mini_vm::{DATA, MiniVm, Privilege, Work, install_kick_handler, kvm};
use common::{Writer, harvest_for, my_counts, profiler};
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry::{DirtySource, PageIndex};
use ringferry_bpf::{Options, Profiler};

/// A VM in this process that dirties until it is told to stop; returns the thread that created it.
fn neighbour(stop: Arc<AtomicBool>) -> std::thread::JoinHandle<i32> {
    std::thread::spawn(move || {
        let kvm = kvm().unwrap();
        let vm = MiniVm::new(&kvm, &[1024]);
        let mut tracker = DirtyTracker::enable(&vm.fd, RingSize::default()).unwrap();
        tracker.add_memory(&vm.memory).unwrap();
        let vcpu = vm.create_vcpu(0, Privilege::User);
        let handle = tracker.attach_vcpu(0, &vcpu.fd).unwrap();
        tracker.start().unwrap();
        let writer =
            Writer::start(vcpu, handle, Work::Loop { first: DATA, pages: 1024, stride: 1, passes: 1 });
        while !stop.load(Ordering::Acquire) {
            harvest_for(&mut tracker, &vm, 1, Duration::from_millis(5), || {});
        }
        writer.stop();
        tracker.stop().unwrap();
        nix::unistd::gettid().as_raw()
    })
}

/// Four vCPUs that each write their own 2048 pages, harvested as they run, all kicked all the time.
fn pushed_and_taken(profiler: &mut Profiler, entries: u32) -> Option<Vec<(u64, u64)>> {
    let kvm = kvm()?;
    let vm = MiniVm::new(&kvm, &[4096, 4096]);
    let mut tracker = DirtyTracker::enable(&vm.fd, RingSize::from_entries(entries).unwrap()).unwrap();
    tracker.add_memory(&vm.memory).unwrap();
    let before = my_counts(profiler);
    let before =
        |vcpu: usize| before.iter().filter(|c| c.vcpu as usize == vcpu).map(|c| c.pushes).sum::<u64>();
    let writers: Vec<Writer> = (0..4_u64)
        .map(|index| {
            let vcpu = vm.create_vcpu(index, Privilege::User);
            let handle = tracker.attach_vcpu(usize::try_from(index).unwrap(), &vcpu.fd).unwrap();
            let first = PageIndex(DATA.0 + index * 2048);
            Writer::start(vcpu, handle, Work::Loop { first, pages: 2048, stride: 1, passes: 3 })
        })
        .collect();
    tracker.start().unwrap();
    harvest_for(&mut tracker, &vm, 10, Duration::from_millis(10), || writers.iter().for_each(Writer::kick));
    writers.into_iter().for_each(Writer::stop);
    tracker.stop().unwrap();
    let figures = tracker.snapshot();
    assert_eq!(figures.unknown_slot_entries, 0);
    let counts = my_counts(profiler);
    Some(
        figures
            .vcpus
            .iter()
            .map(|taken| {
                let counts: Vec<_> =
                    counts.iter().filter(|counts| counts.vcpu as usize == taken.index).collect();
                assert!(counts.iter().all(|counts| counts.overwritten == 0));
                let pushed = counts.iter().map(|counts| counts.pushes).sum::<u64>() - before(taken.index);
                (pushed, taken.pages + taken.duplicate_entries)
            })
            .collect(),
    )
}

#[test]
fn in_20_of_20_runs_the_tracker_took_what_the_kernel_pushed_per_vcpu_beside_a_neighbour() {
    if kvm().is_none() {
        return;
    }
    let Some(mut profiler) = profiler(Options::default()) else { return };
    install_kick_handler();
    let stop = Arc::new(AtomicBool::new(false));
    let other = neighbour(stop.clone());
    for run in 0..20 {
        // Rings that hold everything, and rings that are full all the time.
        let entries = if run % 2 == 0 { 16384 } else { 1024 };
        let vcpus = pushed_and_taken(&mut profiler, entries).unwrap();
        assert_eq!(vcpus.len(), 4);
        for (vcpu, (pushed, taken)) in vcpus.into_iter().enumerate() {
            assert_eq!(pushed, taken, "run {run}, vCPU {vcpu}");
            assert!(pushed > 0, "run {run}, vCPU {vcpu} wrote nothing");
        }
    }
    stop.store(true, Ordering::Release);
    let other = common::counts_of(&mut profiler, other.join().unwrap());
    assert!(other.iter().map(|vcpu| vcpu.pushes).sum::<u64>() > 0, "the neighbour wrote nothing");
    assert_eq!(profiler.totals().unwrap().dropped_pushes, 0);
}
