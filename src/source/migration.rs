//! What all phases of a migration share: the VM, its tracker, what was harvested, and the report.

use std::time::{Duration, Instant};

use super::error::SourceError;
use super::link::{Link, tell_of_the_end};
use super::options::SourceOptions;
use super::report::{SourceReport, millis};
use super::verification::Verification;
use crate::layout::GuestMemory;
use crate::page_set::PageSet;
use crate::progress::{Event, GaveWay, Progress, RoundReport};
use crate::track::{DirtySource, Redirtied};
use crate::transport::control::ControlError;
use crate::transport::{RoundSent, TransportError};
use crate::vm::{Paused, Vm};

/// One migration.
#[derive(Debug)]
pub(super) struct Migration<'a, V: ?Sized, D: ?Sized> {
    pub vm: &'a mut V,
    pub tracker: &'a mut D,
    pub memory: &'a GuestMemory,
    pub options: SourceOptions,
    pub progress: Progress,
    pub report: SourceReport,
    pub started: Instant,
    /// Pages harvested since tracking began: what a failure gives back.
    pub taken: PageSet,
    /// If RAM is to be compared.
    pub verification: Option<Verification>,
}

impl<'a, V: Vm + ?Sized, D: DirtySource + ?Sized> Migration<'a, V, D> {
    pub fn new(
        vm: &'a mut V,
        tracker: &'a mut D,
        memory: &'a GuestMemory,
        options: SourceOptions,
        progress: Progress,
    ) -> Self {
        Self {
            taken: PageSet::new(memory.end()),
            report: SourceReport::default(),
            started: Instant::now(),
            verification: None,
            vm,
            tracker,
            memory,
            options,
            progress,
        }
    }

    /// The number of the next round, from 1.
    pub fn next_round(&self) -> u32 {
        u32::try_from(self.report.rounds.len() + 1).unwrap_or(u32::MAX)
    }

    /// A harvest of everything while the guest runs.
    pub fn harvest(&mut self) -> Result<PageSet, SourceError> {
        let mut harvested = PageSet::new(self.memory.end());
        self.tracker.harvest(&mut harvested)?;
        self.options.send.discards.take_into(&mut harvested, self.memory);
        self.taken.union(&harvested);
        Ok(harvested)
    }

    /// A harvest of what is protected while the guest runs; the rest stays `behind`.
    pub fn harvest_protected(&mut self, behind: &mut Redirtied) -> Result<PageSet, SourceError> {
        let mut harvested = PageSet::new(self.memory.end());
        behind.clear();
        self.tracker.harvest_protected(&mut harvested, behind)?;
        self.options.send.discards.take_into(&mut harvested, self.memory);
        // No page twice in a round: two copies may arrive in any order.
        behind.strike_off(&mut harvested);
        self.taken.union(&harvested);
        if let Some(verification) = &mut self.verification {
            verification.harvested_but(&harvested, Some(behind));
        }
        Ok(harvested)
    }

    /// A harvest while the vCPUs stand still.
    pub fn harvest_paused(&mut self, paused: &Paused) -> Result<PageSet, SourceError> {
        let mut harvested = PageSet::new(self.memory.end());
        self.tracker.harvest_paused(paused, &mut harvested)?;
        self.options.send.discards.take_into(&mut harvested, self.memory);
        self.taken.union(&harvested);
        Ok(harvested)
    }

    /// Puts a round that has ended into the report, and tells the watchers.
    pub fn round_sent(&mut self, sent: &RoundSent, pages_to_send: u64, round: RoundReport) {
        self.report.totals = self.report.totals.plus(sent.totals);
        let round = RoundReport {
            round: sent.round,
            pages_to_send,
            totals: sent.totals,
            duration_ms: millis(sent.duration),
            ..round
        };
        let bytes_sent = self.report.totals.bytes_sent;
        self.report.rounds.push(round.clone());
        self.progress.publish(Event::RoundEnded(round), |status| {
            status.round_pages_done = status.round_pages;
            status.bytes_sent = bytes_sent;
        });
    }

    /// The guest is going to stand still for longer than the limit, and is not called back.
    pub fn limit_gave_way(&mut self, why: GaveWay, limit: Duration, expected: Duration) {
        if self.report.downtime_limit_gave_way.is_some() {
            return;
        }
        self.report.downtime_limit_gave_way = Some(why);
        let (downtime_limit_ms, expected_downtime_ms) = (millis(limit), millis(expected));
        let event = Event::DowntimeLimitGaveWay { why, downtime_limit_ms, expected_downtime_ms };
        self.progress.publish(event, |_| ());
    }

    /// The first act of a failure while the guest stands still; the error to go on with.
    pub fn resume_first(&mut self, paused: Paused, error: SourceError) -> SourceError {
        match self.vm.resume(paused) {
            Ok(()) => error,
            Err(source) => {
                tracing::error!(%error, "the switchover failed");
                SourceError::Vm { action: "resume after a failed switchover", source }
            }
        }
    }

    /// The guest runs: what was harvested is dirty again, and the destination is told.
    pub fn give_up(&mut self, link: &Link, error: SourceError) -> SourceError {
        self.tracker.give_back(&self.taken);
        self.stop_tracking();
        let error = link.explained_by_peer(self.cancelled_or(error));
        tell_of_the_end(&link.control, &error);
        error
    }

    /// Whatever failed after the user had asked for the end failed because of that.
    pub fn cancelled_or(&self, error: SourceError) -> SourceError {
        match error {
            SourceError::Vm { .. } => error,
            SourceError::Control(ControlError::Cancelled { .. })
            | SourceError::Transport(TransportError::Cancelled) => SourceError::Cancelled,
            _ if self.progress.parameters().is_cancelled() => SourceError::Cancelled,
            error => error,
        }
    }

    pub fn stop_tracking(&mut self) {
        self.options.send.discards.forget();
        if let Err(error) = self.tracker.stop() {
            tracing::warn!(%error, "tracking could not be stopped");
        }
    }

    /// The VM is gone. Its RAM is still here, exactly as it was left: what was never dirty by tracking and has changed all
    /// the same can be found now, when it costs the guest nothing.
    pub fn audit(&mut self) {
        let Some(verification) = self.verification.take() else { return };
        // The digests were equal, or the VM would not have been handed over.
        self.report.ram_digest_match = Some(true);
        let Some(audit) = verification.audit(self.progress.parameters().cancel_flag()) else { return };
        self.report.audited = true;
        self.report.ram_digest_match = Some(audit.differing_pages == 0);
        self.report.untracked_pages = audit.differing_pages;
        if let Some(first) = audit.first {
            let pages = audit.differing_pages;
            tracing::error!(pages, first = %first.address(), "pages changed without having been tracked: they are lost");
        }
    }
}
