//! Which of a round's pages will be dirty again before their turn comes, and so need not be sent.
//!
//! Let n(t) be a writer's curve. Right after a round's pages were harvested, which it dirtied while it ran for `T`,
//! it dirties n(t) pages in a time t. In `T + t` without that recycle it would have dirtied n(T + t): so n(T + t) −
//! n(T) of them are others, and **n(t) + n(T) − n(T + t) belong to the round**. That is none of a steady stream's,
//! all of a working set that `T` was long enough to fill, and for random writes the share that `T` filled. A page of
//! the round that is dirtied again is struck off it if it has not been sent by then.

use super::curve::Curve;
use super::model::{Conditions, Model, Round};

/// Steps in which a round is walked through.
const STEPS: u32 = 4;

impl Curve {
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

impl Model {
    /// How many of the pages of `round` will be sent, if each writer runs for the share of the time that `runs` says
    /// (the last index is that of the others).
    pub(crate) fn sent(&self, conditions: &Conditions, round: Round, runs: impl Fn(usize) -> f64) -> f64 {
        let step_s = conditions.seconds(round) / f64::from(STEPS);
        let sent_in_step = round.pages / f64::from(STEPS);
        let again_until = |seconds: f64| {
            let again = |(index, curve): (usize, &Curve)| {
                let ran = if round.current { curve.last().0 } else { 0.0 };
                curve.again(round.after_s, ran + seconds * runs(index))
            };
            self.curves.iter().chain([&self.others]).enumerate().map(again).sum::<f64>()
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
}
