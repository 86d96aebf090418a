//! The test guest in the test VMM: it boots on any number of vCPUs, does what it is told, and proves itself.

use std::time::Duration;

use ringferry::Vm;
use ringferry_testvm::check::check;
use ringferry_testvm::workload::command_line::{Content, Pattern, Work};
use ringferry_testvm::{Boot, Config, Guest, TestVm, TestVmError, guest_image};

const LIMIT: Duration = Duration::from_secs(60);

/// A VM with the test guest, or `None` where there is no KVM.
fn boot(vcpus: usize, memory_bytes: u64, regions: usize, append: &str) -> Option<(TestVm, Guest)> {
    let boot = Boot::Image { image: guest_image(), append: append.to_owned() };
    match TestVm::new(Config { vcpus, memory_bytes, regions, boot, ..Config::default() }) {
        Ok(mut vm) => {
            let guest = Guest::new(vm.memory(), vm.tracker()).expect("RAM holds the mailbox");
            vm.start().expect("the VM was just built");
            Some((vm, guest))
        }
        Err(error @ (TestVmError::NoKvm | TestVmError::KvmPermission)) => {
            ringferry_testvm::skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn working(vm: &TestVm, guest: &Guest) {
    if let Err(error) = guest.wait_until_working(LIMIT) {
        panic!("{error}: {:?}\n{}", vm.status(), vm.console());
    }
}

fn wait_for_steps(guest: &Guest, vcpu: usize, more: u64) {
    let from = guest.stats(vcpu).expect("the vCPU is at work").steps();
    let deadline = std::time::Instant::now() + LIMIT;
    while guest.stats(vcpu).expect("the vCPU is at work").steps() < from + more {
        assert!(std::time::Instant::now() < deadline, "vCPU {vcpu}: {:?}", guest.stats(vcpu));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn one_two_and_eight_vcpus_work_and_prove_it() {
    for vcpus in [1, 2, 8] {
        let append =
            format!("vcpus={vcpus} fill=8MiB each=ws:1MiB,bytes:64,content:random vcpu0=pattern:zipf");
        let Some((mut vm, guest)) = boot(vcpus, 64 << 20, 3, &append) else { return };
        working(&vm, &guest);
        for _ in 0..5 {
            (0..vcpus).for_each(|vcpu| wait_for_steps(&guest, vcpu, 1000));
            let paused = vm.pause().unwrap();
            let report = check(vm.memory()).unwrap();
            assert_eq!(report.vcpus.len(), vcpus);
            assert!(
                report.vcpus.iter().all(|vcpu| vcpu.page_writes > 0 && vcpu.body_bytes > 0),
                "{report:?}"
            );
            assert_eq!(report.vcpus.iter().map(|vcpu| vcpu.filled_pages).sum::<u64>(), 2048);
            vm.resume(paused).unwrap();
        }
    }
}

#[test]
fn a_working_set_may_lie_on_both_sides_of_the_hole_below_4_gib() {
    let append = "vcpus=2 each=bytes:64,pattern:random vcpu0=ws:1MiB vcpu1=ws:6MiB";
    let Some((mut vm, guest)) = boot(2, 6 << 30, 3, append) else { return };
    working(&vm, &guest);
    let share = guest.plan().unwrap().share_of(1);
    let [below, above, ..] = share.as_slice() else { panic!("one piece: {share:?}") };
    assert!(below.pages < 6 << 8 && below.first + below.pages == 3 << 18, "{below:?}");
    assert_eq!(above.first, 4 << 18);
    wait_for_steps(&guest, 1, 100_000);
    let _paused = vm.pause().unwrap();
    let report = check(vm.memory()).unwrap();
    assert_eq!(report.vcpus[1].stamped_pages, 6 << 8);
}

#[test]
fn no_instruction_is_emulated_while_it_works() {
    let Some((vm, guest)) = boot(2, 64 << 20, 1, "vcpus=2 each=ws:8MiB vcpu1=pattern:random,bytes:4096")
    else {
        return;
    };
    working(&vm, &guest);
    (0..2).for_each(|vcpu| wait_for_steps(&guest, vcpu, 10_000));
    let emulated = || [0, 1].map(|vcpu| vm.kernel_counters(vcpu).unwrap()["insn_emulation"]);
    let before = emulated();
    (0..2).for_each(|vcpu| wait_for_steps(&guest, vcpu, 100_000));
    assert_eq!(emulated(), before);
}

#[test]
fn every_pattern_and_content_can_be_had_while_it_runs() {
    let Some((mut vm, mut guest)) = boot(1, 64 << 20, 1, "vcpus=1 fill=4MiB each=ws:1MiB") else { return };
    working(&vm, &guest);
    let mut pages = 100;
    for (pattern, _) in Pattern::ALL {
        for (content, _) in Content::ALL {
            pages += 17;
            let work = Work {
                pattern,
                content,
                working_set_pages: pages,
                bytes_per_page: 200,
                pace_per_s: 0,
                lock: true,
            };
            guest.set_work(0, &work).unwrap();
            let deadline = std::time::Instant::now() + LIMIT;
            while !guest.stats(0).unwrap().work_applied {
                assert!(std::time::Instant::now() < deadline, "{work:?} is not applied");
                std::thread::sleep(Duration::from_millis(1));
            }
            if pattern != Pattern::Idle {
                wait_for_steps(&guest, 0, 100);
            }
            let paused = vm.pause().unwrap();
            check(vm.memory()).unwrap_or_else(|error| panic!("{work:?}: {error}"));
            vm.resume(paused).unwrap();
        }
    }
}

#[test]
fn a_switchover_pause_is_counted_apart_from_the_longest_gap() {
    let Some((mut vm, mut guest)) = boot(2, 32 << 20, 1, "vcpus=2 each=ws:1MiB") else { return };
    working(&vm, &guest);
    guest.restart_longest_gap().unwrap();
    (0..2).for_each(|vcpu| wait_for_steps(&guest, vcpu, 1000));
    let paused = vm.pause().unwrap();
    let slept = Duration::from_millis(400);
    std::thread::sleep(slept);
    guest.count_pause_apart().unwrap();
    vm.resume(paused).unwrap();
    for vcpu in 0..2 {
        wait_for_steps(&guest, vcpu, 1000);
        let pause = guest.stats(vcpu).unwrap().pause_gap.expect("the guest has run since");
        assert!(pause >= slept, "{pause:?}");
    }
    // A pause that nobody announced is a gap like any other.
    guest.restart_longest_gap().unwrap();
    (0..2).for_each(|vcpu| wait_for_steps(&guest, vcpu, 1000));
    let paused = vm.pause().unwrap();
    std::thread::sleep(slept);
    vm.resume(paused).unwrap();
    for vcpu in 0..2 {
        wait_for_steps(&guest, vcpu, 1000);
        assert!(guest.stats(vcpu).unwrap().longest_gap >= slept);
    }
}

#[test]
fn a_guest_that_cannot_run_says_why() {
    for (append, reason) in [
        ("vcpu0=pattern:fast", "`pattern:fast`"),
        ("each=ws:1GiB", "RAM above 4 MiB"),
        ("each=ws:5KiB", "multiple of 4 KiB"),
    ] {
        let Some((vm, guest)) = boot(1, 32 << 20, 1, append) else { return };
        let error = guest.wait_until_working(LIMIT).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(vm.wait_for_end(LIMIT).is_some(), "it ends through the exit port");
        assert!(vm.console().contains(reason), "{}", vm.console());
    }
}

#[test]
fn fewer_vcpus_than_asked_for_work_alone() {
    let Some((vm, guest)) = boot(1, 32 << 20, 1, "vcpus=3 each=ws:1MiB") else { return };
    working(&vm, &guest);
    assert_eq!(guest.vcpus().unwrap(), 1);
    assert!(vm.console().contains("only 1 of 3"), "{}", vm.console());
}
