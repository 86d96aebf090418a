//! Scenarios: published experiments as files, so that everyone repeats the same one.

use std::path::Path;

use anyhow::{Context, Result, bail};
use ringferry::PAGE_SIZE;
use ringferry_testvm::bulk::BulkConfig;
use ringferry_testvm::workload::command_line::Work;
use serde::Deserialize;

use crate::guest::{BackendArg, GatesArg, GuestArgs, HostArgs, VmArgs};
use crate::sizes::{Rate, Size, Time};
use crate::terms::{PolicyName, TermsArgs};

/// Those that are built in, by name.
const BUILT_IN: [(&str, &str); 21] = [
    ("rhel73-30m", include_str!("../../scenarios/rhel73-30m.toml")),
    ("rhel73-50m", include_str!("../../scenarios/rhel73-50m.toml")),
    ("rhel73-60m", include_str!("../../scenarios/rhel73-60m.toml")),
    ("rhel73-100m", include_str!("../../scenarios/rhel73-100m.toml")),
    ("heavy-512m", include_str!("../../scenarios/heavy-512m.toml")),
    ("heavy-512m-50", include_str!("../../scenarios/heavy-512m-50.toml")),
    ("heavy-512m-80", include_str!("../../scenarios/heavy-512m-80.toml")),
    ("heavy-512m-150", include_str!("../../scenarios/heavy-512m-150.toml")),
    ("one-heavy-of-eight", include_str!("../../scenarios/one-heavy-of-eight.toml")),
    ("two-heavy-of-eight", include_str!("../../scenarios/two-heavy-of-eight.toml")),
    ("external-writer", include_str!("../../scenarios/external-writer.toml")),
    ("cliff", include_str!("../../scenarios/cliff.toml")),
    ("drop-to-a-tenth", include_str!("../../scenarios/drop-to-a-tenth.toml")),
    ("low-limit-5ms", include_str!("../../scenarios/low-limit-5ms.toml")),
    ("low-limit-10ms", include_str!("../../scenarios/low-limit-10ms.toml")),
    ("low-limit-20ms", include_str!("../../scenarios/low-limit-20ms.toml")),
    ("bursts", include_str!("../../scenarios/bursts.toml")),
    ("paced-far-below", include_str!("../../scenarios/paced-far-below.toml")),
    ("rtt-100ms", include_str!("../../scenarios/rtt-100ms.toml")),
    ("rtt-100ms-limit-300ms", include_str!("../../scenarios/rtt-100ms-limit-300ms.toml")),
    ("shared-spinlock", include_str!("../../scenarios/shared-spinlock.toml")),
];

/// A guest, what its vCPUs do, the link, and the limits.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it repeats, and whose it is.
    pub description: String,
    pub guest: Guest,
    pub link: Link,
    pub limits: Limits,
    /// Who is slowed down, unless a bench is asked to compare.
    pub policy: Option<PolicyName>,
}

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    pub memory: Size,
    /// Non-zero RAM outside the working sets.
    pub fill: Size,
    /// What each vCPU does, in the words of the guest's command line: as many as there are vCPUs.
    pub vcpus: Vec<String>,
    /// A device that writes guest memory beside them, at the end of RAM.
    pub external: Option<External>,
    /// A vCPU that works in bursts.
    pub bursts: Option<Bursts>,
}

#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    pub rate: Rate,
    pub over: Size,
}

/// The vCPU works for `on` of `every`.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bursts {
    pub vcpu: usize,
    pub on: Time,
    pub every: Time,
}

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    pub rate: Rate,
    /// Delays, and changes of the rate, need a relay in this process instead of a wire of its own.
    pub round_trip: Option<Time>,
    /// Another rate from the first stop of the guest on.
    pub at_stop: Option<AtStop>,
    pub drop: Option<Drop>,
}

#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AtStop {
    pub rate: Rate,
    /// For ever, unless it says so.
    pub lasts: Option<Time>,
}

/// From `after` the begin of the migration on the link has another rate.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drop {
    pub after: Time,
    pub rate: Rate,
}

impl Link {
    /// Whether it is a relay.
    pub fn is_relayed(&self) -> bool {
        self.round_trip.is_some() || self.at_stop.is_some() || self.drop.is_some()
    }
}

#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub downtime: Time,
    pub deadline: Option<Time>,
    pub max_rounds: Option<u32>,
    pub max_transfer: Option<f64>,
    pub convergence_timeout: Option<Time>,
    /// In percent, for fair-share.
    pub min_share: Option<u8>,
    pub max_bandwidth: Option<Rate>,
}

