//! The controller against guests and links that exist only as numbers: what a machine cannot hold, repeated
//! exactly. Whatever comes from here is **simulated**, and every output that shows it says so.
//!
//! A guest is a list of writers, one per vCPU, each with phases: a working set, a rate, an order. Dirtying a clean
//! page costs its writer a fault, as on real KVM. A link has a rate, ripples and stalls. The machine has the
//! latencies that matter for control: how often it looks, how long a kick takes, what a pause costs. The
//! simulation counts pages, it does not name them; which of the dirtied pages were still to be sent is taken from
//! the writer's order.

use std::time::Duration;

use super::units::{duration, sane, whole};
use super::{
    Action, Controller, Event, GateState, LastCheck, LinkSample, Observation, Pages, Prediction, Settings,
    VcpuSample, Why,
};
use crate::PAGE_SIZE;

/// In which order a writer goes through its working set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Order {
    /// Page by page, and from the start again.
    #[default]
    Cyclic,
    /// Every page as likely as any other, each time.
    Random,
}

/// What a vCPU does for a while.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Phase {
    /// Since the migration's start; a later phase has a working set of its own.
    pub from: Duration,
    /// Pages of the working set.
    pub pages: Pages,
    /// Page writes per second, free writes included; infinite: as fast as it can.
    pub writes_per_s: f64,
    /// Their order.
    pub order: Order,
}

/// A vCPU: what it does, in the order in which it does it. Without a phase it writes nothing.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Writer {
    /// By their start.
    pub phases: Vec<Phase>,
}

impl Writer {
    /// One phase for ever: `bytes` of working set at `bytes_per_s`, cyclic.
    pub fn steady(bytes: u64, bytes_per_s: f64) -> Self {
        let pages = Pages(bytes / PAGE_SIZE as u64);
        let writes_per_s = bytes_per_s / PAGE_SIZE as f64;
        Self { phases: vec![Phase { from: Duration::ZERO, pages, writes_per_s, order: Order::Cyclic }] }
    }

    fn phase(&self, at: f64) -> Option<(usize, &Phase)> {
        let started = |(_, phase): &(usize, &Phase)| phase.from.as_secs_f64() <= at;
        self.phases.iter().enumerate().take_while(started).last()
    }
}

/// A guest.
#[derive(Clone, PartialEq, Debug)]
pub struct Guest {
    /// All of its RAM.
    pub ram: Pages,
    /// Populated pages that are not zero: what the first round has to send.
    pub populated: Pages,
    /// One per vCPU.
    pub writers: Vec<Writer>,
}

/// A link.
#[derive(Clone, PartialEq, Debug)]
pub struct Link {
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Its rate goes up and down by this share of itself, 0 to 1, as a wave of [`Link::RIPPLE`].
    pub ripple: f64,
    /// Nothing moves in these intervals.
    pub stalls: Vec<(Duration, Duration)>,
}

impl Link {
    /// Length of the wave.
    pub const RIPPLE: Duration = Duration::from_millis(1700);

    /// A link that never varies.
    pub const fn steady(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, ripple: 0.0, stalls: Vec::new() }
    }

    fn rate(&self, at: f64) -> f64 {
        let in_stall = |(from, to): &(Duration, Duration)| from.as_secs_f64() <= at && at < to.as_secs_f64();
        if self.stalls.iter().any(in_stall) {
            return 0.0;
        }
        let wave = (at / Self::RIPPLE.as_secs_f64() * std::f64::consts::TAU).sin();
        sane(self.bytes_per_s) * (1.0 + sane(self.ripple).min(1.0) * wave)
    }
}

/// The hosts: what control costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Machine {
    /// Shortest time between two observations, and the step of the simulation; the controller may ask for more.
    pub sample_interval: Duration,
    /// From closing a gate to its vCPU standing behind it.
    pub kick: Duration,
    /// What the first write to a clean page costs.
    pub fault: Duration,
    /// Harvest and system calls between two rounds.
    pub round_overhead: Duration,
    /// Pause, device state and handing over: the downtime besides sending.
    pub switchover: Duration,
}

impl Default for Machine {
    /// As measured on a nested KVM with two CPUs that are both busy: 0.25 ms from a kick to the exit, 6.6 µs per fault.
    fn default() -> Self {
        Self {
            sample_interval: Duration::from_micros(100),
            kick: Duration::from_micros(250),
            fault: Duration::from_nanos(6600),
            round_overhead: Duration::from_millis(2),
            switchover: Duration::from_millis(20),
        }
    }
}

