//! What the guest and the link are like, as far as observed, and what follows for the rounds to come.
//!
//! Pure numbers: seconds since the migration's start, pages, bytes. A coming round of `D` pages takes
//! `T = D ÷ B` and leaves `Σ nᵢ(T)`, which is the next round's `D`. Since that map never falls, its rounds either
//! shrink down to what fits the downtime, or stop shrinking at a fixed point above it: **then, and only then, the
//! migration will not converge**, and that is known as soon as the curves are.

use bitvec::vec::BitVec;

use super::curve::Curve;
use super::fair_share::{Held, Levels, water_fill};
use super::link::Link;
use super::units::sane;

/// A braked round aims at this share of P*: gates close a little late, and a round that misses P* by a page is a
/// round for nothing.
pub(crate) const AIM: f64 = 0.9;
/// A vCPU is within its fair share if rounds would shrink at least by a quarter were all like it.
pub(crate) const FAIR: f64 = 0.75;
/// What a vCPU dirties in this time after a recycle says how fast it dirties whenever it is let run.
const FRESH_S: f64 = 0.01;
/// One that comes out of a stall is slower: of 75 pages that this rate lets expect between two stalls, 57 came
/// (kernel-notes/steering.md).
const AFTER_A_STALL: f64 = 0.75;
/// Rounds that anyone is ready to predict, or to wait for.
const MOST_ROUNDS: u32 = 200;
/// A round that is not smaller than this share of the one before is nothing to wait for.
const SHRINKING: f64 = 0.9;
/// And one that is not smaller than this share is as good as no progress.
const NO_PROGRESS: f64 = 0.995;

/// The curves of all who write guest memory, and the link.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// Per vCPU.
    pub curves: Vec<Curve>,
    /// What nobody was named for: the VMM's own writes, devices, or all of a backend that cannot tell.
    pub others: Curve,
    pub link: Link,
    /// Per vCPU: pages that it dirties between two stalls because closing its gate takes time, once measured.
    pub overruns: Vec<Option<f64>>,
    /// Per vCPU: held back in the current round. What it would have dirtied can no longer be seen then, and that it
    /// dirties little is no reason to let it go.
    pub held: BitVec,
}

/// The demand of a vCPU that is held back: more than any level.
const UNKNOWN_DEMAND: f64 = 1e18;

/// What a forecast needs besides the curves. All rates in pages per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conditions {
    /// B, for rounds to come, and for the current one: its pages may be cheaper (zero, never touched).
    pub pages_per_s: f64,
    pub current_pages_per_s: f64,
    /// Pages that are dirty again are struck off the round that was to send them.
    pub strikes_off: bool,
    /// B_switch.
    pub switch_pages_per_s: f64,
    /// P*, in pages.
    pub fits: f64,
    /// Of the switchover, besides sending.
    pub overhead_s: f64,
    /// Of each round, besides sending: the harvest and its system calls.
    pub round_overhead_s: f64,
    /// From a vCPU's overdraft to its gate being closed on it, as far as not measured in pages.
    pub gate_s: f64,
    /// Nobody is stopped for longer at a stretch.
    pub longest_stall_s: f64,
    /// The share of a round's pages that it may leave without anybody being held back.
    pub fair: f64,
    /// The share of their pages that those who are held back keep, however hard.
    pub min_share: f64,
    /// No round is larger.
    pub ram: f64,
}

/// A coming round, or what is left of the current one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Pages to send.
    pub pages: f64,
    /// Pages that it began with; the same for a coming one.
    pub of: f64,
    /// It is the current one: counting goes on from what has been observed.
    pub current: bool,
    /// How long the vCPUs ran to dirty these pages: for ever, if these are all there are; not at all, if they were held
    /// back, and so will dirty others next.
    pub after_s: f64,
    /// How long it has been going on with nobody held back.
    pub free_s: f64,
}

impl Round {
    /// The round after one in which nobody was held back for so long.
    pub fn coming(pages: f64, after_s: f64) -> Self {
        Self { pages, of: pages, current: false, after_s, free_s: 0.0 }
    }

    /// What is left to be sent after it, if nobody is held back in it.
    pub fn next(&self, outcome: &Outcome) -> Self {
        Self::coming(outcome.left, self.free_s + outcome.seconds)
    }

    /// Its pages are all that there are.
    pub fn is_first(&self) -> bool {
        self.after_s.is_infinite()
    }
}

