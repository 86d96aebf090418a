//! The one who decides: takes what is seen, keeps the model, and says who is held back and when it ends.
//!
//! Owns the order of things within a round and nothing else: the arithmetic is in its neighbours. Before it comes
//! `track`, whose counts it is given; after it `source`, which does what it says.

use std::time::Duration;

use super::curve::Curve;
use super::fair_share::even_out;
use super::looks::Looks;
use super::model::{AIM, Brake, FAIR, Fair, Forecast, Model, Outcome, Round, Terms, shrinks};
use super::news::News;
use super::throttle::{LONGEST_STALL, LONGEST_STALL_EVER, Throttle};
use super::units::{duration, sane, whole};
use super::{
    Action, AtTimeout, AutoConverge, Change, DirtyLimit, Event, FairShare, Gate, LastCheck, Observation,
    Pages, PagesPerSlice, Policy, Prediction, Quota, Settings, Share, Why, auto_converge, plan, stop,
    switchover,
};
use crate::PAGE_SIZE;

/// Plans are made this often within a round, or less often for guests whose plans take long.
const REPLAN_S: f64 = 0.05;
const REPLAN_S_PER_VCPU: f64 = 0.5e-3;
/// Bytes on the wire for a page that is sent as it is, until it is measured.
const RAW_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 1.0;
/// Pages that say what a page costs.
const ENOUGH_PAGES: f64 = 16_384.0;
/// Time between two rounds, until it is measured.
const ROUND_OVERHEAD_S: f64 = 2e-3;
/// The first round is the only look at a guest's curves that costs nothing; it is braked only to keep a deadline
/// that could not be kept otherwise, and not before this share of it has been seen.
const FIRST_ROUND_SEEN: f64 = 0.5;
/// Weight of the newest overrun of a gate.
const NEWEST_OVERRUN: f64 = 0.05;
/// One overrun that is larger than so many usual ones is an accident, and counts no more than those.
const MOST_OVERRUN: f64 = 5.0;
/// From the decision to stop the guest to its last write, as measured on a busy host.
const STOPPING_S: f64 = 0.6e-3;
/// Who was held back for no more than this share of a round still teaches how fast it dirties.
const HARDLY_HELD: f64 = 0.1;
/// A switchover that had to be called off lowers the next one's limit to this share.
const CAREFUL: f64 = 0.9;
/// Stalls become longer, and shorter again, when braking has wanted that for so long: a busy moment is no reason, and
/// a migration that is about to end should.
const LONGER_STALLS_WANTED: Duration = Duration::from_millis(150);
const SHORTER_STALLS_WANTED: Duration = Duration::from_secs(1);
/// A braked round is let go if another plan costs the guest so much less: this share, and this many seconds.
const LET_GO_SHARE: f64 = 0.75;
const LET_GO_S: f64 = 0.25;
/// A deadline is aimed at with this margin, as a share of it, and of what is still to come.
const DEADLINE_MARGIN: f64 = 0.01;
const FORECAST_MARGIN: f64 = 0.05;

/// The current round.
#[derive(Clone, Debug, Default)]
struct Current {
    number: u32,
    start: f64,
    pages: f64,
    done: f64,
    skipped: f64,
    /// It is expected to leave markedly less than it began with, with nobody held back.
    shrinks: bool,
    /// How long the round before went on with nobody held back.
    after_s: f64,
    /// When somebody was first held back in this one.
    braked_at: Option<f64>,
    bytes_at_start: u64,
    /// Per vCPU, in seconds, when the round started.
    throttled_at_start: Vec<f64>,
}

impl Current {
    /// How long it has gone on with nobody held back.
    fn free_s(&self, at: f64) -> f64 {
        (self.braked_at.unwrap_or(at) - self.start).max(0.0)
    }
}

/// Decides, from what it is told.
#[derive(Debug)]
pub struct Controller {
    settings: Settings,
    model: Model,
    round: Current,
    rule: auto_converge::Rule,
    throttles: Vec<Throttle>,
    gates: Vec<Gate>,
    shares: Vec<Share>,
    /// By how much the stalls of each vCPU may be longer than the longest.
    stretches: Vec<f64>,
    counts: Vec<Pages>,
    level: Option<Pages>,
    /// The round is being braked down to this, and so were those before it.
    target: Option<f64>,
    /// Bytes on the wire for a dirty page, and for a page of the current round.
    page_bytes: f64,
    round_page_bytes: f64,
    bytes_acked: u64,
    /// Per vCPU, in seconds, when last seen.
    throttled_seen: Vec<f64>,
    next_plan: f64,
    prediction: Option<Prediction>,
    looks: Looks,
    longest_stall: Duration,
    /// Since when braking wants longer stalls, or shorter ones again.
    other_stalls_wanted: Option<Duration>,
    called_off: u32,
    news: News,
}

