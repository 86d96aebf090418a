//! A guest goes on in another VM from its RAM and its saved state.

mod common;

use common::{assert_consistent, build, copy_ram, counting_config, counts, wait_for_progress};
use ringferry::Vm;
use ringferry_testvm::{Backing, Boot, Config};

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
            let state = source.save_state(&paused).unwrap();
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
