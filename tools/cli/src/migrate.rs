//! One migration as the command line asks for it: its options, its run, and what the guest felt of it.

use std::num::NonZeroU64;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use ringferry::converge::{ConvergenceTimeout, DirtyLimit, Limits, Policy};
use ringferry::progress::{Parameters, Progress, Terms, Update};
use ringferry::source::{Source, SourceOptions, SourceReport};
use ringferry::track::VcpuFigures;
use ringferry::transport::{ChannelSpec, MaxBandwidth, SpecError};
use serde::{Deserialize, Serialize};

use crate::display::follow;
use crate::guest::{Host, Marks};
use crate::report::{MigrationReport, VcpuReport};
use crate::sizes::{Rate, Time};

/// Options of a migration.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(next_help_heading = "Migration")]
pub struct MigrateArgs {
    /// Data connections, each with its own thread and io_uring
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub channels: u32,

    /// A data connection over a NIC of its own, [LOCAL][%DEVICE]=REMOTE:PORT; several make several channels,
    /// and `receive` waits with --data-listen for each
    #[arg(long, value_name = "CHANNEL", value_parser = parse_channel)]
    pub channel: Vec<String>,

    /// Longest time that the guest may stand still
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    pub downtime_limit: Time,

    /// Who is slowed down so that the migration ends: fair-share, none, auto-converge or dirty-limit
    #[arg(long, value_name = "NAME", default_value = "fair-share")]
    pub policy: PolicyName,

    /// What `dirty-limit` allows each vCPU [default: 1MB/s]
    #[arg(long, value_name = "RATE")]
    pub dirty_limit: Option<Rate>,

    /// The whole migration ends by then, if braking the guest can do it
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Time>,

    /// Bandwidth over all data connections while the guest runs [default: all there is]
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Rate>,

    /// Bandwidth to count on while the guest stands still [default: as measured]
    #[arg(long, value_name = "RATE")]
    pub switchover_bandwidth: Option<Rate>,

    /// Rounds after which the guest is stopped whatever is left
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_ROUNDS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,

    /// Time after which the downtime limit doubles, and again each time that it passes, up to 10 s
    #[arg(long, value_name = "TIME")]
    pub convergence_timeout: Option<Time>,

    /// Time after which the migration is cancelled
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Time>,

    /// Do not compare the RAM of both sides before the handing over
    #[arg(long)]
    pub no_verify: bool,
}

/// Rounds of precopy at most, as Xen has had it since 2005 (`MAX_ITERS`): a guest that is not stopped by then, on a
/// host that is too busy to tell how fast its link is, is stopped whatever is left.
const DEFAULT_MAX_ROUNDS: u32 = 30;
/// The downtime limit never doubles beyond this.
const DOWNTIME_CAP: Duration = Duration::from_secs(10);

/// A policy by its name, so that it can be sent to another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyName(String);

impl Default for PolicyName {
    fn default() -> Self {
        Self(Policy::default().to_string())
    }
}

impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for PolicyName {
    type Err = ringferry::converge::UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Policy::from_str(name).map(|policy| Self(policy.to_string()))
    }
}

/// Kept as text, because it may be sent to another process.
fn parse_channel(text: &str) -> Result<String, SpecError> {
    text.parse::<ChannelSpec>().map(|_| text.to_owned())
}

impl Default for MigrateArgs {
    /// As the command line has them.
    fn default() -> Self {
        Self {
            channels: 2,
            channel: Vec::new(),
            downtime_limit: Time(Duration::from_millis(300)),
            policy: PolicyName::default(),
            dirty_limit: None,
            deadline: None,
            max_bandwidth: None,
            switchover_bandwidth: None,
            max_rounds: DEFAULT_MAX_ROUNDS,
            convergence_timeout: None,
            timeout: None,
            no_verify: false,
        }
    }
}

