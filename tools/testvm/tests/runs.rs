//! The test VMM runs guests: one vCPU and many, paused and resumed, on RAM of every shape.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{
    IDLE, assert_consistent, build, counting_config, counts, dying_image, echo_image, wait_for_progress,
};
use ringferry::{GuestAddress, Quiesced, Vm};
use ringferry_testvm::{
    Backing, Boot, Config, HugePages, Image, TestVm, TestVmError, Tracking, VcpuError, VcpuStatus,
};

#[test]
fn one_to_sixteen_vcpus_start_and_count() {
    for vcpus in [1, 2, 8, 16] {
        let Some(mut vm) = build(counting_config(vcpus)) else { return };
        vm.start().unwrap();
        wait_for_progress(&vm, &vec![0; vcpus], 10_000);
        let paused = vm.pause().unwrap();
        let before = counts(&vm);
        assert_consistent(&vm);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(counts(&vm), before, "a paused guest stands still");
        vm.resume(paused).unwrap();
        wait_for_progress(&vm, &before, 10_000);
    }
}

#[test]
fn a_guest_runs_the_same_on_many_regions_and_on_a_memfd() {
    for (regions, backing) in [(7, Backing::Anonymous), (1, Backing::Memfd), (5, Backing::Memfd)] {
        let Some(mut vm) = build(Config { regions, backing, ..counting_config(2) }) else { return };
        assert_eq!(vm.memory().regions().len(), regions);
        vm.start().unwrap();
        wait_for_progress(&vm, &[0, 0], 1000);
        let _paused = vm.pause().unwrap();
        assert_consistent(&vm);
    }
}

#[test]
fn a_guest_runs_on_huge_pages_or_the_lack_of_them_is_named() {
    for (huge_pages, backing) in [
        (HugePages::Transparent, Backing::Anonymous),
        (HugePages::Transparent, Backing::Memfd),
        (HugePages::Reserved, Backing::Anonymous),
        (HugePages::Reserved, Backing::Memfd),
    ] {
        let mut vm = match TestVm::new(Config { huge_pages, backing, regions: 3, ..counting_config(2) }) {
            Ok(vm) => vm,
            Err(error @ (TestVmError::NoKvm | TestVmError::KvmPermission)) => {
                return ringferry_testvm::skip(&error.to_string());
            }
            Err(TestVmError::NoHugePages { needed: 16, free }) if free < 16 => continue,
            Err(error) => panic!("{huge_pages:?} {backing:?}: {error}"),
        };
        vm.start().unwrap();
        wait_for_progress(&vm, &[0, 0], 1000);
        let _paused = vm.pause().unwrap();
        assert_consistent(&vm);
    }
}

#[test]
fn a_guest_larger_than_the_space_below_the_hole_runs_and_is_told_so() {
    let boot =
        Boot::Image { image: Image::Bytes { name: "echo", bytes: echo_image() }, append: String::new() };
    // Nearly all of it is never touched.
    let Some(mut vm) = build(Config { boot, memory_bytes: 5 << 30, ..Config::default() }) else { return };
    let regions: Vec<u64> = vm.memory().regions().iter().map(|region| region.pages.pages).collect();
    assert_eq!(regions, [3 << 18, 2 << 18]);
    vm.start().unwrap();
    let ended = vm.wait_for_end(Duration::from_secs(60));
    assert_eq!(ended, Some((0, VcpuStatus::Exited { code: (3 << 20) - 1024 })), "mem_upper ends at the hole");
    vm.write_ram(GuestAddress(5 << 30), b"above").unwrap();
    assert!(vm.write_ram(GuestAddress(3 << 30), b"hole").is_err());
}

#[test]
fn a_thousand_pauses_lose_no_kick() {
    let Some(mut vm) = build(counting_config(2)) else { return };
    vm.start().unwrap();
    wait_for_progress(&vm, &[0, 0], 1);
    for _ in 0..1000 {
        let paused = vm.pause().unwrap();
        vm.resume(paused).unwrap();
    }
    let before = counts(&vm);
    wait_for_progress(&vm, &before, 1000);
}

#[test]
fn the_guest_runs_natively_in_its_loop() {
    let Some(mut vm) = build(counting_config(2)) else { return };
    vm.start().unwrap();
    wait_for_progress(&vm, &[0, 0], 1000);
    let emulated = |vm: &TestVm| -> Vec<u64> {
        (0..2).map(|vcpu| vm.kernel_counters(vcpu).unwrap()["insn_emulation"]).collect()
    };
    let (before, counted) = (emulated(&vm), counts(&vm));
    wait_for_progress(&vm, &counted, 1_000_000);
    assert_eq!(emulated(&vm), before, "instructions emulated by the kernel");
}

#[test]
fn a_guest_that_dies_is_reported_and_pauses_all_the_same() {
    let image = Image::Bytes { name: "dying", bytes: dying_image() };
    let boot = Boot::Image { image, append: String::new() };
    let Some(mut vm) = build(Config { boot, ..Config::default() }) else { return };
    vm.start().unwrap();
    let ended = vm.wait_for_end(Duration::from_secs(60));
    assert!(matches!(ended, Some((0, VcpuStatus::Failed(VcpuError::Shutdown { .. })))), "{ended:?}");
    let paused = vm.pause().unwrap();
    let error = vm.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap_err().to_string();
    assert!(error.starts_with("vCPU 0 has stopped: shutdown"), "{error}");
}

#[test]
fn a_sleeping_vcpu_is_woken_by_a_pause() {
    let Some(mut vm) = build(counting_config(2)) else { return };
    // A minute: longer than a pause waits.
    vm.write_ram(GuestAddress(IDLE), &60_000_000u32.to_le_bytes()).unwrap();
    vm.start().unwrap();
    wait_for_progress(&vm, &[0, 0], 1);
    for turn in 1..=20 {
        let paused = vm.pause().unwrap();
        let before = counts(&vm);
        assert!(before.iter().all(|count| *count <= turn + 1), "one step per pause: {before:?}");
        vm.resume(paused).unwrap();
        wait_for_progress(&vm, &before, 1);
    }
}

#[test]
fn a_throttled_vcpu_is_called_out_by_a_pause() {
    let tracking = Tracking::Ring { entries: 4096 };
    let Some(mut vm) = build(Config { tracking, ..counting_config(2) }) else { return };
    vm.start().unwrap();
    wait_for_progress(&vm, &[0, 0], 1);
    let throttles = vm.tracker().unwrap().vcpus();
    let done = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                throttles.iter().for_each(|throttle| throttle.close_for(Duration::from_secs(1)));
                std::thread::yield_now();
            }
        });
        let outcome = (0..100).try_for_each(|_| {
            (0..2).for_each(|vcpu| vm.kick(vcpu));
            let paused = vm.pause()?;
            vm.resume(paused)
        });
        done.store(true, Ordering::Relaxed);
        outcome
    });
    outcome.unwrap();
    let before = counts(&vm);
    wait_for_progress(&vm, &before, 1000);
}

#[test]
fn a_vm_can_be_dropped_in_every_phase() {
    let Some(vm) = build(counting_config(2)) else { return };
    drop(vm);
    let mut running = build(counting_config(2)).unwrap();
    running.start().unwrap();
    drop(running);
    let mut paused = build(counting_config(2)).unwrap();
    paused.start().unwrap();
    let _paused = paused.pause().unwrap();
    drop(paused);
}
