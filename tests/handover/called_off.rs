//! A link that becomes slower while the guest stands still: the guest runs on, the rounds go on, and nothing is lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ringferry::converge::Limits;
use ringferry::layout::{PageIndex, PageRun};
use ringferry::progress::{Event, GaveWay, Parameters, Progress, Terms, Update};
use ringferry::source::StandstillLimit;
use ringferry::transport::MaxBandwidth;

use crate::world::{PAGES, World, wait_until};

const USUAL: u64 = 4_000_000;
const LIMIT: Duration = Duration::from_millis(300);

fn over_a_link() -> World {
    let mut world = World::new();
    let terms = Terms { limits: Limits { downtime: LIMIT, ..Limits::default() }, ..Terms::default() };
    world.progress = Progress::new(Parameters::new(terms, MaxBandwidth::default()));
    // All of RAM is dirty again whenever somebody asks: 65 ms of the link.
    world.tracker.dirty_pages = Some(PageRun { first: PageIndex(0), pages: PAGES });
    world.relayed = Some((USUAL, Duration::ZERO));
    world
}

fn events_of(world: &World) -> JoinHandle<Vec<Event>> {
    let mut watcher = world.progress.watch();
    thread::spawn(move || {
        let mut events = Vec::new();
        while let Some(update) = watcher.next(Duration::from_secs(20)) {
            if let Update::Event { event, .. } = update {
                events.push(event);
            }
        }
        events
    })
}

#[test]
fn a_link_that_drops_to_a_twentieth_right_after_the_stop_does_not_hold_the_guest_and_the_migration_goes_on() {
    let mut world = over_a_link();
    world.source_vm.writes = Some(PageIndex(60));
    world.tracker.dirtied_by_saving = Some(PageIndex(60));
    let (log, relay, running) =
        (world.source_vm.log.clone(), Arc::clone(&world.relay), Arc::clone(&world.source_vm.running));
    let ended = world.migrate_while(move || {
        wait_until("the state to be saved", || log.at("save").is_some());
        relay.lock().as_ref().unwrap().set_rate(USUAL / 20);
        wait_until("the guest to run on", || log.at("resume").is_some());
        assert!(running.load(Ordering::SeqCst));
        relay.lock().as_ref().unwrap().set_rate(USUAL);
    });
    let report = ended.source.unwrap();
    let log = &world.source_vm.log;
    let stood = log.at("resume").unwrap() - log.at("pause").unwrap();
    assert!(stood < LIMIT, "the guest stood still for {stood:?}");
    assert!(report.switchovers_called_off >= 1);
    assert!(report.downtime_limit_gave_way.is_none() && report.downtime_limit_kept, "{report:?}");
    assert!(log.all().iter().filter(|what| **what == "save").count() >= 2, "the machine's state is void");
    assert_eq!(world.destination_vm.log.all().iter().filter(|what| **what == "restore").count(), 1);
    assert!(!world.source_runs() && world.destination_runs());
    assert!(world.source_ram.is_equal(&world.destination_ram));
    assert_eq!(report.ram_digest_match, Some(true));
}

#[test]
fn after_three_times_the_limit_gives_way_and_that_and_why_is_told() {
    let mut world = over_a_link();
    world.options.standstill = StandstillLimit { factor: 1.0, floor: Duration::from_secs(20) };
    let (log, relay) = (world.source_vm.log.clone(), Arc::clone(&world.relay));
    let watching = events_of(&world);
    // It recovers whenever the guest runs.
    let ended = world.migrate_while(move || {
        for stop in 1..=4 {
            let times = |what| log.all().iter().filter(|logged| **logged == what).count();
            wait_until("a stop", || times("pause") >= stop || times("release") > 0);
            relay.lock().as_ref().unwrap().set_rate(USUAL / 20);
            if stop <= 3 {
                wait_until("the guest to run on", || times("resume") >= stop);
                relay.lock().as_ref().unwrap().set_rate(USUAL);
            }
        }
    });
    let report = ended.source.unwrap();
    assert_eq!(report.switchovers_called_off, 3);
    assert!(!report.downtime_limit_kept, "{} ms", report.downtime_ms);
    assert!(world.source_ram.is_equal(&world.destination_ram) && world.destination_runs());
    assert_eq!(report.downtime_limit_gave_way, Some(GaveWay::CalledOffTooOften));
    let told = |event: &Event| matches!(event, Event::DowntimeLimitGaveWay { .. });
    assert_eq!(watching.join().unwrap().iter().filter(|event| told(event)).count(), 1);
}

#[test]
fn a_source_that_fails_after_it_called_off_a_switchover_still_has_its_vm() {
    let mut world = over_a_link();
    let (log, relay, progress) =
        (world.source_vm.log.clone(), Arc::clone(&world.relay), world.progress.clone());
    let ended = world.migrate_while(move || {
        wait_until("the stop", || log.at("pause").is_some());
        relay.lock().as_ref().unwrap().set_rate(USUAL / 20);
        wait_until("the guest to run on", || log.at("resume").is_some());
        progress.parameters().cancel();
    });
    assert!(ended.source.is_err() && ended.destination.is_err());
    assert!(world.source_runs() && !world.destination_runs());
    assert!(world.tracker.given_back > 0);
}

#[test]
fn a_limit_that_round_trips_of_100_ms_leave_room_for_is_kept_and_one_that_they_do_not_is_told() {
    for (limit, is_kept) in [(1_000, true), (300, false)] {
        let mut world = over_a_link();
        let limits = Limits { downtime: Duration::from_millis(limit), ..Limits::default() };
        let terms = Terms { limits, ..Terms::default() };
        world.progress = Progress::new(Parameters::new(terms, MaxBandwidth::default()));
        world.relayed = Some((USUAL, Duration::from_millis(50)));
        let watching = events_of(&world);
        let report = world.migrate().source.unwrap();
        let told = |event: &Event| matches!(event, Event::DowntimeLimitOutOfReach { fixed_ms, .. } if *fixed_ms > 300.0);
        assert_eq!(watching.join().unwrap().iter().any(told), !is_kept, "{limit} ms");
        assert_eq!(report.downtime_limit_kept, is_kept, "{limit} ms: {}", report.downtime_ms);
        assert!(!is_kept || report.switchovers_called_off == 0);
        assert!(report.downtime_ms > 200.0, "{} ms over round trips of 100 ms", report.downtime_ms);
    }
}
