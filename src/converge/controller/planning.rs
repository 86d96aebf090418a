//! The controller's plan: a forecast by the policy in force, and the quotas that follow from it.

use std::time::Duration;

use bitvec::vec::BitVec;

use super::Controller;
use crate::PAGE_SIZE;
use crate::converge::fair_share::even_out;
use crate::converge::model::{Brake, Conditions, FAIR, Fair, Forecast, Model, Outcome, Round, shrinks};
use crate::converge::throttle::LONGEST_STALL;
use crate::converge::units::{duration, sane, whole};
use crate::converge::{
    AutoConverge, Change, DirtyLimit, FairShare, Pages, PagesPerSlice, Policy, Prediction, Quota, Share, plan,
};

/// Plans are made this often within a round, or less often for guests whose plans take long.
const REPLAN_S: f64 = 0.05;
const REPLAN_S_PER_VCPU: f64 = 0.5e-3;
/// Time between two rounds, until it is measured.
const ROUND_OVERHEAD_S: f64 = 2e-3;
/// The first round is the only look at a guest's curves that costs nothing; it is braked only to keep a deadline
/// that could not be kept otherwise, and not before this share of it has been seen.
const FIRST_ROUND_SEEN: f64 = 0.5;
/// Stalls become longer, and shorter again, when braking has wanted that for so long: a busy moment is no reason, and
/// a migration that is about to end should.
const LONGER_STALLS_WANTED: Duration = Duration::from_millis(150);
const SHORTER_STALLS_WANTED: Duration = Duration::from_secs(1);
/// A braked round is let go if another plan costs the guest so much less: this share, and this many seconds.
const LET_GO_SHARE: f64 = 0.75;
const LET_GO_S: f64 = 0.25;
/// A deadline is aimed at with this margin, as a share of it, and of what is still to come.
const DEADLINE_MARGIN: f64 = 0.01;
const FORECAST_MARGIN: f64 = 0.05;

impl Controller {
    /// Predicts, and sets the quotas that follow.
    pub(super) fn plan(&mut self, now: Duration) {
        let at = now.as_secs_f64();
        let interval = REPLAN_S.max(REPLAN_S_PER_VCPU * self.model.curves.len() as f64);
        self.next_plan = at + interval;
        let round = self.rest_of_the_round(at);
        // The simple brakes need not wait until the link is known.
        match self.settings.policy {
            Policy::None => self.hold_back(now, None),
            Policy::AutoConverge(_) => {
                let share = self.rule.share();
                self.hold_back(now, (share > 0.0).then_some(Quota::QemuTime(share)));
            }
            Policy::DirtyLimit(limit) => {
                self.hold_back(now, Some(Quota::Pages(PagesPerSlice::over(pages_per_s(limit), 1.0))));
            }
            Policy::FairShare(_) => {}
        }
        let Some(conditions) = self.conditions(now) else { return };
        let free = self.model.forecast(&conditions, round, Brake::Off, |_, _| None);
        self.round.shrinks = shrinks(round, &self.model.round(&conditions, round, Brake::Off));
        let forecast = match self.settings.policy {
            Policy::None => free,
            Policy::AutoConverge(parameters) => self.auto_converge_forecast(&conditions, round, &parameters),
            Policy::DirtyLimit(limit) => {
                self.model.forecast(&conditions, round, Brake::Rate(pages_per_s(limit)), |_, _| None)
            }
            Policy::FairShare(fair_share) => self.fair_share(now, &conditions, round, fair_share),
        };
        let spread = self.model.link.spread();
        let prediction = Prediction {
            converges: forecast.is_some(),
            converges_unthrottled: free.is_some(),
            total: forecast.map(|f| duration(at + f.finish_s)),
            downtime: forecast.map_or(self.settings.limits.downtime_at(now), |f| duration(f.downtime_s)),
            lost: forecast.map(|f| duration(f.lost_s)),
            bytes: forecast.map(|f| self.bytes_acked.saturating_add(whole(f.pages * self.page_bytes))),
            rounds: forecast.map(|f| self.round.number.saturating_add(f.rounds)),
            spread,
        };
        self.prediction = Some(prediction);
        self.events.prediction(now, prediction);
        self.events.throttling(now, &self.shares, self.level);
    }