/// One simulated round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoundOutcome {
    /// Pages that it began with.
    pub pages_to_send: Pages,
    /// Pages that it sent.
    pub pages_sent: Pages,
    /// Pages dirtied meanwhile.
    pub dirtied: Pages,
    /// How long it took.
    pub took: Duration,
    /// vCPUs that were held back at its end.
    pub throttled_vcpus: usize,
}

/// What a simulated vCPU went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuOutcome {
    /// Time behind its closed gate.
    pub throttled: Duration,
    /// The longest stretch of it, the final pause excluded.
    pub longest_stall: Duration,
    /// Throttling, downtime and faults.
    pub lost: Duration,
}

/// How a simulated migration ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Simulated {
    /// Why the guest was switched over; `None` if it never was.
    pub ended: Option<Why>,
    /// From the start to the guest running at the destination, or to giving up.
    pub total: Duration,
    /// How long the guest stood still in the end.
    pub downtime: Duration,
    /// All bytes sent.
    pub bytes: u64,
    /// The rounds, the final phase not counted.
    pub rounds: Vec<RoundOutcome>,
    /// By vCPU.
    pub vcpus: Vec<VcpuOutcome>,
    /// What was expected when the first round had ended.
    pub predicted_after_round_1: Option<Prediction>,
    /// The round at whose end it was first known that it would not end without throttling.
    pub hopeless_since_round: Option<u32>,
    /// The events of the controller.
    pub events: Vec<Event>,
}

impl Simulated {
    /// Guest time lost by the worst-off vCPU.
    pub fn lost(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| vcpu.lost).max().unwrap_or_default()
    }

    /// The longest stall of any vCPU, the final pause excluded.
    pub fn longest_stall(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| vcpu.longest_stall).max().unwrap_or_default()
    }
}

/// A vCPU in the simulation.
#[derive(Clone, Debug, Default)]
struct Vcpu {
    phase: usize,
    /// Pages dirtied since the recycle: in the phase's own working set, and in those of phases that are over.
    in_set: f64,
    earlier: f64,
    /// Pages of the phase's working set that are in the current round's set.
    to_send: f64,
    closed_from: f64,
    closed_until: f64,
    stall: f64,
    longest_stall: f64,
    throttled: f64,
    faults: f64,
}

impl Vcpu {
    fn dirtied(&self) -> f64 {
        self.in_set + self.earlier
    }

    /// Runs from `from` for `step` seconds; `unsent` is the share of the round's pages still to be sent. Returns
    /// how many of the newly dirtied pages were among those.
    fn run(&mut self, writer: &Writer, from: f64, step: f64, fault: f64, unsent: f64) -> f64 {
        let closed = (self.closed_until.min(from + step) - self.closed_from.max(from)).clamp(0.0, step);
        self.throttled += closed;
        self.stall += closed;
        self.longest_stall = self.longest_stall.max(self.stall);
        if self.closed_until <= from + step {
            self.stall = 0.0;
        }
        let Some((index, phase)) = writer.phase(from) else { return 0.0 };
        if index != self.phase {
            self.phase = index;
            self.earlier += self.in_set;
            (self.in_set, self.to_send) = (0.0, 0.0);
        }
        let set = phase.pages.as_f64();
        if set == 0.0 {
            return 0.0;
        }
        let running = step - closed;
        let write_s = if phase.writes_per_s > 0.0 { 1.0 / phase.writes_per_s } else { return 0.0 };
        // A write takes its pace or its cost, whichever is longer: a paced writer hides its faults.
        let full_speed = phase.writes_per_s.is_infinite();
        let page_s = if full_speed { fault } else { write_s.max(fault) };
        let clean = (set - self.in_set).max(0.0);
        let (new, was_unsent) = match phase.order {
            Order::Cyclic => {
                let new = (running / page_s).min(clean);
                // Clean pages that are not in this round's set come first, then those that are.
                let others = (set - self.to_send - self.in_set).max(0.0);
                (new, (new - others).max(0.0) * unsent)
            }
            Order::Random => {
                let new = clean * (1.0 - (-running / (page_s * set)).exp());
                (new, new * unsent * (self.to_send / set).min(1.0))
            }
        };
        self.in_set += new;
        if full_speed || write_s < fault {
            self.faults += new * fault;
        }
        was_unsent
    }
}

