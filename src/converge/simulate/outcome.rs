//! What came of a simulated migration.

use std::time::Duration;

use crate::converge::{Change, Event, Pages, Prediction, Why, stop};

/// One simulated round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoundOutcome {
    /// Pages that it began with.
    pub pages_to_send: Pages,
    /// Pages that it sent.
    pub pages_sent: Pages,
    /// Pages dirtied meanwhile.
    pub dirtied: Pages,
    /// How long it took.
    pub took: Duration,
    /// vCPUs that were held back in it.
    pub throttled_vcpus: usize,
}

/// What a simulated vCPU went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuOutcome {
    /// Time behind its closed gate.
    pub throttled: Duration,
    /// The longest stretch of it, pauses excluded.
    pub longest_stall: Duration,
    /// Throttling, pauses and faults.
    pub lost: Duration,
}

/// What became of the downtime limit.
#[derive(Clone, PartialEq, Debug)]
pub enum LimitKept {
    /// The guest stood still no longer than that.
    Yes,
    /// It did, and this event had said that it would.
    NoAndSaid(Change),
    /// It did, and nothing had said so.
    NoAndSilent,
    /// The guest was never switched over.
    NeverTried,
}

/// How a simulated migration ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Simulated {
    /// Why the guest was switched over; `None` if it never was.
    pub ended: Option<Why>,
    /// The limit that made the controller give up.
    pub gave_up: Option<stop::Reached>,
    /// From the start to the guest running at the destination, or to giving up.
    pub total: Duration,
    /// How long the guest stood still in the end.
    pub downtime: Duration,
    /// What became of the limit on that.
    pub limit: LimitKept,
    /// Switchovers that were called off while the guest stood still.
    pub called_off: u32,
    /// How long the guest stood still for them.
    pub called_off_pauses: Duration,
    /// All bytes sent.
    pub bytes: u64,
    /// The rounds, the final phase not counted.
    pub rounds: Vec<RoundOutcome>,
    /// By vCPU.
    pub vcpus: Vec<VcpuOutcome>,
    /// What was expected when the first round had ended.
    pub predicted_after_round_1: Option<Prediction>,
    /// The round at whose end it was first known that it would not end without throttling.
    pub hopeless_since_round: Option<u32>,
    /// The round since which it is said, without a break until the end, that it will not end, throttled or not.
    pub said_not_to_end_since: Option<u32>,
    /// The events of the controller.
    pub events: Vec<Event>,
    /// Pages that were unsent or dirty, every [`Simulated::LEFT_EVERY`], until the guest stood still.
    pub left: Vec<(Duration, Pages)>,
}

impl Simulated {
    /// Time between two entries of `left`.
    pub const LEFT_EVERY: Duration = Duration::from_millis(10);

    /// Guest time lost by the worst-off vCPU.
    pub fn lost(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| vcpu.lost).max().unwrap_or_default()
    }

    /// Time that the worst-off vCPU was held back.
    pub fn throttled(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| vcpu.throttled).max().unwrap_or_default()
    }

    /// The longest stall of any vCPU, pauses excluded.
    pub fn longest_stall(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| vcpu.longest_stall).max().unwrap_or_default()
    }
}

/// Whether a pause of `downtime` kept the limit of `limit`, and if not, what had been said.
pub(super) fn limit_kept(downtime: Duration, limit: Duration, events: &[Event]) -> LimitKept {
    let raised = events.iter().rev().find_map(|event| match event.change {
        Change::DowntimeLimit(raised) => Some(raised),
        _ => None,
    });
    if downtime <= limit.max(raised.unwrap_or_default()) {
        return LimitKept::Yes;
    }
    let says = |event: &&Event| {
        matches!(event.change, Change::DowntimeOutOfReach { .. } | Change::SwitchOver(Why::Limit(_)))
    };
    match events.iter().rev().find(says) {
        Some(event) => LimitKept::NoAndSaid(event.change.clone()),
        None => LimitKept::NoAndSilent,
    }
}
