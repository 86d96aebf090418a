//! A guest goes on in another VM from its RAM and its saved state.

mod common;

use std::time::Duration;

use common::{HOLD, assert_consistent, build, copy_ram, counting_config, counts, wait_for_progress};
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use ringferry::{GuestAddress, Quiesced, Vm};
use ringferry_testvm::{Backing, Boot, Config, StateError, TestVm, TestVmError};

/// The counting guest's VM, waiting for state instead of booting.
fn destination(vcpus: usize) -> Config {
    Config { boot: Boot::Destination, ..counting_config(vcpus) }
}

#[test]
fn a_guest_goes_on_where_it_was_paused() {
    for vcpus in [1, 4] {
        let Some(mut source) = build(counting_config(vcpus)) else { return };
        source.start().unwrap();
        wait_for_progress(&source, &vec![0; vcpus], 10_000);
        for _ in 0..3 {
            let paused = source.pause().unwrap();
            let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
            assert_eq!(source.skipped_msrs(), [], "every MSR can be read");
            let before = counts(&source);

            let config = Config { backing: Backing::Memfd, regions: 3, ..destination(vcpus) };
            let mut target = build(config).unwrap();
            copy_ram(&source, &target);
            let paused_there = target.restore_state(&state).unwrap();
            assert_eq!(target.skipped_msrs(), [], "every MSR can be set");
            assert_eq!(counts(&target), before);
            target.resume(paused_there).unwrap();
            wait_for_progress(&target, &before, 10_000);
            let paused_there = target.pause().unwrap();
            assert_consistent(&target);
            target.resume(paused_there).unwrap();

            source.resume(paused).unwrap();
            wait_for_progress(&source, &before, 10_000);
            source = target;
        }
    }
}

#[test]
fn vcpus_that_wait_to_be_started_are_started_after_the_move() {
    let Some(mut source) = build(counting_config(3)) else { return };
    source.write_ram(GuestAddress(HOLD), &[1]).unwrap();
    source.start().unwrap();
    // Any moment will do: the first vCPU cannot get further than the wait.
    std::thread::sleep(Duration::from_millis(20));
    let paused = source.pause().unwrap();
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let mut target = build(destination(3)).unwrap();
    copy_ram(&source, &target);
    let paused = target.restore_state(&state).unwrap();
    assert_eq!(counts(&target), [0; 3]);
    target.write_ram(GuestAddress(HOLD), &[0]).unwrap();
    target.resume(paused).unwrap();
    wait_for_progress(&target, &[0; 3], 1000);
}

/// Kind and bytes of each record, by the format that `state` describes.
fn records(state: &[u8]) -> Vec<(u16, &[u8])> {
    let mut rest = &state[24..];
    let mut records = Vec::new();
    while let Some((header, tail)) = rest.split_first_chunk::<8>() {
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let (record, tail) = tail.split_at(usize::try_from(length).unwrap_or(usize::MAX));
        records.push((kind, record));
        rest = tail;
    }
    records
}

#[test]
fn state_that_was_set_is_the_state_that_is_read_except_for_what_time_moves() {
    const MSRS: u16 = 8;
    const TIMERS: [u16; 2] = [14, 15];
    let Some(mut source) = build(counting_config(3)) else { return };
    source.start().unwrap();
    wait_for_progress(&source, &[0; 3], 1000);
    let paused = source.pause().unwrap();
    let sent = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let mut target = build(destination(3)).unwrap();
    copy_ram(&source, &target);
    let paused = target.restore_state(&sent).unwrap();
    let found = target.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();

    let (sent, found) = (records(&sent), records(&found));
    assert_eq!(sent.len(), found.len());
    for ((kind, sent), (_, found)) in sent.into_iter().zip(found) {
        if kind == MSRS {
            let differing = sent.chunks(12).zip(found.chunks(12)).filter(|(sent, found)| sent != found);
            let indices: Vec<u32> =
                differing.map(|(sent, _)| u32::from_le_bytes([sent[0], sent[1], sent[2], sent[3]])).collect();
            const IA32_TSC: u32 = 0x10;
            assert_eq!(indices, [IA32_TSC]);
        } else if !TIMERS.contains(&kind) {
            assert!(sent == found, "record {kind}");
        }
    }
}

#[test]
fn state_for_another_vm_is_refused() {
    let Some(mut source) = build(counting_config(2)) else { return };
    source.start().unwrap();
    let paused = source.pause().unwrap();
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let refusal = |vm: &mut TestVm, state: &[u8]| {
        let error = vm.restore_state(state).unwrap_err();
        *error.downcast::<TestVmError>().unwrap()
    };
    let mut larger = build(destination(3)).unwrap();
    let error = refusal(&mut larger, &state);
    assert!(matches!(error, TestVmError::State(StateError::Vcpus { found: 2, expected: 3 })), "{error}");
    let error = refusal(&mut source, &state);
    assert!(matches!(error, TestVmError::WrongPhase { .. }), "{error}");
    let error = refusal(&mut build(destination(2)).unwrap(), b"something else");
    assert!(matches!(error, TestVmError::State(StateError::NotState)), "{error}");
}

#[test]
fn hostile_state_fails_or_is_set_but_never_ends_the_vmm() {
    let Some(mut source) = build(counting_config(1)) else { return };
    source.start().unwrap();
    wait_for_progress(&source, &[0], 100);
    let paused = source.pause().unwrap();
    let state = source.save_state(&Quiesced::declare_no_device_writes(&paused)).unwrap();
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40);
    let mut runner = TestRunner::new(Cases { failure_persistence: None, ..Cases::with_cases(40) });
    let tried = runner.run(&changes, |changes| {
        let mut hostile = state.clone();
        for (index, value) in changes {
            // The header and the first record's are tested without KVM.
            let at = 32 + index.index(hostile.len() - 32);
            hostile[at] = value;
        }
        let mut target = TestVm::new(destination(1)).expect("another VM");
        if let Ok(paused) = target.restore_state(&hostile) {
            target.resume(paused).expect("the vCPU's thread is there");
            target.wait_for_end(Duration::from_millis(2));
            if let Ok(paused) = target.pause() {
                let _ = target.save_state(&Quiesced::declare_no_device_writes(&paused));
            }
        }
        Ok(())
    });
    tried.unwrap();
}
