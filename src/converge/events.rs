//! The log of events for those who watch: every change once, numbered.

use std::collections::VecDeque;
use std::time::Duration;

use super::policy::Decision;
use super::throttle::LONGEST_STALL;
use super::units::whole;
use super::vcpu::Vcpu;
use super::{Change, Event, FairShare, Pages, Prediction, Quota};

/// Events kept for a caller that does not take them.
const MOST_EVENTS: usize = 1024;
/// A prediction is an event when it moves by this share, and so is a share of time that moves by as much of the scale.
const WORTH_RECORDING: f64 = 0.05;

/// Events not yet taken, and the last state of what is recorded only when it changes.
#[derive(Debug)]
pub(super) struct EventLog {
    sequence: u64,
    events: VecDeque<Event>,
    prediction: Option<Prediction>,
    throttling: (usize, u64),
    downtime: Duration,
    late: bool,
    unreachable: bool,
    cannot_hold: bool,
    min_share: f64,
    longest_stall: Duration,
}

impl EventLog {
    /// Nothing is known but the downtime limit.
    pub(super) fn new(downtime: Duration) -> Self {
        Self {
            sequence: 0,
            events: VecDeque::new(),
            prediction: None,
            throttling: (0, 0),
            downtime,
            late: false,
            unreachable: false,
            cannot_hold: false,
            longest_stall: LONGEST_STALL,
            min_share: FairShare::USUAL_MIN_SHARE,
        }
    }

    pub(super) fn record(&mut self, at: Duration, change: Change) {
        self.sequence += 1;
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { sequence: self.sequence, at, change });
    }

    pub(super) fn take(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// The user has set other limits, and knows them: this downtime limit among them.
    pub(super) fn limits_set(&mut self, downtime: Duration) {
        self.downtime = downtime;
        (self.late, self.unreachable) = (false, false);
    }

    pub(super) fn downtime_limit(&mut self, at: Duration, limit: Duration) {
        if limit != self.downtime {
            self.downtime = limit;
            self.record(at, Change::DowntimeLimit(limit));
        }
    }

    pub(super) fn prediction(&mut self, at: Duration, prediction: Prediction) {
        if self.prediction.is_none_or(|recorded| differs(&recorded, &prediction)) {
            self.prediction = Some(prediction);
            self.record(at, Change::Prediction(prediction));
        }
    }

    /// What the policy has decided, as far as it is new.
    pub(super) fn decided(&mut self, at: Duration, decision: &Decision, vcpus: &[Vcpu]) {
        // It only ever goes down.
        if let Some(min_share) = decision.min_share.filter(|min_share| *min_share < self.min_share) {
            self.min_share = min_share;
            self.record(at, Change::MinShare(min_share));
        }
        if decision.braking.is_some() && decision.longest_stall != self.longest_stall {
            self.longest_stall = decision.longest_stall;
            self.record(at, Change::LongestStall(decision.longest_stall));
        }
        if decision.misses_deadline && !self.late {
            self.late = true;
            self.record(at, Change::DeadlineOutOfReach);
        }
        if decision.cannot_hold != self.cannot_hold {
            self.cannot_hold = decision.cannot_hold;
            if self.cannot_hold {
                self.record(at, Change::CannotHold);
            }
        }
        self.throttling(at, vcpus, decision.level);
    }

    /// What the switchover takes besides pages is more than the whole limit.
    pub(super) fn downtime_out_of_reach(&mut self, at: Duration, limit: Duration, overhead: Duration) {
        if !self.unreachable {
            self.unreachable = true;
            self.record(at, Change::DowntimeOutOfReach { limit, overhead });
        }
    }

    /// Who is held back: recorded when their number changes, or the level by a doubling.
    fn throttling(&mut self, at: Duration, vcpus: &[Vcpu], level: Option<Pages>) {
        let throttled = vcpus.iter().filter_map(|vcpu| vcpu.share.quota);
        let vcpus = throttled.clone().count();
        let time_share = throttled.clone().find_map(|quota| match quota {
            Quota::Time(share) | Quota::QemuTime(share) => Some(share),
            Quota::Pages(_) => None,
        });
        let doublings = level.map_or(0, |level| u64::from(level.0.max(1).ilog2()));
        let step = time_share.map_or(doublings, |share| whole(share / WORTH_RECORDING));
        if (vcpus, step) != self.throttling {
            self.throttling = (vcpus, step);
            self.record(at, Change::Throttling { vcpus, level, time_share });
        }
    }
}

/// Whether two predictions differ by enough for another event.
fn differs(recorded: &Prediction, now: &Prediction) -> bool {
    if (recorded.converges, recorded.converges_unthrottled) != (now.converges, now.converges_unthrottled) {
        return true;
    }
    let far = |a: Duration, b: Duration| a.abs_diff(b).as_secs_f64() > WORTH_RECORDING * a.as_secs_f64();
    match (recorded.total, now.total) {
        (Some(recorded), Some(now)) => far(recorded, now),
        (recorded, now) => recorded.is_some() != now.is_some(),
    }
}
