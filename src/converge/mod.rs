//! Will it finish, who must slow down, when to switch over.
//!
//! Numbers only: no KVM, no sockets, no clock. The caller says what time it is (since the migration's start) and
//! what it has seen; so the same code steers a real guest and, in [`simulate`], a thousand vCPUs and terabytes.
//!
//! A page's life comes here from `track`, which counts it, and goes on in `source`, which sends it. The source
//! drives a [`Controller`]:
//!
//! 1. [`round_started`](Controller::round_started) with the pages to send, right after the harvest that recycled;
//! 2. [`observed`](Controller::observed) every millisecond or so; then each vCPU whose [`gates`](Controller::gates)
//!    entry is closed is closed and kicked. [`Action`] says whether to go on, switch over, or give up;
//! 3. [`round_ended`](Controller::round_ended) when its pages are done; then harvest and 1, or switch over;
//! 4. [`last_check`](Controller::last_check) when the guest stands still and what is left is known exactly.
//!
//! `vcpu`, `curve`, `pace`, `bandwidth` and `link` learn, `model` predicts, `policy` decides who is held back; `sampling` says when
//! to sample the vCPUs and `throttle` turns a decision into gates; `pause`, `switchover`, `guard` and `stop` end it; `events` is the log
//! for those who watch; `tuning` has the constants; `controller` ties them together.

pub mod bandwidth;
mod controller;
pub mod curve;
mod events;
pub(crate) mod guard;
pub mod link;
mod model;
mod pace;
mod pause;
pub mod policy;
mod sampling;
pub mod simulate;
pub mod stop;
pub mod switchover;
pub mod throttle;
mod tuning;
pub mod units;
mod vcpu;

use std::time::Duration;

pub use controller::Controller;
pub use policy::{AutoConverge, DirtyLimit, FairShare, Nobody, POLICY_NAMES, Policy, UnknownPolicy};
pub use stop::{AtTimeout, ConvergenceTimeout, Limits};
pub use switchover::LastCheck;
pub use throttle::{GateState, PagesPerSlice, Quota};
pub use tuning::Tuning;
pub use units::Pages;
pub use vcpu::{Share, VcpuSample};

/// What the controller is told before the start; all of it may be changed while it runs.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Who is slowed down.
    pub policy: Policy,
    /// When it ends.
    pub limits: Limits,
    /// Bytes per second to count on in the final phase, as QEMU's avail-switchover-bandwidth; `None`: what the
    /// rounds measure.
    pub switchover_bandwidth: Option<f64>,
    /// What the final phase takes besides sending pages (pausing, device state, handing over), as measured.
    pub switchover_overhead: Duration,
    /// What the switchover would take besides that if it came now, and need not take if it comes later: work that goes on
    /// while the guest runs. It is waited for.
    pub switchover_backlog: Duration,
    /// From a vCPU's overdraft to its gate being closed on it: the time between two observations, and a kick. Until
    /// it has been measured.
    pub gate_latency: Duration,
    /// The guest's RAM.
    pub ram: Pages,
    /// Whether dirty pages come with the vCPU that dirtied them. If not, vCPUs can be slowed down by time only,
    /// and all alike.
    pub per_vcpu: bool,
    /// Pages per vCPU that may be dirty and not yet visible: 512 on hosts with PML, 0 elsewhere.
    pub unseen_per_vcpu: Pages,
    /// The constants.
    pub tuning: Tuning,
}

impl Settings {
    /// The defaults for a guest with so much RAM: fair share, 300 ms of downtime, 20 ms of overhead and 0.17 ms to
    /// close a gate until they are measured.
    pub fn new(ram: Pages) -> Self {
        Self {
            policy: Policy::default(),
            limits: Limits::default(),
            switchover_bandwidth: None,
            switchover_overhead: Duration::from_millis(20),
            switchover_backlog: Duration::ZERO,
            gate_latency: Duration::from_micros(170),
            ram,
            per_vcpu: true,
            unseen_per_vcpu: Pages(0),
            tuning: Tuning::TABLE,
        }
    }
}

