//! The steering stands between the controller, which only computes, and the guest: it observes which vCPU dirties what,
//! feeds the controller, closes the gates that the controller wants closed, and publishes what it decided.

use std::time::{Duration, Instant};

use super::migration::Migration;
use super::run_budget::{RUN_MIN, RunBudget};
use crate::converge::units::whole;
use crate::converge::{
    Action, Change, Controller, GateState, LastCheck, LinkSample, Observation, Pages, Prediction, Quota,
    Settings, VcpuSample, Why,
};
use crate::layout::PAGE_SIZE;
use crate::progress::{self, Event, Phase, Progress};
use crate::track::{DirtySource, Observed, Redirtied, TrackError, VcpuThrottle};
use crate::transport::{SendHandle, Totals};
use crate::vm::Vm;

/// Steers one migration.
#[derive(Debug)]
pub(super) struct Steering {
    controller: Controller,
    progress: Progress,
    started: Instant,
    terms_version: u64,
    vcpus: Vec<SteeredVcpu>,
    samples: Vec<VcpuSample>,
    redirtied: Redirtied,
    /// The last two.
    samples_took: [Duration; 2],
    last_shown: (Duration, Vec<u64>),
    totals_before_round: Totals,
    /// Of the current round, when it started.
    unprotected: u64,
    round_began: Duration,
    /// Pages that are dirty and none of the round's, and that the tracker does not show: until the next harvest, and at all.
    given_back: u64,
    carried: u64,
    round_trip: Duration,
}

#[derive(Debug)]
struct SteeredVcpu {
    throttle: VcpuThrottle,
    throttled_before: Duration,
    gate: GateState,
    /// When its gate opens by itself, which is no later than 10 ms after it was closed.
    opens_at: Duration,
    budget: RunBudget,
}

impl SteeredVcpu {
    fn new(throttle: VcpuThrottle) -> Self {
        Self {
            throttled_before: throttle.throttled(),
            gate: GateState::Open,
            opens_at: Duration::ZERO,
            budget: RunBudget::default(),
            throttle,
        }
    }

    /// Closes its gate, for a vCPU that has dirtied so many pages and may dirty so many more afterwards. Whether it may be
    /// inside the guest.
    fn close(&mut self, until: Duration, now: Duration, quota: Option<Quota>, dirtied: Pages) -> bool {
        let wait = until.saturating_sub(now).min(VcpuThrottle::CLOSED_MAX);
        self.opens_at = now + wait;
        let Some(Quota::Pages(per_slice)) = quota else {
            self.throttle.close_for(wait);
            return true;
        };
        let run = self.budget.next(per_slice.0, dirtied.0, self.throttle.ran());
        !self.throttle.close_and_time(wait, run, wait.max(SHORTEST_STALL))
    }

    /// Whether it may be in the run after a stall, which it ends by itself: its gate is not to be opened before it is known
    /// what it did.
    fn times_its_run(&self, now: Duration, quota: Option<Quota>) -> bool {
        let GateState::ClosedUntil(until) = self.gate else { return false };
        matches!(quota, Some(Quota::Pages(_))) && now < until + TIMED_RUN_MAX && self.throttle.is_timed()
    }
}

/// How often a sample looks again because vCPUs came or went meanwhile; the next sample finds the rest.
const LOOKS_AGAIN_MAX: u32 = 3;
/// Between the last look of a round and the harvest lies no more than this, unless the host is busy, and so many pages
/// whatever the time.
const LOOK_TO_HARVEST: Duration = Duration::from_millis(5);
const PAGES_SINCE_LOOK: u64 = 256;
/// What a link is taken to carry before it was measured: a gigabit a second.
const UNKNOWN_BYTES_PER_S: f64 = 1.25e8;

/// A vCPU that closes its own gate waits for at least this long to be told for how long.
const SHORTEST_STALL: Duration = Duration::from_millis(1);
/// Who has not overdrawn by then does not have to be held back.
const TIMED_RUN_MAX: Duration = Duration::from_millis(2);

