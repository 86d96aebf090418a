//! How long a guest may stand still, whatever the destination does, and how soon a wish to cancel is heard.

use std::io::Read;
use std::net::TcpListener;
use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use ringferry::converge::{AtTimeout, Limits};
use ringferry::layout::{PageIndex, PageRun};
use ringferry::progress::{Parameters, Phase, Progress, Terms};
use ringferry::source::{SourceError, StandstillLimit};
use ringferry::transport::MaxBandwidth;
use ringferry::transport::control::ControlError;

use crate::proxy::Fault;
use crate::world::{PAGES, World, wait_until};

/// What a busy machine may add to a bound: far less than what the bound replaces.
const SLACK: Duration = Duration::from_millis(700);
const FLOOR: Duration = Duration::from_millis(400);

fn with_a_budget() -> World {
    let mut world = World::new();
    world.options.standstill = StandstillLimit { factor: 1.0, floor: FLOOR };
    let limits = Limits { downtime: Duration::from_millis(200), ..Limits::default() };
    let terms = Terms { limits, ..Terms::default() };
    world.progress = Progress::new(Parameters::new(terms, MaxBandwidth::default()));
    world
}

/// The guest stood still for no longer than the budget, and runs at the source.
fn assert_resumed_in_time(world: &World) {
    let log = &world.source_vm.log;
    let stood = log.at("resume").unwrap() - log.at("pause").unwrap();
    assert!(stood < FLOOR + SLACK, "the guest stood still for {stood:?}");
    assert!(world.source_runs() && !world.destination_runs());
}

#[test]
fn a_destination_that_freezes_during_the_standstill_costs_the_guest_no_more_than_the_budget() {
    for message in ["Prepare", "Prepared"] {
        let mut world = with_a_budget();
        world.proxied.fault = Some((message, Fault::Stall));
        let error = world.migrate().source.unwrap_err();
        assert!(matches!(error, SourceError::StandstillOver { .. }), "{message}: {error}");
        assert_resumed_in_time(&world);
    }
}

#[test]
fn a_destination_that_takes_long_to_restore_costs_the_guest_no_more_than_the_budget() {
    let mut world = with_a_budget();
    world.destination_vm.restoring = Duration::from_secs(3);
    let ended = world.migrate();
    let error = ended.source.unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, SourceError::StandstillOver { waiting_for: "Prepared", .. }), "{said}");
    assert!(said.contains("0.4 s"), "{said}");
    assert!(ended.destination.is_err(), "it hears of the end when it has restored");
    assert_resumed_in_time(&world);
}

#[test]
fn a_guest_is_not_stopped_for_a_destination_that_does_not_answer_a_ping() {
    for fault in [Fault::Stall, Fault::Cut] {
        let mut world = World::new();
        world.options.peer_timeout = Duration::from_millis(500);
        world.proxied.fault = Some(("Ping", fault));
        let error = world.migrate().source.unwrap_err();
        assert!(matches!(error, SourceError::Control(_)), "{error}");
        assert_eq!(world.source_vm.log.at("pause"), None, "{error}");
    }
}

#[test]
fn a_destination_that_is_frozen_during_the_rounds_is_noticed_by_both_sides() {
    let mut world = World::new();
    world.options.peer_timeout = Duration::from_millis(500);
    world.progress.parameters().max_bandwidth().set(NonZeroU64::new(2_000));
    world.tracker.dirty_pages = Some(PageRun { first: PageIndex(0), pages: PAGES });
    world.proxied.fault = Some(("Pong", Fault::Stall));
    let begun = Instant::now();
    let ended = world.migrate();
    assert!(ended.source.is_err() && ended.destination.is_err());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(world.source_runs());
}

