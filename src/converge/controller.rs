//! The part that decides: takes what is observed, keeps what is known, and says who is held back and when it ends.
//!
//! It keeps the order of things within a round, and nothing else: `vcpu` and `link` learn, `policy` says who is held
//! back, `pause` when the guest is stopped. Before it comes `track`, whose counts it is given; after it `source`, which does
//! what it says.

use std::time::Duration;

use super::curve::Curve;
use super::events::EventLog;
use super::link::Link;
use super::model::{Conditions, Round, Writers};
use super::pace::Pace;
use super::pause::{Pause, Rest};
use super::policy::{Decision, Rule, View};
use super::sampling::Sampling;
use super::throttle::LONGEST_STALL_EVER;
use super::units::{duration, sane, whole};
use super::vcpu::{Seen, Vcpu};
use super::{
    Action, AtTimeout, Change, Event, GateState, LastCheck, LinkSample, Observation, Pages, Prediction,
    Settings, Share, Why, stop, switchover,
};
use crate::PAGE_SIZE;

/// Bytes on the wire for a page that is sent as it is, until it is measured.
const RAW_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 1.0;
/// Pages that say what a page costs.
const ENOUGH_PAGES: f64 = 16_384.0;
/// A switchover that had to be called off lowers the next one's limit to this share.
const CAREFUL: f64 = 0.9;
/// A downtime limit that is out of reach is exceeded by what it is, and by pages for this share of what the switchover
/// takes besides: enough for the last pages of a guest that hardly writes.
const UNREACHABLE_SHARE: f64 = 0.25;
/// A round of this length counts as one against the limit of rounds, a shorter one in proportion: thirty rounds of a
/// millisecond say nothing about a guest.
const WHOLE_ROUND_S: f64 = 20e-3;
/// Decisions are made this often within a round, or less often for guests whose decisions take long.
const DECIDE_S: f64 = 0.05;
const DECIDE_S_PER_VCPU: f64 = 0.1e-3;

/// The current round.
#[derive(Clone, Debug, Default)]
struct Current {
    number: u32,
    start: f64,
    pages: f64,
    done: f64,
    struck_off: f64,
    /// How long the round before went on with nobody held back.
    after_s: f64,
    /// When somebody was first held back in this one.
    braked_at: Option<f64>,
    bytes_at_start: u64,
    /// How long the vCPUs ran in it, if nobody can be told from another, else how long it has been going on.
    ran_s: f64,
    unprotected: bool,
    /// Pages that are dirty and none of its own.
    besides: f64,
}

impl Current {
    /// How long it has gone on with nobody held back.
    fn free_s(&self, at: f64) -> f64 {
        (self.braked_at.unwrap_or(at) - self.start).max(0.0)
    }

    /// Pages that are still to be sent.
    fn unsent(&self) -> f64 {
        (self.pages - self.done).max(0.0)
    }

    /// What is left of it.
    fn rest(&self, at: f64) -> Round {
        Round {
            pages: self.unsent(),
            of: self.pages,
            current: true,
            after_s: self.after_s,
            free_s: self.free_s(at),
        }
    }
}