impl MigrateArgs {
    /// The progress object of a migration with these options.
    pub fn progress(&self) -> Result<Progress> {
        let limits = Limits {
            downtime: self.downtime_limit.0,
            deadline: self.deadline.map(|deadline| deadline.0),
            max_rounds: Some(self.max_rounds),
            convergence_timeout: self.convergence_timeout.map(|timeout| ConvergenceTimeout {
                after: timeout.0,
                every: timeout.0,
                cap: DOWNTIME_CAP,
            }),
            timeout: self.timeout.map(|timeout| (timeout.0, ringferry::converge::AtTimeout::Cancel)),
            ..Limits::default()
        };
        let terms = Terms {
            policy: match (self.policy.0.parse()?, self.dirty_limit) {
                (Policy::DirtyLimit(_), Some(limit)) => {
                    Policy::DirtyLimit(DirtyLimit { bytes_per_s: limit.bytes_per_s })
                }
                (policy, _) => policy,
            },
            limits,
            switchover_bandwidth: self.switchover_bandwidth.map(|rate| rate.bytes_per_s as f64),
        };
        let limit = self.max_bandwidth.and_then(|rate| NonZeroU64::new(rate.bytes_per_s));
        Ok(Progress::new(Parameters::new(terms, MaxBandwidth::new(limit))))
    }

    /// Migrates the VM of `host` to `destination`; every update goes to `show`. `before` is how fast the guest was.
    pub fn migrate(
        &self,
        host: &mut Host,
        destination: &str,
        progress: &Progress,
        before_per_s: &[f64],
        show: impl FnMut(&Update) + Send,
    ) -> Result<MigrationReport> {
        let mut tracker = host.vm.dirty_source()?;
        let memory = host.vm.memory().clone();
        let options = SourceOptions {
            destination: destination.to_owned(),
            channels: self.channels,
            channel_specs: self.channel.iter().map(|text| text.parse()).collect::<Result<_, SpecError>>()?,
            verify: !self.no_verify,
            vcpus: u32::try_from(host.vm.vcpus())?,
            ..SourceOptions::default()
        };
        let figures_before = host.vm.figures();
        if let Some(guest) = &mut host.guest {
            guest.restart_longest_gap()?;
        }
        let begin = host.marks()?;
        let migrated = thread::scope(|scope| {
            scope.spawn(|| follow(progress, show));
            Source::new(&mut host.vm, tracker.as_mut(), &memory, options, progress.clone()).run()
        })?;
        let end = host.marks()?;
        let marks = begin.as_ref().zip(end.as_ref());
        let figures = host.vm.figures();
        let vcpus = figures.iter().zip(&figures_before);
        let vcpus = vcpus.map(|(now, then)| vcpu_report(host, now, then, &migrated, marks, before_per_s));
        Ok(MigrationReport::new(host.vm.kind().name(), migrated.clone(), vcpus.collect()))
    }
}

fn vcpu_report(
    host: &Host,
    now: &VcpuFigures,
    then: &VcpuFigures,
    migrated: &SourceReport,
    marks: Option<(&Marks, &Marks)>,
    before_per_s: &[f64],
) -> VcpuReport {
    let index = now.index;
    let steps = marks.map_or(0, |(begin, end)| end.steps_since(begin).get(index).copied().unwrap_or(0));
    let before = before_per_s.get(index).copied().unwrap_or(0.0);
    let stats = host.guest.as_ref().and_then(|guest| guest.stats(index).ok());
    let stall = stats.map_or(Duration::ZERO, |stats| stats.longest_gap);
    let live_ms = (migrated.total_ms - migrated.downtime_ms).max(1e-3);
    VcpuReport {
        index,
        pages_dirtied: now.pages - then.pages,
        ring_entries: (now.pages + now.duplicate_entries) - (then.pages + then.duplicate_entries),
        ring_full_exits: now.ring_full_exits - then.ring_full_exits,
        throttled_ms: (now.throttled_ns - then.throttled_ns) as f64 / 1e6,
        longest_stall_ms: stall.as_secs_f64() * 1e3,
        progress_before_per_s: before,
        progress_during_per_s: steps as f64 / live_ms * 1e3,
        progress_after_per_s: None,
        // A vCPU that made no progress before had none to lose.
        lost_guest_ms: if before > 0.0 { migrated.total_ms - steps as f64 / before * 1e3 } else { 0.0 },
    }
}
