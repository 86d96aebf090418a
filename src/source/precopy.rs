//! The second phase: rounds of dirty pages are sent while the guest runs, until the controller says that the rest fits.
//!
//! The guest runs here before and after this phase; only when it succeeds it hands out a [`Standstill`]. The guest may be
//! stopped at the end of a round or in the middle of one. Then the pages that no channel was given yet are taken back:
//! they are the rest, with all that is dirty.

use std::time::{Duration, Instant};

use super::error::SourceError;
use super::link::Link;
use super::migration::Migration;
use super::report::millis;
use super::standstill::Standstill;
use super::state_writer::StateWriter;
use super::steering::Steering;
use super::verification::Verification;
use crate::converge::{Action, LastCheck, Why};
use crate::os::sched::ShortSlice;
use crate::page::populated;
use crate::page_set::PageSet;
use crate::progress::{Event, Phase, RoundReport};
use crate::track::{DirtySource, Observed};
use crate::transport::RoundSent;
use crate::transport::control::Wait;
use crate::vm::{Moment, Vm};

/// Sends rounds until the guest stands still with little enough left. When it fails the guest runs, and everything is
/// undone.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Standstill, SourceError> {
    let result = start_tracking(migration).and_then(|first_round| {
        let _sampled_in_time = ShortSlice::for_this_thread();
        let steering = Steering::new(migration);
        Precopy { migration: &mut *migration, link: &mut *link, steering }.rounds(first_round)
    });
    result.map_err(|error| migration.give_up(link, error))
}

/// Switches tracking on, and finds the pages that the first round has to send: those that exist. A page that is populated
/// later is written by someone, and so dirty.
fn start_tracking<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
) -> Result<PageSet, SourceError> {
    migration.tracker.start()?;
    let mut pages = populated(migration.memory).pages;
    let mut discarded = PageSet::new(migration.memory.end());
    migration.vm.discarded_pages(&mut discarded);
    pages.subtract(&discarded);
    // What was dirtied while the populated pages were looked for says nothing about how fast the guest dirties.
    let dirty = migration.harvest()?;
    pages.union(&dirty);
    if migration.options.verify {
        let verification = Verification::new(migration.memory, &pages, &discarded);
        migration.verification = Some(verification.map_err(SourceError::Verification)?);
    }
    let (ram_pages, populated_pages) = (migration.memory.pages(), pages.len());
    migration.progress.publish(Event::Started { ram_pages, populated_pages }, |status| {
        status.phase = Phase::Precopy;
        status.ram_pages = ram_pages;
    });
    Ok(pages)
}

struct Precopy<'m, 'a, V: ?Sized, D: ?Sized> {
    migration: &'m mut Migration<'a, V, D>,
    link: &'m mut Link,
    steering: Steering,
}

/// How a round ended for this phase.
enum RoundEnd {
    /// All of it is in place at the destination.
    Complete(RoundSent),
    /// The controller wants the guest stopped, while pages of the round are on their way.
    Stop(Why),
}

impl<V: Vm + ?Sized, D: DirtySource + ?Sized> Precopy<'_, '_, V, D> {
    fn rounds(mut self, mut to_send: PageSet) -> Result<Standstill, SourceError> {
        loop {
            let (number, pages_to_send) = (self.migration.next_round(), to_send.len());
            self.steering.round_started(number, pages_to_send, self.link.sender.handle().totals());
            self.link.sender.begin_round(number, to_send)?;
            // What a switchover that was called off in the middle of the round had taken back.
            let mut carried = PageSet::new(self.migration.memory.end());
            let sent = loop {
                match self.round()? {
                    RoundEnd::Complete(sent) => break sent,
                    RoundEnd::Stop(why) => {
                        if let Some(standstill) = self.stop_guest(why, &mut carried, Some(pages_to_send))? {
                            return Ok(standstill);
                        }
                    }
                }
            };
            let observed = self.migration.tracker.observe()?;
            let mut dirty = self.migration.harvest()?;
            self.migration.round_sent(&sent, pages_to_send, dirtied(&dirty, &observed));
            if let Some(verification) = &mut self.migration.verification {
                verification.harvested(&dirty);
            }
            let totals = self.link.sender.handle().totals();
            let besides_pages = self.besides_pages();
            self.steering.set_overhead(besides_pages);
            let action = self.steering.round_ended(&observed, dirty.len(), totals);
            if self.migration.report.rounds.len() == 1 {
                self.migration.report.prediction_after_round_1 = self.steering.prediction();
            }
            dirty.union(&carried);
            match action {
                Action::Continue => self.send_device_state()?,
                Action::GiveUp(_) => return Err(SourceError::GaveUp),
                Action::SwitchOver(why) => {
                    if let Some(standstill) = self.stop_guest(why, &mut dirty, None)? {
                        return Ok(standstill);
                    }
                }
            }
            to_send = dirty;
        }
    }

