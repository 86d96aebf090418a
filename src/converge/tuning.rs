//! The constants of convergence in one table: where each comes from, and what happens when it is half or double.
//!
//! *Measured* names the note with the command, *published* the source, *chosen* the reason. *Half or double* says by how
//! much the total, and what the worst-off vCPU loses, then move at most in the simulated scenarios of `simulate::demands`; the test below
//! fails if it is more.

/// What the controller was tuned with. All of it may be changed before a migration starts; nobody should have to.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct Tuning {
    /// A vCPU is within its fair share if what is left would shrink by this share were all like it. Chosen: a rate that ends
    /// by itself soon needs no brake. Half or double: 16 %, 0.8 s (of a guest that writes at four fifths of the link).
    pub shrink: f64,
    /// Quotas aim at P* less this share of it. Chosen: gates close a little late, and a page too many is a wait for nothing.
    /// Half or double: 1 %, 0.1 s.
    pub short_of: f64,
    /// A vCPU that comes out of a stall dirties this share of what its curve says, until that is measured. Measured: of 75
    /// pages expected between two stalls, 57 came (kernel-notes/steering.md). Half or double: 2 %, 0.3 s.
    pub after_a_stall: f64,
    /// Stalls are made longer until what is left falls at this share of the pace that the longest would give. Chosen.
    /// Half or double: 14 %, 3.2 s (double: always the longest, which ends sooner, and which a guest would feel).
    pub worth_longer: f64,
    /// Seconds over which the measured pace of what is left decides. Chosen: a paced writer that waited for a CPU catches up
    /// within it, and it is short beside a burst. Half or double: 6 %, 0.7 s.
    pub pace_s: f64,
    /// Guest time spent on an earlier end buys at least so many times itself. Chosen. Half or double: 1 %, 0.1 s.
    pub grace_buys: f64,
    /// Share of the bandwidth that stays in hand when the guest is about to be stopped. Measured: between two links
    /// that should be alike, 3 to 6 % (kernel-notes/steering.md). Half or double: 1 %, 0.1 s.
    pub in_hand: f64,
    /// What the first write to a clean page costs its vCPU, in seconds. Measured at the most: kernel-notes/dirty-ring.md.
    /// Half or double: 1 %, 0.1 s.
    pub fault_s: f64,
    /// Time of a vCPU that is held back weighs so much more than that of one that stands still with all others. Chosen: it
    /// has paid before. Half or double: 12 %, 1.1 s (of one heavy writer among eight vCPUs, whose pause is longer or shorter).
    pub held_weight: f64,
    /// A pause that becomes shorter by less than this, in seconds, is not waited for. Chosen. Half or double: 1 %, 0.1 s.
    pub worth_s: f64,
    /// Seconds between the decision to stop the guest and its last write. Measured on a busy host: kernel-notes/steering.md.
    /// Half or double: 1 %, 0.1 s.
    pub stopping_s: f64,
    /// Seconds between two rounds, besides a round trip. Measured: kernel-notes/steering.md. Half or double: 1 %, 0.1 s.
    pub round_s: f64,
}

impl Tuning {
    /// The table.
    pub const TABLE: Self = Self {
        shrink: 0.25,
        short_of: 0.1,
        after_a_stall: 0.75,
        worth_longer: 0.5,
        pace_s: 0.8,
        grace_buys: 2.0,
        in_hand: 0.05,
        fault_s: 7e-6,
        held_weight: 2.0,
        worth_s: 2e-3,
        stopping_s: 0.6e-3,
        round_s: 2e-3,
    };
}

impl Default for Tuning {
    fn default() -> Self {
        Self::TABLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::converge::simulate::demands::{Scenario, scenarios};

    /// What may come of half or double a constant: the total by a share, and what is lost by seconds.
    type Row = (&'static str, fn(&mut Tuning) -> &mut f64, f64, f64);

    const ADMITTED: [Row; 12] = [
        ("shrink", |tuning| &mut tuning.shrink, 0.16, 0.8),
        ("short_of", |tuning| &mut tuning.short_of, 0.01, 0.1),
        ("after_a_stall", |tuning| &mut tuning.after_a_stall, 0.02, 0.3),
        ("worth_longer", |tuning| &mut tuning.worth_longer, 0.14, 3.2),
        ("pace_s", |tuning| &mut tuning.pace_s, 0.06, 0.7),
        ("grace_buys", |tuning| &mut tuning.grace_buys, 0.01, 0.1),
        ("in_hand", |tuning| &mut tuning.in_hand, 0.01, 0.1),
        ("fault_s", |tuning| &mut tuning.fault_s, 0.01, 0.1),
        ("held_weight", |tuning| &mut tuning.held_weight, 0.12, 1.1),
        ("worth_s", |tuning| &mut tuning.worth_s, 0.01, 0.1),
        ("stopping_s", |tuning| &mut tuning.stopping_s, 0.01, 0.1),
        ("round_s", |tuning| &mut tuning.round_s, 0.01, 0.1),
    ];

    /// Without optimisation, those that take a second at most.
    const SHORT: [&str; 3] = ["rhel73-60m", "device-20-and-a-writer", "bursts"];
    const ALL: [&str; 10] = [
        "rhel73-60m",
        "device-20-and-a-writer",
        "bursts",
        "rhel73-100m",
        "heavy-512m",
        "heavy-512m-50",
        "heavy-512m-80",
        "heavy-512m-150",
        "one-heavy-of-eight",
        "drop-for-good-60m",
    ];

    #[test]
    fn no_outcome_depends_on_a_constant_by_more_than_the_table_admits() {
        let names = if cfg!(debug_assertions) { &SHORT[..] } else { &ALL[..] };
        let chosen: Vec<Scenario> =
            scenarios().into_iter().filter(|scenario| names.contains(&scenario.name)).collect();
        assert_eq!(chosen.len(), names.len());
        for scenario in chosen {
            let usual = scenario.run();
            for (constant, field, total_share, lost_s) in ADMITTED {
                for factor in [0.5, 2.0] {
                    let mut other = scenario.clone();
                    *field(&mut other.settings.tuning) *= factor;
                    let done = other.run();
                    let total = (done.total.as_secs_f64() / usual.total.as_secs_f64() - 1.0).abs();
                    let lost = (done.lost().as_secs_f64() - usual.lost().as_secs_f64()).abs();
                    let case = format!("{}, {factor} times {constant}", scenario.name);
                    assert!(
                        total <= total_share && lost <= lost_s,
                        "{case}: {:.1} %, {lost:.2} s",
                        total * 100.0
                    );
                }
            }
        }
    }
}
