//! The part that decides: takes what is observed, keeps the model, and says who is held back and when it ends.
//!
//! Owns the order of things within a round and what is learned in it; `planning` turns that into quotas, and the
//! arithmetic is in its neighbours. Before it comes `track`, whose counts it is given; after it `source`, which does what
//! it says.

mod pause;
mod planning;

use std::time::Duration;

use super::curve::Curve;
use super::events::EventLog;
use super::model::{AIM, Model, Round};
use super::sampling::Sampling;
use super::throttle::{LONGEST_STALL, LONGEST_STALL_EVER, Throttle};
use super::units::whole;
use super::{
    Action, AtTimeout, Change, Event, GateState, LastCheck, LinkSample, Observation, Pages, Policy,
    Prediction, Settings, Share, Why, auto_converge, stop, switchover,
};
use crate::PAGE_SIZE;

/// Bytes on the wire for a page that is sent as it is, until it is measured.
const RAW_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 1.0;
/// Pages that say what a page costs.
const ENOUGH_PAGES: f64 = 16_384.0;
/// Weight of the newest overrun of a gate.
const NEWEST_OVERRUN: f64 = 0.05;
/// One overrun that is larger than so many usual ones is an accident, and counts no more than those.
const MOST_OVERRUN: f64 = 5.0;
/// From the decision to stop the guest to its last write, as measured on a busy host.
const STOPPING_S: f64 = 0.6e-3;
/// A vCPU that was held back for no more than this share of a round still teaches how fast it dirties.
const HARDLY_HELD: f64 = 0.1;
/// A switchover that had to be called off lowers the next one's limit to this share.
const CAREFUL: f64 = 0.9;
/// A downtime limit that is out of reach is exceeded by what it is, and by pages for this share of what the switchover
/// takes besides: enough for the last pages of a guest that hardly writes.
const UNREACHABLE_SHARE: f64 = 0.25;
/// A round of this length counts as one against the limit of rounds, a shorter one in proportion: thirty rounds of a
/// millisecond say nothing about a guest.
const WHOLE_ROUND_S: f64 = 20e-3;

/// The current round.
#[derive(Clone, Debug, Default)]
struct Current {
    number: u32,
    start: f64,
    pages: f64,
    done: f64,
    struck_off: f64,
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
    gates: Vec<GateState>,
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
    sampling: Sampling,
    longest_stall: Duration,
    /// Since when braking wants longer stalls, or shorter ones again.
    other_stalls_wanted: Option<Duration>,
    called_off: u32,
    /// Going on with the round was found worth it until then.
    worth_until: f64,
    /// Rounds that were begun although what was left fitted.
    rounds_for_a_shorter_pause: u32,
    /// Rounds that count against the limit.
    rounds_spent: f64,
    events: EventLog,
}

impl Controller {
    /// A controller for a migration that starts now.
    pub fn new(settings: Settings) -> Self {
        Self {
            events: EventLog::new(settings.limits.downtime),
            sampling: Sampling::new(settings.gate_latency),
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
            worth_until: 0.0,
            rounds_for_a_shorter_pause: 0,
            rounds_spent: 0.0,
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
            self.events.record(now, Change::Policy(self.settings.policy));
        }
        if self.settings.limits != before.limits {
            self.events.limits_set(self.settings.limits.downtime_at(now));
            self.events.record(now, Change::Limits(self.settings.limits.clone()));
        }
        self.next_plan = 0.0;
    }

    /// What the switchover would take besides, if it came now. It changes all the time, and changes no plan: it is waited
    /// for.
    pub fn set_backlog(&mut self, backlog: Duration) {
        self.settings.switchover_backlog = backlog;
    }

