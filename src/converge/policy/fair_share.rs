//! Fair share: who has to slow down, how far, and when it is worth it.
//!
//! Let `L` be what is left: the pages that are unsent or dirty. The link takes `B` of them a second, the guest adds some.
//!
//! **When.** The guest runs free while `L` falls, and is held back from the moment on when it does not, until the rest fits.
//! While it is held, `L` falls by `B − r`, where `r` is what it still adds, and its vCPU loses the share `s` of its time. A
//! free second in which `L` falls by `f` saves `f ÷ (B − r)` seconds of that, and so `s × f ÷ (B − r)` of the vCPU's
//! time; it puts the end off by `1 − f ÷ (B − r)`. So the guest runs free as long as the first is worth more than the
//! second (`impatience`): a steady writer of `W = ρB` as long as `(1 − ρ) ÷ ρ > impatience`. With a deadline it runs free
//! until the last moment from which a guest that is held back still arrives in time.
//!
//! **How hard.** As hard as may be, and at once: `L` is to fall by `L − P*`, which takes `(L − P*) ÷ (B − r)`, of which the
//! vCPU loses `1 − r ÷ W`. For `W > B` that product grows with `r`: 512 MB written at 150 MB/s over 100 MB/s, held to its
//! 5 %, loses `462 ÷ 92.5 × 0.95 = 4.7 s`; halving what is left in each round loses 6.4 s, and ends later. For `W < B` it
//! falls with `r`, but then nobody is held unless the end is worth it.
//!
//! **Who.** In the time `T = L ÷ B` the guest may add `A = max(P*, ¾L)`: what fits the downtime, or what lets `L` shrink by
//! a quarter. If the vCPUs would dirty more, `Σ nᵢ(T) > A`, water is poured: the level λ with `Σ min(nᵢ, λ) = A`. A vCPU with
//! `nᵢ ≤ λ` is never touched. Since `λ ≥ A ÷ vCPUs`, whoever stays within an equal share of what the link can take is
//! safe, whatever the others do. The others keep `min_share` of their `Σ nᵢ` together, poured the same way: a share of
//! each one's own rate would leave most to whoever writes most.

use std::time::Duration;

use super::hold::{Demands, Hold, descent};
use super::rule::{Decision, Parameters, Rule, View};
use crate::converge::model::{Brake, Conditions, Forecast, Outcome, Round};
use crate::converge::throttle::LONGEST_STALL;
use crate::converge::units::sane;
use crate::converge::{AtTimeout, Pages};

/// Parameters of `fair-share`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FairShare {
    /// The share, 0 to 1, of what they would dirty together that the vCPUs that are held back keep, each as many pages
    /// as the others. `None`: a twentieth, or less where the migration would not end otherwise (the controller says so).
    pub min_share: Option<f64>,
    /// Seconds of guest time that one second of an earlier end is worth. Rounds that shrink by themselves cost
    /// the guest nothing and are let run while they end soon enough: at a dirty rate ρ times the bandwidth,
    /// braking buys a second of migration for (1 − ρ) ÷ ρ seconds of the writer's time, so 0.1 brakes by itself
    /// from ρ = 0.91 on. With a deadline, only the deadline counts.
    pub impatience: f64,
    /// Guest time that may be spent on top of that, once, on an end that is earlier by at least twice as much, as a share of
    /// the downtime limit: whoever accepts a pause of 500 ms will not notice 250 ms in slices of 10, and the last rounds,
    /// which are short and many, are bought cheaply. With a deadline, none is.
    pub grace: f64,
}

impl FairShare {
    /// What they keep, unless told otherwise.
    pub const USUAL_MIN_SHARE: f64 = 0.05;
}

impl Default for FairShare {
    fn default() -> Self {
        Self { min_share: None, impatience: 0.1, grace: 0.5 }
    }
}

/// Shares of the usual minimum share, where nothing ends with all of it, or what is left falls at less than this share of the
/// pace that it would fall at with none.
const MIN_SHARES: [f64; 3] = [1.0, 0.5, 0.2];
const WORTH_LESS_SHARE: f64 = 0.5;
/// Shares of what is left that the guest may add, where a deadline cannot be kept with the fair one.
const LESS_THAN_FAIR: [f64; 3] = [0.5, 0.25, 0.0];
/// The guest can be held if what is left falls; and once it could not for so long, if that falls by this share of what the link
/// takes.
const HOLDS: f64 = 0.0;
const HOLDS_AGAIN: f64 = 0.05;
const CANNOT_HOLD_FOR: Duration = Duration::from_millis(500);
/// Stalls become longer, and shorter again, when that has been wanted for so long: a busy moment is no reason, and a migration
/// that is about to end should.
const LONGER_STALLS_WANTED: Duration = Duration::from_millis(150);
const SHORTER_STALLS_WANTED: Duration = Duration::from_secs(1);
/// A deadline is aimed at with this margin, as a share of it, and of what is still to come.
const DEADLINE_MARGIN: f64 = 0.01;
const FORECAST_MARGIN: f64 = 0.05;
/// The last moment is found no later than this.
const LAST_MOMENT_S: f64 = 0.1;
/// In the first round nobody is held back before it has been seen for this share of the time that the rest of it takes: a
/// curve seen for a moment says nothing of the rest.
const FIRST_ROUND_SEEN: f64 = 0.75;
/// Free rounds that are looked ahead.
const MOST_FREE_ROUNDS: u32 = 64;

