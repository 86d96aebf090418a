//! When to brake and how hard: the cheapest of a few dozen walks through the coming rounds.
//!
//! The family of plans, and why it is enough, is derived in `fair_share`.

use std::cmp::Ordering;

use super::model::{AIM, Brake, Conditions, Forecast, Model, Round, no_progress, shrinks};
use super::policy::FairShare;
use super::throttle::LONGEST_STALL_EVER;
use super::units::sane;

/// Free rounds that a plan may begin with.
const MOST_FREE_ROUNDS: u32 = 64;
/// Braked rounds that a plan may end with.
const MOST_BRAKED_ROUNDS: u32 = 32;
/// Depths of the first braked round: shares of what it aims at, P*, and of the way from there up to what it
/// would leave by itself.
const BELOW: [f64; 3] = [0.0, 0.33, 0.67];
const ABOVE: [f64; 5] = [0.0, 0.2, 0.4, 0.6, 0.8];
/// The same for rounds further ahead than the next one, of which there will be other plans in time.
const FAR_BELOW: [f64; 1] = [0.0];
const FAR_ABOVE: [f64; 2] = [0.0, 0.4];
/// How much dearer guest time is at once than after many rounds, as a share.
const PREFER_LATER: f64 = 0.05;

/// Longer stalls are used if they end the migration in less than this share of the time.
const WORTH_LONGER: f64 = 0.5;
/// Shares of the usual minimum share, where nothing ends with all of it.
const LESS_THAN_MINIMUM: [f64; 3] = [0.5, 0.2, 0.0];
/// Shares of a round's pages that it may leave, where a deadline cannot be kept with the fair one.
const LESS_THAN_FAIR: [f64; 3] = [0.5, 0.25, 0.0];

/// What to do in this round, and what comes of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Pages that the current round may leave; `None`: nobody is braked in it.
    pub target: Option<f64>,
    pub forecast: Forecast,
    /// Whether the deadline, if there is one, is kept.
    pub in_time: bool,
}

/// What the planner may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub fair_share: FairShare,
    /// Seconds that remain.
    pub deadline_s: Option<f64>,
    /// Guest time that an earlier end may cost over the cheapest plan.
    pub grace_s: f64,
    /// Whether the current round may be braked.
    pub brake_now: bool,
}

impl Rules {
    /// The plan is better if this is smaller: first the deadline, then the guest.
    fn cost(&self, forecast: &Forecast) -> (bool, f64) {
        match self.deadline_s {
            Some(deadline) if forecast.finish_s > deadline => (true, forecast.finish_s),
            // An hour more costs as much as a second of the guest: it decides between equals only.
            Some(_) => (false, forecast.lost_s + forecast.finish_s / 3600.0),
            None => (false, forecast.lost_s + sane(self.fair_share.impatience) * forecast.finish_s),
        }
    }