/// A stall that is to last longer than a gate stays closed is renewed this long before the gate opens.
const RENEW_BEFORE: Duration = Duration::from_millis(4);

impl Steering {
    /// Takes the wheel of a migration that has just begun.
    pub fn new<V: Vm + ?Sized, D: DirtySource + ?Sized>(migration: &Migration<'_, V, D>) -> Self {
        let Migration { memory, progress, started, .. } = migration;
        let vcpus = migration.tracker.vcpus();
        let mut terms_version = 0;
        let parameters = progress.parameters();
        let terms = parameters.changed_since(&mut terms_version).unwrap_or_else(|| parameters.terms());
        let mut settings = Settings {
            policy: terms.policy,
            limits: terms.limits,
            switchover_bandwidth: terms.switchover_bandwidth,
            switchover_overhead: SWITCHOVER_OVERHEAD,
            unseen_per_vcpu: Pages(migration.tracker.unseen_per_vcpu()),
            ..Settings::new(Pages(memory.pages()))
        };
        if vcpus.iter().all(VcpuThrottle::is_timed) {
            settings.gate_latency = RUN_MIN;
        }
        Self {
            controller: Controller::new(settings),
            progress: progress.clone(),
            started: *started,
            terms_version,
            samples: Vec::with_capacity(vcpus.len()),
            redirtied: Redirtied::new(memory.end()),
            samples_took: [Duration::ZERO; 2],
            vcpus: vcpus.into_iter().map(SteeredVcpu::new).collect(),
            last_shown: (Duration::ZERO, Vec::new()),
            totals_before_round: Totals::default(),
            unprotected: 0,
            round_began: Duration::ZERO,
            given_back: 0,
            carried: 0,
            round_trip: Duration::ZERO,
        }
    }

    /// Everything dirty has been harvested: counting starts anew. `unprotected` of the round's `pages` cannot be seen to be
    /// dirtied again yet.
    pub fn round_started(&mut self, round: u32, pages: u64, unprotected: u64, totals: Totals) {
        self.totals_before_round = totals;
        self.unprotected = unprotected;
        self.round_began = self.started.elapsed();
        self.last_shown = (self.started.elapsed(), Vec::new());
        let event = Event::RoundStarted { round, pages_to_send: pages };
        self.progress.publish(event, |status| {
            status.round = round;
            status.round_pages = pages;
            status.round_pages_done = 0;
        });
        self.controller.round_started(self.started.elapsed(), Pages(pages));
        self.publish_events();
    }

    /// A sample in the middle of a round: observes, strikes off what is dirty again, and slows down the vCPUs that have
    /// to be slowed down.
    pub fn sample(
        &mut self,
        tracker: &mut (impl DirtySource + ?Sized),
        vm: &(impl Vm + ?Sized),
        sender: &SendHandle,
    ) -> Result<Action, TrackError> {
        if let Some(terms) = self.progress.parameters().changed_since(&mut self.terms_version) {
            self.controller.change(self.started.elapsed(), |settings| {
                settings.policy = terms.policy;
                settings.limits = terms.limits;
                settings.switchover_bandwidth = terms.switchover_bandwidth;
            });
        }
        let began = Instant::now();
        let mut observed = self.observe(tracker, sender)?;
        for _ in 0..LOOKS_AGAIN_MAX {
            // One vCPU may have gone and another come: the number of them says nothing.
            let tells_vcpus = matches!(observed, Observed::PerVcpu { .. });
            if !tells_vcpus || !self.take_up_vcpus(tracker.vcpus()) {
                break;
            }
            // It was before they came or went, or after: that one's order is known.
            observed = self.observe(tracker, sender)?;
        }
        let action = self.act(&observed, sender, None);
        self.apply_gates(vm);
        self.samples_took = [self.samples_took[1], began.elapsed()];
        Ok(action)
    }