impl Parameters for FairShare {
    fn rule(self) -> Box<dyn Rule> {
        Box::new(State {
            parameters: self,
            is_braking: false,
            cannot_hold: false,
            does_not_hold_since: None,
            least_per_s: f64::INFINITY,
            stalls: Stalls::default(),
        })
    }
}

/// What it remembers.
#[derive(Debug)]
struct State {
    parameters: FairShare,
    /// It stays so: a guest that is let go loses all that it paid for.
    is_braking: bool,
    /// Nothing holds the guest, and since when.
    cannot_hold: bool,
    does_not_hold_since: Option<Duration>,
    /// Pages per second that each of those who are held keeps. The less is left, the shorter are rounds, and the more pages a
    /// share of what they would dirty is: it stays what it was when the brake was put on.
    least_per_s: f64,
    stalls: Stalls,
}

impl Rule for State {
    fn strikes_off_redirtied(&self) -> bool {
        // A round of a guest that dirties all of it at once and that nothing holds would end at once, and another like it
        // would begin, each at the price of a fault per page.
        !self.cannot_hold
    }

    fn decide(&mut self, view: &View<'_>, conditions: Option<&Conditions>) -> Decision {
        let Some(conditions) = conditions else { return Decision::alike(view, None, None) };
        let free = view.writers.free(conditions, view.round);
        let left = view.left();
        let fair = 1.0 - view.tuning.shrink;
        let mut hold = self.hold(view, conditions, left, fair);
        let holds = hold.holds(conditions, if self.cannot_hold { HOLDS_AGAIN } else { HOLDS });
        self.give_up_if(!holds && left > conditions.fits && free.is_none() && view.number > 1, view.now);
        let remaining = remaining_s(view);
        if !self.is_braking && holds {
            self.is_braking = left > conditions.fits && self.brakes(view, conditions, &hold, free.as_ref());
        }
        let mut misses_deadline = false;
        if let Some(remaining) = remaining
            && (self.is_braking || view.number > 1)
        {
            let is_late =
                |hold: &Hold| descent(conditions, hold, left).is_none_or(|end| end.finish_s > remaining);
            let ends_free = free.is_some_and(|free| free.finish_s <= remaining);
            for fair in LESS_THAN_FAIR {
                if ends_free || !self.is_braking || !is_late(&hold) {
                    break;
                }
                hold = self.hold(view, conditions, left, fair);
            }
            misses_deadline = !ends_free && is_late(&hold);
        }
        let brakes = self.is_braking && (!self.cannot_hold || ends_anyway(view));
        let forecast = match (self.is_braking, holds) {
            (true, true) => descent(conditions, &hold, left),
            (true, false) => None,
            (false, _) => self.ahead(view, conditions, &hold, free),
        };
        if !(brakes || self.cannot_hold && ends_anyway(view)) {
            return Decision {
                misses_deadline,
                cannot_hold: self.cannot_hold,
                ..Decision::alike(view, None, forecast)
            };
        }
        self.least_per_s = self.least_per_s.min(hold.least_per_s);
        let longest_stall = self.stalls.after(view.now, hold.longest_stall);
        Decision {
            quotas: hold.quotas,
            forecast,
            level: hold.level.is_finite().then(|| Pages::floor(hold.level)),
            braking: Some(hold.does),
            longest_stall,
            stretch: hold.stretch,
            min_share: self.parameters.min_share.is_none().then_some(hold.min_share),
            misses_deadline,
            cannot_hold: self.cannot_hold,
        }
    }
}

impl State {
    /// The hardest hold that the minimum share allows, or less than that where nothing else ends it.
    fn hold(&self, view: &View<'_>, conditions: &Conditions, left: f64, fair: f64) -> Hold {
        let demands = Demands::new(view, conditions, left, fair, self.is_braking);
        let hold = |min_share: f64| demands.hold(view, conditions, min_share, self.least_per_s);
        if let Some(min_share) = self.parameters.min_share {
            return hold(sane(min_share));
        }
        let shares = MIN_SHARES.map(|share| share * FairShare::USUAL_MIN_SHARE);
        let falls = |hold: &Hold| conditions.pages_per_s - hold.does.adds_per_s;
        let hardest = hold(0.0);
        let enough = falls(&hardest) * WORTH_LESS_SHARE;
        let does = |hold: &Hold| hold.holds(conditions, HOLDS_AGAIN) && falls(hold) >= enough;
        shares.iter().map(|share| hold(*share)).find(does).unwrap_or(hardest)
    }

