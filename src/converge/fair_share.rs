//! Fair share: who has to slow down, how far, and when it is worth it.
//!
//! **Who.** A round of `D` pages and length `T` may leave `A = max(P*, ¾D)`: what fits the downtime, or what lets
//! the next round be a quarter smaller. If the vCPUs would dirty more, `Σ nᵢ(T) > A`, water is poured: the level λ
//! with `Σ min(nᵢ, λ) = A`. A vCPU with `nᵢ ≤ λ` is never touched. Since `λ ≥ A ÷ vCPUs`, whoever stays within an
//! equal share of what the link can take is safe, whatever the others do.
//!
//! **How far.** Each of the others gets the same number of pages for the round, evenly: λ, or less where that ends
//! the migration sooner and so costs the guest less. Together they keep `min_share` of their `Σ nᵢ`, poured the same
//! way (a share of each one's own rate would leave most to whoever writes most); what that adds is not taken from the
//! others: the round just leaves more.
//!
//! **What it costs.** In a round of length `T`, a vCPU that may dirty λ pages runs for `nᵢ⁻¹(λ)` and stands for
//! the rest: it loses `T − nᵢ⁻¹(λ)`; for a steady writer, `T × (1 − λ ÷ nᵢ(T))`.
//!
//! **When.** Let a steady writer dirty `W` pages a second on a link of `B`, `ρ = W ÷ B`, in rounds of `D₀, D₁, …`
//! pages, each round taking `Dₖ ÷ B` and leaving `Dₖ₊₁ ≤ ρDₖ`. Braking costs `Σ (ρDₖ − Dₖ₊₁) ÷ W`, which is
//! `(ρD₀ − (1 − ρ) Σ Dₖ − P*) ÷ W` over the middle rounds `k = 1, 2, …`. So
//!
//! * for `ρ < 1`, every second of further rounds saves the guest `(1 − ρ) ÷ ρ` seconds: let them run until the
//!   deadline, or until a second of migration is dearer than that (`impatience`), then brake in one go;
//! * for `ρ ≥ 1`, every further round costs: brake at once, and as hard as may be. The guest is stopped as soon as
//!   what is unsent and what is dirty again fit together; at a braked rate `r` that is after `(D − P*) ÷ (B − r)`,
//!   of which the vCPU loses `1 − r ÷ W`. For `W > B` that product grows with `r`, so the hardest brake is the
//!   cheapest: 512 MB written at 150 MB/s over 100 MB/s, held to its 5 %, loses `462 ÷ 92.5 × 0.95 = 4.7 s`.
//!   Halving each round instead (512, 256, 128, 64, 32 MB) costs `D ÷ B − D ÷ 2W` in each, together
//!   `9.6 − 3.2 = 6.4 s`, and ends later.
//!
//! The planner does not use these formulas: it walks the rounds on the measured curves, for each moment at which
//! braking could begin and several depths, and takes the cheapest plan that keeps the deadline. They are why its
//! search is so small: free rounds, then one braked round to a chosen depth, then straight down to `P*`.

use super::throttle::MOST_STRETCH;
use super::units::sane;

/// The level λ with `Σ min(nᵢ, λ) = budget`; infinite if all of it fits. Negative or undefined demands are none.
pub fn water_fill(demands: &[f64], budget: f64) -> f64 {
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

/// The two levels of a braked round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Levels {
    /// λ of the fair share: a vCPU that would dirty no more is not held back at all.
    pub fair: f64,
    /// What each of the others may dirty; at most as much, unless the round may leave more than its fair share.
    pub quota: f64,
}

impl Levels {
    /// The levels for vCPUs that would dirty `demands`, where writers that cannot be held back dirty `others`, the
    /// round is to leave `target`, and `share` is what all vCPUs may fairly leave together.
    pub fn new(demands: &[f64], others: f64, target: f64, share: f64) -> Self {
        let (target, share) = (sane(target), sane(share));
        let fair = water_fill(demands, target.max(share) - others);
        if target >= share {
            return Self { fair, quota: fair };
        }
        let (mut light, mut heavy) = (0.0, 0u32);
        for demand in demands.iter().map(|demand| sane(*demand)) {
            if demand <= fair {
                light += demand;
            } else {
                heavy += 1;
            }
        }
        Self { fair, quota: sane((target - others - light) / f64::from(heavy.max(1))).min(fair) }
    }
}

/// A vCPU that is held back in a round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Held {
    /// Pages that it may dirty.
    pub quota: f64,
    /// Pages that it will dirty: more than its quota, if gates cannot hold it that low.
    pub dirties: f64,
    /// Its stalls may be longer than the longest by this factor.
    pub stretch: f64,
}

