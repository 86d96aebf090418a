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

use super::{Braking, Conditions, Decision, Forecast, Parameters, Rule, View};
use crate::converge::model::{Brake, Outcome, Round};
use crate::converge::throttle::{LONGEST_STALL, LONGEST_STALL_EVER, MOST_STRETCH};
use crate::converge::units::{duration, sane, whole};
use crate::converge::{AtTimeout, Pages, PagesPerSlice, Quota};

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
/// Who is held is decided for no shorter time than this.
const SHORTEST_S: f64 = 5e-3;
/// A deadline is aimed at with this margin, as a share of it, and of what is still to come.
const DEADLINE_MARGIN: f64 = 0.01;
const FORECAST_MARGIN: f64 = 0.05;
/// The last moment is found no later than this.
const LAST_MOMENT_S: f64 = 0.1;
/// In the first round nobody is held back before it has been seen for this share of the time that the rest of it takes: a
/// curve seen for a moment says nothing of the rest.
const FIRST_ROUND_SEEN: f64 = 0.75;
/// Rounds in which what was dirtied between two stalls is sent in a stall.
const ROUNDS_IN_STALL: f64 = 2.0;
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

/// How the guest would be held.
#[derive(Clone, Debug)]
struct Hold {
    quotas: Vec<Option<Quota>>,
    level: f64,
    longest_stall: Duration,
    /// The heaviest of several may stall longer by this factor.
    stretch: f64,
    min_share: f64,
    does: Braking,
    /// Pages per second that they add less while much is left.
    less_at_first: f64,
    /// Whether so little is ever left that it fits.
    can_fit: bool,
    least_per_s: f64,
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
        let fair = 1.0 - view.settings.tuning.shrink;
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
        let grace = sane(self.parameters.grace) * view.settings.limits.downtime.as_secs_f64() - spent;
        let price = end.lost_s - end.downtime_s;
        free.is_some_and(|free| {
            price <= grace && free.finish_s - end.finish_s >= price * view.settings.tuning.grace_buys
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

/// What the vCPUs would dirty in the time in which the link takes what is left.
struct Demands {
    seconds: f64,
    /// By vCPU; if nobody can be told from another, all together.
    is_held: Vec<bool>,
    /// λ.
    level: f64,
    /// Pages per second of those who are not held, or cannot be: now, and when as much is left as fits.
    light_per_s: f64,
    light_at_last: f64,
    /// Of those who are.
    heavy: Vec<f64>,
}

impl Demands {
    fn new(view: &View<'_>, conditions: &Conditions, left: f64, fair: f64, is_braking: bool) -> Self {
        let seconds = (left / conditions.pages_per_s.max(1e-9)).max(SHORTEST_S);
        let others = view.writers.others.at(seconds);
        let budget = (conditions.fits * (1.0 - view.settings.tuning.short_of)).max(left * fair);
        let (pages, others): (Vec<f64>, f64) = if view.settings.per_vcpu {
            (view.writers.vcpus.iter().map(|vcpu| vcpu.curve.soon(seconds)).collect(), others)
        } else {
            (vec![others], 0.0)
        };
        let level = water_fill(&pages, budget - others);
        // What a vCPU that is held would dirty can no longer be seen, and that it dirties little is no reason to let it go.
        let was_held = |index: usize| {
            let vcpu = view.writers.vcpus.get(index);
            is_braking && vcpu.is_some_and(|vcpu| vcpu.share.quota.is_some())
        };
        let is_held: Vec<bool> =
            pages.iter().enumerate().map(|(index, pages)| *pages > level || was_held(index)).collect();
        let heavy = pages.iter().zip(&is_held).filter(|(_, held)| **held).map(|(pages, _)| *pages).collect();
        let light: f64 =
            pages.iter().zip(&is_held).filter(|(_, held)| !**held).map(|(pages, _)| *pages).sum();
        // Whoever writes the same pages again and again adds more in many short rounds than in a long one.
        let last_s = (conditions.fits / conditions.pages_per_s.max(1e-9)).clamp(SHORTEST_S, seconds);
        let free = view.writers.vcpus.iter().zip(&is_held).filter(|(_, held)| !**held);
        let vcpus: f64 = free.map(|(vcpu, _)| vcpu.curve.soon(last_s)).sum();
        let light_at_last = (vcpus + view.writers.others.at(last_s)) / last_s;
        Self { seconds, level, light_per_s: (others + light) / seconds, light_at_last, heavy, is_held }
    }

    fn hold(&self, view: &View<'_>, conditions: &Conditions, min_share: f64, most_per_s: f64) -> Hold {
        let least = water_fill(&self.heavy, min_share * self.heavy.iter().sum::<f64>()) / self.seconds;
        let least = least.min(most_per_s);
        if !view.settings.per_vcpu {
            return self.hold_by_time(view, least, min_share);
        }
        let tuning = &view.settings.tuning;
        let all = view.writers.vcpus.iter().zip(&self.is_held);
        let held = || all.clone().filter(|(_, held)| **held).map(|(vcpu, _)| vcpu);
        let overruns: Vec<f64> =
            held().map(|vcpu| vcpu.overrun_in(view.gate_s, tuning.after_a_stall)).collect();
        let count = overruns.len().max(1) as f64;
        // What vCPUs add that dirty so much between two stalls of this length.
        let quota_in = |stall_s: f64| {
            let mean = overruns.iter().sum::<f64>() / count / (stall_s + view.gate_s);
            // Those who can be held lower dirty as much as the others: together no more than they would.
            if overruns.len() > 1 { least.max(mean) } else { least }
        };
        let adds_in = |stall_s: f64| {
            let quota = quota_in(stall_s);
            let each = overruns.iter().zip(&self.heavy).map(|(overrun, pages)| {
                let floor = overrun / (stall_s * stretch(overruns.len()) + view.gate_s);
                quota.max(floor).min(pages / self.seconds)
            });
            self.light_at_last + each.sum::<f64>()
        };
        let falls = |stall_s: f64| conditions.pages_per_s - adds_in(stall_s);
        let (mut stall_s, longest_s) = (LONGEST_STALL.as_secs_f64(), LONGEST_STALL_EVER.as_secs_f64());
        let enough = falls(longest_s) * tuning.worth_longer;
        let overrun = overruns.iter().sum::<f64>();
        // Where a vCPU dirties more between two stalls than fits, the rest fits while it stalls: once that is sent.
        let sent_s =
            overrun / conditions.pages_per_s.max(1e-9) + ROUNDS_IN_STALL * conditions.round_overhead_s;
        let is_sent = |stall_s: f64| overrun <= conditions.fits || stall_s >= sent_s;
        while (falls(stall_s) < enough || !is_sent(stall_s)) && stall_s < longest_s {
            stall_s = (stall_s * 2.0).min(longest_s);
        }
        let quota = quota_in(stall_s);
        let (mut lost_share, mut lost_vcpus) = (0.0f64, 0.0);
        for ((vcpu, pages), overrun) in held().zip(&self.heavy).zip(&overruns) {
            let floor = overrun / (stall_s * stretch(overruns.len()) + view.gate_s);
            let dirties = (quota.max(floor) * self.seconds).min(*pages);
            let lost = 1.0 - (vcpu.curve.time_to(dirties) / self.seconds).min(1.0);
            lost_share = lost_share.max(lost);
            lost_vcpus += lost;
        }
        let quota = Quota::Pages(PagesPerSlice::over(quota, 1.0));
        let quotas = self.is_held.iter().map(|held| held.then_some(quota)).collect();
        Hold {
            quotas,
            level: self.level,
            stretch: stretch(overruns.len()),
            longest_stall: duration(stall_s),
            min_share,
            does: Braking { adds_per_s: adds_in(stall_s), lost_share, lost_vcpus },
            less_at_first: self.light_at_last - self.light_per_s,
            can_fit: is_sent(stall_s),
            least_per_s: least,
        }
    }

    /// All vCPUs lose the same share of their time.
    fn hold_by_time(&self, view: &View<'_>, least_per_s: f64, min_share: f64) -> Hold {
        let is_held = !self.heavy.is_empty();
        let runs = view.writers.others.time_to(least_per_s * self.seconds).min(self.seconds) / self.seconds;
        let stands = if is_held { 1.0 - runs.max(min_share).min(1.0) } else { 0.0 };
        let adds = view.writers.others.at(self.seconds * (1.0 - stands)) / self.seconds;
        let at_last = if is_held { adds } else { self.light_at_last };
        let vcpus = view.writers.vcpus.len();
        Hold {
            quotas: vec![is_held.then_some(Quota::Time(stands)); vcpus],
            level: self.level,
            stretch: 1.0,
            longest_stall: LONGEST_STALL,
            min_share,
            does: Braking { adds_per_s: at_last, lost_share: stands, lost_vcpus: stands * vcpus as f64 },
            less_at_first: at_last - adds,
            can_fit: true,
            least_per_s,
        }
    }
}

/// Of several that are held, the heaviest stall for a little longer than the others.
fn stretch(held: usize) -> f64 {
    if held > 1 { MOST_STRETCH } else { 1.0 }
}

impl Hold {
    /// What is left falls by at least this share of what the link takes, down to what fits.
    fn holds(&self, conditions: &Conditions, share: f64) -> bool {
        self.can_fit && conditions.pages_per_s - self.does.adds_per_s > share * conditions.pages_per_s
    }
}

/// The end, if the guest is held from now on until what is `left` fits; `None` if that does not end.
fn descent(conditions: &Conditions, hold: &Hold, left: f64) -> Option<Forecast> {
    let lost_share = hold.does.lost_share;
    let adds_per_s = hold.does.adds_per_s - hold.less_at_first / 2.0;
    let falls_per_s = conditions.pages_per_s - adds_per_s;
    let last = left.min(conditions.fits);
    let above = left - last;
    if above > 0.0 && falls_per_s <= 0.0 {
        return None;
    }
    // What was added in one round is sent in the next, until it fits.
    let shrinks = (adds_per_s / conditions.pages_per_s).clamp(0.01, 0.99);
    let rounds = (left / last.max(1.0)).max(1.0).ln() / -shrinks.ln();
    let seconds = if above > 0.0 { above / falls_per_s + rounds * conditions.round_overhead_s } else { 0.0 };
    let downtime_s = conditions.downtime_s(last);
    Some(Forecast {
        finish_s: seconds + downtime_s,
        downtime_s,
        lost_s: seconds * lost_share + downtime_s,
        pages: left + adds_per_s * seconds,
        rounds: u32::try_from(whole(rounds.ceil())).unwrap_or(u32::MAX),
    })
}

/// What the deadline leaves, with a margin.
fn remaining_s(view: &View<'_>) -> Option<f64> {
    let deadline = view.settings.limits.deadline?;
    let left = deadline.as_secs_f64() * (1.0 - DEADLINE_MARGIN) - view.now.as_secs_f64();
    Some(left / (1.0 + FORECAST_MARGIN))
}

/// A limit ends the migration with whatever is left: then a guest that is held back leaves least.
fn ends_anyway(view: &View<'_>) -> bool {
    let limits = &view.settings.limits;
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

/// The level λ with `Σ min(nᵢ, λ) = budget`; infinite if all of it fits. Negative or undefined demands are none.
fn water_fill(demands: &[f64], budget: f64) -> f64 {
    let mut sorted: Vec<f64> = demands.iter().map(|demand| sane(*demand)).collect();
    let mut left = sane(budget);
    if sorted.iter().sum::<f64>() <= left {
        return f64::INFINITY;
    }
    sorted.sort_unstable_by(f64::total_cmp);
    let mut sharers = sorted.len();
    for demand in sorted {
        let level = left / sharers as f64;
        if demand > level {
            return level;
        }
        left -= demand;
        sharers -= 1;
    }
    // Only rounding leads here: everything fits after all.
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_heavy_writers_of_different_weight_share_what_the_light_ones_leave() {
        // Seven at 5 MB/s for a second, one heavy; then two heavy ones.
        let light = [1220.0; 7];
        let level = water_fill(&[&light[..], &[38_400.0]].concat(), 12_000.0);
        assert!((level - (12_000.0 - 7.0 * 1220.0)).abs() < 1e-6);
        let level = water_fill(&[1220.0, 20_000.0, 40_000.0], 11_220.0);
        assert!((level - 5000.0).abs() < 1e-6);
        let level = water_fill(&[1220.0, 4000.0, 40_000.0], 11_220.0);
        assert!((level - 6000.0).abs() < 1e-6, "the lighter of the two is within its share");
    }

    #[test]
    fn nobody_is_throttled_when_all_fits_and_nothing_is_left_when_nothing_is_there() {
        assert_eq!(water_fill(&[10.0, 20.0], 30.0), f64::INFINITY);
        assert_eq!(water_fill(&[], 0.0), f64::INFINITY);
        assert_eq!(water_fill(&[5.0], 0.0), 0.0);
    }

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

    proptest! {
        #[test]
        fn the_water_stands_level_and_the_innocent_are_dry(
            demands in prop::collection::vec(0.0..1e9f64, 0..200), budget in 0.0..2e10f64,
        ) {
            let level = water_fill(&demands, budget);
            let poured: f64 = demands.iter().map(|demand| demand.min(level)).sum();
            let total: f64 = demands.iter().sum();
            prop_assert!((poured - total.min(budget)).abs() <= 1e-6 * total.max(1.0));
            let equal_share = budget / demands.len().max(1) as f64;
            prop_assert!(level >= equal_share * (1.0 - 1e-9), "whoever stays within an equal share is safe");
        }

        #[test]
        fn nonsense_has_no_level_but_an_answer(demands in prop::collection::vec(any::<f64>(), 0..20), budget in any::<f64>()) {
            prop_assert!(water_fill(&demands, budget) >= 0.0);
        }
    }
}