/// Runs a migration of `guest` over `link` until it ends, gives up, or `patience` is over. What the simulation
/// knows better than `settings` (RAM, overhead) is filled in. Deterministic: the same input gives the same output.
pub fn simulate(
    guest: &Guest,
    link: &Link,
    machine: &Machine,
    mut settings: Settings,
    patience: Duration,
) -> Simulated {
    settings.ram = guest.ram;
    settings.switchover_overhead = machine.switchover;
    Simulation {
        guest,
        link,
        machine,
        controller: Controller::new(settings),
        vcpus: vec![Vcpu::default(); guest.writers.len()],
        samples: Vec::new(),
        now: 0.0,
        bytes: 0.0,
        to_send: guest.populated.as_f64(),
        done: 0.0,
        struck_off: 0.0,
        redirtied_unsent: 0.0,
    }
    .migrate(patience.as_secs_f64())
}

struct Simulation<'a> {
    guest: &'a Guest,
    link: &'a Link,
    machine: &'a Machine,
    controller: Controller,
    vcpus: Vec<Vcpu>,
    samples: Vec<VcpuSample>,
    now: f64,
    bytes: f64,
    /// Of the current round.
    to_send: f64,
    done: f64,
    struck_off: f64,
    /// Pages of the round that are dirty again and have not been sent.
    redirtied_unsent: f64,
}

const WIRE_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 16.0;

