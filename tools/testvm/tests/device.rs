//! The VM's device: it writes RAM until it is quiesced and once more when it is saved, and its state is a stream.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod common;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use common::{build, copy_ram, copy_run, counting_config};
use ringferry::vm::Moment;
use ringferry::{GuestAddress, PAGE_SIZE, PageRun, PageSet, Quiesced, Vm};
use ringferry_testvm::device::{DeviceConfig, DeviceError, QUEUE_ADDRESS, QUEUE_PAGES};
use ringferry_testvm::{Boot, Config, TestVm, TestVmError, Tracking};

/// A running VM with a device, and a VM that waits for its state.
fn pair(device: DeviceConfig) -> Option<(TestVm, TestVm)> {
    let tracking = Tracking::Ring { entries: 4096 };
    let mut source = build(Config { tracking, device: Some(device), ..counting_config(1) })?;
    let target = build(Config { boot: Boot::Destination, ..counting_config(1) })?;
    source.start().unwrap();
    wait_for_writes(&source, 2 * QUEUE_PAGES);
    Some((source, target))
}

fn wait_for_writes(vm: &TestVm, writes: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while vm.device_writes().unwrap() < writes {
        assert!(Instant::now() < deadline, "the device made {:?} writes", vm.device_writes());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn queue(vm: &TestVm) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(QUEUE_PAGES).unwrap() * PAGE_SIZE];
    vm.read_ram(GuestAddress(QUEUE_ADDRESS), &mut bytes).unwrap();
    bytes
}