    /// Where each vCPU's gate is to be, as of the last observation. A closed gate opens by itself; a vCPU that
    /// runs while its gate is closed has to be kicked.
    pub fn gates(&self) -> &[GateState] {
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
    pub fn strikes_off_redirtied(&self) -> bool {
        let gets_anywhere = self.round.number <= 1 || self.target.is_some() || self.round.shrinks;
        matches!(self.settings.policy, Policy::FairShare(_)) && gets_anywhere
    }

    /// Whether the round is braked down to a target.
    pub fn is_braking(&self) -> bool {
        self.target.is_some()
    }

    /// How long to wait until the next observation.
    pub fn next_sample(&self) -> Duration {
        self.sampling.next(&self.shares, &self.throttles, &self.gates)
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
        self.model.link.mean()
    }

    /// Bytes per second to count on while the guest stands still, where no `max-bandwidth` holds.
    pub fn switchover_bandwidth(&self) -> Option<f64> {
        self.settings.switchover_bandwidth.or(self.model.link.at_switchover())
    }

    /// P*: what fits the downtime limit at this time, with something in hand.
    pub fn fits(&self, now: Duration) -> Pages {
        let given = self.settings.switchover_bandwidth.map(|given| switchover::careful(given, 0.0));
        self.fits_at(now, given.unwrap_or_else(|| self.model.link.careful_at_switchover()))
    }

    fn fits_at(&self, now: Duration, bandwidth: f64) -> Pages {
        switchover::fit(self.time_left(now), Duration::ZERO, bandwidth, self.page_bytes)
    }

    /// What the downtime limit leaves for pages. A limit that is out of reach gives way to what the switchover takes
    /// whenever it comes; a backlog is waited for.
    fn time_left(&self, now: Duration) -> Duration {
        let Settings { switchover_overhead: overhead, switchover_backlog: backlog, .. } = self.settings;
        self.pause_limit(now).saturating_sub(overhead).saturating_sub(backlog)
    }

    /// What has happened since this was last called.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.take()
    }

    /// vCPUs came or went. `places` says for each that there is now at which place it was before; what was learned of it, and
    /// what was decided, goes with it.
    pub fn vcpus_changed(&mut self, places: &[Option<usize>]) {
        moved(&mut self.throttles, places, &Throttle::default());
        moved(&mut self.gates, places, &GateState::Open);
        moved(&mut self.shares, places, &Share::default());
        moved(&mut self.stretches, places, &1.0);
        moved(&mut self.counts, places, &Pages(0));
        moved(&mut self.throttled_seen, places, &0.0);
        if !self.round.throttled_at_start.is_empty() {
            moved(&mut self.round.throttled_at_start, places, &0.0);
        }
        if self.settings.per_vcpu {
            moved(&mut self.model.curves, places, &Curve::default());
            moved(&mut self.model.overruns, places, &None);
            if !self.model.held.is_empty() {
                let held = |place: &Option<usize>| {
                    place.is_some_and(|at| self.model.held.get(at).is_some_and(|held| *held))
                };
                self.model.held = places.iter().map(held).collect();
            }
        }
        self.next_plan = 0.0;
    }

    /// A round starts with so many pages: everything dirty has been harvested and counts start at 0 again.
    pub fn round_started(&mut self, now: Duration, pages_to_send: Pages) {
        let at = now.as_secs_f64();
        let free_s = self.round.free_s(at);
        self.model.curves.iter_mut().for_each(Curve::recycled);
        self.model.others.recycled();
        self.model.link.start(at, self.bytes_acked);
        self.counts.fill(Pages(0));
        self.throttles.iter_mut().for_each(Throttle::recycled);
        self.sampling.round_started(now);
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
        let (limit, overhead) = (self.settings.limits.downtime_at(now), self.settings.switchover_overhead);
        if limit <= overhead {
            self.events.downtime_out_of_reach(now, limit, overhead);
        }
        self.plan(now);
    }

