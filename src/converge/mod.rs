//! Will it finish, who must slow down, when to switch over.
//!
//! Numbers only: no KVM, no sockets, no clock. The caller says what time it is (since the migration's start) and
//! what it has seen; so the same code steers a real guest and, simulated, a thousand vCPUs and terabytes.
//!
//! A page's life comes here from `track`, which counts it, and goes on in `source`, which sends it. The source
//! drives a [`Controller`]:
//!
//! 1. [`round_started`](Controller::round_started) with the pages to send, right after the harvest that recycled;
//! 2. [`observed`](Controller::observed) every millisecond or so; then each vCPU whose [`gates`](Controller::gates)
//!    entry is closed is closed and kicked. [`Action`] says whether to go on, switch over, or give up;
//! 3. [`round_ended`](Controller::round_ended) when its pages are done; then harvest and 1, or switch over;
//! 4. [`last_check`](Controller::last_check) when the guest stands still and what is left is known exactly.
//!
//! `curve` and `bandwidth` measure, `model` predicts, `plan` and `fair_share` decide, `throttle` turns a decision
//! into gates, `switchover` and `stop` end it, `auto_converge` is the older rule, `policy` has all the names.

pub mod auto_converge;
pub mod bandwidth;
pub mod curve;
pub mod fair_share;
mod model;
mod plan;
pub mod policy;
pub mod stop;
pub mod switchover;
pub mod throttle;
pub mod units;

use std::collections::VecDeque;
use std::time::Duration;

use crate::PAGE_SIZE;
use model::{Brake, Model, Outcome, Round, Terms};
pub use policy::{AutoConverge, DirtyLimit, FairShare, POLICY_NAMES, Policy, UnknownPolicy};
pub use stop::{AtTimeout, ConvergenceTimeout, Limits};
pub use switchover::LastCheck;
pub use throttle::{Gate, PagesPerSlice, Quota};
pub use units::Pages;
use units::{duration, sane};

/// What the controller is told before the start; all of it may be changed while it runs.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Who is slowed down.
    pub policy: Policy,
    /// When it ends.
    pub limits: Limits,
    /// Bytes per second to count on in the final phase, as QEMU's avail-switchover-bandwidth; `None`: what the
    /// rounds measure.
    pub switchover_bandwidth: Option<f64>,
    /// What the final phase takes besides sending pages (pausing, device state, handing over), as measured.
    pub switchover_overhead: Duration,
    /// The guest's RAM.
    pub ram: Pages,
    /// Whether dirty pages come with the vCPU that dirtied them. If not, vCPUs can be slowed down by time only,
    /// and all alike.
    pub per_vcpu: bool,
    /// Pages per vCPU that may be dirty and not yet visible: 512 on hosts with PML, 0 elsewhere.
    pub unseen_per_vcpu: Pages,
}

impl Settings {
    /// The defaults for a guest with so much RAM: fair share, 300 ms, 20 ms of overhead until it is measured.
    pub fn new(ram: Pages) -> Self {
        Self {
            policy: Policy::default(),
            limits: Limits::default(),
            switchover_bandwidth: None,
            switchover_overhead: Duration::from_millis(20),
            ram,
            per_vcpu: true,
            unseen_per_vcpu: Pages(0),
        }
    }
}

/// What has been seen of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuSample {
    /// Different pages that it dirtied since the last recycle.
    pub dirtied: Pages,
    /// Time that it spent behind its closed gate, since the migration's start.
    pub throttled: Duration,
}

/// What has been seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Observation<'a> {
    /// By vCPU index. vCPUs may be added while it runs.
    pub vcpus: &'a [VcpuSample],
    /// Different pages dirtied since the last recycle by others than a known vCPU.
    pub others: Pages,
    /// Pages of this round that need nothing more: sent, found zero, or left because they are dirty again.
    pub pages_done: Pages,
    /// Of these, pages that were left unsent because they are dirty again.
    pub pages_skipped: Pages,
    /// Bytes that the peer's kernel has taken off our hands since the migration's start.
    pub bytes_acked: u64,
}

/// Why the guest is switched over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// What is left fits the downtime limit.
    Fits,
    /// A limit says that it has to end, whether it fits or not.
    Limit(stop::Reached),
}

/// What to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Go on sending; at the end of a round, start the next one.
    Continue,
    /// Stop the guest and send what is left, in the middle of a round, too.
    SwitchOver(Why),
    /// Cancel the migration; the guest stays.
    GiveUp(stop::Reached),
}