/// What a round would do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub seconds: f64,
    /// Pages that it sends: not those that were struck off.
    pub sent: f64,
    /// Pages that it leaves dirty.
    pub left: f64,
    /// Time that its worst-off vCPU stands still.
    pub lost_s: f64,
}

/// A braked round.
#[derive(Clone, Debug)]
pub(crate) struct Fair {
    /// The round, but only with the pages that it will send.
    pub round: Round,
    /// Per vCPU; `None`: it is not held back.
    pub held: Vec<Option<Held>>,
    /// λ.
    pub level: f64,
}

/// A whole migration, from now on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forecast {
    /// From now to the guest running at the destination.
    pub finish_s: f64,
    pub downtime_s: f64,
    /// Throttling and downtime of the worst-off vCPU.
    pub lost_s: f64,
    /// Pages still to be sent.
    pub pages: f64,
    /// Rounds still to come, the current one and the final phase not counted.
    pub rounds: u32,
}

/// How a forecast slows the guest down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Brake {
    Off,
    /// Every vCPU stands for this share of its time.
    Time(f64),
    /// Every vCPU dirties at most so many pages a second.
    Rate(f64),
}

impl Curve {
    /// Pages dirtied by the end of `round` if the vCPU runs for `seconds` of it.
    pub(crate) fn by_the_end(&self, round: Round, seconds: f64) -> f64 {
        if !round.current {
            return self.at(seconds);
        }
        let (t, counted) = self.last();
        counted + (self.at(t + seconds) - self.at(t)).max(0.0)
    }

    /// Pages that a vCPU will dirty between two stalls if closing its gate takes so long, until that is measured: at the
    /// rate of a freshly recycled vCPU, over long enough that a late first look does not distort it.
    pub(crate) fn overrun_in(&self, gate_s: f64) -> f64 {
        AFTER_A_STALL * gate_s * self.at(FRESH_S) / FRESH_S
    }

    /// Running time, from now, until it has dirtied `pages` in `round`.
    pub(crate) fn time_left_to(&self, round: Round, pages: f64) -> f64 {
        if !round.current {
            return self.time_to(pages);
        }
        let (t, counted) = self.last();
        (self.time_to(self.at(t) + (pages - counted).max(0.0)) - t).max(0.0)
    }
}

impl Conditions {
    /// How long `round` takes.
    pub fn seconds(&self, round: Round) -> f64 {
        let pages_per_s = if round.current { self.current_pages_per_s } else { self.pages_per_s };
        sane(round.pages) / pages_per_s.max(1e-9) + self.round_overhead_s
    }

    /// A vCPU that may dirty `quota` pages in `round`. However hard the brake, it will dirty what it has dirtied
    /// already and dirties between two stalls, since gates are neither closed for longer than the longest stall nor
    /// at once.
    fn held(&self, curve: &Curve, overrun: Option<f64>, round: Round, quota: f64) -> Held {
        let seconds = self.seconds(round);
        let demand = curve.by_the_end(round, seconds);
        let counted = if round.current { curve.last().1 } else { 0.0 };
        let stalls = seconds / (self.longest_stall_s + self.gate_s);
        let overrun = overrun.unwrap_or_else(|| curve.overrun_in(self.gate_s));
        let dirties = quota.max(counted + stalls * overrun).min(demand);
        Held { quota: quota.min(demand), dirties, stretch: 1.0 }
    }

    /// The end of a migration whose guest is stopped `seconds` into a round of `of_s` with `left` pages to go.
    fn end(&self, so_far: Forecast, round: Round, seconds: f64, outcome: &Outcome, left: f64) -> Forecast {
        let share = if outcome.seconds > 0.0 { (seconds / outcome.seconds).min(1.0) } else { 0.0 };
        let downtime_s = self.overhead_s + left / self.switch_pages_per_s.max(1e-9);
        Forecast {
            finish_s: so_far.finish_s + seconds + downtime_s,
            downtime_s,
            lost_s: so_far.lost_s + outcome.lost_s * share + downtime_s,
            pages: so_far.pages + outcome.sent * share + left,
            rounds: so_far.rounds + u32::from(!round.current),
        }
    }
}

impl Forecast {
    pub const NOTHING: Self = Self { finish_s: 0.0, downtime_s: 0.0, lost_s: 0.0, pages: 0.0, rounds: 0 };

