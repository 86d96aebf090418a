//! `ringferry bench converge --simulate`: the controller against guests and links that are only numbers, for what
//! this machine cannot hold. What it prints is simulated, and says so; `bench migrate` measures.

mod demands;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use ringferry::PAGE_SIZE;
use ringferry::converge::simulate::{Guest, Link, Machine, Order, Phase, Simulated, Writer, simulate};
use ringferry::converge::{Pages, Settings, Why};
use ringferry_testvm::workload::command_line::{Pattern, Work};
use serde::Serialize;

use crate::output::Output;
use crate::scenario::Scenario;
use crate::sizes::Time;
use crate::terms::{ComparedArgs, TermsArgs};

const EXAMPLES: &str = "\
Examples:
  ringferry bench converge --simulate
  ringferry bench converge --simulate --scenario rhel73-60m --policy fair-share,auto-converge,dirty-limit,none
  ringferry bench converge --simulate --scenario heavy-512m-80 --deadline 13s
  ringferry bench converge --simulate --scenario huge --json
  ringferry bench converge --simulate --demands

Scenarios are those of `bench migrate`, files among them, and three that exist in simulation only: huge (1,024 vCPUs,
4 TiB, 200 Gbit/s), shifting (working sets that move), stalling (a link that varies and stops).
A simulated zipf pattern is a uniformly random one.";

const SCENARIOS: &str = "rhel73-30m,rhel73-50m,rhel73-60m,rhel73-100m,heavy-512m-50,heavy-512m-80,heavy-512m-150,\
                         one-heavy-of-eight,shifting,stalling";

/// Simulate how migrations end: any guest, any link, no machine needed
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Simulate; the only way there is: what is real is measured by `bench migrate`
    #[arg(long, required = true)]
    simulate: bool,

    /// Scenarios, by name or file
    #[arg(long, value_name = "NAME|FILE", value_delimiter = ',', default_value = SCENARIOS)]
    scenario: Vec<String>,

    /// Instead: every migration that the controller is held to, and what of that it does not show
    #[arg(long, conflicts_with = "scenario")]
    demands: bool,

    #[command(flatten)]
    compared: ComparedArgs,

    /// Simulated time after which a migration is given up
    #[arg(long, value_name = "TIME", default_value = "600s")]
    timeout: Time,

    /// Time from a kick to its vCPU having stopped
    #[arg(long, value_name = "TIME", default_value = "250us")]
    kick: Time,
}

/// What is simulated.
struct Case {
    guest: Guest,
    link: Link,
    terms: TermsArgs,
    floor_ms: f64,
    /// Longer steps for guests that would take minutes to simulate.
    look: Duration,
}

#[derive(Serialize)]
struct RoundLine {
    pages_to_send: u64,
    pages_sent: u64,
    pages_dirtied: u64,
    duration_ms: f64,
    throttled_vcpus: usize,
}

#[derive(Serialize)]
struct Line<'a> {
    kind: &'static str,
    simulated: bool,
    scenario: &'a str,
    policy: String,
    result: &'static str,
    vcpus: usize,
    memory_bytes: u64,
    total_ms: f64,
    floor_ms: f64,
    downtime_ms: f64,
    bytes_sent: u64,
    predicted_total_ms_after_round_1: Option<f64>,
    hopeless_unthrottled_since_round: Option<u32>,
    lost_guest_ms_worst: f64,
    throttled_ms_worst: f64,
    longest_stall_ms: f64,
    throttled_vcpus: usize,
    rounds: Vec<RoundLine>,
}