    fn observe(
        &mut self,
        tracker: &mut (impl DirtySource + ?Sized),
        sender: &SendHandle,
    ) -> Result<Observed, TrackError> {
        if !self.controller.strikes_off_redirtied() {
            return tracker.observe();
        }
        let observed = tracker.observe_into(&mut self.redirtied)?;
        sender.strike_off(|undealt| self.redirtied.strike_off(undealt));
        self.redirtied.clear();
        Ok(observed)
    }

    /// The round's pages are in place, and `harvested` pages are dirty.
    pub fn round_ended(
        &mut self,
        tracker: &(impl DirtySource + ?Sized),
        observed: &Observed,
        harvested: u64,
        sender: &SendHandle,
    ) -> Action {
        // It was in the order of the vCPUs of the last sample, unless it tells of more or fewer, or of none.
        let is_known = matches!(observed, Observed::PerVcpu { vcpus, .. } if vcpus.len() == self.vcpus.len());
        if !is_known {
            self.take_up_vcpus(tracker.vcpus());
        }
        let action = self.act(observed, sender, Some(harvested));
        if is_known {
            self.take_up_vcpus(tracker.vcpus());
        }
        action
    }

    /// The guest stands still with exactly `left` pages to send.
    pub fn last_check(&mut self, why: Why, left: u64) -> LastCheck {
        let check = self.controller.last_check(self.started.elapsed(), why, Pages(left));
        self.publish_events();
        check
    }

    /// Whether the guest may run on once more although it was stopped.
    pub fn may_call_off(&self) -> bool {
        self.controller.may_call_off()
    }

    /// The link has been seen while the guest stands still.
    pub fn link_seen(&mut self, sender: &SendHandle) {
        self.controller.link_seen(self.started.elapsed(), &sender.link());
    }

    /// The guest was to stand still for too long, and runs on.
    pub fn called_off(&mut self, left: u64, fit: u64) {
        self.controller.called_off(self.started.elapsed(), Pages(left), Pages(fit));
    }

    /// A switchover was called off: counting starts anew, as of a round with the `pages` that are still on their way.
    pub fn round_goes_on(&mut self, pages: u64, totals: Totals) {
        self.totals_before_round = totals;
        self.last_shown = (self.started.elapsed(), Vec::new());
        self.progress.update(|status| {
            status.phase = Phase::Precopy;
            status.round_pages = pages;
            status.round_pages_done = 0;
        });
        self.controller.round_started(self.started.elapsed(), Pages(pages));
        self.publish_events();
    }

    /// What has to be sent after the round that has begun, and nobody sees: `given_back` pages before the next harvest, and
    /// `carried` ones at all.
    pub fn dirty_besides(&mut self, given_back: u64, carried: u64) {
        (self.given_back, self.carried) = (given_back, carried);
    }

    /// When to sample again: when the controller wants, but sampling is not to be all that this thread does. One sample
    /// that took long is one that had to wait for a CPU.
    pub fn next_sample(&self) -> Duration {
        let [before, last] = self.samples_took;
        self.controller.next_sample().max(before.min(last) * 2)
    }

    /// What was expected at the last sample.
    pub fn prediction(&self) -> Option<progress::Prediction> {
        self.controller.prediction().as_ref().map(shown)
    }

    /// The downtime limit that is in force.
    pub fn downtime_limit(&self) -> Duration {
        self.controller.settings().limits.downtime_at(self.started.elapsed())
    }

    /// The wish below it.
    pub fn downtime_target(&self) -> Option<Duration> {
        self.controller.settings().limits.downtime_target
    }

    /// The limit, or what a switchover takes in any case.
    pub fn pause_limit(&self) -> Duration {
        self.controller.pause_limit(self.started.elapsed())
    }

    /// How long the guest is going to stand still if `left` pages are left, as far as the link is known.
    pub fn expected_downtime(&self, left: u64) -> Duration {
        let settings = self.controller.settings();
        let besides = settings.switchover_overhead.saturating_add(settings.switchover_backlog);
        besides.saturating_add(self.time_to_send(left * PAGE_SIZE as u64))
    }

