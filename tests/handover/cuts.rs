//! The control connection is cut at and within every message.

use ringferry::destination::DestinationError;
use ringferry::layout::PageIndex;
use ringferry::source::SourceError;
use ringferry::wire::reason::Reason;

use crate::proxy::{Fault, Proxied};
use crate::world::{PAGES, Resolution, World};

fn cut(message: &'static str, half: bool) -> Proxied {
    Proxied { fault: Some((message, if half { Fault::Half } else { Fault::Cut })), inserted: None }
}

#[test]
fn a_migration_without_a_fault_moves_every_page_and_one_side_runs() {
    let mut world = World::new();
    let ended = world.migrate();
    let report = ended.source.unwrap();
    assert_eq!(ended.destination.unwrap().ram_digest_match, Some(true));
    assert_eq!((report.ram_digest_match, report.untracked_pages), (Some(true), 0));
    assert!(!world.source_runs() && world.destination_runs());
    assert!(world.source_ram.is_equal(&world.destination_ram));
    let of_rounds = report.rounds.iter().map(|round| round.totals.pages_sent + round.totals.zero_pages);
    assert_eq!(of_rounds.sum::<u64>(), report.totals.pages_sent + report.totals.zero_pages);
}

#[test]
fn wherever_the_control_connection_is_cut_one_side_has_the_vm_and_never_both_run() {
    for message in ["Hello", "Accept", "Prepare", "Prepared", "Commit", "Running"] {
        for half in [false, true] {
            let mut world = World::new();
            world.proxied = cut(message, half);
            let ended = world.migrate();
            match message {
                // The unavoidable window: the source keeps the VM, paused, until an operator decides.
                "Commit" | "Running" => {
                    assert!(ended.unconfirmed.is_some(), "{message}, half {half}: {:?}", ended.source);
                    assert!(!world.source_runs(), "{message}: the source resumed by itself");
                    assert_eq!(world.destination_runs(), message == "Running", "{message}, half {half}");
                }
                _ => {
                    let error = ended.source.expect_err("a cut connection is no success");
                    assert!(world.source_runs(), "{message}, half {half}: nobody runs the VM: {error}");
                    assert!(ended.destination.is_err(), "{message}, half {half}");
                }
            }
        }
    }
}

#[test]
fn an_unconfirmed_vm_is_kept_or_released_with_tracking_off_in_both_ways_out() {
    let mut kept = World::new();
    kept.proxied = cut("Commit", false);
    kept.resolution = Some(Resolution::Keep);
    let ended = kept.migrate();
    assert!(ended.source.is_ok() && ended.unconfirmed.unwrap().contains("keep it here or release it"));
    assert!(kept.source_runs() && !kept.destination_runs() && !kept.tracker.tracking);
    assert!(kept.tracker.given_back > 0, "what was harvested is dirty again");

    let mut released = World::new();
    released.proxied = cut("Running", false);
    released.resolution = Some(Resolution::Release);
    let ended = released.migrate();
    assert!(ended.source.is_ok() && ended.unconfirmed.is_some());
    assert!(!released.source_runs() && released.destination_runs() && !released.tracker.tracking);
}

#[test]
fn whatever_either_vmm_cannot_do_the_vm_is_not_lost() {
    for fails in ["pause", "quiesce", "save"] {
        let mut world = World::new();
        world.source_vm.fails = Some(fails);
        let error = world.migrate().source.unwrap_err();
        assert!(error.to_string().contains(fails), "{error}");
        assert!(world.source_runs() && !world.destination_runs(), "{fails}");
    }
    for fails in ["restore", "prepare"] {
        let mut world = World::new();
        world.destination_vm.fails = Some(fails);
        let error = world.migrate().source.unwrap_err();
        let SourceError::Aborted { reason: Reason::Vmm, text } = &error else { panic!("{error}") };
        assert!(text.contains(&format!("{fails} fails in this test")), "{text}");
        assert!(world.source_runs() && !world.destination_runs(), "{fails}");
        assert!(world.destination_vm.log.all().contains(&"release"), "what prepare took is given back");
    }
}

#[test]
fn a_destination_that_cannot_run_the_vm_after_commit_says_so_and_the_source_runs_it() {
    let mut world = World::new();
    world.destination_vm.fails = Some("resume");
    let ended = world.migrate();
    assert!(
        matches!(ended.source, Err(SourceError::Aborted { reason: Reason::Vmm, .. })),
        "{:?}",
        ended.source
    );
    assert!(world.source_runs() && !world.destination_runs());
    assert!(world.tracker.given_back > 0 && !world.tracker.tracking);
    assert!(matches!(ended.destination, Err(DestinationError::Vm { action: "resume", .. })));
}

#[test]
fn a_failed_migration_gives_back_every_page_that_it_harvested() {
    let mut world = World::new();
    world.proxied = cut("Prepare", false);
    assert!(world.migrate().source.is_err());
    // More if the host was so busy that a switchover was called off.
    assert!(world.tracker.given_back >= 3, "two pages of a round, one of the final harvest");
}

#[test]
fn a_second_migration_after_a_failed_one_into_the_same_ram_loses_nothing_without_verification() {
    let mut world = World::new();
    world.options.verify = false;
    world.proxied = cut("Prepared", false);
    assert!(world.migrate().source.is_err() && world.source_runs());
    // Pages that were sent have become zero, which a second attempt may send as "zero".
    (10..30).for_each(|page| world.source_ram.write(PageIndex(page), 0));
    world.proxied = Proxied::default();
    let ended = world.migrate();
    assert!(ended.source.is_ok());
    assert!(ended.destination.unwrap().cleared_pages > 0, "the destination says that its RAM had been used");
    assert!(world.source_ram.is_equal(&world.destination_ram));
}

#[test]
fn a_destination_with_less_ram_says_so_on_both_sides() {
    let mut world = World::with_pages(PAGES / 2);
    let ended = world.migrate();
    let (source, destination) = (ended.source.unwrap_err(), ended.destination.unwrap_err());
    let SourceError::Refused { reason: Reason::Layout, text } = &source else { panic!("{source}") };
    assert!(text.contains("RAM"), "{text}");
    assert!(
        matches!(&destination, DestinationError::Refused { text, .. } if text.contains("RAM")),
        "{destination}"
    );
    assert!(world.source_runs() && !world.destination_runs());
}
