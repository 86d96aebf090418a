//! What a migration looks like while it runs: bars on a terminal, a line per event elsewhere, JSON lines for
//! programs.

use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};
use ringferry::progress::{Event, GaveWay, Prediction, Progress, RoundReport, Update};
use serde::Serialize;

use crate::bars::{Bars, Drawn};
use crate::output::Output;
use crate::printable::printable;

/// How often a live display is redrawn.
const REDRAW_EVERY: Duration = Duration::from_millis(100);

/// Feeds every update of `progress` to `show`, and the status in between, until the migration has ended.
pub fn follow(progress: &Progress, mut show: impl FnMut(&Update)) {
    let mut watcher = progress.watch();
    loop {
        let update = watcher.next(REDRAW_EVERY);
        let sequence = match &update {
            Some(Update::Status { sequence, .. } | Update::Event { sequence, .. }) => *sequence,
            None => 0,
        };
        match update {
            Some(update) => show(&update),
            None if progress.wait_for_end(Duration::ZERO) => return,
            None => show(&Update::Status { sequence, status: progress.status() }),
        }
    }
}

/// Shows updates in the form that fits where they go.
pub struct Display {
    output: Output,
    bars: Option<Bars>,
    /// The last prediction, and whether its verdict has been told in words.
    expected: Option<(Prediction, bool)>,
}

#[derive(Serialize)]
struct EventObject<'a> {
    kind: &'static str,
    sequence: u64,
    #[serde(flatten)]
    event: &'a Event,
}

impl Display {
    /// A display that is live on a terminal.
    pub fn new(output: Output) -> Self {
        let bars = output.live().then(Bars::start);
        Self { output: output.progress(), bars, expected: None }
    }

    /// Shows one update.
    pub fn show(&mut self, update: &Update) {
        match update {
            Update::Status { status, .. } => {
                if let Some(bars) = &self.bars {
                    bars.show(Drawn::Status(status.clone()));
                }
            }
            Update::Event { sequence, event } => self.event(*sequence, event),
        }
    }

    fn event(&mut self, sequence: u64, event: &Event) {
        let shown = if self.output.json() {
            self.output.object(&EventObject { kind: "migration_event", sequence, event })
        } else {
            let Some(text) = self.sentence(event) else { return };
            match &self.bars {
                Some(bars) => {
                    bars.show(Drawn::Line(text));
                    Ok(())
                }
                None => self.output.line(text),
            }
        };
        if let Err(error) = shown {
            tracing::warn!(%error, "progress could not be shown");
        }
    }
}

impl Display {
    /// An event in words. Predictions move all the time: they are told once a round, or when their verdict changes.
    fn sentence(&mut self, event: &Event) -> Option<String> {
        match (event, self.expected) {
            (Event::PredictionChanged(now), before) => {
                let turned = before.is_none_or(|(before, _)| before.converges != now.converges);
                self.expected = Some((*now, turned));
                turned.then(|| expectation(now))
            }
            (Event::RoundEnded(round), Some((expected, false))) => {
                self.expected = Some((expected, true));
                Some(format!("{}; {}", round_line(round), expectation(&expected)))
            }
            _ => sentence(event),
        }
    }
}

