//! What follows for the rounds to come from how fast the guest dirties and the link drains.
//!
//! Pure numbers: seconds, pages. A coming round of `D` pages takes `T = D ÷ B` and leaves `Σ nᵢ(T)`, which is the next round's
//! `D`. Since that map never falls, its rounds either shrink down to what fits the downtime, or stop shrinking at a fixed
//! point above it: **then, and only then, the migration will not converge by itself**, and that is known as soon as the
//! curves are.
//!
//! A page of a round that is dirtied again before its turn is struck off. Right after a round's pages were harvested, which
//! a writer dirtied while it ran for `T`, it dirties n(t) pages in a time t. In `T + t` without that recycle it would have
//! dirtied n(T + t): so n(T + t) − n(T) of them are others, and **n(t) + n(T) − n(T + t) belong to the round**. That is
//! none of a steady stream's, all of a working set that `T` was long enough to fill, and for random writes the share that
//! `T` filled.

use super::curve::Curve;
use super::units::sane;
use super::vcpu::Vcpu;

/// What a vCPU dirties in this time after a recycle says how fast it dirties whenever it is let run.
const FRESH_S: f64 = 0.01;
/// Rounds that anyone is ready to predict, or to wait for.
pub(crate) const MOST_ROUNDS: u32 = 200;
/// A round that is not smaller than this share of the one before is nothing to wait for.
const SHRINKING: f64 = 0.9;
/// And one that is not smaller than this share is as good as no progress.
const NO_PROGRESS: f64 = 0.995;
/// Steps in which a round is walked through to find what is struck off it.
const STEPS: u32 = 4;
/// Steps in which the moment of the switchover is searched for.
const BISECTIONS: u32 = 8;

/// All who write guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writers<'a> {
    pub vcpus: &'a [Vcpu],
    /// What nobody was named for: the VMM's own writes, devices, or all of a backend that cannot tell.
    pub others: &'a Curve,
    /// All of them together, if nobody is held back: what they dirty is predicted without asking each of a thousand.
    pub all: &'a Curve,
}

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
    /// Of each round, besides sending: the harvest, its system calls, and a round trip.
    pub round_overhead_s: f64,
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

    /// It leaves markedly less than it began with.
    pub fn shrinks(&self, outcome: &Outcome) -> bool {
        outcome.left <= self.of * SHRINKING
    }

    /// It does not get the migration anywhere. What is left of the current round says nothing about that.
    fn no_progress(&self, outcome: &Outcome) -> bool {
        !self.current && outcome.left >= self.pages * NO_PROGRESS
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

/// A whole migration, from now on.
#[derive(Clone, Copy, Debug, Default)]
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

/// How a forecast slows all vCPUs down alike.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Brake {
    Off,
    /// Every vCPU stands for this share of its time.
    Time(f64),
    /// Every vCPU dirties at most so many pages a second.
    Rate(f64),
}

impl Brake {
    fn running(self) -> f64 {
        match self {
            Self::Time(share) => 1.0 - share,
            Self::Off | Self::Rate(_) => 1.0,
        }
    }
}

/// Pages that a vCPU dirties in `seconds` of `round` at no more than `rate`.
fn limited(curve: &Curve, rate: f64, round: Round, seconds: f64) -> f64 {
    let counted = if round.current { curve.last().1 } else { 0.0 };
    curve.by_the_end(round, seconds).min(counted + rate * seconds)
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

    /// Pages that a vCPU will dirty if closing its gate takes so long: at the rate of a freshly recycled vCPU, over long
    /// enough that a late first look does not distort it.
    pub(crate) fn overrun_in(&self, gate_s: f64) -> f64 {
        gate_s * self.at(FRESH_S) / FRESH_S
    }

    /// Pages that a vCPU dirties in the next `t` seconds of running, whether it goes on as it does or begins anew after a
    /// recycle: whichever is more.
    pub(crate) fn soon(&self, t: f64) -> f64 {
        let now = self.last().0;
        self.at(t).max(self.at(now + t) - self.at(now))
    }

    /// Running time, from now, until it has dirtied `pages` in `round`.
    fn time_left_to(&self, round: Round, pages: f64) -> f64 {
        if !round.current {
            return self.time_to(pages);
        }
        let (t, counted) = self.last();
        (self.time_to(self.at(t) + (pages - counted).max(0.0)) - t).max(0.0)
    }

    /// Of the pages dirtied in the first `t` seconds of running after a recycle, those that were dirtied in the
    /// `before` seconds of running up to it, too.
    fn again(&self, before: f64, t: f64) -> f64 {
        let dirtied = self.at(t);
        if before.is_infinite() {
            return dirtied;
        }
        (dirtied + self.at(before) - self.at(before + t)).clamp(0.0, dirtied)
    }
}

impl Conditions {
    /// How long `round` takes.
    pub fn seconds(&self, round: Round) -> f64 {
        let pages_per_s = if round.current { self.current_pages_per_s } else { self.pages_per_s };
        sane(round.pages) / pages_per_s.max(1e-9) + self.round_overhead_s
    }

    /// How long the guest stands still with `left` pages to go.
    pub fn downtime_s(&self, left: f64) -> f64 {
        self.overhead_s + left / self.switch_pages_per_s.max(1e-9)
    }
}