    /// The same quota for every vCPU.
    fn hold_back(&mut self, now: Duration, quota: Option<Quota>) {
        for (throttle, dirtied) in self.throttles.iter_mut().zip(&self.counts) {
            throttle.set(quota, now, *dirtied);
        }
        self.shares.iter_mut().for_each(|share| share.quota = quota);
        self.stretches.fill(1.0);
        self.level = None;
    }

    fn auto_converge_forecast(
        &self,
        conditions: &Conditions,
        round: Round,
        parameters: &AutoConverge,
    ) -> Option<Forecast> {
        let mut rule = self.rule.clone();
        let mut at = self.round.start;
        let mut bytes = self.round.bytes_at_start as f64;
        let mut pages_before = self.round.done;
        let next = |outcome: &Outcome, pages: f64| {
            at += outcome.seconds;
            bytes += (pages + pages_before) * self.page_bytes;
            pages_before = 0.0;
            let changed = rule.on_sync(at, outcome.left * PAGE_SIZE as f64, bytes, parameters);
            changed.then(|| Brake::Time(rule.share()))
        };
        self.model.forecast(conditions, round, Brake::Time(self.rule.share()), next)
    }

    fn fair_share(
        &mut self,
        now: Duration,
        conditions: &Conditions,
        round: Round,
        fair_share: FairShare,
    ) -> Option<Forecast> {
        let remaining = self.settings.limits.deadline.map(|deadline| {
            let left = deadline.as_secs_f64() * (1.0 - DEADLINE_MARGIN) - now.as_secs_f64();
            left / (1.0 + FORECAST_MARGIN)
        });
        let seen = self.round.done >= self.round.pages * FIRST_ROUND_SEEN;
        let later_round = self.round.number > 1;
        // The grace is given once per migration: what the worst-off vCPU has lost so far is taken from it.
        let grace = sane(fair_share.grace) * self.settings.limits.downtime.as_secs_f64();
        let spent = self.throttled_seen.iter().fold(0.0f64, |most, throttled| most.max(*throttled));
        let grace_s = (grace - spent).max(0.0);
        let mut rules = plan::Rules { fair_share, deadline_s: remaining, grace_s, brake_now: later_round };
        let mut conditions = *conditions;
        conditions.min_share = fair_share.min_share.unwrap_or(conditions.min_share);
        let timed;
        let model = if self.settings.per_vcpu {
            &self.model
        } else {
            // All writers as one, which is what can be slowed down then.
            let curves = vec![self.model.others.clone()];
            let held = BitVec::repeat(self.target.is_some(), 1);
            timed = Model { curves, held, ..Model::default() };
            &timed
        };
        let (mut plan, mut conditions) = plan::plan_under(model, conditions, round, &rules);
        let late = remaining.is_some() && plan.is_none_or(|plan| !plan.in_time);
        if late && seen && !later_round {
            rules.brake_now = true;
            (plan, conditions) = plan::plan_under(model, conditions, round, &rules);
        }
        // A guest once braked stays braked, to the depth first chosen, unless that misses the deadline, or it turned out
        // so much better that it need not be: one that is let go for a round loses all that it paid for.
        if let Some(target) = self.target {
            let forecast = plan::brake_down(model, &conditions, round, target);
            let stays = |forecast: &Forecast| {
                let in_time = remaining.is_none_or(|remaining| forecast.finish_s <= remaining);
                let dear = forecast.lost_s * LET_GO_SHARE - LET_GO_S;
                in_time && plan.is_none_or(|plan| plan.forecast.lost_s > dear)
            };
            if let Some(forecast) = forecast.filter(stays) {
                plan = Some(plan::Plan { target: Some(target), forecast, in_time: true });
            }
        }
        // Where no plan ends, a guest that is held back leaves least to whatever limit ends it.
        let no_plan = if later_round { Some(0.0) } else { self.target };
        let target = plan.map_or(no_plan, |plan| plan.target);
        self.target = target;
        let mut fair = match target {
            Some(target) => model.fair(&conditions, round, target),
            None => Fair { round, held: Vec::new(), level: f64::INFINITY },
        };
        even_out(&mut fair.held, |index| self.counts.get(index).map_or(0.0, |counted| counted.as_f64()));
        if target.is_some() && self.round.braked_at.is_none() {
            self.round.braked_at = Some(now.as_secs_f64());
        }
        self.level = fair.level.is_finite().then(|| Pages::floor(fair.level));
        self.set_shares(now, &conditions, &fair);
        if plan.is_some() && later_round {
            // Whether for now or for the rounds to come: a wait for those would end in the same wish.
            let wanted = duration(conditions.longest_stall_s);
            let since = self.other_stalls_wanted.filter(|_| wanted != self.longest_stall).unwrap_or(now);
            self.other_stalls_wanted = (wanted != self.longest_stall).then_some(since);
            let enough =
                if wanted > self.longest_stall { LONGER_STALLS_WANTED } else { SHORTER_STALLS_WANTED };
            if now.saturating_sub(since) >= enough {
                self.longest_stall = wanted;
                self.events.record(now, Change::LongestStall(wanted));
            }
        }
        if target.is_some() && fair_share.min_share.is_none() {
            self.events.min_share(now, conditions.min_share);
        }
        let late = remaining.is_some() && plan.is_some_and(|plan| !plan.in_time) && (seen || later_round);
        if late {
            self.events.deadline_out_of_reach(now);
        }
        plan.map(|plan| plan.forecast)
    }