    /// Something has been seen in the middle of a round.
    pub fn observed(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        self.sampling.begins(now, self.settings.gate_latency);
        if let Some(action) = self.must_end(now) {
            return action;
        }
        let at = now.as_secs_f64();
        if at >= self.next_plan {
            self.plan(now);
        }
        for (index, (throttle, gate)) in self.throttles.iter_mut().zip(&mut self.gates).enumerate() {
            let longest = self.longest_stall.mul_f64(self.stretches[index]).min(LONGEST_STALL_EVER);
            *gate = throttle.poll(now, self.counts[index], longest);
            if let (Some(pages), Some(vcpu)) = (throttle.take_overrun(), self.model.overruns.get_mut(index)) {
                let mean =
                    vcpu.unwrap_or_else(|| self.model.curves[index].overrun_in(self.sampling.gate_s()));
                let pages = pages.as_f64().min(MOST_OVERRUN * mean.max(1.0));
                *vcpu = Some(mean + NEWEST_OVERRUN * (pages - mean));
            }
        }
        self.sampling.ends(now, &self.shares, &self.throttles, &self.gates);
        self.events.downtime_limit(now, self.settings.limits.downtime_at(now));
        let left = (self.round.pages - self.round.done).max(0.0) + self.dirty_now();
        if !self.fits_now(now, left + self.dirtied_until_stopped()) || self.is_worth_going_on(now, left) {
            return Action::Continue;
        }
        self.switch_over(now)
    }

    /// All pages of the round are done, and acknowledged. After [`Action::Continue`], harvest and start the next.
    pub fn round_ended(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen);
        let at = now.as_secs_f64();
        self.rounds_spent += ((at - self.round.start) / WHOLE_ROUND_S).clamp(0.0, 1.0);
        self.model.link.stop(at, &seen.link);
        let sent = self.round.done - self.round.struck_off;
        if self.round.number > 1 && sent >= 1.0 {
            let bytes = self.bytes_acked.saturating_sub(self.round.bytes_at_start) as f64;
            let weight = (sent / ENOUGH_PAGES).min(1.0);
            let seen = (bytes / sent).clamp(64.0, 2.0 * RAW_PAGE_BYTES);
            self.page_bytes += weight * (seen - self.page_bytes);
        }
        if let Policy::AutoConverge(parameters) = &self.settings.policy {
            let dirtied_bytes = self.dirty_now() * PAGE_SIZE as f64;
            self.rule.on_sync(at, dirtied_bytes, seen.link.bytes_acked as f64, parameters);
        }
        self.plan(now);
        let left = self.dirty_now();
        if self.fits_now(now, left + self.dirtied_until_stopped()) && !self.is_worth_another_round(now, left)
        {
            return self.switch_over(now);
        }
        self.must_end(now).unwrap_or(Action::Continue)
    }

    /// The guest stands still and `left` pages, exactly, have to be sent. After [`LastCheck::CallOff`] let it run
    /// on and start a round with them.
    pub fn last_check(&mut self, now: Duration, why: Why, left: Pages) -> LastCheck {
        if matches!(why, Why::Limit(_)) {
            return LastCheck::GoOn;
        }
        let bandwidth =
            self.settings.switchover_bandwidth.unwrap_or_else(|| self.model.link.at_switchover_now());
        let fits = self.fits_at(now, bandwidth);
        let check = switchover::last_check(left, fits, self.called_off);
        if check == LastCheck::CallOff {
            self.called_off(now, left, fits);
        }
        check
    }

    /// The guest stood still with `left` pages to send, of which only `fits` still would: it runs on.
    pub fn called_off(&mut self, now: Duration, left: Pages, fits: Pages) {
        self.called_off += 1;
        self.events.record(now, Change::CalledOff { left, fits });
    }

    /// Whether the guest may run on once more. If not, the downtime limit gives way.
    pub fn may_call_off(&self) -> bool {
        self.called_off < switchover::MAX_CALLED_OFF
    }

    /// The link has been seen while the guest stands still.
    pub fn link_seen(&mut self, now: Duration, seen: &LinkSample) {
        self.model.link.observe(now.as_secs_f64(), seen);
        self.bytes_acked = self.bytes_acked.max(seen.bytes_acked);
    }

    /// What the guest may stand still for, a limit that is out of reach having given way to what the switchover takes whenever
    /// it comes.
    pub fn pause_limit(&self, now: Duration) -> Duration {
        let least = self.settings.switchover_overhead.mul_f64(1.0 + UNREACHABLE_SHARE);
        self.settings.limits.downtime_at(now).max(least)
    }

    fn learn(&mut self, now: Duration, seen: &Observation<'_>) {
        let at = now.as_secs_f64();
        let vcpus = seen.vcpus.len().max(self.gates.len());
        self.throttles.resize(vcpus, Throttle::default());
        self.gates.resize(vcpus, GateState::Open);
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
        self.model.link.observe(at, &seen.link);
        self.bytes_acked = self.bytes_acked.max(seen.link.bytes_acked);
        self.round.done = seen.pages_done.as_f64();
        self.round.struck_off = seen.pages_struck_off.as_f64().min(self.round.done);
        let sent = self.round.done - self.round.struck_off;
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
            |curve: &Curve| curve.by_the_end(round, self.sampling.gate_s().max(STOPPING_S)) - curve.last().1;
        all.map(more).sum::<f64>().max(0.0)
    }

    fn must_end(&mut self, now: Duration) -> Option<Action> {
        // Twenty twentieths of a round make one, whatever binary fractions make of them.
        let rounds = u32::try_from(whole(self.rounds_spent + 1e-6)).unwrap_or(u32::MAX);
        let ram_bytes = self.settings.ram.0.saturating_mul(PAGE_SIZE as u64);
        let reached = self.settings.limits.reached(now, rounds, self.bytes_acked, ram_bytes)?;
        if reached == stop::Reached::Timeout(AtTimeout::Cancel) {
            self.events.record(now, Change::GaveUp(reached));
            return Some(Action::GiveUp(reached));
        }
        self.events.record(now, Change::SwitchOver(Why::Limit(reached)));
        Some(Action::SwitchOver(Why::Limit(reached)))
    }

    /// What is left of the current round.
    fn rest_of_the_round(&self, at: f64) -> Round {
        Round {
            pages: (self.round.pages - self.round.done).max(0.0),
            of: self.round.pages,
            current: true,
            after_s: self.round.after_s,
            free_s: self.round.free_s(at),
        }
    }

    fn fits_now(&self, now: Duration, left: f64) -> bool {
        // A controller that was wrong before leaves more room.
        let room = CAREFUL.powi(i32::try_from(self.called_off).unwrap_or(i32::MAX));
        let late = self.time_left(now).is_zero();
        !late && (left <= 0.0 || left <= self.fits(now).as_f64() * room)
    }

    fn switch_over(&mut self, now: Duration) -> Action {
        self.events.record(now, Change::SwitchOver(Why::Fits));
        Action::SwitchOver(Why::Fits)
    }
}

