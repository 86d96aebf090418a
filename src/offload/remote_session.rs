//! A session of the VMM's tracker, as the offload process has it: each step of it is a message and its answer.

use std::sync::Arc;

use super::error::OffloadError;
use super::line::SharedLine;
use super::protocol::{Harvest, Message, RUNS_MAX, Taker, VcpuPlace};
use crate::kvm::caps;
use crate::layout::{PageIndex, PageRun};
use crate::page_set::PageSet;
use crate::track::{
    DirtySource, LentPage, Observed, Redirtied, TrackError, VcpuFigures, VcpuThrottle, borrowed_throttle,
};
use crate::vm::{Paused, Settled};

/// Dirty pages that the VMM takes.
#[derive(Debug)]
pub(super) struct RemoteSession {
    line: SharedLine,
    taker: Taker,
    page: Arc<LentPage>,
    /// Where the memory ends that the VMM has passed.
    end: PageIndex,
    /// The vCPUs, as the VMM last told.
    vcpus: Vec<(VcpuPlace, VcpuThrottle)>,
}

impl RemoteSession {
    pub(super) fn new(line: SharedLine, taker: Taker, page: Arc<LentPage>, end: PageIndex) -> Self {
        Self { line, taker, page, end, vcpus: Vec::new() }
    }

    /// The vCPUs are these from now on.
    fn take_up(&mut self, places: Vec<VcpuPlace>) {
        let mut before = std::mem::take(&mut self.vcpus);
        let page = &self.page;
        let usize_of = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let vcpus = places.into_iter().map(|place| {
            let known = before.iter().position(|(known, _)| *known == place);
            known.map_or_else(
                || (place, borrowed_throttle(page, usize_of(place.0), usize_of(place.1))),
                |at| before.swap_remove(at),
            )
        });
        self.vcpus = vcpus.collect();
    }

    fn done(&mut self, request: &Message, action: &'static str) -> Result<(), TrackError> {
        let mut places = None;
        let done = {
            let mut line = self.line.lock();
            let answer = line.ask(request, action, &mut |channel, part| match part {
                Message::Vcpus(told) => {
                    places = Some(told);
                    Ok(())
                }
                other => Err(channel.unexpected("Done", &other)),
            });
            answer.and_then(|answer| line.is_done(answer, action))
        };
        if let Some(places) = places {
            self.take_up(places);
        }
        done.map_err(of_vmm)
    }

    fn observe_with(&mut self, redirtied: Option<&mut Redirtied>) -> Result<Observed, TrackError> {
        let action = "observe the guest";
        let (mut places, mut told) = (None, Vec::new());
        let request = Message::Observe { telling: redirtied.is_some() };
        let answer = {
            let mut line = self.line.lock();
            let answer = line.ask(&request, action, &mut |channel, part| {
                match part {
                    Message::Vcpus(vcpus) => places = Some(vcpus),
                    Message::Runs { runs, .. } => told.extend(runs),
                    other => return Err(channel.unexpected("Observed", &other)),
                }
                Ok(())
            });
            match answer.map_err(of_vmm)? {
                Message::Observed { vcpus, others } => (vcpus, others),
                other => return Err(of_vmm(line.not("Observed", other, action))),
            }
        };
        if let Some(places) = places {
            self.take_up(places);
        }
        self.check(&told)?;
        if let Some(redirtied) = redirtied {
            redirtied.add_runs(&told);
        }
        let (vcpus, others) = answer;
        Ok(vcpus.map_or(Observed::Unobservable, |vcpus| Observed::PerVcpu { vcpus, others }))
    }

    /// One or two sets of pages.
    fn harvest_with(
        &mut self,
        what: Harvest,
        dirty: &mut PageSet,
        behind: Option<&mut Redirtied>,
    ) -> Result<(), TrackError> {
        let action = "take dirty pages";
        let (mut harvested, mut left) = (Vec::new(), Vec::new());
        {
            let mut line = self.line.lock();
            line.tell(&Message::Harvest(what)).map_err(of_vmm)?;
            for runs in [Some(&mut harvested), behind.is_some().then_some(&mut left)].into_iter().flatten() {
                hear_runs(&mut line, action, runs).map_err(of_vmm)?;
            }
        }
        self.check(&harvested)?;
        self.check(&left)?;
        harvested.iter().for_each(|run| dirty.insert_run(*run));
        if let Some(behind) = behind {
            behind.add_runs(&left);
        }
        Ok(())
    }