/// Runs the command.
pub fn run(args: &Args, output: Output) -> Result<ExitCode> {
    if !args.simulate {
        bail!("nothing is measured here: simulate with --simulate, or measure with `bench migrate`");
    }
    if args.demands {
        return demands::run(output);
    }
    if !output.json() {
        output.line("SIMULATED guests and links, the real controller\n")?;
        output.line(
            "scenario            policy          total   floor  predicted  downtime  lost, worst  \
             stall  throttled vCPUs  rounds",
        )?;
    }
    for name in &args.scenario {
        let case = case(name)?;
        for (policy, terms) in args.compared.of(&case.terms) {
            let terms = terms.parameters()?.terms();
            let settings =
                Settings { policy: terms.policy, limits: terms.limits, ..Settings::new(case.guest.ram) };
            let machine = Machine { sample_interval: case.look, kick: args.kick.0, ..Machine::default() };
            let done = simulate(&case.guest, &case.link, &machine, settings, args.timeout.0);
            let line = line(name, policy.to_string(), &case, &done);
            if output.json() {
                output.object(&line)?;
            } else {
                output.line(line.text())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn case(name: &str) -> Result<Case> {
    let phase = |from, pages: u64, mb_per_s: f64, order| Phase {
        from: Duration::from_secs(from),
        pages: Pages(pages),
        writes_per_s: mb_per_s * 1e6 / PAGE_SIZE as f64,
        order,
        ..Phase::default()
    };
    let mib = |mib: u64| mib << 8;
    let usual = |writers, link| Case {
        guest: Guest { ram: Pages(mib(2048)), populated: Pages(mib(600)), writers, ..Guest::default() },
        link,
        terms: half_a_second(),
        floor_ms: mib(600) as f64 * PAGE_SIZE as f64 / 100e6 * 1e3,
        look: Machine::default().sample_interval,
    };
    Ok(match name {
        "huge" => {
            let heavy = || Writer::steady(1 << 30, f64::INFINITY);
            let light = || Writer::steady(64 << 20, 5e6);
            let ram = Pages((4 << 40) / PAGE_SIZE as u64);
            let writers = (0..1024).map(|index| if index % 8 == 0 { heavy() } else { light() }).collect();
            Case {
                guest: Guest { ram, populated: ram, writers, ..Guest::default() },
                link: Link::steady(25e9),
                terms: half_a_second(),
                floor_ms: (4u64 << 40) as f64 / 25e9 * 1e3,
                look: Duration::from_millis(2),
            }
        }
        "shifting" => {
            let phases = vec![
                phase(0, mib(30), f64::INFINITY, Order::Cyclic),
                phase(5, mib(200), 120.0, Order::Random),
                phase(9, mib(400), 90.0, Order::Cyclic),
            ];
            usual(vec![Writer { phases }, Writer::default()], Link::steady(100e6))
        }
        "stalling" => {
            let second = Duration::from_secs;
            let stalls = vec![(second(3), second(5)), (second(8), second(9))];
            let link = Link { ripple: 0.3, stalls, ..Link::steady(100e6) };
            usual(vec![Writer::steady(512 << 20, 80e6), Writer::default()], link)
        }
        _ => of_scenario(&Scenario::load(name)?)?,
    })
}

/// Half a second of downtime, and no other limit.
fn half_a_second() -> TermsArgs {
    let downtime = Time(Duration::from_millis(500));
    TermsArgs { downtime_limit: Some(downtime), max_rounds: Some(u32::MAX), ..TermsArgs::default() }
}

fn of_scenario(scenario: &Scenario) -> Result<Case> {
    let mut populated = scenario.guest.fill.bytes / PAGE_SIZE as u64;
    let mut writers = Vec::new();
    for text in &scenario.guest.vcpus {
        let mut work = Work::default();
        // `Scenario` has read it before.
        work.change(text).map_err(|error| anyhow::anyhow!("{error}"))?;
        let order = match work.pattern {
            Pattern::Sequential => Order::Cyclic,
            Pattern::Random | Pattern::Zipf => Order::Random,
            Pattern::HotCold => Order::HotCold { hot: 0.1, writes: 0.9 },
            Pattern::ReadOnly | Pattern::ComputeOnly | Pattern::Idle => {
                writers.push(Writer::default());
                continue;
            }
        };
        populated += work.working_set_pages;
        let writes_per_s = if work.pace_per_s == 0 { f64::INFINITY } else { work.pace_per_s as f64 };
        let pages = Pages(work.working_set_pages);
        writers.push(Writer {
            phases: vec![Phase { from: Duration::ZERO, pages, writes_per_s, order, ..Phase::default() }],
        });
    }
    let ram = Pages(scenario.guest.memory.bytes / PAGE_SIZE as u64);
    Ok(Case {
        guest: Guest { ram, populated: Pages(populated), writers, ..Guest::default() },
        link: Link::steady(scenario.link.rate.bytes_per_s as f64),
        terms: scenario.terms(),
        floor_ms: scenario.floor_ms(),
        look: Machine::default().sample_interval,
    })
}

fn line<'a>(scenario: &'a str, policy: String, case: &Case, done: &Simulated) -> Line<'a> {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let throttled = done.vcpus.iter().map(|vcpu| vcpu.throttled);
    let rounds = done.rounds.iter().map(|round| RoundLine {
        pages_to_send: round.pages_to_send.0,
        pages_sent: round.pages_sent.0,
        pages_dirtied: round.dirtied.0,
        duration_ms: ms(round.took),
        throttled_vcpus: round.throttled_vcpus,
    });
    Line {
        kind: "bench_converge",
        simulated: true,
        scenario,
        policy,
        result: match done.ended {
            Some(Why::Fits) => "completed",
            Some(Why::Limit(_)) => "completed_by_limit",
            None => "not_ended",
        },
        vcpus: case.guest.writers.len(),
        memory_bytes: case.guest.ram.0 * PAGE_SIZE as u64,
        total_ms: ms(done.total),
        floor_ms: case.floor_ms,
        downtime_ms: ms(done.downtime),
        bytes_sent: done.bytes,
        predicted_total_ms_after_round_1: done.predicted_after_round_1.and_then(|p| p.total).map(ms),
        hopeless_unthrottled_since_round: done.hopeless_since_round,
        lost_guest_ms_worst: ms(done.lost()),
        throttled_ms_worst: ms(throttled.clone().max().unwrap_or_default()),
        longest_stall_ms: ms(done.longest_stall()),
        throttled_vcpus: throttled.filter(|throttled| !throttled.is_zero()).count(),
        rounds: rounds.collect(),
    }
}

impl Line<'_> {
    fn text(&self) -> String {
        let seconds = |ms: f64| format!("{:.1} s", ms / 1e3);
        let total = if self.result == "not_ended" { "no end".to_owned() } else { seconds(self.total_ms) };
        let predicted = self.predicted_total_ms_after_round_1.map_or("no end".to_owned(), seconds);
        format!(
            "{:18}  {:13}  {total:>7} {:>7}    {predicted:>7}  {:>5.0} ms  {:>11}  {:>2.0} ms  {:>7} of {:<4}  {:>6}",
            self.scenario,
            self.policy,
            seconds(self.floor_ms),
            self.downtime_ms,
            seconds(self.lost_guest_ms_worst),
            self.longest_stall_ms,
            self.throttled_vcpus,
            self.vcpus,
            self.rounds.len(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_that_is_named_can_be_simulated() {
        for name in SCENARIOS.split(',').chain(["huge"]) {
            let case = case(name.trim()).unwrap();
            assert!(case.floor_ms > 0.0 && !case.guest.writers.is_empty(), "{name}");
        }
    }
}