    fn choose(&self, plans: &[Candidate]) -> Option<Plan> {
        let cheapest = plans.iter().min_by(|a, b| a.cost.partial_cmp(&b.cost).unwrap_or(Ordering::Equal))?;
        let mut best = cheapest;
        if self.deadline_s.is_none() {
            let affordable = cheapest.forecast.lost_s + self.grace_s;
            for plan in plans.iter().filter(|plan| plan.forecast.lost_s <= affordable) {
                if plan.forecast.finish_s < best.forecast.finish_s {
                    best = plan;
                }
            }
        }
        Some(Plan { target: best.target, forecast: best.forecast, in_time: !best.cost.0 })
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    cost: (bool, f64),
    target: Option<f64>,
    forecast: Forecast,
}

/// The best plan from here, and the conditions that it needs.
///
/// Longer stalls, if nothing else ends, or ends much later: a guest that cannot be held within short ones would
/// never arrive. A smaller minimum share, if only that ends. And less than a fair share, if only that keeps the
/// deadline: whoever sets one wants it kept.
pub(crate) fn plan_under(
    model: &Model,
    mut conditions: Conditions,
    now: Round,
    rules: &Rules,
) -> (Option<Plan>, Conditions) {
    let mut best = plan_on_longer_stalls(model, &mut conditions, now, rules);
    for share in LESS_THAN_MINIMUM {
        if best.is_some() || rules.fair_share.min_share.is_some() {
            break;
        }
        conditions.min_share = FairShare::USUAL_MIN_SHARE * share;
        best = plan_on_longer_stalls(model, &mut conditions, now, rules);
    }
    for fair in LESS_THAN_FAIR {
        if rules.deadline_s.is_none() || best.is_some_and(|plan| plan.in_time) {
            break;
        }
        conditions.fair = fair;
        best = plan(model, &conditions, now, rules);
    }
    (best, conditions)
}

fn plan_on_longer_stalls(
    model: &Model,
    conditions: &mut Conditions,
    now: Round,
    rules: &Rules,
) -> Option<Plan> {
    let mut best = plan(model, conditions, now, rules);
    let brakes = |plan: Plan| plan.forecast.lost_s > plan.forecast.downtime_s;
    if best.is_none_or(brakes) {
        let longest_s = LONGEST_STALL_EVER.as_secs_f64();
        let ideal = plan(model, &Conditions { longest_stall_s: longest_s, ..*conditions }, now, rules);
        let finish = |plan: Option<Plan>| plan.map_or(f64::INFINITY, |plan| plan.forecast.finish_s);
        while finish(ideal) < WORTH_LONGER * finish(best) && conditions.longest_stall_s < longest_s {
            conditions.longest_stall_s = (conditions.longest_stall_s * 2.0).min(longest_s);
            best = plan(model, conditions, now, rules);
        }
    }
    best
}

/// The best plan from here; `None` if no plan ends.
fn plan(model: &Model, conditions: &Conditions, now: Round, rules: &Rules) -> Option<Plan> {
    let mut plans = Vec::new();
    let mut consider = |free: u32, braked: bool, target: Option<f64>, forecast: Option<Forecast>| {
        let Some(forecast) = forecast else { return };
        let (late, cost) = rules.cost(&forecast);
        // What lies further ahead may turn out not to be needed: of equals, the one that brakes later, if the
        // rounds until then get it anywhere.
        let hurry = if braked { PREFER_LATER / f64::from(free + 1) } else { 0.0 };
        let cost = (late, if late { cost } else { cost + hurry * forecast.lost_s });
        plans.push(Candidate { cost, target, forecast });
    };
    let aim = conditions.fits * AIM;
    let mut so_far = Forecast::NOTHING;
    let mut round = now;
    let mut shrinking = 0;
    for free in 0..=MOST_FREE_ROUNDS {
        let outcome = model.round(conditions, round, Brake::Off);
        if free > 0 || rules.brake_now {
            let above = (outcome.left - aim).max(0.0);
            let (shares_below, shares_above) =
                if free <= 1 { (&BELOW[..], &ABOVE[..]) } else { (&FAR_BELOW[..], &FAR_ABOVE[..]) };
            let below = shares_below.iter().map(|share| share * aim);
            let targets = below.chain(shares_above.iter().map(|share| aim + share * above));
            for target in targets {
                let forecast = brake_down_after(so_far, model, conditions, round, target);
                consider(shrinking, true, (free == 0).then_some(target), forecast);
            }
        }
        if outcome.left <= conditions.fits {
            consider(
                shrinking,
                false,
                None,
                Some(model.end(conditions, so_far, round, &outcome, Brake::Off)),
            );
            break;
        }
        so_far = so_far.after(round, &outcome);
        shrinking += u32::from(shrinks(round, &outcome));
        let late = rules.deadline_s.is_some_and(|deadline| so_far.finish_s > deadline);
        if free > 0 && (late || no_progress(round, &outcome)) {
            break;
        }
        round = round.next(&outcome);
    }
    rules.choose(&plans)
}

/// The end, if the current `round` is braked to `target` and each further one at least to what fits; `None` if that
/// does not end.
pub(crate) fn brake_down(
    model: &Model,
    conditions: &Conditions,
    round: Round,
    target: f64,
) -> Option<Forecast> {
    brake_down_after(Forecast::NOTHING, model, conditions, round, target)
}

/// The end of a plan: `round` is braked to `target`, each further one at least to what fits.
fn brake_down_after(
    mut so_far: Forecast,
    model: &Model,
    conditions: &Conditions,
    mut round: Round,
    mut target: f64,
) -> Option<Forecast> {
    for _ in 0..MOST_BRAKED_ROUNDS {
        let (outcome, end) = model.fair_round(conditions, so_far, round, target);
        if end.is_some() {
            return end;
        }
        so_far = so_far.after(round, &outcome);
        if no_progress(round, &outcome) {
            return None;
        }
        round = Round::coming(outcome.left, 0.0);
        target = target.min(conditions.fits * AIM);
    }
    None
}
