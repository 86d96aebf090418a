//! What the tracker harvests from a running test VM is all that changed in its RAM.

mod common;

use std::time::{Duration, Instant};

use common::{
    assert_consistent, assert_same_ram, build, copy_ram, copy_run, counting_config, counts, wait_for_progress,
};
use ringferry::{GuestAddress, PageSet, Quiesced, Vm};
use ringferry_testvm::check::check;
use ringferry_testvm::{Boot, Config, Guest, TestVm, Tracking, guest_image};

/// Moves a running guest: everything, what changed, what changed at last. True if it could be tried.
fn moves_whole(vcpus: usize, tracking: Tracking) -> Option<TestVm> {
    let mut source = build(Config { tracking, ..counting_config(vcpus) })?;
    let mut target = build(Config { boot: Boot::Destination, ..counting_config(vcpus) })?;
    source.start().expect("a fresh VM starts");
    wait_for_progress(&source, &vec![0; vcpus], 1000);

    let session = source.tracker().expect("configured").start().expect("tracking starts");
    copy_ram(&source, &target);
    let mut dirty = PageSet::new(source.memory().end());
    for _ in 0..20 {
        let before = counts(&source);
        session.harvest(&mut dirty).expect("a harvest while the guest runs");
        dirty.runs().for_each(|run| copy_run(&source, &target, run));
        dirty.clear();
        wait_for_progress(&source, &before, 1000);
    }
    // The VMM's own write is tracked like the guest's.
    source.write_ram(GuestAddress(0x38_0000), b"written by the VMM").expect("inside RAM");
    let paused = source.pause().expect("the guest pauses");
    session
        .harvest_final(&paused.declare_nothing_else_writes(), &mut dirty)
        .expect("a harvest of the paused guest");
    assert!(dirty.contains(GuestAddress(0x38_0000).page()));
    dirty.runs().for_each(|run| copy_run(&source, &target, run));
    session.stop().expect("tracking stops");

    assert_same_ram(&source, &target);
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).expect("state is saved");
    let before = counts(&source);
    let paused = target.restore_state(&state).expect("state is restored");
    target.resume(paused).expect("the guest goes on");
    wait_for_progress(&target, &before, 1000);
    let _paused = target.pause().expect("the guest pauses");
    assert_consistent(&target);
    Some(source)
}

#[test]
fn a_guest_followed_by_its_rings_arrives_whole() {
    moves_whole(4, Tracking::Ring { entries: 4096 });
}

#[test]
fn a_guest_followed_by_its_bitmap_arrives_whole() {
    moves_whole(2, Tracking::Bitmap);
}

#[test]
fn rings_that_are_full_all_the_time_lose_nothing() {
    // 256 entries are full at 192; the guest writes 257 pages per vCPU in a circle.
    let Some(source) = moves_whole(2, Tracking::Ring { entries: 256 }) else { return };
    let full: u64 = (0..2).filter_map(|vcpu| source.counters(vcpu)).map(|c| c.ring_full_exits).sum();
    assert!(full > 0, "the rings were meant to be too small");
}

#[test]
fn the_test_guest_proves_that_no_write_was_lost_on_the_way() {
    let (vcpus, memory_bytes, regions) = (4, 32 << 20, 3);
    let append = "each=pattern:random,ws:2MiB,content:random \
        vcpu1=pattern:zipf vcpu2=pattern:sequential,bytes:64";
    let boot = Boot::Image { image: guest_image(), append: append.to_owned() };
    let tracking = Tracking::Ring { entries: 1024 };
    let config = Config { vcpus, memory_bytes, regions, boot, tracking, ..Config::default() };
    let Some(mut source) = build(config) else { return };
    let destination = Config { vcpus, memory_bytes, ..Config::default() };
    let mut target = build(destination).unwrap();
    source.start().unwrap();
    let guest = Guest::new(source.memory(), source.tracker()).unwrap();
    guest.wait_until_working(Duration::from_secs(60)).unwrap();
    let told = format!("vcpus=4 tsc_khz={} ", source.tsc_khz());
    assert!(source.console().contains(&told), "CPUID says {told}: {}", source.console());

    let session = source.tracker().unwrap().start().unwrap();
    copy_ram(&source, &target);
    let mut dirty = PageSet::new(source.memory().end());
    for _ in 0..5 {
        session.harvest(&mut dirty).unwrap();
        dirty.runs().for_each(|run| copy_run(&source, &target, run));
        dirty.clear();
    }
    let paused = source.pause().unwrap();
    session.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
    dirty.runs().for_each(|run| copy_run(&source, &target, run));
    session.stop().unwrap();
    check(source.memory()).unwrap();
    check(target.memory()).unwrap();
    assert_same_ram(&source, &target);

    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let paused = target.restore_state(&state).unwrap();
    target.resume(paused).unwrap();
    let guest = Guest::new(target.memory(), None).unwrap();
    let before: Vec<u64> = (0..vcpus).map(|vcpu| guest.stats(vcpu).unwrap().steps()).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while (0..vcpus).any(|vcpu| guest.stats(vcpu).unwrap().steps() < before[vcpu] + 1000) {
        assert!(Instant::now() < deadline, "{:?}\n{}", target.status(), target.console());
        std::thread::sleep(Duration::from_millis(1));
    }
    let _paused = target.pause().unwrap();
    check(target.memory()).unwrap();
}
