//! The second phase: rounds of dirty pages are sent while the guest runs, until the controller says that the rest fits.
//!
//! The guest runs here before and after this phase; only when it succeeds it hands out a [`Standstill`]. The guest may be
//! stopped at the end of a round or in the middle of one. Then the pages that no channel was given yet are taken back:
//! they are the rest, with all that is dirty.

use std::time::{Duration, Instant};

use super::behind::Behind;
use super::error::SourceError;
use super::link::Link;
use super::migration::Migration;
use super::report::millis;
use super::standstill::Standstill;
use super::state_writer::StateWriter;
use super::steering::Steering;
use super::verification::Verification;
use crate::converge::guard::Guard;
use crate::converge::{Action, LastCheck, Why};
use crate::os::sched::ShortSlice;
use crate::page::populated;
use crate::page_set::PageSet;
use crate::progress::{Event, GaveWay, Phase, RoundReport};
use crate::track::{DirtySource, Observed};
use crate::transport::RoundSent;
use crate::transport::control::Wait;
use crate::vm::{Moment, Vm};

/// What the rounds have shown. It outlives a standstill that is called off.
#[derive(Debug)]
pub(super) struct Rounds {
    pub steering: Steering,
    device: DeviceState,
    behind: Behind,
    /// Pages that were harvested while the guest stood still, and given back: nobody sees them before the next harvest.
    given_back: u64,
}

/// A round that is being sent.
#[derive(Debug)]
pub(super) struct UnderWay {
    /// The pages that it began with.
    pub pages_to_send: u64,
    /// Protected pages that were taken back from it, when a switchover was called off in the middle of it.
    pub carried: PageSet,
}

/// Sends rounds until the guest stands still with little enough left. When it fails the guest runs, and everything is
/// undone.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<(Rounds, Standstill), SourceError> {
    let result = start_tracking(migration).and_then(|first_round| {
        let _sampled_in_time = ShortSlice::for_this_thread();
        let mut rounds = Rounds {
            steering: Steering::new(migration),
            device: DeviceState::default(),
            behind: Behind::new(migration.memory.end()),
            given_back: 0,
        };
        let mut precopy = Precopy { migration: &mut *migration, link: &mut *link, rounds: &mut rounds };
        let first = precopy.begin_round(first_round)?;
        let standstill = precopy.until_stopped(first)?;
        Ok((rounds, standstill))
    });
    result.map_err(|error| migration.give_up(link, error))
}

impl Rounds {
    /// A switchover was called off: the guest runs, and so do the rounds, from the one that is being sent. `given_back`
    /// pages were harvested while it stood still.
    pub fn go_on<V: Vm + ?Sized, D: DirtySource + ?Sized>(
        &mut self,
        under_way: UnderWay,
        given_back: u64,
        migration: &mut Migration<'_, V, D>,
        link: &mut Link,
    ) -> Result<Standstill, SourceError> {
        let _sampled_in_time = ShortSlice::for_this_thread();
        // They are among those that were given back.
        self.behind.pages_mut().clear();
        let result = {
            let mut precopy = Precopy { migration: &mut *migration, link: &mut *link, rounds: self };
            precopy.goes_on(under_way.carried.len(), given_back);
            precopy.until_stopped(under_way)
        };
        result.map_err(|error| migration.give_up(link, error))
    }
}

/// Device state that leaves early is given to the link for so long at a time, and a guest that cannot be stopped yet is
/// left alone for so long.
const MOMENT: Duration = Duration::from_millis(100);
/// And at least so much of it.
const STATE_BYTES_MIN: u64 = 1 << 20;
/// Early device state is waited for no longer than this: what bounds it before is the destination's sign of life, which
/// the control connection watches.
const STATE_LIMIT: Duration = Duration::from_secs(3600);
/// Round trips that follow the last page.
const ROUND_TRIPS_AT_THE_END: u32 = 2;
/// What follows the last page takes so long besides: restoring the state, and running (some 3 ms here, 8 on a busy host).
const HANDING_OVER: Duration = Duration::from_millis(8);