    /// How long the link takes for so many bytes while the guest stands still; a guess, as long as it is not known.
    pub fn time_to_send(&self, bytes: u64) -> Duration {
        let bytes_per_s = self.controller.switchover_bandwidth().unwrap_or(UNKNOWN_BYTES_PER_S);
        Duration::try_from_secs_f64(bytes as f64 / bytes_per_s).unwrap_or(Duration::MAX)
    }

    /// Bytes that the link carries in `time`, as far as it is known.
    pub fn bytes_in(&self, time: Duration) -> u64 {
        whole(self.controller.bandwidth().unwrap_or(0.0) * time.as_secs_f64())
    }

    /// Whether the guest could be stopped but for work that goes on while it runs.
    pub fn waits_for_a_backlog(&self) -> bool {
        !self.controller.settings().switchover_backlog.is_zero()
    }

    /// What the switchover takes besides sending pages, now that more is known of it: round trips, what else it takes in any
    /// case, and what it takes if it comes now.
    pub fn set_besides(&mut self, round_trip: Duration, fixed: Duration, backlog: Duration) {
        self.round_trip = round_trip;
        self.controller.set_backlog(backlog);
        let overhead = SWITCHOVER_OVERHEAD.saturating_add(round_trip * ROUND_TRIPS).saturating_add(fixed);
        // A change makes the controller plan anew: not for what makes no difference.
        if overhead.abs_diff(self.controller.settings().switchover_overhead) > Duration::from_millis(1) {
            self.controller
                .change(self.started.elapsed(), |settings| settings.switchover_overhead = overhead);
        }
    }

    /// Whether vCPUs are held back in this round, so that it is the last but few.
    pub fn is_braking(&self) -> bool {
        self.controller.is_braking()
    }