    /// An error if the VMM names pages that it has not passed: memory was plugged in since.
    fn check(&self, runs: &[PageRun]) -> Result<(), TrackError> {
        let needed = runs.last().map_or(PageIndex(0), |run| run.end());
        if needed > self.end { Err(TrackError::SetTooSmall { capacity: self.end, needed }) } else { Ok(()) }
    }
}

/// What the VMM knows of its vCPUs.
pub(super) fn figures(line: &SharedLine) -> Result<Vec<VcpuFigures>, OffloadError> {
    let action = "tell its figures";
    let mut vcpus = Vec::new();
    let mut line = line.lock();
    let answer = line.ask(&Message::AskFigures, action, &mut |channel, part| match part {
        Message::Figures(figures) => {
            vcpus.push(figures);
            Ok(())
        }
        other => Err(channel.unexpected("Figures", &other)),
    })?;
    line.is_done(answer, action)?;
    Ok(vcpus)
}

/// Adds a set of pages, which comes in as many messages as it takes.
fn hear_runs(
    line: &mut super::line::Line,
    action: &'static str,
    into: &mut Vec<PageRun>,
) -> Result<(), OffloadError> {
    let last = line.hear(action, &mut |channel, part| match part {
        Message::Runs { runs, .. } => {
            into.extend(runs);
            Ok(())
        }
        other => Err(channel.unexpected("Runs", &other)),
    })?;
    match last {
        Message::Runs { runs, .. } => {
            into.extend(runs);
            Ok(())
        }
        other => Err(line.not("Runs", other, action)),
    }
}

fn of_vmm(error: OffloadError) -> TrackError {
    TrackError::Vmm(error.into())
}

impl DirtySource for RemoteSession {
    fn backend(&self) -> &'static str {
        if self.taker == Taker::VmmOnBitmap { "bitmap" } else { "ring" }
    }

    fn vcpus(&self) -> Vec<VcpuThrottle> {
        self.vcpus.iter().map(|(_, throttle)| throttle.clone()).collect()
    }

    fn unseen_per_vcpu(&self) -> u64 {
        if self.taker == Taker::VmmOnBitmap { 0 } else { caps::pml_entries() }
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.done(&Message::StartTracking, "start tracking")
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        self.observe_with(None)
    }

    fn observe_into(&mut self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        self.observe_with(Some(redirtied))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_with(Harvest::All, dirty, None)
    }

    fn harvest_protected(&mut self, dirty: &mut PageSet, behind: &mut Redirtied) -> Result<(), TrackError> {
        self.harvest_with(Harvest::Protected, dirty, Some(behind))
    }

    fn protect(&mut self, behind: &mut Redirtied, pages: u64, dirty: &mut PageSet) -> Result<(), TrackError> {
        for runs in behind.take_highest(pages).chunks(RUNS_MAX) {
            let mut protected = Vec::new();
            {
                let mut line = self.line.lock();
                line.tell(&Message::ProtectBehind { runs: runs.to_vec() }).map_err(of_vmm)?;
                hear_runs(&mut line, "protect pages", &mut protected).map_err(of_vmm)?;
            }
            self.check(&protected)?;
            protected.iter().for_each(|run| dirty.insert_run(*run));
        }
        Ok(())
    }

    fn harvest_paused(&mut self, _: &Paused, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_with(Harvest::Paused, dirty, None)
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        self.harvest_with(Harvest::Final, dirty, None)
    }

    fn give_back(&mut self, pages: &PageSet) {
        let runs: Vec<PageRun> = pages.runs().collect();
        for runs in runs.chunks(RUNS_MAX) {
            if let Err(error) = self.line.lock().tell(&Message::GiveBack { runs: runs.to_vec() }) {
                // The VMM forgets the session, and begins the next one afresh.
                return tracing::debug!(%error, "pages were not given back");
            }
        }
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.done(&Message::StopTracking, "stop tracking")
    }
}