    /// Turns what each vCPU may dirty (all together, if they cannot be told apart) into quotas.
    fn set_shares(&mut self, now: Duration, conditions: &Conditions, fair: &Fair) {
        let round = fair.round;
        let seconds = conditions.seconds(round);
        for index in 0..self.throttles.len() {
            let named = self.model.curves.get(index);
            let curve = named.unwrap_or(&self.model.others);
            let held = fair.held.get(if named.is_some() { index } else { 0 }).copied().flatten();
            let quota = held.map(|held| {
                if named.is_some() {
                    Quota::Pages(PagesPerSlice::over(held.quota - curve.last().1, seconds))
                } else {
                    let runs = curve.time_left_to(round, held.dirties).min(seconds) / seconds.max(1e-9);
                    Quota::Time(1.0 - runs.max(sane(conditions.min_share)))
                }
            });
            self.throttles[index].set(quota, now, self.counts[index]);
            self.stretches[index] = held.map_or(1.0, |held| held.stretch);
            self.shares[index] = Share { predicted: Pages::floor(curve.by_the_end(round, seconds)), quota };
        }
        self.model.held.clear();
        self.model.held.extend(self.shares.iter().map(|share| share.quota.is_some()));
    }

    pub(super) fn conditions(&self, now: Duration) -> Option<Conditions> {
        let bandwidth = self.model.link.mean().filter(|mean| *mean > 0.0)?;
        let switch = self.switchover_bandwidth().map_or(bandwidth, sane);
        Some(Conditions {
            pages_per_s: bandwidth / self.page_bytes,
            current_pages_per_s: bandwidth / self.round_page_bytes,
            strikes_off: matches!(self.settings.policy, Policy::FairShare(_)),
            switch_pages_per_s: switch / self.page_bytes,
            fits: self.fits(now).as_f64(),
            overhead_s: self.settings.switchover_overhead.as_secs_f64(),
            round_overhead_s: ROUND_OVERHEAD_S + self.model.link.round_trip_s(),
            longest_stall_s: LONGEST_STALL.as_secs_f64(),
            fair: FAIR,
            gate_s: self.sampling.gate_s(),
            min_share: FairShare::USUAL_MIN_SHARE,
            ram: self.settings.ram.as_f64(),
        })
    }
}

fn pages_per_s(limit: DirtyLimit) -> f64 {
    limit.bytes_per_s as f64 / PAGE_SIZE as f64
}