/// What is expected of the whole migration.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prediction {
    /// Whether it ends by itself under the policy in force.
    pub converges: bool,
    /// Whether it would end with nobody slowed down.
    pub converges_unthrottled: bool,
    /// From the start to the guest running at the destination, if it ends.
    pub total: Option<Duration>,
    /// How long the guest will stand still.
    pub downtime: Duration,
    /// Guest time lost by the worst-off vCPU from now on: throttling and downtime.
    pub lost: Option<Duration>,
    /// Bytes of the whole migration.
    pub bytes: Option<u64>,
    /// Rounds of the whole migration.
    pub rounds: Option<u32>,
    /// How much the link varied, as a share of its mean: the uncertainty of all of the above.
    pub spread: f64,
}

/// One vCPU's part in the current round.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Share {
    /// nᵢ: what it would dirty by the end of the round if nobody held it back.
    pub predicted: Pages,
    /// How it is held back, if it is.
    pub quota: Option<Quota>,
}

/// What the controller decided, for those who watch.
#[derive(Clone, PartialEq, Debug)]
pub enum Change {
    /// Another policy was set.
    Policy(Policy),
    /// Other limits were set.
    Limits(Limits),
    /// The downtime limit gave way.
    DowntimeLimit(Duration),
    /// These many vCPUs are now slowed down; 0: none any more.
    Throttling {
        /// How many.
        vcpus: usize,
        /// λ: what a vCPU may dirty in this round, with `fair-share`.
        level: Option<Pages>,
        /// The share of its time that every vCPU loses, where throttling goes by time.
        time_share: Option<f64>,
    },
    /// What is expected has changed by more than a twentieth.
    Prediction(Prediction),
    /// No plan keeps the deadline; the fastest one is followed.
    DeadlineOutOfReach,
    /// The guest is to be switched over.
    SwitchOver(Why),
    /// More was dirty than expected when the guest stood still: it runs on.
    CalledOff {
        /// What was left.
        left: Pages,
        /// What would have fitted.
        fits: Pages,
    },
    /// The migration is to be cancelled.
    GaveUp(stop::Reached),
}

/// A numbered change.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Counts from 1 without a gap.
    pub sequence: u64,
    /// Since the migration's start.
    pub at: Duration,
    /// What changed.
    pub change: Change,
}

/// Events kept for a caller that does not take them.
const MOST_EVENTS: usize = 1024;
/// Plans are made this often within a round, or less often for guests whose plans take long.
const REPLAN_S: f64 = 0.05;
const REPLAN_S_PER_VCPU: f64 = 0.5e-3;
/// Bytes on the wire for a page that is sent as it is, until it is measured.
const RAW_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 16.0;
/// Time between two rounds, until it is measured.
const ROUND_OVERHEAD_S: f64 = 2e-3;
/// The first round is the only look at a guest's curves that costs nothing; it is braked only to keep a deadline
/// that could not be kept otherwise, and not before this share of it has been seen.
const FIRST_ROUND_SEEN: f64 = 0.5;
/// A deadline is aimed at with this margin.
const DEADLINE_MARGIN: f64 = 0.02;

/// The current round.
#[derive(Clone, Debug, Default)]
struct Current {
    number: u32,
    start: f64,
    pages: f64,
    done: f64,
    skipped: f64,
    bytes_at_start: u64,
    /// Per vCPU, when the round started.
    throttled_at_start: Vec<f64>,
    running: bool,
}

/// Decides, from what it is told.
#[derive(Debug)]
pub struct Controller {
    settings: Settings,
    model: Model,
    round: Current,
    rule: auto_converge::Rule,
    throttles: Vec<throttle::Throttle>,
    gates: Vec<Gate>,
    shares: Vec<Share>,
    counts: Vec<Pages>,
    level: Option<Pages>,
    /// The round is being braked down to this.
    target: Option<f64>,
    /// Bytes per page sent, and the share of a round's pages that are sent at all.
    page_bytes: f64,
    sent_share: f64,
    bytes_acked: u64,
    next_plan: f64,
    prediction: Option<Prediction>,
    told: Option<Prediction>,
    told_throttling: (usize, u64),
    told_downtime: Duration,
    told_late: bool,
    called_off: u32,
    sequence: u64,
    events: VecDeque<Event>,
}

