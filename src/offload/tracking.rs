//! The VMM's end takes dirty pages for an offload process that does not follow the rings: a session of the VMM's tracker, asked
//! message by message.

use super::channel::Channel;
use super::error::OffloadError;
use super::pages::{READ_LIMIT, send_parts, send_runs};
use super::protocol::{Harvest, Message, VcpuPlace};
use crate::layout::{PageIndex, PageRun};
use crate::page_set::PageSet;
use crate::track::{DirtyTracker, Keeping, Observed, Redirtied, Session, TrackError};
use crate::vm::{Paused, Quiesced};

/// How far the VM stands still.
#[derive(Clone, Copy)]
pub(super) enum Stillness<'p> {
    /// It runs, or may.
    None,
    Paused(&'p Paused),
    Quiesced(&'p Paused),
}

/// What the offload process has of the tracker.
#[derive(Debug)]
pub(super) struct Tracking<'k> {
    tracker: &'k DirtyTracker,
    keeping: &'k Keeping,
    session: Session,
    /// The vCPUs of which the offload process knows.
    known: Vec<VcpuPlace>,
}

impl<'k> Tracking<'k> {
    pub(super) fn new(tracker: &'k DirtyTracker, keeping: &'k Keeping) -> Self {
        Self { tracker, keeping, session: tracker.session(), known: Vec::new() }
    }

    /// Answers a request, if it is one of those.
    pub(super) fn answer(
        &mut self,
        channel: &Channel,
        request: &Message,
        stillness: Stillness<'_>,
    ) -> Result<(), OffloadError> {
        let answer = match request {
            Message::StartTracking => match self.session.start() {
                Ok(()) => {
                    self.tell_vcpus(channel)?;
                    Message::Done
                }
                Err(error) => failed(&error),
            },
            Message::Observe { telling } => match self.observe(channel, *telling)? {
                Ok(observed) => observed,
                Err(error) => failed(&error),
            },
            Message::Harvest(what) => return self.harvest(channel, *what, stillness),
            Message::ProtectBehind { runs } => return self.protect(channel, runs),
            Message::GiveBack { runs } => {
                self.session.give_back(&set_of(self.tracker.tracked_end(), runs));
                return Ok(());
            }
            Message::StopTracking => match self.session.stop() {
                Ok(()) => Message::Done,
                Err(error) => failed(&error),
            },
            Message::AskFigures => {
                for figures in self.tracker.snapshot().vcpus {
                    channel.send(&Message::Figures(figures), &[], READ_LIMIT)?;
                }
                Message::Done
            }
            other => return Err(channel.unexpected("a request of tracking", other)),
        };
        channel.send(&answer, &[], READ_LIMIT)
    }

    /// Tells which vCPUs there are, if that has changed.
    fn tell_vcpus(&mut self, channel: &Channel) -> Result<(), OffloadError> {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let vcpus = self.keeping.vcpus().into_iter();
        // A vCPU whose gate is not lent is told with a place that no page has.
        let vcpus = vcpus.map(|(index, place)| (number(index), place.map_or(u32::MAX, number)));
        let vcpus: Vec<VcpuPlace> = vcpus.collect();
        if vcpus != self.known {
            channel.send(&Message::Vcpus(vcpus.clone()), &[], READ_LIMIT)?;
            self.known = vcpus;
        }
        Ok(())
    }

    fn observe(
        &mut self,
        channel: &Channel,
        telling: bool,
    ) -> Result<Result<Message, TrackError>, OffloadError> {
        let observed = if telling {
            let mut told = Redirtied::new(self.tracker.tracked_end());
            let observed = self.session.observe_into(&mut told);
            send_parts(channel, told.for_another_process())?;
            observed
        } else {
            self.session.observe()
        };
        // After the observation: if they came or went in between, the offload process sees that they differ, and asks again.
        self.tell_vcpus(channel)?;
        Ok(observed.map(|observed| match observed {
            Observed::PerVcpu { vcpus, others } => Message::Observed { vcpus: Some(vcpus), others },
            Observed::Total(_) | Observed::Unobservable => Message::Observed { vcpus: None, others: 0 },
        }))
    }

    fn harvest(
        &self,
        channel: &Channel,
        what: Harvest,
        stillness: Stillness<'_>,
    ) -> Result<(), OffloadError> {
        let end = self.tracker.tracked_end();
        let (mut dirty, mut behind) = (PageSet::new(end), None);
        let harvested = match (what, stillness) {
            (Harvest::All, _) => self.session.harvest(&mut dirty),
            (Harvest::Protected, _) => {
                self.session.harvest_protected(&mut dirty, behind.insert(Redirtied::new(end)))
            }
            (Harvest::Paused, Stillness::Paused(paused) | Stillness::Quiesced(paused)) => {
                self.session.harvest_paused(paused, &mut dirty)
            }
            // The offload process asks for the state first; a VMM that asks itself is trusted with its own guest.
            (Harvest::Final, Stillness::Quiesced(paused)) => {
                let settled = Quiesced::declare_no_device_writes(paused).state_is_saved();
                self.session.harvest_final(&settled, &mut dirty)
            }
            (Harvest::Paused | Harvest::Final, _) => {
                let text = "the guest does not stand still".to_owned();
                return channel.send(&Message::Failed { text }, &[], READ_LIMIT);
            }
        };
        if let Err(error) = harvested {
            return channel.send(&failed(&error), &[], READ_LIMIT);
        }
        send_runs(channel, &dirty)?;
        behind.map_or(Ok(()), |behind| send_runs(channel, behind.for_another_process()))
    }

    fn protect(&self, channel: &Channel, runs: &[PageRun]) -> Result<(), OffloadError> {
        let end = self.tracker.tracked_end();
        let (mut dirty, mut behind) = (PageSet::new(end), Redirtied::new(end));
        behind.add_runs(runs);
        match self.session.protect(&mut behind, u64::MAX, &mut dirty) {
            Ok(()) => send_runs(channel, &dirty),
            Err(error) => channel.send(&failed(&error), &[], READ_LIMIT),
        }
    }
}

fn failed(error: &TrackError) -> Message {
    Message::Failed { text: error.to_string() }
}

fn set_of(end: PageIndex, runs: &[PageRun]) -> PageSet {
    let mut pages = PageSet::new(end);
    runs.iter().for_each(|run| pages.insert_run(*run));
    pages
}
