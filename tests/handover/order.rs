//! The order in which nothing is lost, and that in which a failure is undone.

use ringferry::layout::PageIndex;

use crate::proxy::Fault;
use crate::world::World;

#[test]
fn a_page_that_saving_state_writes_arrives() {
    let mut world = World::new();
    let page = PageIndex(62);
    world.source_vm.writes = Some(page);
    world.tracker.dirtied_by_saving = Some(page);
    let ended = world.migrate();
    let report = ended.source.unwrap();
    assert_eq!((report.ram_digest_match, report.untracked_pages), (Some(true), 0));
    assert_eq!(world.destination_ram.read(page), 0xf1a5);
    let log = world.source_vm.log.all();
    let order: Vec<_> = log.iter().filter(|what| ["pause", "quiesce", "save"].contains(what)).collect();
    assert_eq!(order, [&"pause", &"quiesce", &"save"]);
}

#[test]
fn ram_is_verified_before_restoring_state_writes_it() {
    let mut world = World::new();
    world.destination_vm.writes = Some(PageIndex(5));
    let ended = world.migrate();
    assert_eq!(ended.destination.unwrap().ram_digest_match, Some(true));
    assert!(ended.source.is_ok() && world.destination_runs());
    assert_eq!(world.destination_ram.read(PageIndex(5)), 0x1234);
}

#[test]
fn the_first_act_of_a_failure_is_to_let_the_guest_run() {
    for message in ["Prepare", "Prepared"] {
        let mut world = World::new();
        world.proxied.fault = Some((message, Fault::Cut));
        assert!(world.migrate().source.is_err());
        let log = &world.source_vm.log;
        let resumed = log.position("resume").unwrap();
        for later in ["give back", "stop tracking"] {
            assert!(resumed < log.position(later).unwrap(), "{message}: {:?}", log.all());
        }
    }
}
