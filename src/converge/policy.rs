//! The policies by their names: what a user asks for, as text and as values.

use std::fmt;
use std::str::FromStr;

/// Who is slowed down so that a migration ends.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Policy {
    /// Nobody. A guest that dirties faster than the link drains is not migrated within the downtime limit.
    None,
    /// All vCPUs alike, by a growing share of their time: QEMU's `auto-converge`.
    AutoConverge(AutoConverge),
    /// Every vCPU at the same fixed rate of dirtying: QEMU's `dirty-limit`.
    DirtyLimit(DirtyLimit),
    /// Only those vCPUs that dirty more than their share of what the link can take: the default.
    FairShare(FairShare),
}

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

/// Parameters of `dirty-limit`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyLimit {
    /// Bytes that each vCPU may dirty per second. QEMU's `vcpu-dirty-limit`: 1 MB/s unless told otherwise.
    pub bytes_per_s: u64,
}

impl Default for DirtyLimit {
    fn default() -> Self {
        Self { bytes_per_s: 1_000_000 }
    }
}

/// Parameters of `fair-share`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FairShare {
    /// The share, 0 to 1, of what they would dirty together that the vCPUs that are held back keep, each as many pages
    /// as the others. `None`: a twentieth, or less where the migration would not end otherwise (the controller says so).
    pub min_share: Option<f64>,
    /// Seconds of guest time that one second of an earlier end is worth. Rounds that shrink by themselves cost
    /// the guest nothing and are let run while they end soon enough: at a dirty rate ρ times the bandwidth,
    /// braking buys a second of migration for (1 − ρ) ÷ ρ seconds of the writer's time, so 0.1 brakes by itself
    /// from ρ = 0.91 on. With a deadline, only the deadline counts.
    pub impatience: f64,
    /// Guest time that may be spent on top of that, once, on an earlier end, as a share of the downtime limit:
    /// whoever accepts a pause of 500 ms will not notice 250 ms in slices of 10, and the last rounds, which are
    /// short and many, are bought cheaply. With a deadline, none is.
    pub grace: f64,
}

impl FairShare {
    /// What they keep, unless told otherwise.
    pub const USUAL_MIN_SHARE: f64 = 0.05;
}

impl Default for FairShare {
    fn default() -> Self {
        Self { min_share: None, impatience: 0.1, grace: 0.5 }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::FairShare(FairShare::default())
    }
}

/// All names, for help texts and error messages.
pub const POLICY_NAMES: [&str; 4] = ["none", "auto-converge", "dirty-limit", "fair-share"];

impl Policy {
    /// The name that users know it by.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => POLICY_NAMES[0],
            Self::AutoConverge(_) => POLICY_NAMES[1],
            Self::DirtyLimit(_) => POLICY_NAMES[2],
            Self::FairShare(_) => POLICY_NAMES[3],
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy that does not exist.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownPolicy(String);

impl fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no policy {:?}; the policies are {}", self.0, POLICY_NAMES.join(", "))
    }
}

impl std::error::Error for UnknownPolicy {}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    /// The policy of this name with its default parameters.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "none" => Ok(Self::None),
            "auto-converge" => Ok(Self::AutoConverge(AutoConverge::default())),
            "dirty-limit" => Ok(Self::DirtyLimit(DirtyLimit::default())),
            "fair-share" => Ok(Self::FairShare(FairShare::default())),
            _ => Err(UnknownPolicy(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_one_name_and_a_wrong_name_is_answered_with_the_right_ones() {
        for name in POLICY_NAMES {
            assert_eq!(name.parse::<Policy>().unwrap().to_string(), name);
        }
        assert_eq!(Policy::default().name(), "fair-share");
        let error = "postpone".parse::<Policy>().unwrap_err().to_string();
        assert!(POLICY_NAMES.iter().all(|name| error.contains(name)), "{error}");
    }
}
