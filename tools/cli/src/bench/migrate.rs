//! `ringferry bench migrate`: a scenario, run on a real guest and over a shaped link, under one policy after another.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ringferry::progress::{Event, Update};
use ringferry::wire::relay::next_message;
use ringferry_testvm::links::{JUMBO_MTU, Links};
use ringferry_testvm::relay::Relay;
use serde::Serialize;

use super::bursts::Bursts;
use crate::display::Display;
use crate::guest::{BackendArg, GatesArg, GuestArgs};
use crate::interrupt;
use crate::migrate::MigrateArgs;
use crate::output::Output;
use crate::receiving_process::Listen;
use crate::report::MigrationReport;
use crate::scenario::{AtStop, Link, Scenario};
use crate::sizes::Time;
use crate::terms::{ComparedArgs, PolicyName, TermsArgs};
use crate::two_processes::Crossing;

/// A policy that never ends is given up after this long, unless the user says otherwise.
const GIVE_UP: &str = "120s";

const EXAMPLES: &str = "\
Examples:
  ringferry bench migrate --scenario rhel73-60m
  ringferry bench migrate --scenario rhel73-60m --policy fair-share,auto-converge,dirty-limit,none --repeat 5
  ringferry bench migrate --scenario heavy-512m-80 --deadline 21s
  ringferry bench migrate --scenario cliff
  ringferry bench migrate --scenario mine.toml --json

The link is made of two network namespaces and tbf, and goes when the measurement ends: needs root and iproute2. A link that
is delayed or becomes slower is a relay in this process, which needs neither.";

/// Run a scenario on a real guest: how long, at which price for the guest
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Name of a built-in scenario, or a file
    #[arg(long, value_name = "NAME|FILE")]
    scenario: String,

    #[command(flatten)]
    compared: ComparedArgs,

    /// Migrations under each policy, in turn
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// Data connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    channels: u32,

    /// Where dirty pages come from
    #[arg(long, value_enum, default_value_t = BackendArg::Ring)]
    backend: BackendArg,

    /// Entries of each vCPU's dirty ring
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    ring_entries: u32,

    /// Keep each vCPU on a CPU of its own, as far as there are enough: figures of single vCPUs scatter less
    #[arg(long)]
    pin_vcpus: bool,

    /// How the gate of a vCPU closes that is held back
    #[arg(long, value_enum, value_name = "KIND", default_value_t = GatesArg::default())]
    gates: GatesArg,

    /// Time after which a migration is given up
    #[arg(long, value_name = "TIME", default_value = GIVE_UP)]
    timeout: Time,

    /// How long the guest may stand still in any case, on a host that is slow to compare RAM [default: 1s]
    #[arg(long, value_name = "TIME")]
    standstill_floor: Option<Time>,

    /// Compare the RAM of both sides before the handing over, and look for writes that tracking missed after it
    /// [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    verify: Option<bool>,
}

/// A `migration_report` and what a scenario adds to it.
#[derive(Clone, Debug, Serialize)]
struct ScenarioReport {
    #[serde(flatten)]
    report: MigrationReport,
    scenario: String,
    policy: String,
    floor_ms: f64,
    predicted_total_ms_after_round_1: Option<f64>,
    policy_events: Vec<Event>,
}

/// A migration that did not end.
#[derive(Clone, Debug, Serialize)]
struct FailedReport {
    kind: &'static str,
    result: &'static str,
    scenario: String,
    policy: String,
    error: String,
    policy_events: Vec<Event>,
}