impl Forecast {
    /// The same after `round`.
    pub fn after(self, round: Round, outcome: &Outcome) -> Self {
        Self {
            finish_s: self.finish_s + outcome.seconds,
            lost_s: self.lost_s + outcome.lost_s,
            pages: self.pages + outcome.sent,
            rounds: self.rounds + u32::from(!round.current),
            ..self
        }
    }

    /// The end of a migration whose guest is stopped `seconds` into `round` with `left` pages to go.
    fn end(self, conditions: &Conditions, round: Round, seconds: f64, outcome: &Outcome, left: f64) -> Self {
        let share = if outcome.seconds > 0.0 { (seconds / outcome.seconds).min(1.0) } else { 0.0 };
        let downtime_s = conditions.downtime_s(left);
        Self {
            finish_s: self.finish_s + seconds + downtime_s,
            downtime_s,
            lost_s: self.lost_s + outcome.lost_s * share + downtime_s,
            pages: self.pages + outcome.sent * share + left,
            rounds: self.rounds + u32::from(!round.current),
        }
    }
}

impl Writers<'_> {
    /// Pages known to be dirty in `round`.
    fn counted(self, round: Round) -> f64 {
        if round.current { self.all.last().1 } else { 0.0 }
    }

    /// Pages that are dirty `seconds` into `round`.
    fn dirtied(self, round: Round, seconds: f64, brake: Brake) -> f64 {
        let Brake::Rate(rate) = brake else { return self.all.by_the_end(round, seconds * brake.running()) };
        let vcpus = self.vcpus.iter().map(|vcpu| limited(&vcpu.curve, rate, round, seconds)).sum::<f64>();
        vcpus + self.others.by_the_end(round, seconds)
    }

    /// What `round` would do.
    pub fn round(self, conditions: &Conditions, round: Round, brake: Brake) -> Outcome {
        let outcome = self.round_of(conditions, round, round.pages, brake);
        let strikes_off = conditions.strikes_off && matches!(brake, Brake::Off);
        if !strikes_off || !(round.is_first() || round.shrinks(&outcome)) {
            return outcome;
        }
        self.round_of(conditions, round, self.sent(conditions, round), brake)
    }

    fn round_of(self, conditions: &Conditions, round: Round, sent: f64, brake: Brake) -> Outcome {
        let seconds = conditions.seconds(Round { pages: sent, ..round });
        let struck_off = round.pages - sent + self.counted(round);
        let left = self.dirtied(round, seconds, brake).max(struck_off).min(conditions.ram);
        let lost_s = match brake {
            Brake::Off => 0.0,
            Brake::Time(share) => seconds * share,
            Brake::Rate(rate) => {
                let lost =
                    |curve: &Curve| seconds - curve.time_left_to(round, limited(curve, rate, round, seconds));
                self.vcpus.iter().map(|vcpu| lost(&vcpu.curve)).fold(0.0, f64::max)
            }
        };
        Outcome { seconds, sent, left, lost_s }
    }

    /// How many of the pages of `round` will be sent.
    fn sent(self, conditions: &Conditions, round: Round) -> f64 {
        let step_s = conditions.seconds(round) / f64::from(STEPS);
        let sent_in_step = round.pages / f64::from(STEPS);
        let again_until = |seconds: f64| {
            let ran = if round.current { self.all.last().0 } else { 0.0 };
            self.all.again(round.after_s, ran + seconds)
        };
        let mut unsent = round.pages;
        let mut struck_off = 0.0;
        let mut again_before = again_until(0.0);
        for step in 1..=STEPS {
            let again = again_until(step_s * f64::from(step));
            let halfway = (unsent - sent_in_step / 2.0).max(0.0);
            let of_these = (again - again_before).max(0.0) * (halfway / round.of.max(1.0));
            again_before = again;
            struck_off += of_these.min(unsent);
            unsent -= of_these + sent_in_step;
            if unsent <= 0.0 {
                break;
            }
        }
        round.pages - struck_off.min(round.pages)
    }

    /// The end, if `round` is the last one. What is still to be sent and what is dirty again add up to a concave curve, which
    /// falls below P* once.
    pub fn end(
        self,
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
            return so_far.end(conditions, round, 0.0, outcome, left_at(0.0));
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
        so_far.end(conditions, round, late_enough, outcome, conditions.fits.max(outcome.left))
    }

    /// The rounds to come under a brake that `next` sets for each, from the round's outcome; `None` if they stop
    /// shrinking before they fit.
    pub fn forecast(
        self,
        conditions: &Conditions,
        first: Round,
        mut brake: Brake,
        mut next: impl FnMut(&Outcome, f64) -> Option<Brake>,
    ) -> Option<Forecast> {
        let mut so_far = Forecast::default();
        let mut round = first;
        for _ in 0..MOST_ROUNDS {
            let outcome = self.round(conditions, round, brake);
            if outcome.left <= conditions.fits {
                return Some(self.end(conditions, so_far, round, &outcome, brake));
            }
            so_far = so_far.after(round, &outcome);
            let changed = next(&outcome, round.pages);
            brake = changed.unwrap_or(brake);
            if round.no_progress(&outcome) && changed.is_none() && !matches!(brake, Brake::Time(_)) {
                return None;
            }
            round = round.next(&outcome);
        }
        None
    }

    /// The same with nobody held back.
    pub fn free(self, conditions: &Conditions, first: Round) -> Option<Forecast> {
        self.forecast(conditions, first, Brake::Off, |_, _| None)
    }
}