/// Not all can be held as low as is wanted, nor all alike. As far as longer stalls take pages from those who dirty most,
/// the others may dirty them: together they dirty as much as before. `counted` says what each has dirtied already.
pub fn even_out(vcpus: &mut [Option<Held>], counted: impl Fn(usize) -> f64) {
    let held = || vcpus.iter().flatten();
    let mean = held().map(|held| held.dirties).sum::<f64>() / (held().count().max(1) as f64);
    let missing: f64 = held().map(|held| (mean - held.dirties).max(0.0)).sum();
    let mut taken = 0.0;
    for (index, held) in vcpus.iter_mut().enumerate() {
        let Some(held) = held.as_mut().filter(|held| held.dirties > mean.max(held.quota)) else { continue };
        let counted = counted(index);
        let to_come = (held.dirties - counted).max(0.0);
        held.stretch = (to_come / (mean.max(held.quota) - counted).max(1e-9)).clamp(1.0, MOST_STRETCH);
        let less = to_come - to_come / held.stretch;
        held.dirties -= less;
        taken += less;
    }
    let share = if missing > 0.0 { (taken / missing).min(1.0) } else { 0.0 };
    for held in vcpus.iter_mut().flatten().filter(|held| held.dirties < mean) {
        held.dirties += share * (mean - held.dirties);
        held.quota = held.quota.max(held.dirties);
    }
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
    fn who_cannot_be_held_low_enough_stalls_for_longer_and_the_other_dirties_what_that_saves() {
        let held = |dirties| Some(Held { quota: 1000.0, dirties, stretch: 1.0 });
        let mut vcpus = [held(6000.0), None, held(4000.0)];
        even_out(&mut vcpus, |_| 0.0);
        let [Some(most), None, Some(least)] = vcpus else { panic!("{vcpus:?}") };
        assert_eq!((most.quota, most.dirties, most.stretch), (1000.0, 5000.0, 1.2));
        assert_eq!((least.quota, least.dirties, least.stretch), (5000.0, 5000.0, 1.0));
    }

    #[test]
    fn who_can_all_be_held_as_low_as_wanted_are_left_alone() {
        let held = Some(Held { quota: 5000.0, dirties: 5000.0, stretch: 1.0 });
        let mut vcpus = [held, None, held];
        even_out(&mut vcpus, |_| 4999.0);
        assert_eq!(vcpus, [held, None, held]);
    }

    proptest! {
        #[test]
        fn evening_out_takes_as_much_as_it_gives(
            floors in prop::collection::vec((0.0..1e6f64, 0.0..1e6f64), 0..50), quota in 0.0..1e6f64,
        ) {
            let held = |(counted, floor): &(f64, f64)| {
                Some(Held { quota, dirties: quota.max(counted + floor), stretch: 1.0 })
            };
            let before: Vec<Option<Held>> = floors.iter().map(held).collect();
            let mut after = before.clone();
            even_out(&mut after, |index| floors[index].0);
            let sum = |vcpus: &[Option<Held>]| vcpus.iter().flatten().map(|held| held.dirties).sum::<f64>();
            prop_assert!((sum(&after) - sum(&before)).abs() <= 1e-9 * sum(&before) + 1e-6);
            let spread = |vcpus: &[Option<Held>]| {
                let dirties = || vcpus.iter().flatten().map(|held| held.dirties);
                dirties().fold(0.0, f64::max) - dirties().fold(f64::INFINITY, f64::min)
            };
            prop_assert!(floors.is_empty() || spread(&after) <= spread(&before) * (1.0 + 1e-9));
            for (held, (counted, _)) in after.iter().flatten().zip(&floors) {
                prop_assert!(held.dirties >= counted * (1.0 - 1e-9), "what is dirty stays so");
                prop_assert!((1.0..=MOST_STRETCH).contains(&held.stretch));
            }
        }

        #[test]
        fn the_water_stands_level_and_the_innocent_are_dry(
            demands in prop::collection::vec(0.0..1e9f64, 0..200), share in 0.0..1e10f64, target in 0.0..2e10f64, others in 0.0..1e9f64,
        ) {
            let budget = (target.max(share) - others).max(0.0);
            let level = water_fill(&demands, budget);
            let poured: f64 = demands.iter().map(|demand| demand.min(level)).sum();
            let total: f64 = demands.iter().sum();
            prop_assert!((poured - total.min(budget)).abs() <= 1e-6 * total.max(1.0));
            let levels = Levels::new(&demands, others, target, share);
            prop_assert_eq!(levels.fair, level);
            prop_assert!(levels.quota <= levels.fair);
            let equal_share = budget / demands.len().max(1) as f64;
            prop_assert!(levels.fair >= equal_share * (1.0 - 1e-9), "whoever stays within an equal share is safe");
            let held = |demand: &f64| if *demand <= levels.fair { *demand } else { levels.quota };
            let left = others + demands.iter().map(held).sum::<f64>();
            let light: f64 = demands.iter().filter(|demand| **demand <= levels.fair).sum();
            let reachable = target.max(others + light).max(others);
            prop_assert!(left <= reachable * (1.0 + 1e-6) + 1.0 || left <= others + total, "{} of {}", left, reachable);
        }

        #[test]
        fn nonsense_has_no_level_but_an_answer(demands in prop::collection::vec(any::<f64>(), 0..20), budget in any::<f64>()) {
            prop_assert!(water_fill(&demands, budget) >= 0.0);
            let levels = Levels::new(&demands, budget, 1.0, budget);
            prop_assert!(levels.fair >= 0.0 && levels.quota >= 0.0);
        }
    }
}
