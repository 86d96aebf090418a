//! What the guest and the link are like, as far as observed, and what follows for the rounds to come.
//!
//! Pure numbers: seconds since the migration's start, pages, bytes. A coming round of `D` pages takes
//! `T = D ÷ B` and leaves `Σ nᵢ(T)`, which is the next round's `D`. Since that map never falls, its rounds either
//! shrink down to what fits the downtime, or stop shrinking at a fixed point above it: **then, and only then, the
//! migration will not converge**, and that is known as soon as the curves are.

use super::bandwidth::Bandwidth;
use super::curve::Curve;
use super::fair_share::{allowance, water_fill};
use super::units::sane;

/// Rounds that anyone is ready to predict, or to wait for.
const MOST_ROUNDS: u32 = 200;
/// A round that is not smaller than this share of the one before is as good as no progress.
const NO_PROGRESS: f64 = 0.995;

/// The curves of all who write guest memory, and the link.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// Per vCPU.
    pub curves: Vec<Curve>,
    /// What nobody was named for: the VMM's own writes, devices, or all of a backend that cannot tell.
    pub others: Curve,
    pub bandwidth: Bandwidth,
}

/// What a forecast needs besides the curves. All rates in pages per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// B.
    pub pages_per_s: f64,
    /// B_switch.
    pub switch_pages_per_s: f64,
    /// P*, in pages.
    pub fits: f64,
    /// Of the switchover, besides sending.
    pub overhead_s: f64,
    /// Of each round, besides sending: the harvest and its system calls.
    pub round_overhead_s: f64,
    /// No round is larger.
    pub ram: f64,
}

/// A coming round, or what is left of the current one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Pages to send.
    pub pages: f64,
    /// It is the current one: counting goes on from what has been observed.
    pub current: bool,
}

/// What a round would do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub seconds: f64,
    /// Pages that it leaves dirty.
    pub left: f64,
    /// Time that its worst-off vCPU stands still.
    pub lost_s: f64,
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

    /// Running time, from now, until it has dirtied `pages` in `round`.
    pub(crate) fn time_left_to(&self, round: Round, pages: f64) -> f64 {
        if !round.current {
            return self.time_to(pages);
        }
        let (t, counted) = self.last();
        (self.time_to(self.at(t) + (pages - counted).max(0.0)) - t).max(0.0)
    }
}

impl Terms {
    pub fn seconds(&self, pages: f64) -> f64 {
        sane(pages) / self.pages_per_s.max(1e-9) + self.round_overhead_s
    }

    /// The end of a migration that has `left` pages when the guest is stopped.
    pub fn end(&self, so_far: Forecast, left: f64) -> Forecast {
        let downtime_s = self.overhead_s + left / self.switch_pages_per_s.max(1e-9);
        Forecast {
            finish_s: so_far.finish_s + downtime_s,
            downtime_s,
            lost_s: so_far.lost_s + downtime_s,
            pages: so_far.pages + left,
            ..so_far
        }
    }
}

impl Forecast {
    pub const NOTHING: Self = Self { finish_s: 0.0, downtime_s: 0.0, lost_s: 0.0, pages: 0.0, rounds: 0 };

    pub fn after(self, round: Round, outcome: &Outcome) -> Self {
        Self {
            finish_s: self.finish_s + outcome.seconds,
            lost_s: self.lost_s + outcome.lost_s,
            pages: self.pages + round.pages,
            rounds: self.rounds + u32::from(!round.current),
            ..self
        }
    }
}

impl Model {
    /// What `round` would do under a brake that treats all vCPUs alike.
    pub fn round(&self, terms: &Terms, round: Round, brake: Brake) -> Outcome {
        let seconds = terms.seconds(round.pages);
        let running = match brake {
            Brake::Time(share) => seconds * (1.0 - share),
            Brake::Off | Brake::Rate(_) => seconds,
        };
        let dirtied = |curve: &Curve| {
            let free = curve.by_the_end(round, running);
            let Brake::Rate(rate) = brake else { return free };
            let counted = if round.current { curve.last().1 } else { 0.0 };
            free.min(counted + rate * seconds)
        };
        let left = self.curves.iter().map(dirtied).sum::<f64>() + self.others.by_the_end(round, running);
        let lost = |curve: &Curve| (seconds - curve.time_left_to(round, dirtied(curve))).max(0.0);
        let lost_s = match brake {
            Brake::Off => 0.0,
            Brake::Time(share) => seconds * share,
            Brake::Rate(_) => self.curves.iter().map(lost).fold(0.0, f64::max),
        };
        Outcome { seconds, left: left.min(terms.ram), lost_s }
    }

    /// What `round` would do if fair share let it leave `target` pages, and the level λ that this takes.
    pub fn fair_round(&self, terms: &Terms, round: Round, target: f64, min_share: f64) -> (Outcome, f64) {
        let seconds = terms.seconds(round.pages);
        let others = self.others.by_the_end(round, seconds);
        let demands: Vec<f64> = self.curves.iter().map(|curve| curve.by_the_end(round, seconds)).collect();
        let level = water_fill(&demands, target - others);
        let (mut left, mut lost_s) = (others, 0.0f64);
        for (curve, demand) in self.curves.iter().zip(&demands) {
            let allowed = allowance(*demand, level, min_share);
            left += allowed;
            if *demand > level {
                let runs = curve.time_left_to(round, allowed);
                lost_s = lost_s.max(seconds - runs);
            }
        }
        (Outcome { seconds, left: left.min(terms.ram), lost_s }, level)
    }

    /// The rounds to come under a brake that `next` sets for each, from the round's outcome; `None` if they stop
    /// shrinking before they fit.
    pub fn forecast(
        &self,
        terms: &Terms,
        first: Round,
        mut brake: Brake,
        mut next: impl FnMut(&Outcome, f64) -> Option<Brake>,
    ) -> Option<Forecast> {
        let mut so_far = Forecast::NOTHING;
        let mut round = first;
        for _ in 0..MOST_ROUNDS {
            let outcome = self.round(terms, round, brake);
            so_far = so_far.after(round, &outcome);
            if outcome.left <= terms.fits {
                return Some(terms.end(so_far, outcome.left));
            }
            let changed = next(&outcome, round.pages);
            brake = changed.unwrap_or(brake);
            if no_progress(round, &outcome) && changed.is_none() && !matches!(brake, Brake::Time(_)) {
                return None;
            }
            round = Round { pages: outcome.left, current: false };
        }
        None
    }
}

/// The round does not get the migration anywhere. What is left of the current round says nothing about that.
pub(crate) fn no_progress(round: Round, outcome: &Outcome) -> bool {
    !round.current && outcome.left >= round.pages * NO_PROGRESS
}