impl Controller {
    /// A controller for a migration that starts now.
    pub fn new(settings: Settings) -> Self {
        Self {
            told_downtime: settings.limits.downtime,
            settings,
            model: Model::default(),
            round: Current::default(),
            rule: auto_converge::Rule::default(),
            throttles: Vec::new(),
            gates: Vec::new(),
            shares: Vec::new(),
            counts: Vec::new(),
            level: None,
            target: None,
            page_bytes: RAW_PAGE_BYTES,
            sent_share: 1.0,
            bytes_acked: 0,
            next_plan: 0.0,
            prediction: None,
            told: None,
            told_throttling: (0, 0),
            told_late: false,
            called_off: 0,
            sequence: 0,
            events: VecDeque::new(),
        }
    }

    /// The settings in force.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Changes settings while it runs; takes effect at the next observation.
    pub fn change(&mut self, now: Duration, change: impl FnOnce(&mut Settings)) {
        let before = self.settings.clone();
        change(&mut self.settings);
        if self.settings.policy != before.policy {
            (self.target, self.level) = (None, None);
            self.tell(now, Change::Policy(self.settings.policy));
        }
        if self.settings.limits != before.limits {
            self.told_downtime = self.settings.limits.downtime_at(now);
            self.told_late = false;
            self.tell(now, Change::Limits(self.settings.limits.clone()));
        }
        self.next_plan = 0.0;
    }

    /// Where each vCPU's gate is to be, as of the last observation. A closed gate opens by itself; a vCPU that
    /// runs while its gate is closed has to be kicked.
    pub fn gates(&self) -> &[Gate] {
        &self.gates
    }

    /// Each vCPU's part in this round.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// λ of the current round, if it is braked.
    pub fn level(&self) -> Option<Pages> {
        self.level
    }

    /// What is expected; `None` until the link has been measured.
    pub fn prediction(&self) -> Option<Prediction> {
        self.prediction
    }

    /// The wire's bandwidth in bytes per second, as measured.
    pub fn bandwidth(&self) -> Option<f64> {
        self.model.bandwidth.mean()
    }

    /// P*: what fits the downtime limit at this time.
    pub fn fits(&self, now: Duration) -> Pages {
        let bandwidth = self.settings.switchover_bandwidth.or(self.model.bandwidth.mean()).unwrap_or(0.0);
        let limit = self.settings.limits.downtime_at(now);
        switchover::fit(limit, self.settings.switchover_overhead, bandwidth, self.page_bytes)
    }

    /// What has happened since this was last called.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// A round starts with so many pages: everything dirty has been harvested and counts start at 0 again.
    pub fn round_started(&mut self, now: Duration, pages_to_send: Pages) {
        let at = now.as_secs_f64();
        self.model.curves.iter_mut().for_each(curve::Curve::recycled);
        self.model.others.recycled();
        self.model.bandwidth.start(at, self.bytes_acked);
        self.counts.fill(Pages(0));
        self.round = Current {
            number: self.round.number.saturating_add(1),
            start: at,
            pages: pages_to_send.as_f64(),
            bytes_at_start: self.bytes_acked,
            throttled_at_start: std::mem::take(&mut self.round.throttled_at_start),
            running: true,
            ..Current::default()
        };
        self.target = None;
        self.plan(now);
    }

    /// Something has been seen in the middle of a round.
    pub fn observed(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        if let Some(action) = self.must_end(now, false) {
            return action;
        }
        let at = now.as_secs_f64();
        if at >= self.next_plan {
            self.plan(now);
        }
        for ((throttle, gate), dirtied) in self.throttles.iter_mut().zip(&mut self.gates).zip(&self.counts) {
            *gate = throttle.look(now, *dirtied);
        }
        self.downtime_limit_told(now);
        let left = (self.round.pages - self.round.done).max(0.0) + self.dirty_now();
        self.switch_if_it_fits(now, left)
    }

    /// All pages of the round are done, and acknowledged. After [`Action::Continue`], harvest and start the next.
    pub fn round_ended(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        let at = now.as_secs_f64();
        self.model.bandwidth.stop(at, seen.bytes_acked);
        self.round.running = false;
        // The vCPUs' throttled time so far belongs to rounds that are over.
        let throttled = seen.vcpus.iter().map(|vcpu| vcpu.throttled.as_secs_f64());
        self.round.throttled_at_start = throttled.collect();
        if let Policy::AutoConverge(parameters) = &self.settings.policy {
            let dirtied_bytes = self.dirty_now() * PAGE_SIZE as f64;
            self.rule.on_sync(at, dirtied_bytes, seen.bytes_acked as f64, parameters);
        }
        match self.switch_if_it_fits(now, self.dirty_now()) {
            Action::Continue => self.must_end(now, true).unwrap_or(Action::Continue),
            action => action,
        }
    }

