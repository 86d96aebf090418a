//! `ringferry bench converge --simulate --demands`: a line for each migration that the controller is held to.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use ringferry::converge::simulate::Simulated;
use ringferry::converge::simulate::demands::scenarios;
use serde::Serialize;

use crate::output::Output;

#[derive(Serialize)]
struct Line {
    kind: &'static str,
    simulated: bool,
    scenario: &'static str,
    ended: bool,
    total_ms: f64,
    downtime_ms: f64,
    lost_guest_ms_worst: f64,
    throttled_ms_worst: f64,
    longest_stall_ms: f64,
    rounds: usize,
    called_off: u32,
    unmet: Vec<String>,
}

/// Runs all of them. Unsuccessful if one does not show what is demanded of it.
pub fn run(output: Output) -> Result<ExitCode> {
    if !output.json() {
        output.line("SIMULATED guests and links, the real controller\n")?;
        output.line(
            "scenario                    total     pause  lost, worst  throttled   stall  rounds  called off  not shown",
        )?;
    }
    let mut all_met = true;
    for scenario in scenarios() {
        let done = scenario.run();
        let line = line(scenario.name, &done, scenario.demand.unmet(&done));
        all_met &= line.unmet.is_empty();
        if output.json() {
            output.object(&line)?;
        } else {
            output.line(line.text())?;
        }
    }
    Ok(if all_met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(scenario: &'static str, done: &Simulated, unmet: Vec<String>) -> Line {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    Line {
        kind: "bench_converge_demand",
        simulated: true,
        scenario,
        ended: done.ended.is_some(),
        total_ms: ms(done.total),
        downtime_ms: ms(done.downtime),
        lost_guest_ms_worst: ms(done.lost()),
        throttled_ms_worst: ms(done.throttled()),
        longest_stall_ms: ms(done.longest_stall()),
        rounds: done.rounds.len(),
        called_off: done.called_off,
        unmet,
    }
}

impl Line {
    fn text(&self) -> String {
        let total = if self.ended { format!("{:.2} s", self.total_ms / 1e3) } else { "no end".to_owned() };
        format!(
            "{:25} {total:>8}  {:>5.0} ms  {:>9.2} s  {:>7.2} s  {:>3.0} ms  {:>6}  {:>10}  {}",
            self.scenario,
            self.downtime_ms,
            self.lost_guest_ms_worst / 1e3,
            self.throttled_ms_worst / 1e3,
            self.longest_stall_ms,
            self.rounds,
            self.called_off,
            self.unmet.join("; "),
        )
    }
}
