//! A destination that is frozen at any moment of the standstill: the guest runs again at the source within the budget, or
//! the VM is held until somebody has looked, if `Commit` had left.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use crate::faults::random::Random;
use crate::guest::{By, Guest, kvm, receive, whoever_migrates};
use crate::support::{Outcome, Running, ringferry};

/// Destinations that are frozen before `Commit`, if the environment does not say how many.
const RUNS: u32 = 2;
/// The budget of the standstill, and what a busy machine may add to it.
const BUDGET: Duration = Duration::from_secs(1);
const SLACK: Duration = Duration::from_millis(1500);
/// The rest of RAM takes about so long, without the limit that held it back while the guest ran.
const STANDSTILL: Duration = Duration::from_millis(150);

/// The rest goes at once when the time is over: most of RAM.
const TERMS: [&str; 11] = [
    "--json",
    "--max-bandwidth",
    "20MB/s",
    "--switchover-bandwidth",
    "1GB/s",
    "--timeout",
    "1s",
    "--switch-over-at-timeout",
    "--standstill-floor",
    "1s",
    "--verify=false",
];

#[derive(PartialEq, Eq, Debug)]
enum Found {
    /// The guest ran again at the source.
    RanOn,
    /// `Commit` had left, and no answer came.
    Undecided,
    /// It had moved before.
    Moved,
}

whoever_migrates! {
    a_destination_frozen_at_any_moment_of_the_standstill_costs_the_guest_no_more_than_the_budget,
}

fn a_destination_frozen_at_any_moment_of_the_standstill_costs_the_guest_no_more_than_the_budget(by: By) {
    if !kvm() {
        return;
    }
    let from_environment = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    let runs = from_environment("RINGFERRY_FROZEN_RUNS").unwrap_or(RUNS);
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    println!("destinations frozen from seed {seed} on");
    let mut random = Random::new(seed);
    let (mut ran_on, mut others) = (0, Vec::new());
    while ran_on < runs {
        assert!(
            others.len() < 10 + 3 * usize::try_from(runs).unwrap(),
            "too few were frozen in time: {others:?}"
        );
        match freeze(by, random.up_to(STANDSTILL)) {
            Found::RanOn => ran_on += 1,
            other => others.push(other),
        }
    }
    println!("{ran_on} of {ran_on} guests ran on within the budget; frozen too late: {others:?}");
}

/// Freezes the destination `after` the guest was stopped.
fn freeze(by: By, after: Duration) -> Found {
    let vm = ["--memory", "256MiB", "--vcpus", "1"];
    let mut guest = Guest::start_for(by, &vm, &["--fill", "160MiB", "--work", "each=ws:8MiB"]);
    let (destination, to) = receive(&[]);
    let mut send = Running::start(&[&guest.send(&to)[..], &TERMS].concat());
    send.line_with("\"switchover\"");
    thread::sleep(after);
    destination.signal(Signal::STOP);
    let begun = Instant::now();
    let sent = send.end();
    let took = begun.elapsed();
    let found = found(&sent);
    match found {
        Found::RanOn => {
            // One whose switchover was called off ran long before the source gave the destination up.
            assert!(
                was_called_off(&sent) || took < BUDGET + SLACK,
                "the guest stood still for {took:?}: {sent:?}"
            );
            guest.assert_runs();
            destination.signal(Signal::CONT);
            assert_eq!(destination.end().code, Some(1), "it has no VM");
            guest.assert_runs_on();
        }
        Found::Undecided => {
            // It has read Commit or not: it says so when it goes on.
            destination.signal(Signal::CONT);
            let mut destination = destination;
            let runs_there = destination.is_alive() && destination.line_with("\"kind\"").contains("received");
            let decision = if runs_there { "--drop" } else { "--keep" };
            let resolved = ringferry(&["resolve", decision, "--monitor", &guest.monitor]);
            assert_eq!(resolved.code, Some(0), "{resolved:?}");
        }
        Found::Moved => destination.signal(Signal::CONT),
    }
    found
}

/// Whether the guest ran on after it was stopped for the last time.
fn was_called_off(sent: &Outcome) -> bool {
    let objects = sent.objects();
    let events = objects.iter().filter_map(|object| object["event"].as_str());
    events.rev().find(|event| event.starts_with("switchover")) == Some("switchover_called_off")
}

fn found(sent: &Outcome) -> Found {
    let last = sent.objects().pop().unwrap();
    match last["kind"].as_str() {
        Some("migration_report") => Found::Moved,
        Some("unconfirmed") => Found::Undecided,
        Some("error") => Found::RanOn,
        _ => panic!("{sent:?}"),
    }
}
