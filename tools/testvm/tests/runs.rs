//! The test VMM runs guests: one vCPU and many, paused and resumed, on RAM of every shape.

mod common;

use common::{assert_consistent, build, counting_config, counts, wait_for_progress};
use ringferry::Vm;
use ringferry_testvm::{Backing, Config};

#[test]
fn one_two_and_eight_vcpus_start_and_count() {
    for vcpus in [1, 2, 8] {
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