    pub fn after(self, round: Round, outcome: &Outcome) -> Self {
        Self {
            finish_s: self.finish_s + outcome.seconds,
            lost_s: self.lost_s + outcome.lost_s,
            pages: self.pages + outcome.sent,
            rounds: self.rounds + u32::from(!round.current),
            ..self
        }
    }
}

/// Steps in which the moment of the switchover is searched for.
const BISECTIONS: u32 = 8;

impl Model {
    fn counted(&self, round: Round) -> f64 {
        let all = self.curves.iter().chain([&self.others]);
        if round.current { all.map(|curve| curve.last().1).sum() } else { 0.0 }
    }

    /// Pages that are dirty `seconds` into `round` under a brake that treats all vCPUs alike.
    fn dirtied(&self, round: Round, seconds: f64, brake: Brake) -> f64 {
        let running = seconds * brake.running();
        let all = self.curves.iter().map(|curve| brake.dirtied(curve, round, seconds)).sum::<f64>();
        all + self.others.by_the_end(round, running)
    }

    /// What `round` would do under a brake that treats all vCPUs alike.
    pub fn round(&self, conditions: &Conditions, round: Round, brake: Brake) -> Outcome {
        let outcome = self.round_of(conditions, round, round.pages, brake);
        let strikes_off = conditions.strikes_off && matches!(brake, Brake::Off);
        if !strikes_off || !(round.is_first() || shrinks(round, &outcome)) {
            return outcome;
        }
        self.round_of(conditions, round, self.sent(conditions, round, |_| 1.0), brake)
    }

    fn round_of(&self, conditions: &Conditions, round: Round, sent: f64, brake: Brake) -> Outcome {
        let seconds = conditions.seconds(Round { pages: sent, ..round });
        let struck_off = round.pages - sent + self.counted(round);
        let left = self.dirtied(round, seconds, brake).max(struck_off).min(conditions.ram);
        let lost = |curve: &Curve| seconds - curve.time_left_to(round, brake.dirtied(curve, round, seconds));
        let lost_s = match brake {
            Brake::Off => 0.0,
            Brake::Time(share) => seconds * share,
            Brake::Rate(_) => self.curves.iter().map(lost).fold(0.0, f64::max),
        };
        Outcome { seconds, sent, left, lost_s }
    }

    /// The end, if `round` under a brake that treats all alike is the last one. What is still to be sent and what
    /// is dirty again add up to a concave curve, which falls below P* once.
    pub fn end(
        &self,
        conditions: &Conditions,
        so_far: Forecast,
        round: Round,
        outcome: &Outcome,
        brake: Brake,
    ) -> Forecast {
        let left_at = |seconds: f64| {
            let unsent = round.pages * (1.0 - seconds / outcome.seconds.max(1e-9)).clamp(0.0, 1.0);
            (unsent + self.dirtied(round, seconds, brake)).min(conditions.ram)
        };
        if left_at(0.0) <= conditions.fits {
            return conditions.end(so_far, round, 0.0, outcome, left_at(0.0));
        }
        let (mut too_early, mut late_enough) = (0.0, outcome.seconds);
        for _ in 0..BISECTIONS {
            let middle = (too_early + late_enough) / 2.0;
            if left_at(middle) > conditions.fits {
                too_early = middle;
            } else {
                late_enough = middle;
            }
        }
        conditions.end(so_far, round, late_enough, outcome, conditions.fits.max(outcome.left))
    }

    /// What `round` would do, and whether it is the last one, if fair share braked it down to `target` pages.
    pub fn fair_round(
        &self,
        conditions: &Conditions,
        so_far: Forecast,
        round: Round,
        target: f64,
    ) -> (Outcome, Option<Forecast>) {
        let fair = self.fair(conditions, round, target);
        let seconds = conditions.seconds(fair.round);
        let mut left = self.others.by_the_end(round, seconds);
        let mut lost_s = 0.0f64;
        for (curve, held) in self.curves.iter().zip(fair.held) {
            left += held.map_or_else(|| curve.by_the_end(round, seconds), |held| held.dirties);
            let lost = |held: Held| seconds - curve.time_left_to(round, held.dirties);
            lost_s = lost_s.max(held.map_or(0.0, lost));
        }
        let outcome = Outcome { seconds, sent: fair.round.pages, left: left.min(conditions.ram), lost_s };
        let end = (outcome.left <= conditions.fits).then(|| {
            // Quotas are even: what is left falls along a line.
            let at_first = round.pages + self.counted(round);
            let above = (at_first - conditions.fits).max(0.0);
            let until = if above > 0.0 { seconds * above / (at_first - outcome.left) } else { 0.0 };
            conditions.end(so_far, round, until, &outcome, at_first.min(conditions.fits))
        });
        (outcome, end)
    }