    /// Lets every vCPU run.
    pub fn open_gates(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.gate = GateState::Open;
            vcpu.throttle.open();
        }
    }

    /// The vCPUs that there are now, in the order in which they are observed: some may have been plugged in or unplugged.
    /// Whether that changed anything.
    fn take_up_vcpus(&mut self, throttles: Vec<VcpuThrottle>) -> bool {
        let is_same = |(throttle, vcpu): (&VcpuThrottle, &SteeredVcpu)| throttle.is_same(&vcpu.throttle);
        if throttles.len() == self.vcpus.len() && throttles.iter().zip(&self.vcpus).all(is_same) {
            return false;
        }
        let mut before: Vec<_> = std::mem::take(&mut self.vcpus).into_iter().map(Some).collect();
        let mut places = Vec::with_capacity(throttles.len());
        for throttle in throttles {
            let is_it = |vcpu: &Option<SteeredVcpu>| {
                vcpu.as_ref().is_some_and(|vcpu| vcpu.throttle.is_same(&throttle))
            };
            let place = before.iter().position(is_it);
            let known = place.and_then(|place| before[place].take());
            self.vcpus.push(known.unwrap_or_else(|| SteeredVcpu::new(throttle)));
            places.push(place);
        }
        // Of those that are gone, nobody waits for an opening.
        before.iter().flatten().for_each(|vcpu| vcpu.throttle.open());
        self.controller.vcpus_changed(&places);
        let shown = |place: &Option<usize>| place.and_then(|place| self.last_shown.1.get(place)).copied();
        self.last_shown.1 = places.iter().map(|place| shown(place).unwrap_or(0)).collect();
        tracing::info!(vcpus = self.vcpus.len(), "vCPUs came or went while the guest is steered");
        true
    }

    fn act(&mut self, observed: &Observed, sender: &SendHandle, harvested: Option<u64>) -> Action {
        let totals = sender.totals();
        let now = self.started.elapsed();
        let (per_vcpu, others) = match observed {
            Observed::PerVcpu { vcpus, others } => {
                let unnamed = harvested.map_or(0, |harvested| self.unnamed(vcpus, harvested, now));
                (vcpus.as_slice(), unnamed.max(*others))
            }
            Observed::Total(pages) => ([].as_slice(), harvested.unwrap_or(*pages)),
            Observed::Unobservable => ([].as_slice(), harvested.unwrap_or(0)),
        };
        // What was given back has been harvested by the end of the round.
        let besides = self.carried + if harvested.is_some() { 0 } else { self.given_back };
        let tells_vcpus = matches!(observed, Observed::PerVcpu { .. });
        if self.controller.settings().per_vcpu != tells_vcpus {
            self.controller.change(now, |settings| settings.per_vcpu = tells_vcpus);
        }
        self.samples.clear();
        self.samples.extend(self.vcpus.iter().enumerate().map(|(index, vcpu)| VcpuSample {
            dirtied: Pages(per_vcpu.get(index).copied().unwrap_or(0)),
            throttled: vcpu.throttle.throttled().saturating_sub(vcpu.throttled_before),
        }));
        let round = totals.since(self.totals_before_round);
        let link = LinkSample { round_trip: self.round_trip, ..sender.link() };
        let pages_done = round.pages_sent + round.zero_pages + round.pages_struck_off;
        let seen = Observation {
            vcpus: &self.samples,
            others: Pages(others),
            besides: Pages(besides),
            pages_done: Pages(pages_done),
            pages_struck_off: Pages(round.pages_struck_off),
            unprotected: Pages(self.unprotected),
            link,
        };
        let action = match harvested {
            Some(_) => self.controller.round_ended(now, &seen),
            None => self.controller.observed(now, &seen),
        };
        self.show(now, per_vcpu, pages_done, totals);
        self.publish_events();
        action
    }

    /// Pages of a harvest that nobody was named for: what processors still kept, what other writers' logs held; but not what
    /// the vCPUs dirtied between the last look and the harvest.
    fn unnamed(&self, vcpus: &[u64], harvested: u64, now: Duration) -> u64 {
        let named: u64 = vcpus.iter().sum();
        let round_s = now.saturating_sub(self.round_began).as_secs_f64();
        let since_look = (LOOK_TO_HARVEST.as_secs_f64() / round_s.max(1e-6)).min(1.0);
        let since_look = whole(named as f64 * since_look) + PAGES_SINCE_LOOK;
        harvested.saturating_sub(named + since_look + self.given_back)
    }

    /// Closes and opens the gates as the controller wants them. A vCPU whose gate has just been closed may be
    /// inside the guest: it is kicked out.
    fn apply_gates(&mut self, vm: &(impl Vm + ?Sized)) {
        let now = self.started.elapsed();
        let seen = self.controller.shares().zip(&self.samples);
        let wanted = self.controller.gates().zip(seen);
        for (vcpu, (wanted, (share, sample))) in self.vcpus.iter_mut().zip(wanted) {
            let close = |vcpu: &mut SteeredVcpu, until| {
                let may_be_inside = vcpu.close(until, now, share.quota, sample.dirtied);
                if may_be_inside {
                    vm.kick(vcpu.throttle.index());
                }
            };
            match wanted {
                // A gate opens by itself after a while: a longer stall is renewed shortly before. When this
                // thread comes too late for that, the vCPU is inside the guest again and has to be kicked.
                GateState::ClosedUntil(until) if wanted == vcpu.gate => {
                    if until > vcpu.opens_at && now + RENEW_BEFORE > vcpu.opens_at {
                        close(vcpu, until);
                    }
                }
                wanted if wanted == vcpu.gate => {}
                GateState::Open if vcpu.times_its_run(now, share.quota) => continue,
                GateState::Open => vcpu.throttle.open(),
                GateState::ClosedUntil(until) => close(vcpu, until),
            }
            vcpu.gate = wanted;
        }
    }

    fn show(&mut self, now: Duration, per_vcpu: &[u64], pages_done: u64, totals: Totals) {
        let window = now.saturating_sub(self.last_shown.0);
        // Rates over less than this are noise to a reader.
        if window < Duration::from_millis(50) {
            return;
        }
        let before = &self.last_shown.1;
        let rate = |(vcpu, pages): (usize, &u64)| {
            pages.saturating_sub(before.get(vcpu).copied().unwrap_or(0)) as f64 / window.as_secs_f64()
        };
        let rates: Vec<f64> = per_vcpu.iter().enumerate().map(rate).collect();
        let bandwidth = self.controller.bandwidth();
        self.progress.update(|status| {
            status.round_pages_done = pages_done.min(status.round_pages);
            status.bytes_sent = totals.bytes_sent;
            status.wire_bytes_per_s = bandwidth.unwrap_or(status.wire_bytes_per_s);
            status.dirtied_pages = per_vcpu.to_vec();
            status.dirty_pages_per_s = rates;
        });
        self.last_shown = (now, per_vcpu.to_vec());
    }

    fn publish_events(&mut self) {
        let settings = self.controller.settings();
        let (policy, limits) = (settings.policy.to_string(), settings.limits.clone());
        for event in self.controller.take_events() {
            let terms = || Event::TermsChanged {
                policy: policy.clone(),
                downtime_limit_ms: limits.downtime_at(event.at).as_secs_f64() * 1e3,
                downtime_target_ms: limits.downtime_target.map(|target| target.as_secs_f64() * 1e3),
            };
            let event = match event.change {
                Change::Policy(_) | Change::Limits(_) | Change::DowntimeLimit(_) => terms(),
                Change::Throttling { vcpus, level, time_share } => {
                    Event::ThrottleChanged { vcpus, level_pages: level.map(|level| level.0), time_share }
                }
                Change::Prediction(prediction) => Event::PredictionChanged(shown(&prediction)),
                Change::LongestStall(longest) => {
                    Event::StallsChanged { longest_stall_ms: longest.as_secs_f64() * 1e3 }
                }
                Change::MinShare(min_share) => Event::MinShareLowered { min_share },
                Change::CannotHold => Event::CannotHoldGuest,
                Change::DeadlineOutOfReach => Event::DeadlineOutOfReach,
                Change::DowntimeOutOfReach { limit, overhead } => Event::DowntimeLimitOutOfReach {
                    downtime_limit_ms: limit.as_secs_f64() * 1e3,
                    fixed_ms: overhead.as_secs_f64() * 1e3,
                },
                Change::CalledOff { left, fits } => {
                    Event::SwitchoverCalledOff { pages_left: left.0, pages_fit: fits.0 }
                }
                // The source publishes these when they have happened.
                Change::SwitchOver(_) | Change::GaveUp(_) => continue,
            };
            let prediction = match &event {
                Event::PredictionChanged(prediction) => Some(*prediction),
                _ => None,
            };
            self.progress.publish(event, |status| status.prediction = prediction.or(status.prediction));
        }
    }
}

/// Round trips between the pause and the word that the destination runs: the pages on their way, the last pages, what
/// saving state wrote, `Prepare` and `Commit`.
const ROUND_TRIPS: u32 = 5;
/// The switchover takes this long besides pages, round trips, verification and device state in pieces: stopping vCPUs (0.4 ms
/// mean, 7 ms worst here), saving, restoring and handing over (3 ms here, without the pages a pause is 4 to 7 ms long).
const SWITCHOVER_OVERHEAD: Duration = Duration::from_millis(12);

fn shown(prediction: &Prediction) -> progress::Prediction {
    let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
    progress::Prediction {
        converges: prediction.converges,
        converges_unthrottled: prediction.converges_unthrottled,
        total_ms: prediction.total.map(millis),
        downtime_ms: millis(prediction.downtime),
        lost_guest_ms: prediction.lost.map(millis),
        bytes: prediction.bytes,
    }
}