fn sentence(event: &Event) -> Option<String> {
    Some(match event {
        Event::Started { ram_pages, populated_pages } => format!(
            "tracking is on; {} of {} pages are populated",
            HumanCount(*populated_pages),
            HumanCount(*ram_pages)
        ),
        Event::RoundStarted { .. } => return None,
        Event::RoundEnded(round) => round_line(round),
        Event::PredictionChanged(_) => return None,
        Event::ThrottleChanged { vcpus: 0, .. } => "no vCPU is slowed down any more".to_owned(),
        Event::ThrottleChanged { vcpus, level_pages, time_share } => {
            let how = match (level_pages, time_share) {
                (Some(pages), _) => format!("to {} new pages in this round", HumanCount(*pages)),
                (None, Some(share)) => format!("by {:.0} % of its time", share * 100.0),
                (None, None) => "to a fixed rate".to_owned(),
            };
            format!("slowing {vcpus} vCPU{} down, each {how}", if *vcpus == 1 { "" } else { "s" })
        }
        Event::TermsChanged { policy, downtime_limit_ms, downtime_target_ms } => {
            let target = downtime_target_ms.map_or_else(String::new, |ms| format!(", target {ms:.0} ms"));
            format!("policy {}, downtime limit {downtime_limit_ms:.0} ms{target}", printable(policy))
        }
        Event::StallsChanged { longest_stall_ms } => {
            format!(
                "vCPUs that are held back now stand for {longest_stall_ms:.0} ms at a stretch, or a little longer"
            )
        }
        Event::MinShareLowered { min_share } => {
            format!(
                "heavier writers than the link carries: they keep {:.1} % of their pages",
                min_share * 100.0
            )
        }
        Event::CannotHoldGuest => "the guest dirties faster than the link drains, however it is held back: it is let run, and this will not end by itself".to_owned(),
        Event::DeadlineOutOfReach => "the deadline cannot be kept; going as fast as can be".to_owned(),
        Event::DowntimeLimitOutOfReach { downtime_limit_ms, fixed_ms } => format!(
            "the downtime limit of {downtime_limit_ms:.0} ms cannot be kept: the handing over takes {fixed_ms:.0} ms \
             without a page to send"
        ),
        Event::SwitchoverCalledOff { pages_left, pages_fit } => format!(
            "the guest runs on: {} pages were left, {} fit the downtime limit",
            HumanCount(*pages_left),
            HumanCount(*pages_fit)
        ),
        Event::DowntimeLimitGaveWay { why, downtime_limit_ms, expected_downtime_ms } => format!(
            "the guest is going to stand still for {expected_downtime_ms:.0} ms, beyond the limit of \
             {downtime_limit_ms:.0} ms, because {}",
            gave_way(*why)
        ),
        Event::Switchover { pages_left } => {
            format!("the guest stands still, {} pages are left", HumanCount(*pages_left))
        }
        Event::Ended { completed: true, .. } => "the destination runs the VM".to_owned(),
        Event::Ended { completed: false, .. } => return None,
        other => format!("{other:?}"),
    })
}

/// Why a downtime limit gave way, in words.
pub fn gave_way(why: GaveWay) -> &'static str {
    match why {
        GaveWay::OutOfReach => "the switchover takes longer even without a page to send",
        GaveWay::CalledOffTooOften => "it was called off as often as it may be",
        GaveWay::AnotherLimit => "a limit of rounds, bytes or time ordered the switchover",
        GaveWay::DeviceStateLeft => "devices had handed over state that cannot be taken back",
        GaveWay::OldDestination => "the destination is of a release that cannot forget a switchover",
    }
}

fn round_line(round: &RoundReport) -> String {
    format!(
        "round {}: {} pages, {} zero, {} in {:.1} ms; {} dirtied meanwhile",
        round.round,
        HumanCount(round.totals.pages_sent),
        HumanCount(round.totals.zero_pages),
        BinaryBytes(round.totals.bytes_sent),
        round.duration_ms,
        HumanCount(round.pages_dirtied),
    )
}

/// What is to be expected, in words.
pub fn expectation(prediction: &Prediction) -> String {
    match prediction.total_ms {
        Some(total_ms) if prediction.converges => {
            format!("ends after {:.1} s, with {:.0} ms of downtime", total_ms / 1e3, prediction.downtime_ms)
        }
        _ => "will not converge: the guest dirties pages faster than the wire takes them".to_owned(),
    }
}

/// A rate in bytes, for display.
pub fn binary_bytes(bytes: f64) -> BinaryBytes {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate for display; `as` saturates"
    )]
    BinaryBytes(bytes as u64)
}
