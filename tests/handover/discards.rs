//! A VMM gives guest memory back to the host while it migrates.

use ringferry::layout::{PageIndex, PageRun};
use ringferry::transport::ZeroCopy;

use crate::world::{NEW_CONTENT, World};

#[test]
fn what_a_vmm_discards_while_it_migrates_arrives_as_it_is_then_registered_or_not() {
    let run = PageRun { first: PageIndex(10), pages: 8 };
    for zero_copy in [ZeroCopy::AlwaysRegistered, ZeroCopy::Always, ZeroCopy::Never] {
        for when in ["pause", "quiesce", "save"] {
            let mut world = World::new();
            world.options.send.zero_copy = zero_copy;
            world.source_vm.discards = Some((when, run, world.options.send.discards.clone()));
            let ended = world.migrate();
            // Verified: the RAM of both sides is the same.
            ended.source.unwrap_or_else(|error| panic!("{zero_copy:?}, at {when}: {error}"));
            ended.destination.unwrap();
            assert_eq!(world.destination_ram.read(run.first), NEW_CONTENT, "{zero_copy:?}, at {when}");
            assert_eq!(world.destination_ram.read(PageIndex(11)), 0, "{zero_copy:?}, at {when}");
        }
    }
}

#[test]
fn a_vmm_that_names_pages_that_are_no_ram_does_no_harm() {
    let mut world = World::new();
    world.options.send.discards.discarded(PageRun { first: PageIndex(0), pages: 1 });
    let discards = world.options.send.discards.clone();
    let ended = world.migrate_while(move || {
        for _ in 0..1000 {
            discards.discarded(PageRun { first: PageIndex(1 << 30), pages: u64::MAX });
        }
    });
    ended.source.unwrap();
    ended.destination.unwrap();
}