/// What has been seen.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Observation<'a> {
    /// By vCPU index. vCPUs may be added while it runs.
    pub vcpus: &'a [VcpuSample],
    /// Different pages dirtied since the last recycle by others than a known vCPU.
    pub others: Pages,
    /// Pages that are dirty, and none of this round's, because a switchover was called off; nobody dirties them now.
    pub besides: Pages,
    /// Pages of this round that need nothing more: sent, found zero, or struck off because they are dirty again.
    pub pages_done: Pages,
    /// Of these, pages that were struck off unsent because they are dirty again.
    pub pages_struck_off: Pages,
    /// Pages of this round that are dirty and not protected, so that nobody sees them dirtied again.
    pub unprotected: Pages,
    /// What has been seen of the link.
    pub link: LinkSample,
}

/// What has been seen of the link.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct LinkSample {
    /// Bytes that the peer's kernel has acknowledged since the migration's start, over all connections.
    pub bytes_acked: u64,
    /// Bytes per second that the link carries when nothing but itself holds it back, as far as that is known: while
    /// `max-bandwidth` sets the pace, the growth of `bytes_acked` says nothing of it.
    pub unpaced_bytes_per_s: Option<f64>,
    /// The round trip without the queues that we fill ourselves; 0 while unknown.
    pub round_trip: Duration,
}

/// Why the guest is switched over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// What is left fits the downtime limit.
    Fits,
    /// A limit says that it has to end, whether it fits or not.
    Limit(stop::Reached),
}

/// What to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Go on sending; at the end of a round, start the next one.
    Continue,
    /// Stop the guest and send what is left, in the middle of a round, too.
    SwitchOver(Why),
    /// Cancel the migration; the guest stays.
    GiveUp(stop::Reached),
}

/// What is expected of the whole migration.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prediction {
    /// Whether it ends by itself under the policy in force.
    pub converges: bool,
    /// Whether it would end with nobody slowed down.
    pub converges_unthrottled: bool,
    /// From the start to the guest running at the destination, if it ends.
    pub total: Option<Duration>,
    /// How long the guest will stand still.
    pub downtime: Duration,
    /// Guest time lost by the worst-off vCPU from now on: throttling and downtime.
    pub lost: Option<Duration>,
    /// Bytes of the whole migration.
    pub bytes: Option<u64>,
    /// Rounds of the whole migration.
    pub rounds: Option<u32>,
    /// How much the link varied, as a share of its mean: the uncertainty of all of the above.
    pub spread: f64,
}

/// What the controller decided, for those who watch.
#[derive(Clone, PartialEq, Debug)]
pub enum Change {
    /// Another policy was set.
    Policy(Policy),
    /// Other limits were set.
    Limits(Limits),
    /// The downtime limit gave way.
    DowntimeLimit(Duration),
    /// These many vCPUs are now slowed down; 0: none any more.
    Throttling {
        /// How many.
        vcpus: usize,
        /// λ: what a vCPU may dirty in this round, with `fair-share`.
        level: Option<Pages>,
        /// The share of its time that every vCPU loses, where throttling goes by time.
        time_share: Option<f64>,
    },
    /// What is expected has changed by more than a twentieth.
    Prediction(Prediction),
    /// vCPUs that are held back may now be stopped for so long at a stretch: longer than usual where the guest cannot
    /// be held with shorter stalls. The heaviest of several, by up to [`throttle::MOST_STRETCH`].
    LongestStall(Duration),
    /// The migration would not end if those who are held back kept the usual minimum share: now they keep this one.
    MinShare(f64),
    /// The guest dirties faster than the link drains, however it is held back: nobody is, unless a limit ends it.
    CannotHold,
    /// No plan keeps the deadline; the fastest one is followed.
    DeadlineOutOfReach,
    /// The downtime limit is shorter than what the switchover takes besides pages: it cannot be kept, and as little as
    /// possible is added to that.
    DowntimeOutOfReach {
        /// The limit.
        limit: Duration,
        /// What the switchover takes besides pages.
        overhead: Duration,
    },
    /// The guest is to be switched over.
    SwitchOver(Why),
    /// More was dirty than expected when the guest stood still: it runs on.
    CalledOff {
        /// What was left.
        left: Pages,
        /// What would have fitted.
        fits: Pages,
    },
    /// The migration is to be cancelled.
    GaveUp(stop::Reached),
}

/// A numbered change.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Counts from 1 without a gap.
    pub sequence: u64,
    /// Since the migration's start.
    pub at: Duration,
    /// What changed.
    pub change: Change,
}

#[cfg(test)]
mod tests;