impl Controller {
    /// A controller for a migration that starts now.
    pub fn new(settings: Settings) -> Self {
        Self {
            news: News::new(settings.limits.downtime),
            looks: Looks::new(settings.gate_latency),
            settings,
            model: Model::default(),
            round: Current::default(),
            rule: auto_converge::Rule::default(),
            throttles: Vec::new(),
            gates: Vec::new(),
            shares: Vec::new(),
            stretches: Vec::new(),
            counts: Vec::new(),
            level: None,
            target: None,
            page_bytes: RAW_PAGE_BYTES,
            round_page_bytes: RAW_PAGE_BYTES,
            bytes_acked: 0,
            throttled_seen: Vec::new(),
            next_plan: 0.0,
            prediction: None,
            longest_stall: LONGEST_STALL,
            other_stalls_wanted: None,
            called_off: 0,
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
            self.news.tell(now, Change::Policy(self.settings.policy));
        }
        if self.settings.limits != before.limits {
            self.news.limits_set(self.settings.limits.downtime_at(now));
            self.news.tell(now, Change::Limits(self.settings.limits.clone()));
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

    /// Whether pages of this round that are dirty again should be struck off it: they have to be sent once more in
    /// any case. So the hottest pages are left for the end.
    ///
    /// Not in a round that is not braked and does not shrink by itself: it would end as soon as the guest had dirtied
    /// all of it again, and another like it would begin, each at the price of a fault per page. And not under the
    /// older policies, which are there to be compared with.
    pub fn leaves_redirtied(&self) -> bool {
        let gets_anywhere = self.round.number <= 1 || self.target.is_some() || self.round.shrinks;
        matches!(self.settings.policy, Policy::FairShare(_)) && gets_anywhere
    }

    /// How long to wait until the next observation.
    pub fn next_look(&self) -> Duration {
        self.looks.next(&self.shares, &self.throttles, &self.gates)
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

    /// P*: what fits the downtime limit at this time, with something in hand.
    pub fn fits(&self, now: Duration) -> Pages {
        let given = self.settings.switchover_bandwidth.map(|given| switchover::careful(given, 0.0));
        let mean = self.model.bandwidth.mean().unwrap_or(0.0);
        self.fits_at(now, given.unwrap_or(switchover::careful(mean, self.model.bandwidth.spread())))
    }

    fn fits_at(&self, now: Duration, bandwidth: f64) -> Pages {
        let limit = self.settings.limits.downtime_at(now);
        switchover::fit(limit, self.settings.switchover_overhead, bandwidth, self.page_bytes)
    }

    /// What has happened since this was last called.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.news.take()
    }

    /// A round starts with so many pages: everything dirty has been harvested and counts start at 0 again.
    pub fn round_started(&mut self, now: Duration, pages_to_send: Pages) {
        let at = now.as_secs_f64();
        let free_s = self.round.free_s(at);
        self.model.curves.iter_mut().for_each(Curve::recycled);
        self.model.others.recycled();
        self.model.bandwidth.start(at, self.bytes_acked);
        self.counts.fill(Pages(0));
        self.throttles.iter_mut().for_each(Throttle::recycled);
        self.looks.round_started(now);
        self.round = Current {
            number: self.round.number.saturating_add(1),
            start: at,
            pages: pages_to_send.as_f64(),
            bytes_at_start: self.bytes_acked,
            after_s: if self.round.number == 0 { f64::INFINITY } else { free_s },
            ..Current::default()
        };
        // The depth of a plan is that of its first braked round; those that follow it go straight down.
        let aim = self.fits(now).as_f64() * AIM;
        self.target = self.target.map(|target| target.min(aim));
        self.model.held.clear();
        self.round_page_bytes = self.page_bytes;
        self.plan(now);
    }

    /// Something has been seen in the middle of a round.
    pub fn observed(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        self.looks.begins(now, self.settings.gate_latency);
        if let Some(action) = self.must_end(now, false) {
            return action;
        }
        let at = now.as_secs_f64();
        if at >= self.next_plan {
            self.plan(now);
        }
        for (index, (throttle, gate)) in self.throttles.iter_mut().zip(&mut self.gates).enumerate() {
            let longest = self.longest_stall.mul_f64(self.stretches[index]).min(LONGEST_STALL_EVER);
            *gate = throttle.look(now, self.counts[index], longest);
            if let (Some(pages), Some(vcpu)) = (throttle.take_overrun(), self.model.overruns.get_mut(index)) {
                let mean = vcpu.unwrap_or_else(|| self.model.curves[index].overrun_in(self.looks.gate_s()));
                let pages = pages.as_f64().min(MOST_OVERRUN * mean.max(1.0));
                *vcpu = Some(mean + NEWEST_OVERRUN * (pages - mean));
            }
        }
        self.looks.ends(now, &self.shares, &self.throttles, &self.gates);
        self.news.downtime_limit(now, self.settings.limits.downtime_at(now));
        let left = (self.round.pages - self.round.done).max(0.0) + self.dirty_now();
        self.switch_if_it_fits(now, left + self.dirtied_until_stopped())
    }

    /// All pages of the round are done, and acknowledged. After [`Action::Continue`], harvest and start the next.
    pub fn round_ended(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        let at = now.as_secs_f64();
        self.model.bandwidth.stop(at, seen.bytes_acked);
        let sent = self.round.done - self.round.skipped;
        if self.round.number > 1 && sent >= 1.0 {
            let bytes = self.bytes_acked.saturating_sub(self.round.bytes_at_start) as f64;
            let weight = (sent / ENOUGH_PAGES).min(1.0);
            let seen = (bytes / sent).clamp(64.0, 2.0 * RAW_PAGE_BYTES);
            self.page_bytes += weight * (seen - self.page_bytes);
        }
        if let Policy::AutoConverge(parameters) = &self.settings.policy {
            let dirtied_bytes = self.dirty_now() * PAGE_SIZE as f64;
            self.rule.on_sync(at, dirtied_bytes, seen.bytes_acked as f64, parameters);
        }
        self.plan(now);
        match self.switch_if_it_fits(now, self.dirty_now() + self.dirtied_until_stopped()) {
            Action::Continue => self.must_end(now, true).unwrap_or(Action::Continue),
            action => action,
        }
    }

    /// The guest stands still and `left` pages, exactly, have to be sent. After [`LastCheck::CallOff`] let it run
    /// on and start a round with them.
    pub fn last_check(&mut self, now: Duration, why: Why, left: Pages) -> LastCheck {
        if matches!(why, Why::Limit(_)) {
            return LastCheck::GoOn;
        }
        let bandwidth = self.settings.switchover_bandwidth.or(self.model.bandwidth.mean()).unwrap_or(0.0);
        let fits = self.fits_at(now, bandwidth);
        let check = switchover::last_check(left, fits, self.called_off);
        if check == LastCheck::CallOff {
            self.called_off += 1;
            self.news.tell(now, Change::CalledOff { left, fits });
        }
        check
    }

    fn learn(&mut self, now: Duration, seen: &Observation<'_>) {
        let at = now.as_secs_f64();
        let vcpus = seen.vcpus.len().max(self.gates.len());
        self.throttles.resize(vcpus, Throttle::default());
        self.gates.resize(vcpus, Gate::Open);
        self.shares.resize(vcpus, Share::default());
        self.stretches.resize(vcpus, 1.0);
        self.counts.resize(vcpus, Pages(0));
        if self.settings.per_vcpu {
            self.model.curves.resize(vcpus, Curve::default());
            self.model.overruns.resize(vcpus, None);
        }
        let elapsed = (at - self.round.start).max(0.0);
        // Of the time that a vCPU has been throttled before it is first seen in a round, this much can be of it.
        for (new, vcpu) in seen.vcpus.iter().enumerate().skip(self.round.throttled_at_start.len()) {
            let before = self.throttled_seen.get(new).copied().unwrap_or(0.0);
            let throttled = vcpu.throttled.as_secs_f64();
            self.round.throttled_at_start.push((throttled - elapsed).max(before.min(throttled)));
        }
        self.throttled_seen.clear();
        self.throttled_seen.extend(seen.vcpus.iter().map(|vcpu| vcpu.throttled.as_secs_f64()));
        let held_by_pages = matches!(self.settings.policy, Policy::FairShare(_) | Policy::DirtyLimit(_));
        let mut running_of_all = 0.0;
        for (index, vcpu) in seen.vcpus.iter().enumerate() {
            let throttled = vcpu.throttled.as_secs_f64();
            let throttled = throttled - self.round.throttled_at_start[index];
            let running = (elapsed - throttled.max(0.0)).max(0.0);
            running_of_all += running;
            if self.settings.per_vcpu {
                self.counts[index] = vcpu.dirtied;
                let curve = &mut self.model.curves[index];
                if held_by_pages && throttled > elapsed * HARDLY_HELD {
                    curve.observe_held(running, vcpu.dirtied.as_f64());
                } else {
                    curve.observe(running, vcpu.dirtied.as_f64());
                }
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
        // Bytes lag behind pages by what is on the way: only a long stretch of pages says what a page costs.
        if sent >= ENOUGH_PAGES {
            self.round_page_bytes = (bytes / sent).clamp(1.0, 2.0 * RAW_PAGE_BYTES);
        }
    }

    fn dirty_now(&self) -> f64 {
        let unseen = self.settings.unseen_per_vcpu.as_f64() * self.model.curves.len() as f64;
        let counted: f64 = self.model.curves.iter().map(|curve| curve.last().1).sum();
        (counted + self.model.others.last().1 + unseen).min(self.settings.ram.as_f64())
    }

    /// What will be dirtied between the decision to stop the guest and its standing still, which takes as long as
    /// closing a gate, or as stopping a vCPU that knows of nothing.
    fn dirtied_until_stopped(&self) -> f64 {
        let round = Round { current: true, ..Round::coming(0.0, 0.0) };
        let all = self.model.curves.iter().chain([&self.model.others]);
        let more =
            |curve: &Curve| curve.by_the_end(round, self.looks.gate_s().max(STOPPING_S)) - curve.last().1;
        all.map(more).sum::<f64>().max(0.0)
    }

    fn terms(&self, now: Duration) -> Option<Terms> {
        let bandwidth = self.model.bandwidth.mean().filter(|mean| *mean > 0.0)?;
        let switch = self.settings.switchover_bandwidth.map_or(bandwidth, sane);
        Some(Terms {
            pages_per_s: bandwidth / self.page_bytes,
            current_pages_per_s: bandwidth / self.round_page_bytes,
            strikes: matches!(self.settings.policy, Policy::FairShare(_)),
            switch_pages_per_s: switch / self.page_bytes,
            fits: self.fits(now).as_f64(),
            overhead_s: self.settings.switchover_overhead.as_secs_f64(),
            round_overhead_s: ROUND_OVERHEAD_S,
            longest_stall_s: LONGEST_STALL.as_secs_f64(),
            fair: FAIR,
            gate_s: self.looks.gate_s(),
            min_share: FairShare::USUAL_MIN_SHARE,
            ram: self.settings.ram.as_f64(),
        })
    }

    fn must_end(&mut self, now: Duration, at_round_end: bool) -> Option<Action> {
        let rounds = self.round.number.saturating_sub(u32::from(!at_round_end));
        let ram_bytes = self.settings.ram.0.saturating_mul(PAGE_SIZE as u64);
        let reached = self.settings.limits.reached(now, rounds, self.bytes_acked, ram_bytes)?;
        if reached == stop::Reached::Timeout(AtTimeout::Cancel) {
            self.news.tell(now, Change::GaveUp(reached));
            return Some(Action::GiveUp(reached));
        }
        self.news.tell(now, Change::SwitchOver(Why::Limit(reached)));
        Some(Action::SwitchOver(Why::Limit(reached)))
    }

    fn switch_if_it_fits(&mut self, now: Duration, left: f64) -> Action {
        // Who was wrong before leaves more room.
        let room = CAREFUL.powi(i32::try_from(self.called_off).unwrap_or(i32::MAX));
        if left > 0.0 && left > self.fits(now).as_f64() * room {
            return Action::Continue;
        }
        self.news.tell(now, Change::SwitchOver(Why::Fits));
        Action::SwitchOver(Why::Fits)
    }

    /// Predicts, and sets the quotas that follow.
    fn plan(&mut self, now: Duration) {
        let at = now.as_secs_f64();
        let interval = REPLAN_S.max(REPLAN_S_PER_VCPU * self.model.curves.len() as f64);
        self.next_plan = at + interval;
        let round = Round {
            pages: (self.round.pages - self.round.done).max(0.0),
            of: self.round.pages,
            current: true,
            after_s: self.round.after_s,
            free_s: self.round.free_s(at),
        };
        // The simple brakes need not wait until the link is known.
        match self.settings.policy {
            Policy::None => self.hold_back(now, None),
            Policy::AutoConverge(_) => {
                let share = self.rule.share();
                self.hold_back(now, (share > 0.0).then_some(Quota::QemuTime(share)));
            }
            Policy::DirtyLimit(limit) => {
                self.hold_back(now, Some(Quota::Pages(PagesPerSlice::over(pages_per_s(limit), 1.0))));
            }
            Policy::FairShare(_) => {}
        }
        let Some(terms) = self.terms(now) else { return };
        let free = self.model.forecast(&terms, round, Brake::Off, |_, _| None);
        self.round.shrinks = shrinks(round, &self.model.round(&terms, round, Brake::Off));
        let forecast = match self.settings.policy {
            Policy::None => free,
            Policy::AutoConverge(parameters) => self.auto_converge_forecast(&terms, round, &parameters),
            Policy::DirtyLimit(limit) => {
                self.model.forecast(&terms, round, Brake::Rate(pages_per_s(limit)), |_, _| None)
            }
            Policy::FairShare(fair_share) => self.fair_share(now, &terms, round, fair_share),
        };
        let spread = self.model.bandwidth.spread();
        let prediction = Prediction {
            converges: forecast.is_some(),
            converges_unthrottled: free.is_some(),
            total: forecast.map(|f| duration(at + f.finish_s)),
            downtime: forecast.map_or(self.settings.limits.downtime_at(now), |f| duration(f.downtime_s)),
            lost: forecast.map(|f| duration(f.lost_s)),
            bytes: forecast.map(|f| self.bytes_acked.saturating_add(whole(f.pages * self.page_bytes))),
            rounds: forecast.map(|f| self.round.number.saturating_add(f.rounds)),
            spread,
        };
        self.prediction = Some(prediction);
        self.news.prediction(now, prediction);
        self.news.throttling(now, &self.shares, self.level);
    }

    /// The same quota for every vCPU.
    fn hold_back(&mut self, now: Duration, quota: Option<Quota>) {
        for (throttle, dirtied) in self.throttles.iter_mut().zip(&self.counts) {
            throttle.set(quota, now, *dirtied);
        }
        self.shares.iter_mut().for_each(|share| share.quota = quota);
        self.stretches.fill(1.0);
        self.level = None;
    }

    fn auto_converge_forecast(
        &self,
        terms: &Terms,
        round: Round,
        parameters: &AutoConverge,
    ) -> Option<Forecast> {
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
    ) -> Option<Forecast> {
        let remaining = self.settings.limits.deadline.map(|deadline| {
            let left = deadline.as_secs_f64() * (1.0 - DEADLINE_MARGIN) - now.as_secs_f64();
            left / (1.0 + FORECAST_MARGIN)
        });
        let seen = self.round.done >= self.round.pages * FIRST_ROUND_SEEN;
        let later_round = self.round.number > 1;
        // The grace is given once per migration: what the worst-off vCPU has lost so far is taken from it.
        let grace = sane(fair_share.grace) * self.settings.limits.downtime.as_secs_f64();
        let spent = self.throttled_seen.iter().fold(0.0f64, |most, throttled| most.max(*throttled));
        let grace_s = (grace - spent).max(0.0);
        let mut rules = plan::Rules { fair_share, deadline_s: remaining, grace_s, brake_now: later_round };
        let mut terms = *terms;
        terms.min_share = fair_share.min_share.unwrap_or(terms.min_share);
        let timed;
        let model = if self.settings.per_vcpu {
            &self.model
        } else {
            // All writers as one, which is what can be slowed down then.
            let curves = vec![self.model.others.clone()];
            let held = vec![self.target.is_some()];
            timed = Model { curves, held, ..Model::default() };
            &timed
        };
        let (mut plan, mut terms) = plan::plan_on_terms(model, terms, round, &rules);
        let late = remaining.is_some() && plan.is_none_or(|plan| !plan.in_time);
        if late && seen && !later_round {
            rules.brake_now = true;
            (plan, terms) = plan::plan_on_terms(model, terms, round, &rules);
        }
        // A guest once braked stays braked, to the depth first chosen, unless that misses the deadline, or it turned out
        // so much better that it need not be: one that is let go for a round loses all that it paid for.
        if let Some(target) = self.target {
            let forecast = plan::brake_down(model, &terms, round, target);
            let stays = |forecast: &Forecast| {
                let in_time = remaining.is_none_or(|remaining| forecast.finish_s <= remaining);
                let dear = forecast.lost_s * LET_GO_SHARE - LET_GO_S;
                in_time && plan.is_none_or(|plan| plan.forecast.lost_s > dear)
            };
            if let Some(forecast) = forecast.filter(stays) {
                plan = Some(plan::Plan { target: Some(target), forecast, in_time: true });
            }
        }
        // Where no plan ends, a guest that is held back leaves least to whatever limit ends it.
        let no_plan = if later_round { Some(0.0) } else { self.target };
        let target = plan.map_or(no_plan, |plan| plan.target);
        self.target = target;
        let mut fair = match target {
            Some(target) => model.fair(&terms, round, target),
            None => Fair { round, held: Vec::new(), level: f64::INFINITY },
        };
        even_out(&mut fair.held, |index| self.counts.get(index).map_or(0.0, |counted| counted.as_f64()));
        if target.is_some() && self.round.braked_at.is_none() {
            self.round.braked_at = Some(now.as_secs_f64());
        }
        self.level = fair.level.is_finite().then(|| Pages::floor(fair.level));
        self.set_shares(now, &terms, &fair);
        if plan.is_some() && later_round {
            // Whether for now or for the rounds to come: who waits for those would say the same again then.
            let wanted = duration(terms.longest_stall_s);
            let since = self.other_stalls_wanted.filter(|_| wanted != self.longest_stall).unwrap_or(now);
            self.other_stalls_wanted = (wanted != self.longest_stall).then_some(since);
            let enough =
                if wanted > self.longest_stall { LONGER_STALLS_WANTED } else { SHORTER_STALLS_WANTED };
            if now.saturating_sub(since) >= enough {
                self.longest_stall = wanted;
                self.news.tell(now, Change::LongestStall(wanted));
            }
        }
        if target.is_some() && fair_share.min_share.is_none() {
            self.news.min_share(now, terms.min_share);
        }
        let late = remaining.is_some() && plan.is_some_and(|plan| !plan.in_time) && (seen || later_round);
        if late {
            self.news.deadline_out_of_reach(now);
        }
        plan.map(|plan| plan.forecast)
    }

    /// Turns what each vCPU may dirty (all together, if they cannot be told apart) into quotas.
    fn set_shares(&mut self, now: Duration, terms: &Terms, fair: &Fair) {
        let round = fair.round;
        let seconds = terms.seconds(round);
        for index in 0..self.throttles.len() {
            let named = self.model.curves.get(index);
            let curve = named.unwrap_or(&self.model.others);
            let held = fair.held.get(if named.is_some() { index } else { 0 }).copied().flatten();
            let quota = held.map(|held| {
                if named.is_some() {
                    Quota::Pages(PagesPerSlice::over(held.quota - curve.last().1, seconds))
                } else {
                    let runs = curve.time_left_to(round, held.dirties).min(seconds) / seconds.max(1e-9);
                    Quota::Time(1.0 - runs.max(sane(terms.min_share)))
                }
            });
            self.throttles[index].set(quota, now, self.counts[index]);
            self.stretches[index] = held.map_or(1.0, |held| held.stretch);
            self.shares[index] = Share { predicted: Pages::floor(curve.by_the_end(round, seconds)), quota };
        }
        self.model.held.clear();
        self.model.held.extend(self.shares.iter().map(|share| share.quota.is_some()));
    }
}

fn pages_per_s(limit: DirtyLimit) -> f64 {
    limit.bytes_per_s as f64 / PAGE_SIZE as f64
}
