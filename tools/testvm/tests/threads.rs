//! The VM of host threads: it works as the guest does, proves itself, and moves with its clock.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::time::{Duration, Instant};

use ringferry::{DirtySource, GuestMemory, PageRun, PageSet, Quiesced, Vm};
use ringferry_testvm::check::check;
use ringferry_testvm::{Boot, Config, Guest, Image, TestVmError, ThreadVm, guest_image};

const LIMIT: Duration = Duration::from_secs(60);

fn config(vcpus: usize, append: &str) -> Config {
    let boot = Boot::Image { image: guest_image(), append: append.to_owned() };
    Config { vcpus, memory_bytes: 24 << 20, regions: 3, boot, ..Config::default() }
}

fn started(vcpus: usize, append: &str) -> (ThreadVm, Guest) {
    let mut vm = ThreadVm::new(config(vcpus, append)).unwrap();
    vm.start().unwrap();
    let guest = Guest::new(vm.memory(), None).unwrap();
    guest.wait_until_working(LIMIT).unwrap();
    (vm, guest)
}

fn wait_for_steps(guest: &Guest, vcpu: usize, more: u64) {
    let from = guest.stats(vcpu).unwrap().steps();
    let deadline = Instant::now() + LIMIT;
    while guest.stats(vcpu).unwrap().steps() < from + more {
        assert!(Instant::now() < deadline, "vCPU {vcpu}: {:?}", guest.stats(vcpu));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a migration does to pages: word by word, as both sides may be in use.
fn copy(from: &GuestMemory, to: &GuestMemory, pages: &PageSet) {
    use ringferry_testvm::HostMachine;
    use ringferry_testvm::workload::Machine;
    let (from, mut to) = (HostMachine::new(from), HostMachine::new(to));
    for run in pages.runs() {
        for address in (run.first.address().0..run.end().address().0).step_by(8) {
            to.store(address, from.load(address));
        }
    }
}

#[test]
fn threads_work_and_prove_it_between_pauses() {
    for vcpus in [1, 5] {
        let append = "fill=4MiB each=ws:1MiB,bytes:64,content:random vcpu0=pattern:zipf";
        let (mut vm, guest) = started(vcpus, append);
        for _ in 0..5 {
            (0..vcpus).for_each(|vcpu| wait_for_steps(&guest, vcpu, 1000));
            let paused = vm.pause().unwrap();
            let still = guest.stats(0).unwrap();
            let report = check(vm.memory()).unwrap();
            assert_eq!(report.vcpus.len(), vcpus);
            assert!(report.vcpus.iter().all(|vcpu| vcpu.page_writes > 0 && !vcpu.write_in_flight));
            assert_eq!(report.vcpus.iter().map(|vcpu| vcpu.filled_pages).sum::<u64>(), 1024);
            assert_eq!(guest.stats(0).unwrap(), still, "a paused vCPU works");
            vm.resume(paused).unwrap();
        }
    }
}

#[test]
fn a_copy_made_from_tracked_rounds_goes_on_where_the_original_stopped() {
    let append = "fill=2MiB each=ws:2MiB,bytes:100 vcpu1=pattern:random,pace:5000";
    let (mut source, mut guest) = started(2, append);
    let mut destination = ThreadVm::new(Config { boot: Boot::Destination, ..config(2, "") }).unwrap();
    let mut tracker = source.track().unwrap();
    tracker.start().unwrap();
    let mut pages = PageSet::new(source.memory().end());
    for region in source.memory().regions() {
        pages.insert_run(PageRun { first: region.pages.first, pages: region.pages.pages });
    }
    for _ in 0..5 {
        copy(source.memory(), destination.memory(), &pages);
        pages.clear();
        tracker.harvest(&mut pages).unwrap();
        assert!(!pages.is_empty());
    }
    let paused = source.pause().unwrap();
    guest.count_pause_apart().unwrap();
    tracker.harvest_final(&paused.declare_nothing_else_writes(), &mut pages).unwrap();
    copy(source.memory(), destination.memory(), &pages);
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let slept = Duration::from_millis(300);
    std::thread::sleep(slept);

    let before = check(source.memory()).unwrap();
    let arrived = destination.restore_state(&state).unwrap();
    assert_eq!(check(destination.memory()).unwrap(), before);
    destination.resume(arrived).unwrap();
    let moved = Guest::new(destination.memory(), None).unwrap();
    for vcpu in 0..2 {
        wait_for_steps(&moved, vcpu, 1000);
        let pause = moved.stats(vcpu).unwrap().pause_gap.expect("it has run since");
        assert!(pause >= slept, "the pause that the vCPU felt: {pause:?}");
    }
    let arrived = destination.pause().unwrap();
    let after = check(destination.memory()).unwrap();
    for (after, before) in after.vcpus.iter().zip(&before.vcpus) {
        assert!(after.page_writes > before.page_writes);
    }
    // The source can go on as well, as after a migration that failed.
    source.resume(paused).unwrap();
    wait_for_steps(&guest, 0, 1000);
    destination.resume(arrived).unwrap();
}

#[test]
fn a_page_that_is_not_copied_after_it_was_dirtied_is_found_out() {
    let (mut vm, guest) = started(1, "each=ws:1MiB");
    let stale = ThreadVm::new(Config { boot: Boot::Destination, ..config(1, "") }).unwrap();
    let mut pages = PageSet::new(vm.memory().end());
    vm.memory().regions().iter().for_each(|region| pages.insert_run(region.pages));
    wait_for_steps(&guest, 0, 10_000);
    let paused = vm.pause().unwrap();
    copy(vm.memory(), stale.memory(), &pages);
    check(stale.memory()).unwrap();
    vm.resume(paused).unwrap();
    wait_for_steps(&guest, 0, 10_000);
    let paused = vm.pause().unwrap();
    // All but one page of the working set.
    let lost = ringferry::GuestAddress(ringferry_testvm::workload::mailbox::RESERVED_END).page();
    pages.remove(lost);
    copy(vm.memory(), stale.memory(), &pages);
    check(stale.memory()).unwrap_err();
    vm.resume(paused).unwrap();
}

#[test]
fn what_threads_cannot_do_is_refused_with_its_reason() {
    let refused = |config: Config| match ThreadVm::new(config).and_then(|mut vm| vm.start()) {
        Ok(()) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    assert!(refused(config(1, "each=pattern:backwards")).contains("backwards"));
    assert!(refused(config(1, "each=ws:1GiB")).contains("ask for less"));
    assert!(refused(config(2, "vcpus=3")).contains("3 vCPUs"));
    assert!(refused(Config { memory_bytes: 2 << 20, ..config(1, "") }).contains("mailbox"));
    assert!(refused(Config { boot: Boot::Destination, ..config(1, "") }).contains("destination"));
    let foreign = Boot::Image { image: Image::File("kernel.elf".into()), append: String::new() };
    assert!(refused(Config { boot: foreign, ..config(1, "") }).contains("built-in guest"));
}

#[test]
fn calls_in_the_wrong_order_are_refused_and_change_nothing() {
    let (mut vm, guest) = started(1, "each=ws:1MiB");
    assert!(vm.start().is_err());
    assert!(vm.restore_state(&[]).is_err());
    let paused = vm.pause().unwrap();
    assert!(vm.pause().is_err());
    vm.resume(paused).unwrap();
    wait_for_steps(&guest, 0, 1000);
}

#[test]
fn state_that_is_not_a_thread_vms_is_refused_whatever_its_bytes() {
    let (mut vm, _guest) = started(2, "each=ws:1MiB");
    let paused = vm.pause().unwrap();
    let good = vm.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let restored = |state: &[u8], vcpus| {
        let mut vm = ThreadVm::new(Config { boot: Boot::Destination, ..config(vcpus, "") }).unwrap();
        vm.restore_state(state).map(drop).map_err(|error| error.to_string())
    };
    for length in 0..good.len() {
        assert!(restored(&good[..length], 2).is_err(), "{length} bytes of it");
    }
    let longer = [good.as_slice(), &[0; 9]].concat();
    assert!(restored(&longer, 2).unwrap_err().contains("9 bytes follow"));
    assert!(restored(&good, 3).unwrap_err().contains("2 vCPUs"));
    let mut version = good.clone();
    version[8] ^= 0xff;
    assert!(restored(&version, 2).unwrap_err().contains("version"));
    assert!(restored(b"RFTestVM........", 2).unwrap_err().contains("another VMM"));
    // Good state over RAM that holds no guest.
    assert!(matches!(restored(&good, 2), Err(error) if error.contains("no test guest")));
    vm.resume(paused).unwrap();
}

#[test]
fn one_tracker_at_a_time() {
    let (vm, _guest) = started(1, "each=ws:1MiB");
    let (mut first, mut second) = (vm.track().unwrap(), vm.track().unwrap());
    first.start().unwrap();
    second.start().unwrap_err();
    first.stop().unwrap();
    second.start().unwrap();
    let _: TestVmError = ThreadVm::new(Config { vcpus: 0, ..Config::default() }).unwrap_err();
}
