//! When to brake and how hard: the cheapest of a few dozen walks through the coming rounds.
//!
//! The family of plans, and why it is enough, is derived in `fair_share`.

use super::model::{Forecast, Model, Round, Terms, no_progress};
use super::policy::FairShare;
use super::units::sane;

/// Free rounds that a plan may begin with.
const MOST_FREE_ROUNDS: u32 = 64;
/// Braked rounds that a plan may end with.
const MOST_BRAKED_ROUNDS: u32 = 32;
/// A braked round aims at this share of P*: gates close a little late, and a round that misses P* by a page is a
/// round for nothing.
pub(crate) const AIM: f64 = 0.9;
/// Depths of the first braked round: this share of the way from P* up to what it would leave by itself.
const DEPTHS: [f64; 5] = [0.0, 0.2, 0.4, 0.6, 0.8];

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
}

/// The best plan from here; `None` if no plan ends.
pub(crate) fn plan(model: &Model, terms: &Terms, now: Round, rules: &Rules) -> Option<Plan> {
    let mut best: Option<((bool, f64), Plan)> = None;
    let mut consider = |target: Option<f64>, forecast: Option<Forecast>| {
        let Some(forecast) = forecast else { return };
        let cost = rules.cost(&forecast);
        if best.is_none_or(|(least, _)| cost < least) {
            best = Some((cost, Plan { target, forecast, in_time: !cost.0 }));
        }
    };
    let min_share = rules.fair_share.min_share;
    let aim = terms.fits * AIM;
    let mut so_far = Forecast::NOTHING;
    let mut round = now;
    for free in 0..=MOST_FREE_ROUNDS {
        let outcome = model.round(terms, round, super::model::Brake::Off);
        if free > 0 || rules.brake_now {
            let above = (outcome.left - aim).max(0.0);
            for depth in DEPTHS {
                let target = aim + depth * above;
                let forecast = brake_down(model, terms, so_far, round, target, min_share);
                consider((free == 0).then_some(target), forecast);
            }
        }
        so_far = so_far.after(round, &outcome);
        if outcome.left <= terms.fits {
            consider(None, Some(terms.end(so_far, outcome.left)));
            break;
        }
        let late = rules.deadline_s.is_some_and(|deadline| so_far.finish_s > deadline);
        if free > 0 && (late || no_progress(round, &outcome)) {
            break;
        }
        round = Round { pages: outcome.left, current: false };
    }
    best.map(|(_, plan)| plan)
}

/// The end of a plan: `round` is braked to `target`, each further one as hard as may be.
fn brake_down(
    model: &Model,
    terms: &Terms,
    mut so_far: Forecast,
    mut round: Round,
    mut target: f64,
    min_share: f64,
) -> Option<Forecast> {
    for _ in 0..MOST_BRAKED_ROUNDS {
        let (outcome, _) = model.fair_round(terms, round, target, min_share);
        so_far = so_far.after(round, &outcome);
        if outcome.left <= terms.fits {
            return Some(terms.end(so_far, outcome.left));
        }
        if no_progress(round, &outcome) {
            return None;
        }
        round = Round { pages: outcome.left, current: false };
        target = terms.fits * AIM;
    }
    None
}