impl Simulation<'_> {
    fn clock(&self) -> Duration {
        duration(self.now)
    }

    /// Lets everyone work for `step`; the sender only if `sending`.
    fn step(&mut self, step: f64, sending: bool) {
        let left = (self.to_send - self.done).max(0.0);
        // Of the pages that were not struck off; the order in which they are sent has nothing to do with the writers'.
        let unsent = if left > 0.0 { left / (self.to_send - self.struck_off) } else { 0.0 };
        let fault = self.machine.fault.as_secs_f64();
        for (vcpu, writer) in self.vcpus.iter_mut().zip(&self.guest.writers) {
            self.redirtied_unsent += vcpu.run(writer, self.now, step, fault, unsent);
        }
        self.redirtied_unsent = self.redirtied_unsent.min(left);
        if sending && left > 0.0 {
            let struck_off =
                if self.controller.strikes_off_redirtied() { self.redirtied_unsent } else { 0.0 };
            let can_send = self.link.rate(self.now) * step / WIRE_PAGE_BYTES;
            let pages = can_send.min(left - struck_off);
            self.done += pages + struck_off;
            self.struck_off += struck_off;
            self.redirtied_unsent *= if struck_off > 0.0 { 0.0 } else { 1.0 - pages / left };
            self.bytes += pages * WIRE_PAGE_BYTES;
        }
        self.now += step;
    }

    fn start_round(&mut self, pages: f64) {
        (self.to_send, self.done, self.struck_off, self.redirtied_unsent) = (pages, 0.0, 0.0, 0.0);
        for vcpu in &mut self.vcpus {
            vcpu.to_send = vcpu.in_set;
            (vcpu.in_set, vcpu.earlier) = (0.0, 0.0);
        }
        let now = self.clock();
        self.controller.round_started(now, Pages::floor(pages.ceil()));
    }

    fn dirty(&self) -> f64 {
        self.vcpus.iter().map(Vcpu::dirtied).sum::<f64>()
    }

    fn migrate(mut self, patience: f64) -> Simulated {
        let mut rounds = Vec::new();
        let mut predicted_after_round_1 = None;
        let mut hopeless_since_round = None;
        let mut events = Vec::new();
        let mut ended = None;
        let mut downtime = 0.0;
        self.start_round(self.to_send);
        // In the first pass, everything that the writers touch is among the pages to send.
        for (vcpu, writer) in self.vcpus.iter_mut().zip(&self.guest.writers) {
            vcpu.to_send = writer.phase(0.0).map_or(0.0, |(_, phase)| phase.pages.as_f64());
        }
        let mut round_start = 0.0;
        while self.now < patience && rounds.len() < 100_000 {
            let interval = self.controller.next_sample().max(self.machine.sample_interval);
            self.step(interval.as_secs_f64().max(1e-5), true);
            let now = self.clock();
            let over = self.done >= self.to_send;
            let action = self.sample(now, over);
            events.extend(self.controller.take_events());
            match action {
                Action::GiveUp(_) => break,
                Action::Continue if !over => continue,
                Action::Continue | Action::SwitchOver(_) => {}
            }
            rounds.push(RoundOutcome {
                pages_to_send: Pages::floor(self.to_send),
                pages_sent: Pages::floor(self.done - self.struck_off),
                dirtied: Pages::floor(self.dirty()),
                took: duration(self.now - round_start),
                throttled_vcpus: self.controller.shares().filter(|share| share.quota.is_some()).count(),
            });
            let left = (self.to_send - self.done - self.redirtied_unsent).max(0.0) + self.dirty();
            let left = left.min(self.guest.ram.as_f64());
            if let Action::SwitchOver(why) = action {
                let check = self.controller.last_check(now, why, Pages::floor(left));
                events.extend(self.controller.take_events());
                let (took, sent) = self.stand_still(left, check, patience);
                if check == LastCheck::GoOn {
                    downtime = took;
                    self.bytes += sent;
                    ended = Some(why);
                    break;
                }
            } else {
                self.step(self.machine.round_overhead.as_secs_f64(), false);
            }
            round_start = self.now;
            let next = if matches!(action, Action::SwitchOver(_)) { left } else { self.dirty() };
            self.start_round(next);
            let prediction = self.controller.prediction();
            if rounds.len() == 1 {
                predicted_after_round_1 = prediction;
            }
            if hopeless_since_round.is_none() && prediction.is_some_and(|p| !p.converges_unthrottled) {
                hopeless_since_round = u32::try_from(rounds.len()).ok();
            }
        }
        if rounds.len() == 1 {
            predicted_after_round_1 = self.controller.prediction();
        }
        let vcpu = |vcpu: &Vcpu| VcpuOutcome {
            throttled: duration(vcpu.throttled),
            longest_stall: duration(vcpu.longest_stall),
            lost: duration(vcpu.throttled + downtime + vcpu.faults),
        };
        Simulated {
            ended,
            total: self.clock(),
            downtime: duration(downtime),
            bytes: whole(self.bytes),
            rounds,
            vcpus: self.vcpus.iter().map(vcpu).collect(),
            predicted_after_round_1,
            hopeless_since_round,
            events,
        }
    }

    fn sample(&mut self, now: Duration, round_is_over: bool) -> Action {
        let mut samples = std::mem::take(&mut self.samples);
        samples.clear();
        let named = self.controller.settings().per_vcpu;
        samples.extend(self.vcpus.iter().map(|vcpu| VcpuSample {
            dirtied: if named { Pages::floor(vcpu.dirtied()) } else { Pages(0) },
            throttled: duration(vcpu.throttled),
        }));
        let seen = Observation {
            vcpus: &samples,
            others: if named { Pages(0) } else { Pages::floor(self.dirty()) },
            pages_done: Pages::floor(self.done),
            pages_struck_off: Pages::floor(self.struck_off),
            unprotected: Pages(0),
            link: LinkSample { bytes_acked: whole(self.bytes), ..LinkSample::default() },
        };
        let action = if round_is_over {
            self.controller.round_ended(now, &seen)
        } else {
            self.controller.observed(now, &seen)
        };
        self.samples = samples;
        let kick = self.machine.kick.as_secs_f64();
        for (vcpu, gate) in self.vcpus.iter_mut().zip(self.controller.gates()) {
            match gate {
                GateState::ClosedUntil(until) if until.as_secs_f64() > vcpu.closed_until => {
                    vcpu.closed_from = now.as_secs_f64() + kick;
                    vcpu.closed_until = until.as_secs_f64();
                }
                _ => {}
            }
        }
        action
    }

    /// The guest stands still: how long, and how many bytes that sends.
    fn stand_still(&mut self, left: f64, check: LastCheck, patience: f64) -> (f64, f64) {
        let stopped = self.now;
        self.now += self.machine.switchover.as_secs_f64();
        let bytes = left * WIRE_PAGE_BYTES;
        let mut to_go = if check == LastCheck::GoOn { bytes } else { 0.0 };
        // A rest of less than a byte is rounding.
        while to_go >= 1.0 && self.now < patience * 2.0 {
            let rate = self.link.rate(self.now);
            let step = if rate > 0.0 { (to_go / rate).min(1e-3) } else { 1e-3 };
            to_go -= rate * step;
            self.now += step;
        }
        (self.now - stopped, bytes - to_go.max(0.0))
    }
}