/// Runs the command.
pub fn run(args: &Args, output: Output) -> Result<ExitCode> {
    interrupt::flag()?;
    let scenario = Scenario::load(&args.scenario)?;
    if !output.json() {
        output.line(format_args!("{}: {}", args.scenario, scenario.description.trim()))?;
        output.line(format_args!("the least that it can take: {:.1} s", scenario.floor_ms() / 1e3))?;
    }
    let links = if scenario.link.is_relayed() { None } else { Some(wire(&scenario)?) };
    let policies = args.compared.of(&scenario.terms());
    let mut all_ended = true;
    for run in 0..args.repeat {
        for (policy, terms) in &policies {
            interrupt::check()?;
            if !output.json() {
                output.line(format_args!("\nrun {} of {}, policy {policy}", run + 1, args.repeat))?;
            }
            all_ended &= one(args, &scenario, *policy, terms, links.as_ref(), output)?;
        }
    }
    Ok(if all_ended { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A link of its own for the scenario, which this thread enters.
fn wire(scenario: &Scenario) -> Result<Links> {
    let links = Links::new("bench")
        .and_then(|links| links.add(1, Some(scenario.link.rate.bytes_per_s), JUMBO_MTU).map(|()| links))
        .context("cannot make a link of its own for the measurement (as root, with iproute2?)")?;
    links.enter_near()?;
    Ok(links)
}

/// What changes while a scenario runs: a relay's rate, a vCPU's work.
struct Changing {
    relay: Option<Arc<Relay>>,
    at_stop: Mutex<Option<AtStop>>,
    usual_bytes_per_s: u64,
    bursts: Option<Bursts>,
}

impl Changing {
    fn begin(scenario: &Scenario, crossing: &mut Crossing) -> Result<Self> {
        let Link { rate, round_trip, at_stop, drop } = scenario.link;
        let mut relay = None;
        if scenario.link.is_relayed() {
            let one_way = round_trip.map_or(Duration::ZERO, |round_trip| round_trip.0 / 2);
            let through = Relay::new(crossing.address().parse()?, rate.bytes_per_s, one_way, next_message)?;
            crossing.go_through(through.address());
            relay = Some(Arc::new(through));
        }
        if let (Some(drop), Some(relay)) = (drop, &relay) {
            change_later(relay, drop.after.0, drop.rate.bytes_per_s)?;
        }
        let bursts =
            scenario.guest.bursts.map(|bursts| Bursts::start(crossing.host(), bursts)).transpose()?;
        Ok(Self { relay, at_stop: Mutex::new(at_stop), usual_bytes_per_s: rate.bytes_per_s, bursts })
    }

    fn follow(&self, event: &Event) {
        if let (Some(relay), Event::Switchover { .. }) = (&self.relay, event)
            && let Some(at_stop) = self.at_stop.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            relay.set_rate(at_stop.rate.bytes_per_s);
            if let Some(lasts) = at_stop.lasts
                && let Err(error) = change_later(relay, lasts.0, self.usual_bytes_per_s)
            {
                tracing::error!(%error, "the link stays as slow as it is");
            }
        }
        if let Some(bursts) = &self.bursts {
            match event {
                Event::Switchover { .. } => bursts.standstill(true),
                Event::SwitchoverCalledOff { .. } | Event::RoundStarted { .. } => bursts.standstill(false),
                _ => {}
            }
        }
    }
}

/// Gives the link another rate after a while, if it is still there.
fn change_later(relay: &Arc<Relay>, after: Duration, bytes_per_s: u64) -> std::io::Result<()> {
    let relay = Arc::downgrade(relay);
    let changing = thread::Builder::new().name("link".to_owned()).spawn(move || {
        thread::sleep(after);
        if let Some(relay) = relay.upgrade() {
            relay.set_rate(bytes_per_s);
        }
    });
    changing.map(drop)
}

/// One migration; false if it did not end.
fn one(
    args: &Args,
    scenario: &Scenario,
    policy: PolicyName,
    terms: &TermsArgs,
    links: Option<&Links>,
    output: Output,
) -> Result<bool> {
    let guest = scenario.guest_args(args.backend, args.ring_entries, args.pin_vcpus)?;
    let guest = GuestArgs { gates: args.gates, ..guest };
    let listen = links.map_or_else(Listen::default, |links| Listen {
        address: (Links::far_address(1), 7000).into(),
        namespace: Some(links.far().to_owned()),
    });
    let mut crossing = Crossing::prepare(&guest, &listen)?;
    let changing = Changing::begin(scenario, &mut crossing)?;
    let migrate = MigrateArgs {
        channels: args.channels,
        verify: args.verify.or(Some(true)),
        standstill_floor: args.standstill_floor,
        terms: TermsArgs { timeout: Some(args.timeout), ..terms.clone() },
        ..MigrateArgs::default()
    };
    let events = Mutex::new(Vec::new());
    let mut display = Display::new(output);
    let migrated = crossing.migrate(&migrate, interrupt::flag()?, |update| {
        if let Update::Event { event, .. } = update {
            changing.follow(event);
        }
        if let Update::Event { event, .. } = update
            && is_of_policy(event)
        {
            events.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event.clone());
        }
        display.show(update);
    });
    drop(display);
    let policy_events = events.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (scenario_name, policy) = (args.scenario.clone(), policy.to_string());
    match migrated {
        Ok(report) => {
            let report = ScenarioReport {
                scenario: scenario_name,
                policy,
                floor_ms: scenario.floor_ms(),
                predicted_total_ms_after_round_1: report
                    .source
                    .prediction_after_round_1
                    .and_then(|p| p.total_ms),
                policy_events,
                report,
            };
            if output.json() {
                output.object(&report)?;
            } else {
                output.write(report.text().as_bytes())?;
            }
            report.report.verdict()?;
            Ok(true)
        }
        Err(error) => {
            let error = format!("{error:#}");
            if output.json() {
                let (kind, result) = ("migration_report", "failed");
                output.object(&FailedReport {
                    kind,
                    result,
                    scenario: scenario_name,
                    policy,
                    error,
                    policy_events,
                })?;
            } else {
                output.line(format_args!("did not end: {error}"))?;
            }
            Ok(false)
        }
    }
}

fn is_of_policy(event: &Event) -> bool {
    !matches!(
        event,
        Event::Started { .. } | Event::RoundStarted { .. } | Event::RoundEnded(_) | Event::Ended { .. }
    )
}

impl ScenarioReport {
    fn text(&self) -> String {
        let predicted = self.predicted_total_ms_after_round_1.map_or_else(
            || "nothing was predicted after the first round".to_owned(),
            |ms| format!("predicted after the first round: {:.1} s", ms / 1e3),
        );
        format!(
            "{}{:.2} times the least possible; {predicted}\n",
            self.report.text(),
            self.report.source.total_ms / self.floor_ms
        )
    }
}