    /// Who is held back, and how far, if `round` is to leave `target` pages.
    pub fn fair(&self, conditions: &Conditions, round: Round, target: f64) -> Fair {
        let fair = self.fair_of(conditions, round, target);
        if !conditions.strikes_off || round.after_s <= 0.0 {
            return fair;
        }
        let seconds = conditions.seconds(round);
        let runs = |index: usize| match (self.curves.get(index), fair.held.get(index)) {
            (Some(curve), Some(Some(held))) => (curve.time_left_to(round, held.dirties) / seconds).min(1.0),
            _ => 1.0,
        };
        let sent = self.sent(conditions, round, runs);
        if sent < round.pages {
            self.fair_of(conditions, Round { pages: sent, ..round }, target)
        } else {
            fair
        }
    }

    fn fair_of(&self, conditions: &Conditions, round: Round, target: f64) -> Fair {
        let seconds = conditions.seconds(round);
        let others = self.others.by_the_end(round, seconds);
        let held = |index: usize| round.current && self.held.get(index).is_some_and(|held| *held);
        let demand = |(index, curve): (usize, &Curve)| {
            if held(index) { UNKNOWN_DEMAND } else { curve.by_the_end(round, seconds) }
        };
        let demands: Vec<f64> = self.curves.iter().enumerate().map(demand).collect();
        let levels =
            Levels::new(&demands, others, target, (conditions.fits * AIM).max(round.of * conditions.fair));
        let is_held = |demand: f64| demand > levels.fair;
        let wanted = self.curves.iter().zip(&demands).filter(|(_, demand)| is_held(**demand));
        let wanted: Vec<f64> = wanted.map(|(curve, _)| curve.by_the_end(round, seconds)).collect();
        let least = water_fill(&wanted, conditions.min_share * wanted.iter().sum::<f64>());
        let held = |(index, demand): (usize, f64)| {
            let overrun = self.overruns.get(index).copied().flatten();
            let held = || conditions.held(&self.curves[index], overrun, round, levels.quota.max(least));
            is_held(demand).then(held)
        };
        let held = demands.into_iter().enumerate().map(held).collect();
        Fair { round, held, level: levels.fair }
    }

    /// The rounds to come under a brake that `next` sets for each, from the round's outcome; `None` if they stop
    /// shrinking before they fit.
    pub fn forecast(
        &self,
        conditions: &Conditions,
        first: Round,
        mut brake: Brake,
        mut next: impl FnMut(&Outcome, f64) -> Option<Brake>,
    ) -> Option<Forecast> {
        let mut so_far = Forecast::NOTHING;
        let mut round = first;
        for _ in 0..MOST_ROUNDS {
            let outcome = self.round(conditions, round, brake);
            if outcome.left <= conditions.fits {
                return Some(self.end(conditions, so_far, round, &outcome, brake));
            }
            so_far = so_far.after(round, &outcome);
            let changed = next(&outcome, round.pages);
            brake = changed.unwrap_or(brake);
            if no_progress(round, &outcome) && changed.is_none() && !matches!(brake, Brake::Time(_)) {
                return None;
            }
            round = round.next(&outcome);
        }
        None
    }
}

impl Brake {
    fn running(self) -> f64 {
        match self {
            Self::Time(share) => 1.0 - share,
            Self::Off | Self::Rate(_) => 1.0,
        }
    }

    fn dirtied(self, curve: &Curve, round: Round, seconds: f64) -> f64 {
        let free = curve.by_the_end(round, seconds * self.running());
        let Self::Rate(rate) = self else { return free };
        let counted = if round.current { curve.last().1 } else { 0.0 };
        free.min(counted + rate * seconds)
    }
}

/// The round leaves markedly less than it began with.
pub(crate) fn shrinks(round: Round, outcome: &Outcome) -> bool {
    outcome.left <= round.of * SHRINKING
}

/// The round does not get the migration anywhere. What is left of the current round says nothing about that.
pub(crate) fn no_progress(round: Round, outcome: &Outcome) -> bool {
    !round.current && outcome.left >= round.pages * NO_PROGRESS
}