    /// A guest that cannot be held for a moment is none that cannot be held.
    fn give_up_if(&mut self, it_does_not_hold: bool, now: Duration) {
        if !it_does_not_hold {
            (self.cannot_hold, self.does_not_hold_since) = (false, None);
            return;
        }
        let since = *self.does_not_hold_since.get_or_insert(now);
        self.cannot_hold |= now.saturating_sub(since) >= CANNOT_HOLD_FOR;
    }

    /// Whether the time has come.
    fn brakes(&self, view: &View<'_>, conditions: &Conditions, hold: &Hold, free: Option<&Forecast>) -> bool {
        let left = view.left();
        let Some(end) = descent(conditions, hold, left) else { return false };
        let is_first = view.number <= 1;
        let rest_s = view.round.pages / conditions.current_pages_per_s.max(1e-9);
        if is_first && view.elapsed_s < rest_s * FIRST_ROUND_SEEN {
            return false;
        }
        if let Some(remaining) = remaining_s(view) {
            let ends_free = free.is_some_and(|free| free.finish_s <= remaining);
            let last_moment = end.finish_s * (1.0 + FORECAST_MARGIN) + LAST_MOMENT_S >= remaining;
            return !ends_free && (last_moment || !is_first && !self.falls(view, conditions, 0.0));
        }
        !self.is_worth_waiting(view, conditions, hold) || !is_first && self.is_cheap(view, &end, free)
    }

    /// What is left falls by itself by more than `share` of what the link takes: now, and in this round and the next. In the
    /// first round, whose curves may not have shown their ends yet, one of the two will do.
    fn falls(&self, view: &View<'_>, conditions: &Conditions, share: f64) -> bool {
        let least = share * conditions.pages_per_s;
        let now = view.adds_per_s.is_none_or(|adds| conditions.pages_per_s - adds > least);
        let ahead = self.pace_ahead(view, conditions, view.round) > least;
        if view.number <= 1 { now || ahead } else { now && ahead }
    }

    /// Whether a second of running free is worth more than what it puts the end off.
    fn is_worth_waiting(&self, view: &View<'_>, conditions: &Conditions, hold: &Hold) -> bool {
        self.falls(view, conditions, self.least_fall(conditions, hold))
    }

    /// The share of what the link takes by which what is left has to fall by itself to be worth a wait: solves
    /// `s × f ÷ (B − r) = impatience × (1 − f ÷ (B − r))` for `f ÷ B`.
    fn least_fall(&self, conditions: &Conditions, hold: &Hold) -> f64 {
        let impatience = sane(self.parameters.impatience);
        let fall = 1.0 - hold.does.adds_per_s / conditions.pages_per_s.max(1e-9);
        fall * impatience / (hold.does.lost_share + impatience).max(1e-9)
    }

    /// Pages per second by which what is left falls in `round`, or in it and the next: whichever is more. What is left of the
    /// current round may be a moment, and the round after it as large as this one.
    fn pace_ahead(&self, view: &View<'_>, conditions: &Conditions, round: Round) -> f64 {
        let left = if round.current { round.pages + view.writers.all.last().1 } else { round.pages };
        let outcome = view.writers.round(conditions, round, Brake::Off);
        let next = view.writers.round(conditions, round.next(&outcome), Brake::Off);
        let pace = |after: &Outcome, seconds: f64| (left - after.left) / seconds.max(1e-9);
        pace(&outcome, outcome.seconds).max(pace(&next, outcome.seconds + next.seconds))
    }

    /// Whether an end that comes at once is cheap enough. The grace is given once per migration: what the worst-off vCPU has
    /// lost so far is taken from it.
    fn is_cheap(&self, view: &View<'_>, end: &Forecast, free: Option<&Forecast>) -> bool {
        let spent = view.writers.vcpus.iter().fold(0.0f64, |most, vcpu| most.max(vcpu.throttled_s));
        let grace = sane(self.parameters.grace) * view.limits.downtime.as_secs_f64() - spent;
        let price = end.lost_s - end.downtime_s;
        free.is_some_and(|free| {
            price <= grace && free.finish_s - end.finish_s >= price * view.tuning.grace_buys
        })
    }

