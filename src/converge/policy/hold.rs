//! How hard vCPUs can be held, and what comes of it.

use std::time::Duration;

use bitvec::vec::BitVec;

use super::rule::{Braking, View};
use crate::converge::model::{Conditions, Forecast};
use crate::converge::throttle::{LONGEST_STALL, LONGEST_STALL_EVER, MOST_STRETCH, PagesPerSlice, Quota};
use crate::converge::units::{duration, sane, whole};

/// Who is held is decided for no shorter time than this.
const SHORTEST_S: f64 = 5e-3;
/// Rounds in which what was dirtied between two stalls is sent in a stall.
const ROUNDS_IN_STALL: f64 = 2.0;

/// How the guest would be held.
#[derive(Clone, Debug)]
pub(super) struct Hold {
    pub quotas: Vec<Option<Quota>>,
    pub level: f64,
    pub longest_stall: Duration,
    /// The heaviest of several may stall longer by this factor.
    pub stretch: f64,
    pub min_share: f64,
    pub does: Braking,
    /// Pages per second that they add less while much is left.
    pub less_at_first: f64,
    /// Whether so little is ever left that it fits.
    pub can_fit: bool,
    pub least_per_s: f64,
}

/// What the vCPUs would dirty in the time in which the link takes what is left.
pub(super) struct Demands {
    seconds: f64,
    /// By vCPU; if nobody can be told from another, all together.
    is_held: BitVec,
    /// λ.
    pub level: f64,
    /// Pages per second of those who are not held, or cannot be: now, and when as much is left as fits.
    light_per_s: f64,
    light_at_last: f64,
    /// Of those who are.
    heavy: Vec<f64>,
}

impl Demands {
    pub fn new(view: &View<'_>, conditions: &Conditions, left: f64, fair: f64, is_braking: bool) -> Self {
        let seconds = (left / conditions.pages_per_s.max(1e-9)).max(SHORTEST_S);
        let others = view.writers.others.at(seconds);
        let budget = (conditions.fits * (1.0 - view.tuning.short_of)).max(left * fair);
        let (pages, others): (Vec<f64>, f64) = if view.per_vcpu {
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
        let is_held: BitVec =
            pages.iter().enumerate().map(|(index, pages)| *pages > level || was_held(index)).collect();
        let pages_of = |index: usize| pages.get(index).copied().unwrap_or(0.0);
        let heavy = is_held.iter_ones().map(pages_of).collect();
        let light: f64 = is_held.iter_zeros().map(pages_of).sum();
        // Whoever writes the same pages again and again adds more in many short rounds than in a long one.
        let last_s = (conditions.fits / conditions.pages_per_s.max(1e-9)).clamp(SHORTEST_S, seconds);
        let free = is_held.iter_zeros().filter_map(|index| view.writers.vcpus.get(index));
        let vcpus: f64 = free.map(|vcpu| vcpu.curve.soon(last_s)).sum();
        let light_at_last = (vcpus + view.writers.others.at(last_s)) / last_s;
        Self { seconds, level, light_per_s: (others + light) / seconds, light_at_last, heavy, is_held }
    }

    pub fn hold(&self, view: &View<'_>, conditions: &Conditions, min_share: f64, most_per_s: f64) -> Hold {
        let least = water_fill(&self.heavy, min_share * self.heavy.iter().sum::<f64>()) / self.seconds;
        let least = least.min(most_per_s);
        if !view.per_vcpu {
            return self.hold_by_time(view, least, min_share);
        }
        let tuning = &view.tuning;
        let held = || self.is_held.iter_ones().filter_map(|index| view.writers.vcpus.get(index));
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
        let quotas = self.is_held.iter().by_vals().map(|held| held.then_some(quota)).collect();
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
    pub fn holds(&self, conditions: &Conditions, share: f64) -> bool {
        self.can_fit && conditions.pages_per_s - self.does.adds_per_s > share * conditions.pages_per_s
    }
}

/// The end, if the guest is held from now on until what is `left` fits; `None` if that does not end.
pub(super) fn descent(conditions: &Conditions, hold: &Hold, left: f64) -> Option<Forecast> {
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