fn device_error(error: ringferry::vm::VmError) -> DeviceError {
    match *error.downcast::<TestVmError>().unwrap() {
        TestVmError::Device(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn the_device_writes_ram_while_vcpus_stand_still_until_it_is_quiesced() {
    let Some((mut source, _)) = pair(DeviceConfig::default()) else { return };
    let paused = source.pause().unwrap();
    let writes = source.device_writes().unwrap();
    wait_for_writes(&source, writes + 10);
    let too_early = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap_err();
    assert!(too_early.to_string().contains("device"), "{too_early}");
    let quiesced = source.quiesce(&paused).unwrap();
    let (writes, before) = (source.device_writes(), queue(&source));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((source.device_writes(), queue(&source)), (writes, before));
    source.save_state(&quiesced).unwrap();
    assert_eq!(source.device_writes(), writes.map(|writes| writes + 1), "saving makes a last write");
    source.resume(paused).unwrap();
    wait_for_writes(&source, writes.unwrap() + 10);
    assert_eq!(source.calls().quiesced, 1);
}

#[test]
fn a_destination_takes_the_device_over_only_with_its_last_write_in_ram() {
    let Some((mut source, mut target)) = pair(DeviceConfig::default()) else { return };
    let session = source.tracker().unwrap().start().unwrap();
    wait_for_writes(&source, source.device_writes().unwrap() + QUEUE_PAGES);
    let mut dirty = PageSet::new(source.memory().end());
    let paused = source.pause().unwrap();
    let quiesced = source.quiesce(&paused).unwrap();
    copy_ram(&source, &target);
    session.harvest(&mut dirty).unwrap();
    assert!(dirty.contains(GuestAddress(QUEUE_ADDRESS).page()), "the device tells the tracker");
    dirty.clear();
    let state = source.save_state(&quiesced).unwrap();
    let settled = quiesced.state_is_saved();

    let refused = device_error(target.restore_state(&state).unwrap_err());
    assert!(matches!(refused, DeviceError::OldQueue { .. }), "{refused}");
    session.harvest_final(&settled, &mut dirty).unwrap();
    session.stop().unwrap();
    let queue_run = PageRun { first: GuestAddress(QUEUE_ADDRESS).page(), pages: QUEUE_PAGES };
    let flushed: Vec<_> =
        dirty.runs().filter(|run| queue_run.first <= run.first && run.end() <= queue_run.end()).collect();
    assert_eq!(
        flushed.iter().map(|run| run.pages).sum::<u64>(),
        1,
        "the write of saving is in the last harvest"
    );
    dirty.runs().for_each(|run| copy_run(&source, &target, run));

    let there = target.restore_state(&state).unwrap();
    assert_eq!(target.device_writes(), source.device_writes());
    target.prepare().unwrap();
    target.resume(there).unwrap();
    wait_for_writes(&target, source.device_writes().unwrap() + 10);
    assert_eq!(target.calls().prepared, 1);
}

/// Hands what is written to a destination, in pieces of changing length.
struct Pieces<'a> {
    target: &'a mut TestVm,
    bytes: u64,
    /// The byte of the stream that is changed on the way.
    damaged: Option<u64>,
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(1 + usize::try_from(self.bytes % 50_021).unwrap());
        let mut piece = bytes[..length].to_vec();
        let range = self.bytes..self.bytes + length as u64;
        if let Some(at) = self.damaged.filter(|at| range.contains(at)) {
            piece[usize::try_from(at - range.start).unwrap()] ^= 1;
        }
        self.target.load_device_state(&piece).map_err(io::Error::other)?;
        self.bytes = range.end;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const STATE_BYTES: u64 = (5 << 20) + 7;

fn with_state() -> DeviceConfig {
    DeviceConfig { state_bytes: STATE_BYTES, round_bytes: 1_000_001, ..DeviceConfig::default() }
}

#[test]
fn streamed_state_leaves_in_rounds_and_arrives_whole_however_it_is_cut() {
    let Some((mut source, mut target)) = pair(with_state()) else { return };
    source.discarded_pages(&mut PageSet::new(source.memory().end()));
    let mut out = Pieces { target: &mut target, bytes: 0, damaged: None };
    for round in 1..=3 {
        source.save_device_state(Moment::Running { bytes: 1 << 20 }, &mut out).unwrap();
        assert_eq!(out.bytes, 16 + round * 1_000_001);
    }
    let paused = source.pause().unwrap();
    let quiesced = source.quiesce(&paused).unwrap();
    source.save_device_state(Moment::Stopped(&quiesced), &mut out).unwrap();
    assert_eq!(out.bytes, 16 + STATE_BYTES);
    let state = source.save_state(&quiesced).unwrap();
    copy_ram(&source, &target);
    let there = target.restore_state(&state).unwrap();
    target.resume(there).unwrap();
    wait_for_writes(&target, source.device_writes().unwrap() + 1);
}

#[test]
fn streamed_state_that_lacks_its_end_or_differs_in_a_byte_is_refused() {
    let Some((mut source, mut target)) = pair(with_state()) else { return };
    let mut out = Pieces { target: &mut target, bytes: 0, damaged: None };
    source.save_device_state(Moment::Running { bytes: 1 << 20 }, &mut out).unwrap();
    let paused = source.pause().unwrap();
    let quiesced = source.quiesce(&paused).unwrap();
    let state = source.save_state(&quiesced).unwrap();
    copy_ram(&source, &target);
    let refused = device_error(target.restore_state(&state).unwrap_err());
    assert!(matches!(refused, DeviceError::Length { found: 1_000_001, expected: STATE_BYTES }), "{refused}");

    // A migration that follows begins with the first byte on both sides.
    for damaged in [16, 3_000_000, 16 + STATE_BYTES - 1] {
        target.release();
        source.discarded_pages(&mut PageSet::new(source.memory().end()));
        let mut out = Pieces { target: &mut target, bytes: 0, damaged: Some(damaged) };
        let refused = source.save_device_state(Moment::Stopped(&quiesced), &mut out).unwrap_err();
        assert!(refused.to_string().contains("bytes were lost or moved"), "{refused}");
    }
}

#[test]
fn gigabytes_of_state_pass_through_a_block() {
    const BYTES: u64 = 2 << 30;
    let Some((mut source, mut target)) = pair(DeviceConfig { state_bytes: BYTES, ..DeviceConfig::default() })
    else {
        return;
    };
    let paused = source.pause().unwrap();
    let quiesced = source.quiesce(&paused).unwrap();
    /// The longest piece, and all of them.
    struct Longest<'a>(&'a mut TestVm, usize, u64);
    impl Write for Longest<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.load_device_state(bytes).map_err(io::Error::other)?;
            self.1 = self.1.max(bytes.len());
            self.2 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut out = Longest(&mut target, 0, 0);
    source.save_device_state(Moment::Stopped(&quiesced), &mut out).unwrap();
    assert_eq!((out.1, out.2), (64 << 10, 16 + BYTES));
    let state = source.save_state(&quiesced).unwrap();
    copy_ram(&source, &target);
    let _paused = target.restore_state(&state).unwrap();
}