/// Decides, from what it is told.
#[derive(Debug)]
pub struct Controller {
    settings: Settings,
    vcpus: Vec<Vcpu>,
    others: Curve,
    link: Link,
    round: Current,
    pace: Pace,
    rule: Box<dyn Rule>,
    /// The last one.
    decision: Decision,
    next_decision: f64,
    prediction: Option<Prediction>,
    /// Bytes on the wire for a dirty page, and for a page of the current round.
    page_bytes: f64,
    round_page_bytes: f64,
    bytes_acked: u64,
    sampling: Sampling,
    pause: Pause,
    called_off: u32,
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
            rule: settings.policy.rule(),
            settings,
            vcpus: Vec::new(),
            others: Curve::default(),
            link: Link::default(),
            round: Current::default(),
            pace: Pace::default(),
            decision: Decision::default(),
            next_decision: 0.0,
            prediction: None,
            page_bytes: RAW_PAGE_BYTES,
            round_page_bytes: RAW_PAGE_BYTES,
            bytes_acked: 0,
            pause: Pause::default(),
            called_off: 0,
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
            self.rule = self.settings.policy.rule();
            self.events.record(now, Change::Policy(self.settings.policy));
        }
        if self.settings.limits != before.limits {
            self.events.limits_set(self.settings.limits.downtime_at(now));
            self.events.record(now, Change::Limits(self.settings.limits.clone()));
        }
        self.next_decision = 0.0;
    }

    /// What the switchover would take besides, if it came now. It changes all the time, and changes no plan: it is waited
    /// for.
    pub fn set_backlog(&mut self, backlog: Duration) {
        self.settings.switchover_backlog = backlog;
    }

    /// Where each vCPU's gate is to be, as of the last observation. A closed gate opens by itself; a vCPU that
    /// runs while its gate is closed has to be kicked.
    pub fn gates(&self) -> impl Iterator<Item = GateState> + '_ {
        self.vcpus.iter().map(|vcpu| vcpu.gate)
    }

    /// Each vCPU's part in this round.
    pub fn shares(&self) -> impl Iterator<Item = Share> + '_ {
        self.vcpus.iter().map(|vcpu| vcpu.share)
    }

    /// Whether pages of this round that are dirty again should be struck off it.
    pub fn strikes_off_redirtied(&self) -> bool {
        self.rule.strikes_off_redirtied()
    }

    /// Whether the guest is being held back until the rest fits.
    pub fn is_braking(&self) -> bool {
        self.decision.braking.is_some()
    }

    /// How long to wait until the next observation.
    pub fn next_sample(&self) -> Duration {
        self.sampling.next(&self.vcpus)
    }

    /// What is expected; `None` until the link has been measured.
    pub fn prediction(&self) -> Option<Prediction> {
        self.prediction
    }

    /// The wire's bandwidth in bytes per second, as measured.
    pub fn bandwidth(&self) -> Option<f64> {
        self.link.mean()
    }

    /// Bytes per second to count on while the guest stands still, where no `max-bandwidth` holds.
    pub fn switchover_bandwidth(&self) -> Option<f64> {
        self.settings.switchover_bandwidth.or(self.link.at_switchover())
    }

    /// P*: what fits the downtime limit at this time, with something in hand.
    pub fn fits(&self, now: Duration) -> Pages {
        self.fits_in(self.settings.limits.downtime_at(now))
    }

    fn fits_in(&self, limit: Duration) -> Pages {
        let in_hand = self.settings.tuning.in_hand;
        let given = self.settings.switchover_bandwidth.map(|given| switchover::careful(given, 0.0, in_hand));
        let bandwidth = given.unwrap_or_else(|| self.link.careful_at_switchover(in_hand));
        switchover::fit(self.time_left(limit), bandwidth, self.page_bytes)
    }

    /// What the downtime limit leaves for pages. A limit that is out of reach gives way to what the switchover takes
    /// whenever it comes; a backlog is waited for.
    fn time_left(&self, limit: Duration) -> Duration {
        let Settings { switchover_overhead: overhead, switchover_backlog: backlog, .. } = self.settings;
        self.in_reach(limit).saturating_sub(overhead).saturating_sub(backlog)
    }

    /// What has happened since this was last called.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.take()
    }

    /// vCPUs came or went. `places` says for each that there is now at which place it was before; what was learned of it, and
    /// what was decided, goes with it.
    pub fn vcpus_changed(&mut self, places: &[Option<usize>]) {
        let mut before: Vec<Option<Vcpu>> = std::mem::take(&mut self.vcpus).into_iter().map(Some).collect();
        let mut at =
            |place: &Option<usize>| place.and_then(|place| before.get_mut(place)?.take()).unwrap_or_default();
        self.vcpus = places.iter().map(&mut at).collect();
        self.next_decision = 0.0;
    }

    /// A round starts with so many pages: everything dirty has been harvested and counts start at 0 again.
    pub fn round_started(&mut self, now: Duration, pages_to_send: Pages) {
        let at = now.as_secs_f64();
        let free_s = self.round.free_s(at);
        self.pace.round_ended(self.adds_in_round());
        self.vcpus.iter_mut().for_each(Vcpu::recycled);
        self.others.recycled();
        self.link.start(at, self.bytes_acked);
        self.sampling.round_started(now);
        self.round = Current {
            number: self.round.number.saturating_add(1),
            start: at,
            pages: pages_to_send.as_f64(),
            bytes_at_start: self.bytes_acked,
            after_s: if self.round.number == 0 { f64::INFINITY } else { free_s },
            ..Current::default()
        };
        self.round_page_bytes = self.page_bytes;
        self.decide(now);
    }

    /// Something has been seen in the middle of a round.
    pub fn observed(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen, false);
        self.sampling.begins(now, self.settings.gate_latency);
        if let Some(action) = self.must_end(now) {
            return action;
        }
        if now.as_secs_f64() >= self.next_decision {
            self.decide(now);
        }
        let longest = self.decision.longest_stall.mul_f64(self.decision.stretch).min(LONGEST_STALL_EVER);
        let (gate_s, after_a_stall) = (self.sampling.gate_s(), self.settings.tuning.after_a_stall);
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.poll(now, longest, gate_s, after_a_stall));
        self.sampling.ends(now, &self.vcpus);
        self.events.downtime_limit(now, self.settings.limits.downtime_at(now));
        if self.round.number <= 1 {
            // Who writes the guest's memory unseen shows at the first harvest; what the round still sends has to be sent anyway.
            return Action::Continue;
        }
        let left = self.round.unsent() + self.dirty_now();
        let until_stopped = self.dirtied_until_stopped(now);
        if !self.fits_now(now, left + until_stopped) || self.had_better_wait(now, left, false) {
            return Action::Continue;
        }
        self.switch_over(now)
    }

    /// All pages of the round are done, and acknowledged. After [`Action::Continue`], harvest and start the next.
    pub fn round_ended(&mut self, now: Duration, seen: &Observation<'_>) -> Action {
        self.learn(now, seen, true);
        let at = now.as_secs_f64();
        self.rounds_spent += ((at - self.round.start) / WHOLE_ROUND_S).clamp(0.0, 1.0);
        self.link.stop(at, &seen.link);
        let sent = self.round.done - self.round.struck_off;
        if self.round.number > 1 && sent >= 1.0 {
            let bytes = self.bytes_acked.saturating_sub(self.round.bytes_at_start) as f64;
            let weight = (sent / ENOUGH_PAGES).min(1.0);
            let seen = (bytes / sent).clamp(64.0, 2.0 * RAW_PAGE_BYTES);
            self.page_bytes += weight * (seen - self.page_bytes);
        }
        // All of it is known now.
        let left = self.counted() + self.round.besides;
        self.rule.round_ended(now, left * PAGE_SIZE as f64, self.bytes_acked as f64);
        self.decide(now);
        if self.fits_now(now, left + self.dirtied_until_stopped(now))
            && !self.had_better_wait(now, left, true)
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
        let given = self.settings.switchover_bandwidth;
        let bandwidth = given.unwrap_or_else(|| self.link.at_switchover_now());
        let limit = self.settings.limits.downtime_at(now);
        let fits = switchover::fit(self.time_left(limit), bandwidth, self.page_bytes);
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
        self.link.observe(now.as_secs_f64(), seen);
        self.bytes_acked = self.bytes_acked.max(seen.bytes_acked);
    }

    /// What the guest may stand still for, a limit that is out of reach having given way to what the switchover takes whenever
    /// it comes.
    pub fn pause_limit(&self, now: Duration) -> Duration {
        self.in_reach(self.settings.limits.downtime_at(now))
    }

    fn in_reach(&self, limit: Duration) -> Duration {
        limit.max(self.settings.switchover_overhead.mul_f64(1.0 + UNREACHABLE_SHARE))
    }

    fn learn(&mut self, now: Duration, seen: &Observation<'_>, round_is_over: bool) {
        let at = now.as_secs_f64();
        let elapsed_s = (at - self.round.start).max(0.0);
        self.vcpus.resize_with(seen.vcpus.len().max(self.vcpus.len()), Vcpu::default);
        self.round.unprotected |= seen.unprotected > Pages(0);
        let per_vcpu = self.settings.per_vcpu;
        let lags = self.settings.unseen_per_vcpu > Pages(0) && !round_is_over;
        let how = Seen { elapsed_s, per_vcpu, unprotected: self.round.unprotected, lags };
        let ran = self.vcpus.iter_mut().zip(seen.vcpus).map(|(vcpu, sample)| vcpu.learn(sample, how));
        let running_of_all: f64 = ran.sum();
        // Writers that nobody can name are slowed down with the vCPUs only if they are the vCPUs.
        let by_vcpus = !per_vcpu && !seen.vcpus.is_empty();
        let running = if by_vcpus { running_of_all / seen.vcpus.len() as f64 } else { elapsed_s };
        // A log that is read at harvests only shows nothing until then.
        if round_is_over || seen.others.as_f64() > self.others.last().1 {
            self.others.observe(running, seen.others.as_f64());
        }
        self.round.ran_s = running;
        self.link.observe(at, &seen.link);
        self.bytes_acked = self.bytes_acked.max(seen.link.bytes_acked);
        self.round.besides = seen.besides.as_f64();
        self.round.done = seen.pages_done.as_f64();
        self.round.struck_off = seen.pages_struck_off.as_f64().min(self.round.done);
        let sent = self.round.done - self.round.struck_off;
        let bytes = self.bytes_acked.saturating_sub(self.round.bytes_at_start) as f64;
        // Bytes lag behind pages by what is on the way: only a long stretch of pages says what a page costs.
        if sent >= ENOUGH_PAGES {
            self.round_page_bytes = (bytes / sent).clamp(1.0, 2.0 * RAW_PAGE_BYTES);
        }
        self.pace.observe(at, self.adds_in_round(), self.settings.tuning.pace_s);
    }

    /// Pages that were added in this round to what is left: those that are dirty, but for those that it has not sent yet.
    fn adds_in_round(&self) -> f64 {
        self.counted() - self.round.struck_off
    }

    fn counted(&self) -> f64 {
        self.vcpus.iter().map(|vcpu| vcpu.curve.last().1).sum::<f64>() + self.others.last().1
    }

    /// What is dirty, as far as it is known and as far as it has to be expected: pages that KVM has not told yet, and those of
    /// logs that are read at harvests only.
    fn dirty_now(&self) -> f64 {
        let most_unseen = self.settings.unseen_per_vcpu.as_f64();
        let unseen = |vcpu: &Vcpu| most_unseen.min(vcpu.curve.at(self.round.ran_s));
        let unseen = if most_unseen > 0.0 { self.vcpus.iter().map(unseen).sum() } else { 0.0 };
        let others = (self.others.at(self.round.ran_s) - self.others.last().1).max(0.0);
        (self.counted() + self.round.besides + unseen + others).min(self.settings.ram.as_f64())
    }

    /// What will be dirtied between the decision to stop the guest and its standing still, which takes as long as
    /// closing a gate, or as stopping a vCPU that knows of nothing.
    fn dirtied_until_stopped(&self, now: Duration) -> f64 {
        let round = Round { current: true, ..Round::coming(0.0, 0.0) };
        let seconds = self.sampling.gate_s().max(self.settings.tuning.stopping_s);
        let more = |curve: &Curve| curve.by_the_end(round, seconds) - curve.last().1;
        let until = now + duration(seconds);
        let stands = |vcpu: &&Vcpu| matches!(vcpu.gate, GateState::ClosedUntil(opens) if opens > until);
        let runs = self.vcpus.iter().filter(|vcpu| !stands(vcpu));
        let all: f64 = runs.map(|vcpu| more(&vcpu.curve)).sum();
        (all + more(&self.others)).max(0.0)
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

    fn fits_now(&self, now: Duration, left: f64) -> bool {
        // A controller that was wrong before leaves more room.
        let room = CAREFUL.powi(i32::try_from(self.called_off).unwrap_or(i32::MAX));
        let late = self.time_left(self.settings.limits.downtime_at(now)).is_zero();
        !late && (left <= 0.0 || left <= self.fits(now).as_f64() * room)
    }

    fn switch_over(&mut self, now: Duration) -> Action {
        self.events.record(now, Change::SwitchOver(Why::Fits));
        Action::SwitchOver(Why::Fits)
    }

    /// The rest fits. Whether the guest had better be stopped later all the same.
    fn had_better_wait(&mut self, now: Duration, left: f64, round_is_over: bool) -> bool {
        if !round_is_over && self.pause.was_worth_waiting(now) {
            return true;
        }
        let Some(conditions) = self.conditions(now) else { return false };
        let at = now.as_secs_f64();
        let round =
            if round_is_over { Round::coming(left, self.round.free_s(at)) } else { self.round.rest(at) };
        let all = self.all();
        let writers = Writers { vcpus: &self.vcpus, others: &self.others, all: &all };
        let braking = self.decision.braking;
        let rest = Rest { round, left, braking };
        self.pause.is_worth_waiting(now, &self.settings, writers, &conditions, rest)
    }

    /// All writers together.
    fn all(&self) -> Curve {
        let curves = self.vcpus.iter().map(|vcpu| &vcpu.curve).chain([&self.others]);
        let ran = curves.clone().map(|curve| curve.last().0).fold(0.0, f64::max);
        Curve::sum(curves, ran)
    }

    /// Asks the policy, and does what it says.
    fn decide(&mut self, now: Duration) {
        let at = now.as_secs_f64();
        self.next_decision = at + DECIDE_S.max(DECIDE_S_PER_VCPU * self.vcpus.len() as f64);
        let (limit, overhead) = (self.settings.limits.downtime_at(now), self.settings.switchover_overhead);
        if limit <= overhead {
            self.events.downtime_out_of_reach(now, limit, overhead);
        }
        let conditions = self.conditions(now);
        let all = self.all();
        let writers = Writers { vcpus: &self.vcpus, others: &self.others, all: &all };
        let round = self.round.rest(at);
        let view = View {
            now,
            limits: &self.settings.limits,
            tuning: &self.settings.tuning,
            per_vcpu: self.settings.per_vcpu,
            writers,
            round,
            number: self.round.number,
            elapsed_s: at - self.round.start,
            adds_per_s: self.pace.adds_per_s(),
            besides: self.round.besides,
            gate_s: self.sampling.gate_s(),
            strikes_off: self.rule.strikes_off_redirtied(),
        };
        let decision = self.rule.decide(&view, conditions.as_ref());
        let free = conditions.as_ref().map(|conditions| writers.free(conditions, round).is_some());
        if decision.braking.is_some() && self.round.braked_at.is_none() {
            self.round.braked_at = Some(at);
        }
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            vcpu.hold(decision.quotas.get(index).copied().flatten(), now);
            if let Some(conditions) = &conditions {
                vcpu.share.predicted = Pages::floor(vcpu.curve.by_the_end(round, conditions.seconds(round)));
            }
        }
        self.events.decided(now, &decision, &self.vcpus);
        if let Some(converges_unthrottled) = free {
            let forecast = decision.forecast;
            let prediction = Prediction {
                converges: forecast.is_some(),
                converges_unthrottled,
                total: forecast.map(|f| duration(at + f.finish_s)),
                downtime: forecast.map_or(self.settings.limits.downtime_at(now), |f| duration(f.downtime_s)),
                lost: forecast.map(|f| duration(f.lost_s)),
                bytes: forecast.map(|f| self.bytes_acked.saturating_add(whole(f.pages * self.page_bytes))),
                rounds: forecast.map(|f| self.round.number.saturating_add(f.rounds)),
                spread: self.link.spread(),
            };
            self.prediction = Some(prediction);
            self.events.prediction(now, prediction);
        }
        self.decision = decision;
    }

    fn conditions(&self, now: Duration) -> Option<Conditions> {
        let bandwidth = self.link.mean().filter(|mean| *mean > 0.0)?;
        let switch = self.switchover_bandwidth().map_or(bandwidth, sane);
        Some(Conditions {
            pages_per_s: bandwidth / self.page_bytes,
            current_pages_per_s: bandwidth / self.round_page_bytes,
            strikes_off: self.rule.strikes_off_redirtied(),
            switch_pages_per_s: switch / self.page_bytes,
            fits: self.fits_in(self.settings.limits.aim_at(now)).as_f64(),
            overhead_s: self.settings.switchover_overhead.as_secs_f64(),
            round_overhead_s: self.settings.tuning.round_s + self.link.round_trip_s(),
            ram: self.settings.ram.as_f64(),
        })
    }
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
        let before = controller.vcpus.clone();
        // The first is unplugged, and a new one comes.
        controller.vcpus_changed(&[Some(1), Some(2), None]);
        let gates: Vec<GateState> = controller.gates().collect();
        assert_eq!(gates, [before[1].gate, before[2].gate, GateState::Open]);
        let counted: Vec<Pages> = controller.vcpus.iter().map(|vcpu| vcpu.counted).collect();
        assert_eq!(counted, [Pages(490_000), Pages(147), Pages(0)]);
        let last: Vec<(f64, f64)> = controller.vcpus.iter().map(|vcpu| vcpu.curve.last()).collect();
        assert_eq!(last, [before[1].curve.last(), before[2].curve.last(), Curve::default().last()]);
        assert_eq!(controller.vcpus[0].throttled_s, before[1].throttled_s);
    }
}
