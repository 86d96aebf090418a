//! Fair share: who has to slow down, how far, and when it is worth it.
//!
//! **Who and how far.** A round of length `T` may leave at most `A` pages dirty. If the vCPUs would dirty more,
//! `Σ nᵢ(T) > A`, water is poured: the level λ with `Σ min(nᵢ, λ) = A`. A vCPU with `nᵢ ≤ λ` is never touched;
//! each other gets λ pages for the round. Since `λ ≥ A ÷ vCPUs`, whoever stays within an equal share of what the
//! link can take is safe, whatever the others do. Nobody is held below `min_share` of its own `nᵢ`; what that
//! adds is not taken from the others: the round just leaves more than `A`.
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
//! * for `ρ ≥ 1`, every further round costs: brake at once, in the first round that can reach `P*`, and as hard
//!   as that takes. 512 MB written at 150 MB/s over 100 MB/s: one round of 5.1 s that may leave 50 MB costs
//!   `5.1 − 50 ÷ 150 = 4.8 s`. Halving each round instead (512, 256, 128, 64, 32 MB) costs `D ÷ B − D ÷ 2W` in
//!   each, together `9.6 − 3.2 = 6.4 s`, and ends later.
//!
//! The planner does not use these formulas: it walks the rounds on the measured curves, for each moment at which
//! braking could begin and several depths, and takes the cheapest plan that keeps the deadline. They are why its
//! search is so small: free rounds, then one braked round to a chosen depth, then straight down to `P*`.

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

/// What a vCPU with this demand may dirty at level λ, with a floor of `min_share` of its demand.
pub fn allowance(demand: f64, level: f64, min_share: f64) -> f64 {
    let demand = sane(demand);
    if demand <= level { demand } else { level.max(demand * sane(min_share).min(1.0)) }
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
            demands in prop::collection::vec(0.0..1e9f64, 0..200), budget in 0.0..1e10f64, min_share in 0.0..0.2f64,
        ) {
            let level = water_fill(&demands, budget);
            let poured: f64 = demands.iter().map(|demand| demand.min(level)).sum();
            let total: f64 = demands.iter().sum();
            prop_assert!((poured - total.min(budget)).abs() <= 1e-6 * total.max(1.0));
            let equal_share = budget / demands.len().max(1) as f64;
            for demand in &demands {
                let allowed = allowance(*demand, level, min_share);
                prop_assert!(allowed <= demand * (1.0 + 1e-12) && allowed >= min_share * demand);
                if *demand <= equal_share * (1.0 - 1e-9) {
                    prop_assert_eq!(allowed, *demand, "within an equal share");
                }
            }
        }

        #[test]
        fn nonsense_has_no_level_but_an_answer(demands in prop::collection::vec(any::<f64>(), 0..20), budget in any::<f64>()) {
            let level = water_fill(&demands, budget);
            prop_assert!(level >= 0.0);
            for demand in demands {
                prop_assert!(allowance(demand, level, budget) >= 0.0);
            }
        }
    }
}
