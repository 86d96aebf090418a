//! The rule of QEMU's `auto-converge`: when a period is too dirty twice, every vCPU loses more of its time.
//!
//! The rule is of 2013 (`bytes_dirty_period > bytes_xfer_period / 2`, seen twice, checked when the dirty log is
//! read and at least a second has passed); the growing share is of QEMU 2.5 (initial 20 %, increment 10 %, at
//! most 99 %). Kept as it is, its flaws included, to be compared with.

use std::time::Duration;

use super::rule::{Decision, Parameters, View};
use crate::PAGE_SIZE;
use crate::converge::Quota;
use crate::converge::model::{Brake, Conditions, Outcome};
use crate::converge::units::sane;

/// The dirty log counts as read at most this often, in seconds (`migration_bitmap_sync_precopy` in QEMU).
const PERIOD_S: f64 = 1.0;
/// Periods that must be too dirty before anything happens.
const PERIODS: u8 = 2;

/// Parameters of `auto-converge`, as `cpu-throttle-initial` and its neighbours in QEMU since 2.5.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AutoConverge {
    /// Share of CPU time taken at first, in percent.
    pub initial_percent: u8,
    /// Added each time that it was not enough, in percent.
    pub increment_percent: u8,
    /// Never more than this, in percent.
    pub max_percent: u8,
    /// A sync period is too dirty if it dirtied more than this share of what it transferred, in percent.
    pub trigger_percent: u8,
}

impl Default for AutoConverge {
    fn default() -> Self {
        Self { initial_percent: 20, increment_percent: 10, max_percent: 99, trigger_percent: 50 }
    }
}

impl Parameters for AutoConverge {
    fn rule(self) -> Box<dyn super::rule::Rule> {
        Box::new(Rule { parameters: self, ..Rule::default() })
    }
}

/// The state of the rule.
#[derive(Clone, Debug, Default)]
struct Rule {
    parameters: AutoConverge,
    percent: u8,
    too_dirty: u8,
    period_start: f64,
    dirtied_bytes: f64,
    transferred_before: f64,
}

impl Rule {
    /// The share of its time that every vCPU loses, 0 to 0.99.
    fn share(&self) -> f64 {
        f64::from(self.percent.min(99)) / 100.0
    }

    /// A round has ended at `now` seconds, with so much dirtied in it and `transferred_bytes` since the
    /// migration's start. True if the share has changed.
    fn on_sync(&mut self, now: f64, dirtied_bytes: f64, transferred_bytes: f64) -> bool {
        let p = self.parameters;
        self.dirtied_bytes += sane(dirtied_bytes);
        if now - self.period_start <= PERIOD_S {
            return false;
        }
        let transferred = transferred_bytes - self.transferred_before;
        let too_dirty = self.dirtied_bytes > transferred * f64::from(p.trigger_percent) / 100.0;
        (self.period_start, self.dirtied_bytes, self.transferred_before) = (now, 0.0, transferred_bytes);
        // As in QEMU, a period that is not too dirty does not take the first strike back.
        self.too_dirty += u8::from(too_dirty);
        if !too_dirty || self.too_dirty < PERIODS {
            return false;
        }
        self.too_dirty = 0;
        let before = self.percent;
        let next = if before == 0 { p.initial_percent } else { before.saturating_add(p.increment_percent) };
        self.percent = next.min(p.max_percent).min(99);
        self.percent != before
    }
}

impl super::rule::Rule for Rule {
    fn round_ended(&mut self, now: Duration, dirtied_bytes: f64, transferred_bytes: f64) {
        self.on_sync(now.as_secs_f64(), dirtied_bytes, transferred_bytes);
    }

    fn decide(&mut self, view: &View<'_>, conditions: Option<&Conditions>) -> Decision {
        let share = self.share();
        let forecast = conditions.and_then(|conditions| {
            let mut coming = self.clone();
            let mut at = view.now.as_secs_f64();
            let mut bytes = self.transferred_before;
            let mut sent = view.round.of - view.round.pages;
            let next = |outcome: &Outcome, pages: f64| {
                at += outcome.seconds;
                bytes += (pages + std::mem::take(&mut sent)) * PAGE_SIZE as f64;
                let changed = coming.on_sync(at, outcome.left * PAGE_SIZE as f64, bytes);
                changed.then(|| Brake::Time(coming.share()))
            };
            view.writers.forecast(conditions, view.round, Brake::Time(share), next)
        });
        Decision::alike(view, (share > 0.0).then_some(Quota::QemuTime(share)), forecast)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of a second, each transferring 100 and dirtying so much; the percentages after each.
    fn percentages(dirtied: &[f64]) -> Vec<u8> {
        let mut rule = Rule::default();
        let mut now = 0.0;
        let mut transferred = 0.0;
        let after = |dirtied: &f64| {
            now += 1.1;
            transferred += 100.0;
            rule.on_sync(now, *dirtied, transferred);
            rule.percent
        };
        dirtied.iter().map(after).collect()
    }

    #[test]
    fn two_dirty_periods_throttle_by_20_and_each_further_two_by_10_up_to_99() {
        assert_eq!(percentages(&[60.0; 6]), [0, 20, 20, 30, 30, 40]);
        assert_eq!(percentages(&[60.0; 40])[39], 99);
    }

    #[test]
    fn half_of_what_was_transferred_is_not_too_dirty() {
        assert_eq!(percentages(&[50.0; 10]), [0; 10]);
    }

    #[test]
    fn rounds_shorter_than_a_second_are_one_period() {
        let mut rule = Rule::default();
        assert!(!(1..=10u8).any(|n| rule.on_sync(f64::from(n) / 10.0, 10.0, 0.0)));
        assert!(!rule.on_sync(1.1, 10.0, 100.0));
        assert!(rule.on_sync(2.2, 60.0, 200.0));
    }
}
