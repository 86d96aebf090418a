//! Who is slowed down and when it ends, as a user says it: before a migration, and again while it runs.

use std::num::NonZeroU64;
use std::time::Duration;

use ringferry::converge::{AtTimeout, ConvergenceTimeout, Limits, Policy};
use ringferry::progress::{Parameters, Terms};
use ringferry::transport::MaxBandwidth;
use serde::{Deserialize, Serialize};

use crate::sizes::{Rate, Time};

/// Rounds of precopy at most, as Xen has had it since 2005 (`MAX_ITERS`): a guest that is not stopped by then, on a
/// host that is too busy to tell how fast its link is, is stopped whatever is left.
const DEFAULT_MAX_ROUNDS: u32 = 30;
/// The downtime limit never doubles beyond this.
const DOWNTIME_CAP: Duration = Duration::from_secs(10);

/// What may be changed while a migration runs; what is not given stays as it is.
#[derive(clap::Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Convergence")]
#[serde(default)]
pub struct TermsArgs {
    /// Longest time that the guest may stand still [default: 300ms]
    #[arg(long, value_name = "TIME")]
    pub downtime_limit: Option<Time>,

    /// A wish below the limit: how long the guest should stand still, if that can be had [default: none]
    #[arg(long, value_name = "TIME")]
    pub downtime_target: Option<Time>,

    /// Who is slowed down so that the migration ends: fair-share, none, auto-converge or dirty-limit
    /// [default: fair-share]
    #[arg(long, value_name = "NAME")]
    pub policy: Option<PolicyName>,

    /// The share of their pages that `fair-share` leaves those it holds back, the same number to each, in
    /// percent [default: 5, or less where the migration would not end otherwise]
    #[arg(long, value_name = "PERCENT", value_parser = percent(0))]
    pub min_share: Option<u8>,

    /// What `dirty-limit` allows each vCPU [default: 1MB/s]
    #[arg(long, value_name = "RATE")]
    pub dirty_limit: Option<Rate>,

    /// The share of their time that `auto-converge` takes of all vCPUs at first, in percent [default: 20]
    #[arg(long, value_name = "PERCENT", value_parser = percent(1))]
    pub throttle_initial: Option<u8>,

    /// What it adds each time that this was not enough [default: 10]
    #[arg(long, value_name = "PERCENT", value_parser = percent(1))]
    pub throttle_increment: Option<u8>,

    /// What it never exceeds [default: 99]
    #[arg(long, value_name = "PERCENT", value_parser = percent(1))]
    pub throttle_max: Option<u8>,

    /// The whole migration ends by then, if braking the guest can do it
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Time>,

    /// Bandwidth over all data connections while the guest runs [default: all there is]
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Rate>,

    /// Bandwidth to count on while the guest stands still [default: as measured]
    #[arg(long, value_name = "RATE")]
    pub switchover_bandwidth: Option<Rate>,

    /// Rounds after which the guest is stopped whatever is left [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: Option<u32>,

    /// Stop the guest, whatever is left, when this many times its RAM has been sent
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    pub max_transfer: Option<f64>,

    /// Time after which the downtime limit doubles, and again each time that it passes, up to 10 s
    #[arg(long, value_name = "TIME")]
    pub convergence_timeout: Option<Time>,

    /// Time after which the migration is cancelled
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Time>,

    /// What happens at the timeout instead: the guest is stopped and moved, whatever is left
    #[arg(long)]
    pub switch_over_at_timeout: bool,
}

/// Terms that contradict each other: wrong usage.
#[derive(Debug, thiserror::Error)]
#[error("{parameter} goes with policy {of}, and the policy is {policy}")]
pub struct WrongTerms {
    parameter: &'static str,
    of: &'static str,
    policy: &'static str,
}