/// Switches tracking on, and finds the pages that the first round has to send: those that exist. A page that is populated
/// later is written by someone, and so dirty.
fn start_tracking<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
) -> Result<PageSet, SourceError> {
    migration.options.send.discards.follow(migration.memory.end());
    migration.tracker.start()?;
    let mut pages = populated(migration.memory).pages;
    let mut discarded = PageSet::new(migration.memory.end());
    migration.vm.discarded_pages(&mut discarded);
    pages.subtract(&discarded);
    // What was dirtied while the populated pages were looked for says nothing about how fast the guest dirties.
    let dirty = migration.harvest()?;
    pages.union(&dirty);
    discarded.subtract(&dirty);
    if migration.options.verify {
        let verification = Verification::new(migration.memory, &pages, &dirty, discarded);
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
    rounds: &'m mut Rounds,
}

/// What is known of the device state that would have to leave during the standstill.
#[derive(Debug, Default)]
struct DeviceState {
    bytes_left: u64,
    /// It does not become less by what leaves early.
    stays: bool,
    /// How fast it left last time: the VMMs may be slower than the link.
    bytes_per_s: Option<f64>,
}

impl DeviceState {
    /// How long the two VMMs take for what is left.
    fn takes(&self) -> Duration {
        let seconds = self.bytes_per_s.map_or(0.0, |bytes_per_s| self.bytes_left as f64 / bytes_per_s);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// What comes after a round.
enum Followed {
    Stopped(Box<Standstill>),
    /// The pages of the next.
    Next(PageSet),
}

/// How a round ended for this phase.
enum RoundEnd {
    /// All of it is in place at the destination.
    Complete(RoundSent),
    /// The controller wants the guest stopped, while pages of the round are on their way.
    Stop(Why),
}

impl<V: Vm + ?Sized, D: DirtySource + ?Sized> Precopy<'_, '_, V, D> {
    fn begin_round(&mut self, to_send: PageSet) -> Result<UnderWay, SourceError> {
        self.heed_wishes()?;
        let Rounds { steering, behind, given_back, .. } = &mut *self.rounds;
        let number = self.migration.next_round();
        let pages_to_send = to_send.len() + behind.len();
        let totals = self.link.sender.handle().totals();
        steering.round_started(number, pages_to_send, behind.len(), totals);
        steering.dirty_besides(std::mem::take(given_back), 0);
        if behind.is_empty() {
            self.link.sender.begin_round(number, to_send)?;
        } else {
            self.link.sender.begin_open_round(number, to_send)?;
        }
        Ok(UnderWay { pages_to_send, carried: PageSet::new(self.migration.memory.end()) })
    }

    /// Sends rounds until the guest stands still; the first is under way.
    fn until_stopped(&mut self, mut under_way: UnderWay) -> Result<Standstill, SourceError> {
        loop {
            match self.follow(under_way)? {
                Followed::Stopped(standstill) => return Ok(*standstill),
                Followed::Next(to_send) => under_way = self.begin_round(to_send)?,
            }
        }
    }

    /// Follows a round to its end, or until the guest stands still.
    fn follow(&mut self, under_way: UnderWay) -> Result<Followed, SourceError> {
        let UnderWay { pages_to_send, mut carried } = under_way;
        let sent = loop {
            match self.round()? {
                RoundEnd::Complete(sent) => break sent,
                RoundEnd::Stop(why) => {
                    if let Some(standstill) = self.stop_guest(why, &mut carried, Some(pages_to_send))? {
                        return Ok(Followed::Stopped(Box::new(standstill)));
                    }
                    self.goes_on(carried.len(), self.rounds.given_back);
                }
            }
        };
        let observed = self.migration.tracker.observe()?;
        let mut dirty = self.migration.harvest_protected(self.rounds.behind.pages_mut())?;
        self.rounds.given_back = 0;
        let pages_dirty = dirty.len() + self.rounds.behind.len();
        self.migration.round_sent(&sent, pages_to_send, dirtied(pages_dirty, &observed));
        self.plan_besides()?;
        let sender = self.link.sender.handle();
        let action =
            self.rounds.steering.round_ended(self.migration.tracker, &observed, pages_dirty, &sender);
        if self.migration.report.rounds.len() == 1 {
            self.migration.report.prediction_after_round_1 = self.rounds.steering.prediction();
        }
        dirty.union(&carried);
        match action {
            Action::GiveUp(_) => return Err(SourceError::GaveUp),
            Action::SwitchOver(why) => {
                self.wait_until_alive()?;
                if let Some(standstill) = self.stop_guest(why, &mut dirty, None)? {
                    return Ok(Followed::Stopped(Box::new(standstill)));
                }
            }
            Action::Continue => {
                self.send_device_state()?;
                if sent.duration < MOMENT / 10 && self.rounds.steering.waits_for_a_backlog() {
                    self.steer_for(MOMENT / 10)?;
                }
            }
        }
        Ok(Followed::Next(dirty))
    }

    /// A switchover was called off in the middle of a round: for the controller, what is left of that is a round of its own.
    fn goes_on(&mut self, carried: u64, given_back: u64) {
        let (pages, totals) = (self.link.sender.pages_left(), self.link.sender.handle().totals());
        self.rounds.steering.round_goes_on(pages, totals);
        self.rounds.steering.dirty_besides(given_back, carried);
    }

    /// Follows the round that is being sent until it ends, or until the guest is to be stopped.
    fn round(&mut self) -> Result<RoundEnd, SourceError> {
        loop {
            self.rounds.behind.top_up(self.migration, self.link, &self.rounds.steering)?;
            if let Some(sent) =
                self.link.sender.wait_round(self.rounds.behind.wait(self.rounds.steering.next_sample()))?
            {
                return Ok(RoundEnd::Complete(sent));
            }
            match self.sample()? {
                Action::SwitchOver(why) if self.link.is_alive() => return Ok(RoundEnd::Stop(why)),
                _ => {}
            }
        }
    }

    /// Samples which vCPU dirties what, slows down the vCPUs that have to be slowed down, and looks after the peer.
    fn sample(&mut self) -> Result<Action, SourceError> {
        self.heed_wishes()?;
        self.plan_besides()?;
        let sending = self.link.sender.handle();
        let discards = &self.migration.options.send.discards;
        if discards.is_pending() {
            sending.strike_off(|undealt| discards.strike_off(undealt));
        }
        match self.rounds.steering.sample(self.migration.tracker, self.migration.vm, &sending)? {
            Action::GiveUp(_) => Err(SourceError::GaveUp),
            action => Ok(action),
        }
    }

    /// The user may have cancelled, the destination may have ended.
    fn heed_wishes(&mut self) -> Result<(), SourceError> {
        let parameters = self.migration.progress.parameters();
        if parameters.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        self.link.watch_peer(parameters)
    }

    /// Between two rounds: steers on until the destination has shown that it is alive. One that never does ends the
    /// control connection.
    fn wait_until_alive(&mut self) -> Result<(), SourceError> {
        while !self.link.is_alive() {
            self.steer_for(Duration::from_millis(1))?;
        }
        Ok(())
    }

    fn steer_for(&mut self, time: Duration) -> Result<(), SourceError> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.sample()?;
            let left = deadline.saturating_duration_since(Instant::now());
            std::thread::sleep(self.rounds.steering.next_sample().min(left));
        }
        Ok(())
    }

    /// Tells the plan what the standstill takes besides pages: round trips, and device state that can only leave then, in
    /// any case; the rest of the verification, and state that is on its way or becomes less, if it comes now.
    fn plan_besides(&mut self) -> Result<(), SourceError> {
        self.rounds.device.bytes_left = self.migration.vm.device_state_bytes_left();
        let device =
            self.rounds.steering.time_to_send(self.rounds.device.bytes_left).max(self.rounds.device.takes());
        let (fixed, waits) =
            if self.rounds.device.stays { (device, Duration::ZERO) } else { (Duration::ZERO, device) };
        let verifying = self.migration.verification.as_ref().map_or(Duration::ZERO, Verification::left);
        let under_way = self.rounds.steering.time_to_send(self.link.state_under_way()?);
        self.rounds.steering.set_besides(
            self.link.round_trip(),
            fixed,
            verifying.saturating_add(under_way).saturating_add(waits),
        );
        Ok(())
    }

    /// Stops the guest and adds all that is left to `left`. If that is too much the guest runs on: then `None`.
    /// `round_pages` is the size of the round that is being sent, if one is.
    fn stop_guest(
        &mut self,
        why: Why,
        left: &mut PageSet,
        round_pages: Option<u64>,
    ) -> Result<Option<Standstill>, SourceError> {
        let since = Instant::now();
        let paused =
            self.migration.vm.pause().map_err(|source| SourceError::Vm { action: "pause", source })?;
        // A gate that opened before the pause would let its vCPU use the time until then.
        self.rounds.steering.open_gates();
        self.migration.report.pause_ms = millis(since.elapsed());
        let dirty = match self.migration.harvest_paused(&paused) {
            Ok(dirty) => dirty,
            Err(error) => return Err(self.migration.resume_first(paused, error)),
        };
        if round_pages.is_some() {
            left.union(&self.link.sender.recall());
        }
        left.union(&dirty);
        if self.rounds.steering.last_check(why, left.len()) == LastCheck::CallOff {
            // These pages are not protected, and so must not be sent while the guest runs. They come with the next harvest.
            let resumed = self.migration.vm.resume(paused);
            left.subtract(&dirty);
            self.migration.tracker.give_back(&dirty);
            self.rounds.given_back = dirty.len();
            self.migration.report.switchovers_called_off += 1;
            let action = "resume a guest that dirtied too much";
            resumed.map_err(|source| SourceError::Vm { action, source })?;
            return Ok(None);
        }
        if round_pages.is_some() {
            self.link.sender.close_round(self.rounds.behind.len());
        }
        if let Some(verification) = &mut self.migration.verification {
            verification.harvested(&dirty);
        }
        if self.migration.report.prediction_after_round_1.is_none() {
            // The guest is stopped in the middle of the first round.
            self.migration.report.prediction_after_round_1 = self.rounds.steering.prediction();
        }
        let limit = self.rounds.steering.downtime_limit();
        let expected = self.rounds.steering.expected_downtime(left.len() + self.link.sender.pages_left());
        let (guard, held) = (self.guard(), self.held(why));
        let report = &mut self.migration.report;
        report.predicted_downtime_ms = Some(millis(expected));
        report.downtime_limit_ms = millis(limit);
        report.downtime_target_ms = self.rounds.steering.downtime_target().map(millis);
        let out_of_reach = self.rounds.steering.pause_limit() > limit;
        let gave_way = held.or(out_of_reach.then_some(GaveWay::OutOfReach)).filter(|_| expected > limit);
        report.downtime_limit_gave_way = None;
        if let Some(why) = gave_way {
            self.migration.limit_gave_way(why, limit, expected);
        }
        let budget = self.migration.options.standstill.budget(expected.max(limit));
        let pages_left = left.len();
        self.migration
            .progress
            .publish(Event::Switchover { pages_left }, |status| status.phase = Phase::Switchover);
        let left = std::mem::take(left);
        Ok(Some(Standstill { paused, since, budget, left, unprotected: dirty, round_pages, guard, held }))
    }

    /// What watches the standstill.
    fn guard(&self) -> Guard {
        let verifying = self.migration.verification.as_ref().map_or(Duration::ZERO, Verification::left);
        let round_trip = self.link.round_trip();
        let besides =
            HANDING_OVER.saturating_add(verifying).saturating_add(round_trip * ROUND_TRIPS_AT_THE_END);
        Guard::new(self.rounds.steering.pause_limit(), besides, round_trip)
    }

    /// Why a standstill will not be called off, if it will not.
    fn held(&self, why: Why) -> Option<GaveWay> {
        if matches!(why, Why::Limit(_)) {
            Some(GaveWay::AnotherLimit)
        } else if !self.rounds.steering.may_call_off() {
            Some(GaveWay::CalledOffTooOften)
        } else {
            (!self.link.may_call_off).then_some(GaveWay::OldDestination)
        }
    }

    /// Device state that can leave early. Every gate is open meanwhile, because nothing is sampled.
    fn send_device_state(&mut self) -> Result<(), SourceError> {
        self.rounds.steering.open_gates();
        let bytes = self.rounds.steering.bytes_in(MOMENT).max(STATE_BYTES_MIN);
        let parameters = self.migration.progress.parameters();
        let wait = Wait { deadline: Instant::now() + STATE_LIMIT, cancel: parameters.cancel_flag() };
        let (begun, before) = (Instant::now(), self.link.state_bytes);
        let mut writer = StateWriter::new(self.link, &self.migration.progress, wait);
        let saved = self.migration.vm.save_device_state(Moment::Running { bytes }, &mut writer);
        writer.finish(saved)?;
        let sent = self.link.state_bytes - before;
        if sent >= STATE_BYTES_MIN {
            self.rounds.device.bytes_per_s = Some(sent as f64 / begun.elapsed().as_secs_f64().max(1e-6));
        }
        let left = self.migration.vm.device_state_bytes_left();
        self.rounds.device.stays = left >= self.rounds.device.bytes_left;
        Ok(())
    }
}

fn dirtied(pages_dirtied: u64, observed: &Observed) -> RoundReport {
    let vcpu_pages_dirtied = match observed {
        Observed::PerVcpu { vcpus, .. } => vcpus.clone(),
        Observed::Total(_) | Observed::Unobservable => Vec::new(),
    };
    RoundReport { pages_dirtied, vcpu_pages_dirtied, ..RoundReport::default() }
}
