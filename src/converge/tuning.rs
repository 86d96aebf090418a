//! The constants of convergence in one table: where each comes from, and what happens when it is half or double.
//!
//! *Measured* names the note with the command, *published* the source, *chosen* the reason. `tests::tuning` runs the
//! published experiments with each constant halved and doubled, and fails if an outcome moves by more than the table admits.

/// What the controller was tuned with. All of it may be changed before a migration starts; nobody should have to.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct Tuning {
    /// A vCPU is within its fair share if what is left would shrink by this share were all like it. Chosen: a rate that ends
    /// by itself soon needs no brake.
    pub shrink: f64,
    /// Quotas aim at P* less this share of it. Chosen: gates close a little late, and a page too many is a wait for nothing.
    pub short_of: f64,
    /// A vCPU that comes out of a stall dirties this share of what its curve says. Measured: of 75 pages expected
    /// between two stalls, 57 came (kernel-notes/steering.md).
    pub after_a_stall: f64,
    /// Longer stalls are used until what is left falls at this share of the pace that the longest would give. Chosen.
    pub worth_longer: f64,
    /// Seconds over which the measured pace of what is left decides. Chosen: a paced writer that waited for a CPU catches up within
    /// it, and it is short beside a burst.
    pub pace_s: f64,
    /// Time spent on a shorter total buys at least so many times itself. Chosen.
    pub grace_buys: f64,
    /// Share of the bandwidth that stays in hand when the guest is about to be stopped. Measured: between two links
    /// that should be alike, 3 to 6 % (kernel-notes/steering.md).
    pub in_hand: f64,
    /// What the first write to a clean page costs its vCPU, in seconds. Measured at the most: kernel-notes/dirty-ring.md.
    pub fault_s: f64,
    /// Time of a vCPU that is held back weighs so much more than that of one that stands still with all others. Chosen: it
    /// has paid before.
    pub held_weight: f64,
    /// A pause that becomes shorter by less than this, in seconds, is not waited for. Chosen.
    pub worth_s: f64,
    /// Seconds between the decision to stop the guest and its last write. Measured on a busy host: kernel-notes/steering.md.
    pub stopping_s: f64,
    /// Seconds between two rounds, besides a round trip. Measured: kernel-notes/steering.md.
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