    /// The guest stands still and `left` pages, exactly, have to be sent. After [`LastCheck::CallOff`] let it run
    /// on and start a round with them.
    pub fn last_check(&mut self, now: Duration, why: Why, left: Pages) -> LastCheck {
        let fits = self.fits(now);
        if matches!(why, Why::Limit(_)) {
            return LastCheck::GoOn;
        }
        let check = switchover::last_check(left, fits, self.called_off);
        if check == LastCheck::CallOff {
            self.called_off += 1;
            self.tell(now, Change::CalledOff { left, fits });
        }
        check
    }

    fn tell(&mut self, at: Duration, change: Change) {
        self.sequence += 1;
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { sequence: self.sequence, at, change });
    }

    fn learn(&mut self, now: Duration, seen: &Observation<'_>) {
        let at = now.as_secs_f64();
        let vcpus = seen.vcpus.len().max(self.gates.len());
        self.throttles.resize(vcpus, throttle::Throttle::default());
        self.gates.resize(vcpus, Gate::Open);
        self.shares.resize(vcpus, Share::default());
        self.counts.resize(vcpus, Pages(0));
        if self.settings.per_vcpu {
            self.model.curves.resize(vcpus, curve::Curve::default());
        }
        for new in self.round.throttled_at_start.len()..seen.vcpus.len() {
            self.round.throttled_at_start.push(seen.vcpus[new].throttled.as_secs_f64());
        }
        let elapsed = at - self.round.start;
        let mut running_of_all = 0.0;
        for (index, vcpu) in seen.vcpus.iter().enumerate() {
            let throttled = vcpu.throttled.as_secs_f64() - self.round.throttled_at_start[index];
            let running = (elapsed - throttled.max(0.0)).max(0.0);
            running_of_all += running;
            if self.settings.per_vcpu {
                self.counts[index] = vcpu.dirtied;
                self.model.curves[index].observe(running, vcpu.dirtied.as_f64());
            }
        }
        // Writers that nobody can name are slowed down with the vCPUs only if they are the vCPUs.
        let by_vcpus = !self.settings.per_vcpu && !seen.vcpus.is_empty();
        let running = if by_vcpus { running_of_all / seen.vcpus.len() as f64 } else { elapsed };
        self.model.others.observe(running, seen.others.as_f64());
        self.model.bandwidth.observe(at, seen.bytes_acked);
        self.bytes_acked = self.bytes_acked.max(seen.bytes_acked);
        self.round.done = seen.pages_done.as_f64();
        self.round.skipped = seen.pages_skipped.as_f64().min(self.round.done);
        let sent = self.round.done - self.round.skipped;
        let bytes = self.bytes_acked.saturating_sub(self.round.bytes_at_start) as f64;
        // A page costs what pages have cost in this round, once there are enough of them; never nothing.
        if sent >= 1024.0 || (sent > 0.0 && sent >= self.round.pages / 2.0) {
            self.page_bytes = (bytes / sent).clamp(64.0, 2.0 * RAW_PAGE_BYTES);
            self.sent_share = (sent / self.round.done.max(1.0)).clamp(0.05, 1.0);
        }
    }

    fn dirty_now(&self) -> f64 {
        let unseen = self.settings.unseen_per_vcpu.as_f64() * self.model.curves.len() as f64;
        let counted: f64 = self.model.curves.iter().map(|curve| curve.last().1).sum();
        (counted + self.model.others.last().1 + unseen).min(self.settings.ram.as_f64())
    }

    fn terms(&self, now: Duration) -> Option<Terms> {
        let bandwidth = self.model.bandwidth.mean().filter(|mean| *mean > 0.0)?;
        let switch = self.settings.switchover_bandwidth.map_or(bandwidth, sane);
        Some(Terms {
            pages_per_s: bandwidth / (self.page_bytes * self.sent_share),
            switch_pages_per_s: switch / self.page_bytes,
            fits: self.fits(now).as_f64(),
            overhead_s: self.settings.switchover_overhead.as_secs_f64(),
            round_overhead_s: ROUND_OVERHEAD_S,
            ram: self.settings.ram.as_f64(),
        })
    }

    fn must_end(&mut self, now: Duration, at_round_end: bool) -> Option<Action> {
        let rounds = self.round.number.saturating_sub(u32::from(!at_round_end));
        let ram_bytes = self.settings.ram.0.saturating_mul(PAGE_SIZE as u64);
        let reached = self.settings.limits.reached(now, rounds, self.bytes_acked, ram_bytes)?;
        if reached == stop::Reached::Timeout(AtTimeout::Cancel) {
            self.tell(now, Change::GaveUp(reached));
            return Some(Action::GiveUp(reached));
        }
        self.tell(now, Change::SwitchOver(Why::Limit(reached)));
        Some(Action::SwitchOver(Why::Limit(reached)))
    }

    fn switch_if_it_fits(&mut self, now: Duration, left: f64) -> Action {
        if left > 0.0 && left > self.fits(now).as_f64() {
            return Action::Continue;
        }
        self.tell(now, Change::SwitchOver(Why::Fits));
        Action::SwitchOver(Why::Fits)
    }

    fn downtime_limit_told(&mut self, now: Duration) {
        let limit = self.settings.limits.downtime_at(now);
        if limit != self.told_downtime {
            self.told_downtime = limit;
            self.tell(now, Change::DowntimeLimit(limit));
        }
    }

    /// Predicts, and sets the quotas that follow.
    fn plan(&mut self, now: Duration) {
        let at = now.as_secs_f64();
        let interval = REPLAN_S.max(REPLAN_S_PER_VCPU * self.model.curves.len() as f64);
        self.next_plan = at + interval;
        let round = Round { pages: (self.round.pages - self.round.done).max(0.0), current: true };
        let Some(terms) = self.terms(now) else { return };
        let free = self.model.forecast(&terms, round, Brake::Off, |_, _| None);
        let forecast = match self.settings.policy {
            Policy::None => {
                self.hold_back(now, None);
                free
            }
            Policy::AutoConverge(parameters) => {
                let share = self.rule.share();
                self.hold_back(now, (share > 0.0).then_some(Quota::QemuTime(share)));
                self.auto_converge_forecast(&terms, round, &parameters)
            }
            Policy::DirtyLimit(limit) => {
                let rate = limit.bytes_per_s as f64 / PAGE_SIZE as f64;
                self.hold_back(now, Some(Quota::Pages(PagesPerSlice::over(rate, 1.0))));
                self.model.forecast(&terms, round, Brake::Rate(rate), |_, _| None)
            }
            Policy::FairShare(fair_share) => self.fair_share(now, &terms, round, fair_share),
        };
        let spread = self.model.bandwidth.spread();
        let bytes_per_page = self.page_bytes * self.sent_share;
        let prediction = Prediction {
            converges: forecast.is_some(),
            converges_unthrottled: free.is_some(),
            total: forecast.map(|f| duration(at + f.finish_s)),
            downtime: forecast.map_or(self.settings.limits.downtime_at(now), |f| duration(f.downtime_s)),
            lost: forecast.map(|f| duration(f.lost_s)),
            bytes: forecast.map(|f| self.bytes_acked.saturating_add(units::whole(f.pages * bytes_per_page))),
            rounds: forecast.map(|f| self.round.number.saturating_add(f.rounds)),
            spread,
        };
        self.prediction = Some(prediction);
        if self.told.is_none_or(|told| differs(&told, &prediction)) {
            self.told = Some(prediction);
            self.tell(now, Change::Prediction(prediction));
        }
        self.throttling_told(now);
    }

    /// The same quota for every vCPU.
    fn hold_back(&mut self, now: Duration, quota: Option<Quota>) {
        for (throttle, dirtied) in self.throttles.iter_mut().zip(&self.counts) {
            throttle.set(quota, now, *dirtied);
        }
        self.shares.iter_mut().for_each(|share| share.quota = quota);
        self.level = None;
    }

    fn auto_converge_forecast(
        &self,
        terms: &Terms,
        round: Round,
        parameters: &AutoConverge,
    ) -> Option<model::Forecast> {
        let mut rule = self.rule.clone();
        let mut at = self.round.start;
        let mut bytes = self.round.bytes_at_start as f64;
        let mut pages_before = self.round.done;
        let next = |outcome: &Outcome, pages: f64| {
            at += outcome.seconds;
            bytes += (pages + pages_before) * self.page_bytes;
            pages_before = 0.0;
            let changed = rule.on_sync(at, outcome.left * PAGE_SIZE as f64, bytes, parameters);
            changed.then(|| Brake::Time(rule.share()))
        };
        self.model.forecast(terms, round, Brake::Time(self.rule.share()), next)
    }

    fn fair_share(
        &mut self,
        now: Duration,
        terms: &Terms,
        round: Round,
        fair_share: FairShare,
    ) -> Option<model::Forecast> {
        let remaining = self
            .settings
            .limits
            .deadline
            .map(|deadline| deadline.as_secs_f64() * (1.0 - DEADLINE_MARGIN) - now.as_secs_f64());
        let seen = self.round.done >= self.round.pages * FIRST_ROUND_SEEN;
        let later_round = self.round.number > 1;
        let mut rules = plan::Rules { fair_share, deadline_s: remaining, brake_now: later_round };
        let timed;
        let model = if self.settings.per_vcpu {
            &self.model
        } else {
            // All writers as one, which is what can be slowed down then.
            let curves = vec![self.model.others.clone()];
            timed =
                Model { curves, others: curve::Curve::default(), bandwidth: self.model.bandwidth.clone() };
            &timed
        };
        let mut plan = plan::plan(model, terms, round, &rules);
        let late = remaining.is_some() && plan.is_none_or(|plan| !plan.in_time);
        if late && seen && !later_round {
            rules.brake_now = true;
            plan = plan::plan(model, terms, round, &rules);
        }
        // A round once braked stays braked, to the depth first chosen: only what the others need may change.
        let target = self.target.or(plan.and_then(|plan| plan.target));
        self.target = target;
        let quotas = target.map(|target| {
            let (outcome, level) = model.fair_round(terms, round, target, fair_share.min_share);
            (outcome.seconds, level)
        });
        self.set_shares(now, terms, round, quotas, fair_share.min_share);
        let late = remaining.is_some() && plan.is_some_and(|plan| !plan.in_time) && (seen || later_round);
        if late && !self.told_late {
            self.told_late = true;
            self.tell(now, Change::DeadlineOutOfReach);
        }
        plan.map(|plan| plan.forecast)
    }

    fn set_shares(
        &mut self,
        now: Duration,
        terms: &Terms,
        round: Round,
        braked: Option<(f64, f64)>,
        min_share: f64,
    ) {
        let seconds = terms.seconds(round.pages);
        let level = braked.map_or(f64::INFINITY, |(_, level)| level);
        self.level = level.is_finite().then(|| Pages::floor(level));
        for index in 0..self.throttles.len() {
            let curve = self.model.curves.get(index).unwrap_or(&self.model.others);
            let demand = curve.by_the_end(round, seconds);
            let allowed = fair_share::allowance(demand, level, min_share);
            let quota = if demand <= level {
                None
            } else if self.settings.per_vcpu {
                let left = (allowed - curve.last().1).max(demand * sane(min_share) * seconds.min(0.1));
                Some(Quota::Pages(PagesPerSlice::over(left, seconds)))
            } else {
                let runs = curve.time_left_to(round, allowed).min(seconds);
                Some(Quota::Time(1.0 - (runs / seconds.max(1e-9)).max(sane(min_share))))
            };
            self.throttles[index].set(quota, now, self.counts[index]);
            self.shares[index] = Share { predicted: Pages::floor(demand), quota };
        }
    }

    fn throttling_told(&mut self, now: Duration) {
        let throttled = self.shares.iter().filter_map(|share| share.quota);
        let vcpus = throttled.clone().count();
        let time_share = throttled.clone().find_map(|quota| match quota {
            Quota::Time(share) | Quota::QemuTime(share) => Some(share),
            Quota::Pages(_) => None,
        });
        // Told again when it moves by more than a twentieth of the scale, or of a doubling.
        let step = time_share
            .map_or(self.level.map_or(0, |level| u64::from(level.0.max(1).ilog2())), |share| {
                units::whole(share * 20.0)
            });
        if (vcpus, step) != self.told_throttling {
            self.told_throttling = (vcpus, step);
            self.tell(now, Change::Throttling { vcpus, level: self.level, time_share });
        }
    }
}

/// Whether two predictions are different news.
fn differs(told: &Prediction, now: &Prediction) -> bool {
    if (told.converges, told.converges_unthrottled) != (now.converges, now.converges_unthrottled) {
        return true;
    }
    let far = |a: Duration, b: Duration| a.abs_diff(b).as_secs_f64() > 0.05 * a.as_secs_f64();
    match (told.total, now.total) {
        (Some(told), Some(now)) => far(told, now),
        (told, now) => told.is_some() != now.is_some(),
    }
}