/// What was at the places before, in the new order.
fn moved<T: Clone>(all: &mut Vec<T>, places: &[Option<usize>], new: &T) {
    let before = std::mem::take(all);
    let at = |place: &Option<usize>| place.and_then(|place| before.get(place)).unwrap_or(new).clone();
    *all = places.iter().map(at).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::converge::VcpuSample;

    #[test]
    fn what_was_learned_of_a_vcpu_goes_with_it_when_another_before_it_is_gone() {
        let mut settings = Settings::new(Pages(1 << 20));
        settings.policy = "dirty-limit".parse().unwrap();
        let mut controller = Controller::new(settings);
        controller.round_started(Duration::ZERO, Pages(1 << 20));
        let sample =
            |dirtied| VcpuSample { dirtied: Pages(dirtied), throttled: Duration::from_nanos(dirtied) };
        for ms in 1..50 {
            let vcpus = [sample(0), sample(ms * 10_000), sample(ms * 3)];
            let seen = Observation { vcpus: &vcpus, pages_done: Pages(ms), ..Observation::default() };
            let _ = controller.observed(Duration::from_millis(ms), &seen);
        }
        let (gates, curves) = (controller.gates.clone(), controller.model.curves.clone());
        let throttled = controller.throttled_seen.clone();
        // The first is unplugged, and a new one comes.
        controller.vcpus_changed(&[Some(1), Some(2), None]);
        assert_eq!(controller.gates(), [gates[1], gates[2], GateState::Open]);
        assert_eq!(controller.counts, [Pages(490_000), Pages(147), Pages(0)]);
        let last = |curve: &Curve| curve.last();
        assert_eq!(
            controller.model.curves.iter().map(last).collect::<Vec<_>>(),
            [curves[1].last(), curves[2].last(), Curve::default().last()]
        );
        assert_eq!(controller.throttled_seen, [throttled[1], throttled[2], 0.0]);
        assert_eq!(controller.throttles.len(), 3);
    }
}