    /// Follows the round that is being sent: samples who dirties what, and slows down whoever has to be slowed down.
    fn round(&mut self) -> Result<RoundEnd, SourceError> {
        loop {
            if let Some(sent) = self.link.sender.wait_round(self.steering.next_sample())? {
                return Ok(RoundEnd::Complete(sent));
            }
            let parameters = self.migration.progress.parameters();
            if parameters.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            self.link.watch_peer(parameters)?;
            let sending = self.link.sender.handle();
            match self.steering.sample(self.migration.tracker, self.migration.vm, &sending)? {
                Action::Continue => {}
                Action::GiveUp(_) => return Err(SourceError::GaveUp),
                Action::SwitchOver(why) => return Ok(RoundEnd::Stop(why)),
            }
        }
    }

    /// What the standstill takes besides pages, as far as it is known by now: the rest of the verification, and device
    /// state that can only leave then.
    fn besides_pages(&mut self) -> Duration {
        let verifying = self.migration.verification.as_ref().map_or(Duration::ZERO, Verification::left);
        let state = self.steering.time_to_send(self.migration.vm.device_state_bytes_left());
        verifying + state
    }

    /// Stops the guest, now that the destination has shown that it is alive, and adds all that is left to `left`. If that
    /// is too much the guest runs on: then `None`. `round_pages` is the size of the round that is being sent, if one is.
    fn stop_guest(
        &mut self,
        why: Why,
        left: &mut PageSet,
        round_pages: Option<u64>,
    ) -> Result<Option<Standstill>, SourceError> {
        self.link.confirm_alive(self.migration.progress.parameters())?;
        let since = Instant::now();
        let paused =
            self.migration.vm.pause().map_err(|source| SourceError::Vm { action: "pause", source })?;
        // Not before: a vCPU that was held back would use the time until the pause.
        self.steering.open_gates();
        self.migration.report.pause_ms = millis(since.elapsed());
        let dirty = match self.migration.harvest() {
            Ok(dirty) => dirty,
            Err(error) => return Err(self.migration.resume_first(paused, error)),
        };
        if round_pages.is_some() {
            left.union(&self.link.sender.recall());
        }
        left.union(&dirty);
        if let Some(verification) = &mut self.migration.verification {
            verification.harvested(&dirty);
        }
        if self.steering.last_check(why, left.len()) == LastCheck::CallOff {
            let resumed = self.migration.vm.resume(paused);
            let action = "resume a guest that dirtied too much";
            resumed.map_err(|source| SourceError::Vm { action, source })?;
            return Ok(None);
        }
        let expected = self.steering.expected_downtime(left.len());
        let report = &mut self.migration.report;
        report.predicted_downtime_ms = Some(millis(expected));
        report.downtime_limit_ms = millis(self.steering.downtime_limit());
        let budget = self.migration.options.standstill.budget(expected.max(self.steering.downtime_limit()));
        let pages_left = left.len();
        self.migration
            .progress
            .publish(Event::Switchover { pages_left }, |status| status.phase = Phase::Switchover);
        let left = std::mem::take(left);
        Ok(Some(Standstill::new(paused, since, budget, left, round_pages)))
    }

    /// Device state that can leave early. Every gate is open meanwhile, for nobody steers.
    fn send_device_state(&mut self) -> Result<(), SourceError> {
        self.steering.open_gates();
        let parameters = self.migration.progress.parameters();
        // The guest runs: what bounds this is the peer's sign of life, which the control connection watches.
        let wait =
            Wait { deadline: Instant::now() + Duration::from_secs(3600), cancel: parameters.cancel_flag() };
        let mut writer = StateWriter::new(self.link, &self.migration.progress, wait);
        let saved = self.migration.vm.save_device_state(Moment::Running, &mut writer);
        writer.finish(saved)
    }
}

fn dirtied(dirty: &PageSet, observed: &Observed) -> RoundReport {
    let vcpu_pages_dirtied = match observed {
        Observed::PerVcpu(pages) => pages.clone(),
        Observed::Total(_) | Observed::Unobservable => Vec::new(),
    };
    RoundReport { pages_dirtied: dirty.len(), vcpu_pages_dirtied, ..RoundReport::default() }
}
