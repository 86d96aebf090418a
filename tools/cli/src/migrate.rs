//! One migration as the command line asks for it: its options, its run, and what the guest felt of it.

use std::fmt;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use ringferry::progress::{Progress, Update};
use ringferry::source::{
    Outcome, Source, SourceError, SourceOptions, SourceReport, StandstillLimit, Unconfirmed,
};
use ringferry::track::{DirtySource, VcpuFigures};
use ringferry::transport::{ChannelSpec, ChannelSpecError, SendOptions};
use ringferry::vm::Vm;
use serde::{Deserialize, Serialize};

use crate::display::follow;
use crate::guest::{Host, Marks};
use crate::report::{MigrationReport, VcpuReport};
use crate::sizes::Time;
use crate::terms::{TermsArgs, WrongTerms, factor};

/// Options of a migration.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(next_help_heading = "Migration")]
#[serde(default)]
pub struct MigrateArgs {
    /// Data connections, each with its own thread and io_uring
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub channels: u32,

    /// A data connection over a NIC of its own, [LOCAL][%DEVICE]=REMOTE:PORT; several make several channels,
    /// and `receive` waits with --data-listen for each
    #[arg(long, value_name = "CHANNEL", value_parser = parse_channel)]
    pub channel: Vec<String>,

    /// Compare the RAM of both sides before the handing over, and look for writes that tracking missed after it
    /// [default: false; for the demo, true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub verify: Option<bool>,

    /// Let guest RAM be registered with the kernel, and pinned, where zero-copy sends really are zero-copied: for a VMM that
    /// discards no guest memory meanwhile (balloon, hole punching)
    #[arg(long)]
    pub register_memory: bool,

    /// How many times the expected downtime the guest may stand still before it runs on here [default: 4]
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    pub standstill_factor: Option<f64>,

    /// How long it may stand still in any case [default: 1s]
    #[arg(long, value_name = "TIME")]
    pub standstill_floor: Option<Time>,

    /// How long the destination may give no sign of life [default: 5s]
    #[arg(long, value_name = "TIME")]
    pub peer_timeout: Option<Time>,

    #[command(flatten)]
    pub terms: TermsArgs,
}

/// Kept as text, because it may be sent to another process.
fn parse_channel(text: &str) -> Result<String, ChannelSpecError> {
    text.parse::<ChannelSpec>().map(|_| text.to_owned())
}

impl Default for MigrateArgs {
    /// As the command line has them.
    fn default() -> Self {
        Self {
            channels: 2,
            channel: Vec::new(),
            verify: None,
            register_memory: false,
            standstill_factor: None,
            standstill_floor: None,
            peer_timeout: None,
            terms: TermsArgs::default(),
        }
    }
}

/// What becomes of a VM of which nobody knows whether the destination runs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It does not run there, and never will: it runs on here.
    Keep,
    /// It runs there: it is gone here.
    Drop,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "the VM is kept: it runs on here",
            Self::Drop => "the VM is dropped: it is the destination's",
        })
    }
}

/// Where a migration has left the VM.
#[derive(Debug)]
pub enum Migrated {
    /// At the destination.
    Moved(Box<MigrationReport>),
    /// Where somebody decided, because the destination did not say.
    Decided(Decision),
}

impl MigrateArgs {
    /// The progress object of a migration with these options.
    pub fn progress(&self) -> Result<Progress, WrongTerms> {
        Ok(Progress::new(self.terms.parameters()?))
    }

