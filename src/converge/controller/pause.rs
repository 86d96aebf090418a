//! The pause is a cost, not an allowance: once the rest fits, the guest is stopped when to stop it later would not cost it
//! less.
//!
//! What is still to be sent can be sent while the guest runs or while it stands still; the link takes the same time for it. So
//! the round goes on, and others follow it, as long as some round to come leaves less than there is now, and the
//! shorter pause gives all vCPUs together more than it costs them until then: faults, and the time of those that are held
//! back.

use std::time::Duration;

use super::Controller;
use crate::converge::model::{Brake, Conditions, Forecast, Outcome, Round};

/// A pause that becomes shorter by less than this is not waited for.
const WORTH_S: f64 = 2e-3;
/// Nor by less than this share of it, to the end of the round that is being sent.
const WORTH_SHARE: f64 = 0.05;
/// The same for rounds after it, which have to be sent on top of all others.
const WORTH_SHARE_OF_ROUNDS: f64 = 0.3;
/// What the first write to a clean page costs its vCPU, at the most that was measured (kernel-notes/dirty-ring.md).
const FAULT_S: f64 = 7e-6;
/// Time of a vCPU that is held back weighs so much more than that of one that stands still with all others: it has paid before.
const HELD_WEIGHT: f64 = 2.0;
/// Rounds that are looked ahead.
const AHEAD: u32 = 4;
/// Rounds that are sent for nothing but a shorter pause: predictions that do not come true end here.
const ROUNDS_MAX: u32 = 10;
/// What was found worth waiting for is looked at anew after so long for each vCPU, because a look costs by their number.
const LOOK_AGAIN_S_PER_VCPU: f64 = 0.1e-3;
/// A deadline is kept with this share of it in hand.
const DEADLINE_SHARE: f64 = 0.98;

impl Controller {
    /// Whether the guest had better be stopped later, although the `left` pages that have to be sent fit.
    pub(super) fn is_worth_going_on(&mut self, now: Duration, left: f64) -> bool {
        let at = now.as_secs_f64();
        if at < self.worth_until {
            return true;
        }
        let worth = self.is_worth(now, self.rest_of_the_round(at), left);
        if worth {
            self.worth_until = at + LOOK_AGAIN_S_PER_VCPU * self.shares.len() as f64;
        }
        worth
    }

    /// The same when a round has ended, and another one would have to be begun.
    pub(super) fn is_worth_another_round(&mut self, now: Duration, left: f64) -> bool {
        let next = Round::coming(left, self.round.free_s(now.as_secs_f64()));
        let worth = self.rounds_for_a_shorter_pause < ROUNDS_MAX && self.is_worth(now, next, left);
        self.rounds_for_a_shorter_pause += u32::from(worth);
        worth
    }

    fn is_worth(&self, now: Duration, mut round: Round, left: f64) -> bool {
        let Some(conditions) = self.conditions(now) else { return false };
        let pause_s = |pages: f64| pages / conditions.switch_pages_per_s.max(1e-9);
        let deadline = self.settings.limits.deadline.map_or(f64::INFINITY, |deadline| deadline.as_secs_f64());
        let held = self.shares.iter().filter(|share| share.quota.is_some()).count();
        let vcpus = self.shares.len().max(1);
        let (mut ends_s, mut costs_s) = (now.as_secs_f64() + conditions.overhead_s, 0.0);
        for _ in 0..AHEAD {
            let outcome = self.outcome(&conditions, round);
            let dirtied = outcome.left - if round.current { self.dirty_now() } else { 0.0 };
            costs_s += dirtied.max(0.0) * FAULT_S + outcome.lost_s * held as f64 * HELD_WEIGHT;
            ends_s += outcome.seconds;
            let gained_s = pause_s(left) - pause_s(outcome.left);
            let share = if round.current { WORTH_SHARE } else { WORTH_SHARE_OF_ROUNDS };
            if ends_s + pause_s(outcome.left) > deadline * DEADLINE_SHARE {
                return false;
            }
            if gained_s > WORTH_S.max(pause_s(left) * share) && gained_s * vcpus as f64 > costs_s {
                return true;
            }
            round = round.next(&outcome);
        }
        false
    }

    /// What `round` would do, braked as it is.
    fn outcome(&self, conditions: &Conditions, round: Round) -> Outcome {
        match self.target {
            Some(target) if self.settings.per_vcpu => {
                self.model.fair_round(conditions, Forecast::NOTHING, round, target).0
            }
            _ => self.model.round(conditions, round, Brake::Off),
        }
    }
}