impl Scenario {
    /// The scenario of this name, or in this file.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Self::parse(name, text);
        }
        let known: Vec<&str> = BUILT_IN.iter().map(|(known, _)| *known).collect();
        let text = std::fs::read_to_string(Path::new(name)).with_context(|| {
            format!("{name} is no scenario that can be read; built in are {}", known.join(", "))
        })?;
        Self::parse(name, &text)
    }

    fn parse(file: &str, text: &str) -> Result<Self> {
        // toml names line, column, key and what is allowed.
        let scenario: Self = toml::from_str(text).with_context(|| format!("scenario {file}"))?;
        if scenario.guest.vcpus.is_empty() || scenario.guest.vcpus.len() > 16 {
            bail!(
                "scenario {file}: key `vcpus` in [guest] has {} entries, 1 to 16 are allowed",
                scenario.guest.vcpus.len()
            );
        }
        if let Some(percent) = scenario.limits.min_share.filter(|percent| *percent > 99) {
            bail!("scenario {file}: key `min_share` in [limits] is {percent}, 0 to 99 (percent) are allowed");
        }
        for (vcpu, work) in scenario.guest.vcpus.iter().enumerate() {
            Work::default().change(work).map_err(|error| {
                anyhow::anyhow!("scenario {file}: key `vcpus` in [guest], entry {vcpu}: {error}")
            })?;
        }
        Ok(scenario)
    }

    /// The guest that it describes.
    pub fn guest_args(&self, backend: BackendArg, ring_entries: u32, pin_vcpus: bool) -> Result<GuestArgs> {
        let vcpus = u32::try_from(self.guest.vcpus.len())?;
        let work = self.guest.vcpus.iter().enumerate();
        Ok(GuestArgs {
            vm: VmArgs {
                name: None,
                guest: None,
                memory: self.guest.memory,
                vcpus,
                regions: 1,
                host: HostArgs { pin_vcpus, ..HostArgs::default() },
            },
            fill: self.guest.fill,
            work: work.map(|(vcpu, work)| format!("vcpu{vcpu}={work}")).collect(),
            image: None,
            append: None,
            kvmclock: false,
            device_state: None,
            external: self.guest.external.map(|external| BulkConfig {
                bytes_per_s: external.rate.bytes_per_s,
                bytes: external.over.bytes,
            }),
            backend,
            ring_entries,
            gates: GatesArg::default(),
        })
    }

    /// Its policy and limits. A policy that does not end is to be seen not to end: rounds are limited only if it says so.
    pub fn terms(&self) -> TermsArgs {
        let Limits {
            downtime,
            deadline,
            max_rounds,
            max_transfer,
            convergence_timeout,
            min_share,
            max_bandwidth,
        } = self.limits;
        TermsArgs {
            downtime_limit: Some(downtime),
            policy: self.policy,
            deadline,
            max_rounds: Some(max_rounds.unwrap_or(u32::MAX)),
            max_transfer,
            convergence_timeout,
            min_share,
            max_bandwidth,
            ..TermsArgs::default()
        }
    }

    /// The least time that a migration can take: what is populated, and once more what is written, over the link.
    pub fn floor_ms(&self) -> f64 {
        let written = self.guest.vcpus.iter().filter_map(|text| {
            let mut work = Work::default();
            work.change(text).ok()?;
            work.pattern.writes().then_some(work.working_set_pages * PAGE_SIZE as u64)
        });
        let written: u64 = written.sum();
        let rate = self
            .limits
            .max_bandwidth
            .map_or(self.link.rate.bytes_per_s, |limit| limit.bytes_per_s.min(self.link.rate.bytes_per_s));
        (self.guest.fill.bytes + 2 * written) as f64 / rate as f64 * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_scenario_can_be_read() {
        for (name, _) in BUILT_IN {
            assert!(Scenario::load(name).unwrap().floor_ms() > 0.0, "{name}");
        }
    }

    #[test]
    fn a_wrong_scenario_is_answered_with_file_line_key_and_what_is_allowed() {
        let text = BUILT_IN[0].1.replace("downtime", "down-time");
        let error = format!("{:#}", Scenario::parse("mine.toml", &text).unwrap_err());
        for part in ["mine.toml", "line", "down-time", "`downtime`"] {
            assert!(error.contains(part), "{part:?} is missing in: {error}");
        }
        let text = BUILT_IN[0].1.replace("sequential", "backwards");
        let error = format!("{:#}", Scenario::parse("mine.toml", &text).unwrap_err());
        assert!(error.contains("entry 0") && error.contains("backwards"), "{error}");
        let text = BUILT_IN[0].1.replace("100MB/s", "fast");
        let error = format!("{:#}", Scenario::parse("mine.toml", &text).unwrap_err());
        assert!(error.contains("rate") && error.contains("100MB/s"), "{error}");
        let text = BUILT_IN[0].1.replace("[limits]", "[limits]\nmin_share = 200");
        let error = format!("{:#}", Scenario::parse("mine.toml", &text).unwrap_err());
        assert!(error.contains("min_share") && error.contains("0 to 99"), "{error}");
    }

    #[test]
    fn a_scenario_that_does_not_exist_is_answered_with_those_that_do() {
        let error = format!("{:#}", Scenario::load("rhel99").unwrap_err());
        assert!(error.contains("rhel73-60m"), "{error}");
    }
}