    /// Migrates the VM of `host` to `destination`; every update goes to `show`. `before_per_s` is how fast the guest was.
    /// If the destination does not say whether it runs the VM, `decide` hears why, and the VM stands still until it
    /// returns; it is asked again, with the reason, if the VM cannot be kept.
    ///
    /// # Errors
    ///
    /// The VM runs on here, unless it cannot be resumed.
    pub fn migrate(
        &self,
        host: &mut Host,
        destination: &str,
        progress: &Progress,
        before_per_s: &[f64],
        show: impl FnMut(&Update) + Send,
        decide: impl FnMut(&SourceError) -> Decision,
    ) -> Result<Migrated> {
        let mut tracker = host.vm.dirty_source()?;
        let memory = host.vm.memory().clone();
        let vcpus = u32::try_from(host.vm.vcpus())?;
        let options = self.options(destination, vcpus, host.name.clone(), host.description.to_bytes()?)?;
        let figures_before = host.vm.figures();
        if let Some(guest) = &mut host.guest {
            guest.restart_longest_gap()?;
        }
        let begin = host.seen();
        let outcome = thread::scope(|scope| {
            scope.spawn(|| follow(progress, show));
            let vm = host.vm.as_vm();
            Source::new(vm, tracker.as_mut(), &memory, options, progress.clone()).run()
        });
        let migrated = match outcome? {
            Outcome::HandedOver(report) => report,
            Outcome::Unconfirmed(unconfirmed) => {
                return Ok(Migrated::Decided(resolve(unconfirmed, decide)));
            }
        };
        let end = host.seen();
        let marks = begin.as_ref().zip(end.as_ref());
        let figures = host.vm.figures();
        let vcpus = figures.iter().zip(&figures_before);
        let vcpus = vcpus.map(|(now, then)| vcpu_report(host, now, then, &migrated, marks, before_per_s));
        let vcpus = vcpus.collect();
        Ok(Migrated::Moved(Box::new(MigrationReport::new(host.vm.kind().name(), *migrated, vcpus))))
    }

    /// The library's options of a migration of such a VM.
    pub fn options(
        &self,
        destination: &str,
        vcpus: u32,
        vm_id: String,
        description: Vec<u8>,
    ) -> Result<SourceOptions> {
        let ours = SourceOptions::default();
        let time = |given: Option<Time>, default| given.map_or(default, |time| time.0);
        Ok(SourceOptions {
            destination: destination.to_owned(),
            channels: self.channels,
            channel_specs: self
                .channel
                .iter()
                .map(|text| text.parse())
                .collect::<Result<_, ChannelSpecError>>()?,
            verify: self.verify.unwrap_or(ours.verify),
            send: SendOptions { register_memory: self.register_memory, ..ours.send },
            vcpus,
            vm_id,
            description,
            peer_timeout: time(self.peer_timeout, ours.peer_timeout),
            standstill: StandstillLimit {
                factor: self.standstill_factor.unwrap_or(ours.standstill.factor),
                floor: time(self.standstill_floor, ours.standstill.floor),
            },
            ..ours
        })
    }
}

/// Does with the VM what `decide` says.
fn resolve<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    mut unconfirmed: Unconfirmed<'_, V, D>,
    mut decide: impl FnMut(&SourceError) -> Decision,
) -> Decision {
    let mut decision = decide(unconfirmed.cause());
    while decision == Decision::Keep {
        match unconfirmed.keep() {
            Ok(()) => return decision,
            Err((still, error)) => {
                unconfirmed = still;
                decision = decide(&error);
            }
        }
    }
    drop(unconfirmed.release());
    decision
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
    let in_kernel = now.stalls_in_kernel - then.stalls_in_kernel;
    let in_user = now.stalls_in_user - then.stalls_in_user;
    let live_ms = (migrated.total_ms - migrated.downtime_ms).max(1e-3);
    VcpuReport {
        index,
        pages_dirtied: now.pages - then.pages,
        ring_entries: (now.pages + now.duplicate_entries) - (then.pages + then.duplicate_entries),
        ring_full_exits: now.ring_full_exits - then.ring_full_exits,
        throttled_ms: (now.throttled_ns - then.throttled_ns) as f64 / 1e6,
        longest_stall_ms: stall.as_secs_f64() * 1e3,
        stalls: now.stalls - then.stalls,
        stalls_in_kernel_share: (in_kernel + in_user > 0)
            .then(|| in_kernel as f64 / (in_kernel + in_user) as f64),
        stalls_put_off: now.stalls_put_off - then.stalls_put_off,
        progress_before_per_s: before,
        progress_during_per_s: steps as f64 / live_ms * 1e3,
        progress_after_per_s: None,
        // A vCPU that made no progress before had none to lose.
        lost_guest_ms: if before > 0.0 { migrated.total_ms - steps as f64 / before * 1e3 } else { 0.0 },
    }
}