impl TermsArgs {
    /// The parameters of a migration that begins.
    pub fn parameters(&self) -> Result<Parameters, WrongTerms> {
        let limits = Limits { max_rounds: Some(DEFAULT_MAX_ROUNDS), ..Limits::default() };
        let parameters = Parameters::new(Terms { limits, ..Terms::default() }, MaxBandwidth::default());
        self.change(&parameters)?;
        Ok(parameters)
    }

    /// Changes what is given; nothing, if it contradicts itself.
    pub fn change(&self, parameters: &Parameters) -> Result<(), WrongTerms> {
        let mut changed = parameters.terms();
        self.change_policy(&mut changed.policy)?;
        self.change_limits(&mut changed.limits);
        if let Some(rate) = self.switchover_bandwidth {
            changed.switchover_bandwidth = Some(rate.bytes_per_s as f64);
        }
        parameters.change(|terms| *terms = changed);
        if let Some(rate) = self.max_bandwidth {
            parameters.max_bandwidth().set(NonZeroU64::new(rate.bytes_per_s));
        }
        Ok(())
    }

    fn change_policy(&self, policy: &mut Policy) -> Result<(), WrongTerms> {
        if let Some(PolicyName(named)) = self.policy
            && named.name() != policy.name()
        {
            *policy = named;
        }
        let chosen = policy.name();
        let wrong = |parameter, of| Err(WrongTerms { parameter, of, policy: chosen });
        match (self.min_share, &mut *policy) {
            (Some(percent), Policy::FairShare(share)) => share.min_share = Some(f64::from(percent) / 100.0),
            (Some(_), _) => return wrong("--min-share", "fair-share"),
            (None, _) => {}
        }
        match (self.dirty_limit, &mut *policy) {
            (Some(rate), Policy::DirtyLimit(limit)) => limit.bytes_per_s = rate.bytes_per_s,
            (Some(_), _) => return wrong("--dirty-limit", "dirty-limit"),
            (None, _) => {}
        }
        match &mut *policy {
            Policy::AutoConverge(throttle) => {
                throttle.initial_percent = self.throttle_initial.unwrap_or(throttle.initial_percent);
                throttle.increment_percent = self.throttle_increment.unwrap_or(throttle.increment_percent);
                throttle.max_percent = self.throttle_max.unwrap_or(throttle.max_percent);
            }
            _ if self.throttle_initial.or(self.throttle_increment).or(self.throttle_max).is_some() => {
                return wrong("--throttle-initial, -increment or -max", "auto-converge");
            }
            _ => {}
        }
        Ok(())
    }

    fn change_limits(&self, limits: &mut Limits) {
        let time = |given: Option<Time>| given.map(|time| time.0);
        limits.downtime = time(self.downtime_limit).unwrap_or(limits.downtime);
        limits.downtime_target = time(self.downtime_target).or(limits.downtime_target);
        limits.deadline = time(self.deadline).or(limits.deadline);
        limits.max_rounds = self.max_rounds.or(limits.max_rounds);
        limits.max_transfer_factor = self.max_transfer.or(limits.max_transfer_factor);
        if let Some(after) = time(self.convergence_timeout) {
            limits.convergence_timeout = Some(ConvergenceTimeout { after, every: after, cap: DOWNTIME_CAP });
        }
        if let Some(after) = time(self.timeout) {
            limits.timeout = Some((after, AtTimeout::Cancel));
        }
        if self.switch_over_at_timeout
            && let Some((_, answer)) = &mut limits.timeout
        {
            *answer = AtTimeout::SwitchOver;
        }
    }
}

/// The policies that a bench compares on one scenario.
#[derive(clap::Args, Clone, Debug)]
pub struct ComparedArgs {
    /// Policies, one after the other in the same run [default: the scenario's, else fair-share]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    policy: Vec<PolicyName>,

    /// The whole migration ends by then, if braking the guest can do it [default: the scenario's]
    #[arg(long, value_name = "TIME")]
    deadline: Option<Time>,

