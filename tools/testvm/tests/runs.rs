//! The test VMM runs guests: one vCPU and many, paused and resumed, on RAM of every shape.

mod common;

use std::time::Duration;

use common::{assert_consistent, build, counting_config, counts, dying_image, wait_for_progress};
use ringferry::Vm;
use ringferry_testvm::{Backing, Boot, Config, Image, TestVm, VcpuError, VcpuStatus};

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
    let error = vm.save_state(&paused).unwrap_err().to_string();
    assert!(error.starts_with("vCPU 0 has stopped: shutdown"), "{error}");
}