#[test]
fn a_limit_of_bandwidth_is_lifted_when_the_guest_is_stopped_in_the_middle_of_a_round() {
    let mut world = World::new();
    let limits = Limits {
        downtime: Duration::from_millis(300),
        timeout: Some((Duration::from_millis(300), AtTimeout::SwitchOver)),
        ..Limits::default()
    };
    // 64 pages take 26 s at this rate.
    let max_bandwidth = MaxBandwidth::new(NonZeroU64::new(10_000));
    let terms = Terms { limits, ..Terms::default() };
    world.progress = Progress::new(Parameters::new(terms, max_bandwidth));
    world.tracker.dirty_pages = Some(PageRun { first: PageIndex(0), pages: PAGES });
    world.options.standstill = StandstillLimit { factor: 1.0, floor: Duration::from_secs(30) };
    let report = world.migrate().source.unwrap();
    assert!(report.downtime_ms < 5_000.0, "the guest stood still for {} ms", report.downtime_ms);
    assert!(world.source_ram.is_equal(&world.destination_ram));
}

/// Cancels once `phase` is reached and `then` holds; how long until the guest runs and `run` has returned.
fn cancel_when(world: &mut World, ready: impl Fn(&Progress) -> bool + Send) {
    let (progress, log) = (world.progress.clone(), world.source_vm.log.clone());
    let ended = world.migrate_while(move || {
        wait_until("the phase to cancel in", || ready(&progress));
        log.add("cancel");
        progress.parameters().cancel();
    });
    assert!(matches!(ended.source, Err(SourceError::Cancelled)), "{:?}", ended.source);
    assert!(world.source_runs() && !world.destination_runs());
    let log = &world.source_vm.log;
    let resumed = log.at("resume").or(log.at("stop tracking")).unwrap();
    let took = resumed.saturating_duration_since(log.at("cancel").unwrap());
    assert!(took < Duration::from_millis(100), "running again {took:?} after the wish");
}

#[test]
fn a_wish_to_cancel_is_heard_within_a_tenth_of_a_second_while_rounds_are_sent() {
    let mut world = World::new();
    world.progress.parameters().max_bandwidth().set(NonZeroU64::new(2_000));
    cancel_when(&mut world, |progress| progress.status().phase == Phase::Precopy);
}

#[test]
fn a_wish_to_cancel_is_heard_within_a_tenth_of_a_second_while_the_guest_stands_still() {
    let mut world = World::new();
    world.destination_vm.restoring = Duration::from_secs(2);
    world.options.standstill = StandstillLimit { factor: 1.0, floor: Duration::from_secs(30) };
    let log = world.destination_vm.log.clone();
    cancel_when(&mut world, move |_| log.at("restore").is_some());
}

#[test]
fn a_wish_to_cancel_is_heard_while_the_destination_says_nothing_to_the_greeting() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut world = World::new();
    world.options.answer_timeout = Duration::from_secs(30);
    world.options.peer_timeout = Duration::from_secs(30);
    let progress = world.progress.clone();
    let cancelling = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        progress.parameters().cancel();
        Instant::now()
    });
    let error = world.send_to(address).unwrap_err();
    let took = cancelling.join().unwrap().elapsed();
    assert!(matches!(error, SourceError::Cancelled), "{error}");
    assert!(took < Duration::from_millis(100), "{took:?}");
    assert!(world.source_runs());
}

#[test]
fn a_wish_that_comes_before_the_start_leaves_the_vm_running() {
    let mut world = World::new();
    world.progress.parameters().cancel();
    assert!(matches!(world.migrate().source, Err(SourceError::Cancelled)));
    assert!(world.source_runs() && !world.destination_runs());
}

#[test]
fn a_silent_peer_is_told_from_a_broken_connection() {
    let mut world = World::new();
    world.options.peer_timeout = Duration::from_millis(300);
    world.options.answer_timeout = Duration::from_secs(20);
    world.proxied.fault = Some(("Accept", Fault::Stall));
    let error = world.migrate().source.unwrap_err();
    assert!(matches!(error, SourceError::Control(ControlError::Silent { .. })), "{error}");
}
