//! Device state in pieces: some of it while the guest runs, none of it held.

use ringferry::destination::DestinationOptions;
use ringferry::source::{SourceError, StandstillLimit};
use ringferry::wire::reason::Reason;
use std::time::Duration;

use crate::world::World;

#[test]
fn device_state_arrives_in_order_in_pieces_while_the_guest_runs_and_after() {
    // Nothing at all, far more than the window, and what a GPU has.
    for bytes in [0, 1, 70_000_123, 2 << 30] {
        let mut world = World::new();
        (world.source_vm.device_bytes, world.destination_vm.device_bytes) = (bytes, bytes);
        world.options.standstill = StandstillLimit { factor: 1.0, floor: Duration::from_secs(60) };
        let ended = world.migrate();
        let report = ended.source.unwrap();
        assert!(report.state_bytes >= bytes, "{}", report.state_bytes);
        assert_eq!(world.destination_vm.device.at, bytes);
        assert_eq!(ended.destination.unwrap().state_bytes, report.state_bytes);
        assert!(world.destination_runs() && world.source_ram.is_equal(&world.destination_ram));
    }
    // Both sides, in this one process, hold no more of it than the window and what is between two threads.
    let peak = peak_memory_bytes();
    assert!(peak < 512 << 20, "{peak} bytes at most were in use");
}

/// The most memory that this process has had resident.
fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_destination_whose_vmm_takes_no_pieces_says_so_and_the_vm_stays() {
    let mut world = World::new();
    world.source_vm.device_bytes = 1000;
    // It expects other bytes: the first one is wrong.
    world.destination_vm.device.at = 5;
    let error = world.migrate().source.unwrap_err();
    let SourceError::Aborted { reason: Reason::Vmm, text } = &error else { panic!("{error}") };
    assert!(text.contains("load the state of a device"), "{text}");
    assert!(world.source_runs());
}

#[test]
fn a_machine_state_beyond_the_limit_is_refused_and_the_vm_stays() {
    let mut world = World::new();
    world.destination_options =
        DestinationOptions { machine_state_bytes_max: 3, ..world.destination_options };
    let error = world.migrate().source.unwrap_err();
    assert!(
        matches!(&error, SourceError::Aborted { text, .. } if text.contains("longer than 3 bytes")),
        "{error}"
    );
    assert!(world.source_runs() && !world.destination_runs());
}
