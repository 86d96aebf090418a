//! The pause is a cost, not an allowance: once the rest fits, the guest is stopped when to stop it later would not cost it
//! less.
//!
//! What is still to be sent can be sent while the guest runs or while it stands still; the link takes the same time for it. So
//! it is sent before, as long as that gives all vCPUs together more than it costs them until then: faults, and the time of
//! those that are held back.

use std::time::Duration;

use super::Settings;
use super::model::{Brake, Conditions, Round, Writers};
use super::policy::Braking;

/// Nor is one that becomes shorter by less than this share, to the end of the round that is being sent.
const WORTH_SHARE: f64 = 0.05;
/// The same for rounds after it, which have to be sent on top of all others.
const WORTH_SHARE_OF_ROUNDS: f64 = 0.3;
/// Rounds that are looked ahead.
const AHEAD: u32 = 4;
/// Rounds that are sent for nothing but a shorter pause: predictions that do not come true end here.
const ROUNDS_MAX: u32 = 10;
/// What is left has to become less within this time and this many times what passes between two rounds.
const PATIENCE_S: f64 = 0.05;
const PATIENCE_ROUNDS: f64 = 3.0;
/// What was found worth waiting for is looked at anew after so long for each vCPU, because a look costs by their number.
const LOOK_AGAIN_S_PER_VCPU: f64 = 0.1e-3;
/// A deadline is kept with this share of it in hand.
const DEADLINE_SHARE: f64 = 0.98;

/// What is remembered from look to look.
#[derive(Debug)]
pub(crate) struct Pause {
    /// Going on was found worth it until then.
    worth_until: f64,
    /// The least that was left so far, and when.
    least: (f64, f64),
    /// Rounds that were begun although what was left fitted.
    rounds: u32,
}

/// What would have to be sent if the guest were stopped now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    /// What is left of the current round, or the one that would have to be begun.
    pub round: Round,
    /// Pages that are unsent or dirty.
    pub left: f64,
    pub braking: Option<Braking>,
}

impl Default for Pause {
    fn default() -> Self {
        Self { worth_until: 0.0, least: (f64::INFINITY, 0.0), rounds: 0 }
    }
}

impl Pause {
    /// Whether going on with the round was found worth it a moment ago.
    pub fn was_worth_waiting(&self, now: Duration) -> bool {
        now.as_secs_f64() < self.worth_until
    }

    /// Whether the guest had better be stopped later, although the rest fits.
    pub fn is_worth_waiting(
        &mut self,
        now: Duration,
        settings: &Settings,
        writers: Writers<'_>,
        conditions: &Conditions,
        rest: Rest,
    ) -> bool {
        let Rest { round, left, braking } = rest;
        let at = now.as_secs_f64();
        if left < self.least.0 {
            self.least = (left, at);
        }
        let patience_s = PATIENCE_S + PATIENCE_ROUNDS * conditions.round_overhead_s;
        let gets_less = at <= self.least.1 + patience_s;
        if left > conditions.fits {
            // It fits the limit, and not what was wished for.
            return gets_less;
        }
        if braking.is_some() && !gets_less {
            return false;
        }
        let deadline_s = settings.limits.deadline.map_or(f64::INFINITY, |deadline| deadline.as_secs_f64());
        let until_s = deadline_s * DEADLINE_SHARE - at;
        let worth = match braking {
            Some(braking) => {
                is_worth_holding(settings, conditions, writers.vcpus.len(), left, braking, until_s)
            }
            None => is_worth_running(settings, conditions, writers, round, left, until_s),
        };
        if !round.current {
            self.rounds += u32::from(worth);
            return worth && self.rounds <= ROUNDS_MAX;
        }
        if worth {
            self.worth_until = at + LOOK_AGAIN_S_PER_VCPU * writers.vcpus.len() as f64;
        }
        worth
    }
}

/// What a second more costs those who are held, against what it takes off the pause of all.
fn is_worth_holding(
    settings: &Settings,
    conditions: &Conditions,
    vcpus: usize,
    left: f64,
    braking: Braking,
    until_s: f64,
) -> bool {
    let falls_per_s = conditions.pages_per_s - braking.adds_per_s;
    let shorter = falls_per_s / conditions.switch_pages_per_s.max(1e-9);
    let pause_s = left / conditions.switch_pages_per_s.max(1e-9);
    let ends_in_time = falls_per_s > 0.0 && left / falls_per_s + conditions.overhead_s <= until_s;
    let is_cheap = shorter * vcpus as f64 > settings.tuning.held_weight * braking.lost_vcpus;
    ends_in_time && pause_s > settings.tuning.worth_s && is_cheap
}

/// The same for the rounds to come with nobody held back.
fn is_worth_running(
    settings: &Settings,
    conditions: &Conditions,
    writers: Writers<'_>,
    mut round: Round,
    left: f64,
    until_s: f64,
) -> bool {
    let pause_s = |pages: f64| pages / conditions.switch_pages_per_s.max(1e-9);
    let vcpus = writers.vcpus.len().max(1) as f64;
    let dirty = if round.current { writers.all.last().1 } else { 0.0 };
    let (mut ends_s, mut costs_s) = (conditions.overhead_s, 0.0);
    for ahead in 0..AHEAD {
        let outcome = writers.round(conditions, round, Brake::Off);
        let dirtied = outcome.left - if ahead == 0 { dirty } else { 0.0 };
        costs_s += dirtied.max(0.0) * settings.tuning.fault_s;
        ends_s += outcome.seconds;
        let gained_s = pause_s(left) - pause_s(outcome.left);
        let share = if round.current { WORTH_SHARE } else { WORTH_SHARE_OF_ROUNDS };
        if ends_s + pause_s(outcome.left) > until_s {
            return false;
        }
        if gained_s > settings.tuning.worth_s.max(pause_s(left) * share) && gained_s * vcpus > costs_s {
            return true;
        }
        round = round.next(&outcome);
    }
    false
}
