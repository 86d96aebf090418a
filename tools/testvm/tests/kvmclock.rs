//! A guest with kvmclock: restoring its state writes its RAM.

mod common;

use std::time::Duration;

use common::{build, copy_ram, word};
use ringferry::{PAGE_SIZE, Quiesced, Vm};
use ringferry_testvm::check::check;
use ringferry_testvm::{Boot, Config, Guest, KVMCLOCK_ADDRESS, Tracking, guest_image};

const LIMIT: Duration = Duration::from_secs(60);

fn config(kvmclock: bool) -> Config {
    let boot = Boot::Image { image: guest_image(), append: "vcpus=2 each=ws:1MiB".to_owned() };
    Config { vcpus: 2, kvmclock, boot, ..Config::default() }
}

/// The words of the page into which KVM writes the time.
fn clock_page(vm: &ringferry_testvm::TestVm) -> Vec<u64> {
    (0..PAGE_SIZE as u64 / 8).map(|index| word(vm, KVMCLOCK_ADDRESS + index * 8)).collect()
}

#[test]
fn restoring_a_guest_with_kvmclock_writes_its_ram() {
    let Some(mut source) = build(config(true)) else { return };
    let guest = Guest::new(source.memory(), None).unwrap();
    source.start().unwrap();
    guest.wait_until_working(LIMIT).unwrap();
    let paused = source.pause().unwrap();
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let before = clock_page(&source);
    let [wall_clock, system_times @ ..] = &before[..] else { panic!("an empty page") };
    assert!(*wall_clock != 0, "KVM wrote the wall clock");
    for vcpu in 0..2 {
        assert!(
            system_times[7 + vcpu * 8..][..4].iter().any(|word| *word != 0),
            "and each vCPU's system time"
        );
    }

    let tracking = Tracking::Ring { entries: 4096 };
    let mut target = build(Config { boot: Boot::Destination, tracking, ..config(false) }).unwrap();
    copy_ram(&source, &target);
    let paused = target.restore_state(&state).unwrap();
    assert_eq!(target.skipped_msrs(), []);
    assert!(clock_page(&target) != before, "setting the MSR writes the page");

    let guest = Guest::new(target.memory(), target.tracker()).unwrap();
    let steps = guest.stats(0).unwrap().steps();
    target.resume(paused).unwrap();
    let deadline = std::time::Instant::now() + LIMIT;
    while guest.stats(0).unwrap().steps() < steps + 1000 {
        assert!(std::time::Instant::now() < deadline, "{:?}", target.status());
    }
    let _paused = target.pause().unwrap();
    check(target.memory()).unwrap();
}

#[test]
fn a_guest_that_is_not_shown_kvmclock_leaves_its_page_alone() {
    let Some(mut vm) = build(config(false)) else { return };
    let guest = Guest::new(vm.memory(), None).unwrap();
    vm.start().unwrap();
    guest.wait_until_working(LIMIT).unwrap();
    assert!(clock_page(&vm).iter().all(|word| *word == 0));
    let _paused = vm.pause().unwrap();
}