    /// The rounds to come, if nobody is held yet.
    fn ahead(
        &self,
        view: &View<'_>,
        conditions: &Conditions,
        hold: &Hold,
        free: Option<Forecast>,
    ) -> Option<Forecast> {
        let remaining = remaining_s(view);
        if let (Some(free), Some(remaining)) = (free, remaining)
            && free.finish_s <= remaining
        {
            return Some(free);
        }
        let least = self.least_fall(conditions, hold) * conditions.pages_per_s;
        let mut so_far = Forecast::default();
        let mut round = view.round;
        for _ in 0..MOST_FREE_ROUNDS {
            let outcome = view.writers.round(conditions, round, Brake::Off);
            if outcome.left <= conditions.fits {
                return Some(view.writers.end(conditions, so_far, round, &outcome, Brake::Off));
            }
            let left = if round.current { round.pages + view.writers.all.last().1 } else { round.pages };
            let at_start = descent(conditions, hold, left);
            let at_end = descent(conditions, hold, outcome.left);
            if let (Some(remaining), Some(at_start), Some(at_end)) = (remaining, at_start, at_end) {
                let late = so_far.finish_s + outcome.seconds + at_end.finish_s - remaining;
                if late > 0.0 {
                    // Somewhere in this round; what that costs lies between.
                    let longer = outcome.seconds + at_end.finish_s - at_start.finish_s;
                    let share = (1.0 - late / longer.max(1e-9)).clamp(0.0, 1.0);
                    let seconds = share * outcome.seconds;
                    let lost_s = at_start.lost_s + share * (at_end.lost_s - at_start.lost_s);
                    let pages = so_far.pages + share * outcome.sent + at_start.pages;
                    let finish_s = so_far.finish_s
                        + seconds
                        + at_start.finish_s
                        + share * (at_end.finish_s - at_start.finish_s);
                    return Some(Forecast { finish_s, lost_s, pages, ..at_start });
                }
            } else if !round.current {
                let is_cheap = at_start.is_some_and(|end| {
                    let end = Forecast { finish_s: so_far.finish_s + end.finish_s, ..end };
                    self.is_cheap(view, &end, free.as_ref())
                });
                if is_cheap || self.pace_ahead(view, conditions, round) <= least {
                    return at_start.map(|end| Forecast {
                        finish_s: so_far.finish_s + end.finish_s,
                        pages: so_far.pages + end.pages,
                        rounds: so_far.rounds + end.rounds,
                        ..end
                    });
                }
            }
            so_far = so_far.after(round, &outcome);
            round = round.next(&outcome);
        }
        free
    }
}

/// What the deadline leaves, with a margin.
fn remaining_s(view: &View<'_>) -> Option<f64> {
    let deadline = view.limits.deadline?;
    let left = deadline.as_secs_f64() * (1.0 - DEADLINE_MARGIN) - view.now.as_secs_f64();
    Some(left / (1.0 + FORECAST_MARGIN))
}

/// A limit ends the migration with whatever is left: then a guest that is held back leaves least.
fn ends_anyway(view: &View<'_>) -> bool {
    let limits = &view.limits;
    let by_time = limits.timeout.is_some_and(|(_, answer)| answer == AtTimeout::SwitchOver);
    by_time
        || limits.max_rounds.is_some()
        || limits.max_transfer_factor.is_some()
        || limits.convergence_timeout.is_some()
}

/// The longest stall in force.
#[derive(Debug)]
struct Stalls {
    longest: Duration,
    /// Since when longer ones are wanted, or shorter ones again.
    other_wanted: Option<Duration>,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { longest: LONGEST_STALL, other_wanted: None }
    }
}

impl Stalls {
    /// What is in force at `now`, when `wanted` is wanted.
    fn after(&mut self, now: Duration, wanted: Duration) -> Duration {
        if wanted == self.longest {
            self.other_wanted = None;
            return wanted;
        }
        let since = *self.other_wanted.get_or_insert(now);
        let enough = if wanted > self.longest { LONGER_STALLS_WANTED } else { SHORTER_STALLS_WANTED };
        if now.saturating_sub(since) >= enough {
            *self = Self { longest: wanted, other_wanted: None };
        }
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_become_longer_and_shorter_only_when_that_is_wanted_for_a_while() {
        let ms = Duration::from_millis;
        let mut stalls = Stalls::default();
        assert_eq!(stalls.after(ms(0), ms(16)), LONGEST_STALL);
        assert_eq!(stalls.after(ms(100), LONGEST_STALL), LONGEST_STALL);
        assert_eq!(stalls.after(ms(160), ms(16)), LONGEST_STALL, "it was not wanted in between");
        assert_eq!(stalls.after(ms(310), ms(16)), ms(16));
        assert_eq!(stalls.after(ms(400), ms(8)), ms(16));
        assert_eq!(stalls.after(ms(1400), ms(8)), ms(8));
    }
}