    /// The share of their pages that `fair-share` leaves those it holds back, in percent [default: the
    /// scenario's, else 5, or less where the migration would not end otherwise]
    #[arg(long, value_name = "PERCENT", value_parser = percent(0))]
    min_share: Option<u8>,

    /// What `dirty-limit` allows each vCPU [default: 1MB/s]
    #[arg(long, value_name = "RATE")]
    dirty_limit: Option<Rate>,
}

impl ComparedArgs {
    /// Each policy and its terms, on top of the scenario's own.
    pub fn of(&self, scenario: &TermsArgs) -> Vec<(PolicyName, TermsArgs)> {
        let own = [scenario.policy.unwrap_or_default()];
        let policies = if self.policy.is_empty() { &own } else { self.policy.as_slice() };
        let terms = |policy: &PolicyName| TermsArgs {
            policy: Some(*policy),
            dirty_limit: self.dirty_limit.filter(|_| matches!(policy.0, Policy::DirtyLimit(_))),
            min_share: self
                .min_share
                .or(scenario.min_share)
                .filter(|_| matches!(policy.0, Policy::FairShare(_))),
            deadline: self.deadline.or(scenario.deadline),
            ..scenario.clone()
        };
        policies.iter().map(|policy| (*policy, terms(policy))).collect()
    }
}

/// A policy by its name, so that it can be sent to another process.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PolicyName(Policy);

impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for PolicyName {
    type Err = ringferry::converge::UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        name.parse().map(Self)
    }
}

impl TryFrom<String> for PolicyName {
    type Error = ringferry::converge::UnknownPolicy;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<PolicyName> for String {
    fn from(policy: PolicyName) -> Self {
        policy.to_string()
    }
}

fn percent(least: u8) -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(i64::from(least)..=99)
}

/// How many times something, not less than once.
pub fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if (1.0..=1e6).contains(&factor) => Ok(factor),
        _ => Err("write a factor, 1 or more, such as 3 or 2.5".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use ringferry::converge::{AutoConverge, DirtyLimit};

    use super::*;

    fn args(policy: &str) -> TermsArgs {
        TermsArgs { policy: Some(policy.parse().unwrap()), ..TermsArgs::default() }
    }

    #[test]
    fn what_is_not_given_stays_as_it_is() {
        let begun = TermsArgs { downtime_limit: Some("1s".parse().unwrap()), ..args("auto-converge") };
        let parameters = begun.parameters().unwrap();
        let change = TermsArgs { throttle_max: Some(80), max_transfer: Some(2.0), ..TermsArgs::default() };
        change.change(&parameters).unwrap();
        let Terms { policy, limits, .. } = parameters.terms();
        let expected = AutoConverge { max_percent: 80, ..AutoConverge::default() };
        assert_eq!(policy, Policy::AutoConverge(expected));
        assert_eq!((limits.downtime, limits.max_rounds), (Duration::from_secs(1), Some(30)));
        assert_eq!(limits.max_transfer_factor, Some(2.0));
        // Naming the policy again does not undo its parameters; another one has its own.
        args("auto-converge").change(&parameters).unwrap();
        assert_eq!(parameters.terms().policy, policy);
        args("dirty-limit").change(&parameters).unwrap();
        assert_eq!(parameters.terms().policy, Policy::DirtyLimit(DirtyLimit::default()));
    }

    #[test]
    fn a_parameter_of_another_policy_is_refused_and_changes_nothing() {
        let parameters = TermsArgs::default().parameters().unwrap();
        let before = parameters.terms();
        let wrong = TermsArgs {
            dirty_limit: Some("5MB/s".parse().unwrap()),
            downtime_limit: Some("9s".parse().unwrap()),
            ..TermsArgs::default()
        };
        let error = wrong.change(&parameters).unwrap_err().to_string();
        assert_eq!(error, "--dirty-limit goes with policy dirty-limit, and the policy is fair-share");
        assert_eq!(parameters.terms(), before);
    }
}
