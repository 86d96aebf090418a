//! The controller against guests and links that exist only as numbers: what a machine cannot hold, repeated
//! exactly. Whatever comes from here is **simulated**, and every output that shows it says so.
//!
//! Every page is an individual: it is to be sent or not, protected or not, dirty or not, and somebody was the first to
//! write it. A guest is a list of writers, one per vCPU, each with phases: a working set, a pace, an order; and of devices
//! that write its memory, too. Dirtying a clean page costs its vCPU a fault, as on real KVM, and writing a dirty one next
//! to nothing. A link has a rate, ripples, stalls, steps, a round trip. The machine has what matters for control: how
//! often it looks, how long a kick takes, how large a ring is, what a pause costs.
//!
//! `guest` and `link` describe; `memory` knows every page, `writer` writes and `sender` sends them; `vcpu` waits at gates;
//! `outcome` is what came of it. This file plays the part of `source`, step by step.
//!
//! It differs from real KVM, as far as is known, in this: all vCPUs have a CPU of their own, and nobody takes the CPU of
//! the thread that samples (on two CPUs with two busy vCPUs, samples come up to milliseconds late); a kick always takes the
//! same time; harvests, ring exits and protecting cost the guest nothing but the faults that follow; zero pages and
//! deltas do not exist, every page is 4112 bytes on the wire; bytes are sent the moment that the link takes them, where
//! real sockets hold some milliseconds' worth; a paced writer that was held back does not catch up.

pub mod demands;
mod guest;
mod link;
mod memory;
mod outcome;
mod pages;
mod sender;
mod vcpu;
mod writer;

use std::time::Duration;

pub use self::guest::{Burst, Guest, Machine, Order, Phase, Seen, SendOrder, Writer};
pub use self::link::{Cliff, Link, Step};
pub use self::outcome::{LimitKept, RoundOutcome, Simulated, VcpuOutcome};

use self::guest::{Places, in_memory, places};
use self::link::Pipe;
use self::memory::{Memory, Side};
use self::outcome::limit_kept;
use self::sender::Sender;
use self::vcpu::{Vcpu, World};
use super::guard::Guard;
use super::units::{duration, whole};
use super::{Action, Controller, Event, LastCheck, Observation, Pages, Settings, VcpuSample, Why};
use crate::PAGE_SIZE;

/// A page and what is sent with it.
const WIRE_PAGE_BYTES: f64 = PAGE_SIZE as f64 + 16.0;
/// Pages that are known to be dirty are protected when the link has no more to send than for this long, and at least so
/// many at a time, as in `source`.
const AHEAD_S: f64 = 10e-3;
const AHEAD_PAGES_MIN: usize = 2048;
/// The longest step while the guest stands still.
const STANDSTILL_STEP_S: f64 = 1e-3;
/// More rounds than these say nothing more.
const ROUNDS_MAX: usize = 100_000;

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
    settings.switchover_overhead = machine.switchover + link.round_trip * machine.switchover_round_trips;
    settings.unseen_per_vcpu = Pages(machine.held_back.into());
    let (vcpu_places, device_places) = places(guest);
    let overlap = overlap(vcpu_places.iter().chain(&device_places));
    let memory = Memory::new(in_memory(guest.ram), in_memory(guest.populated));
    let writers = guest.writers.len();
    Simulation {
        guest,
        machine,
        controller: Controller::new(settings),
        vcpus: (0..writers).map(|index| Vcpu::new(Side::Vcpu, index)).collect(),
        devices: (0..guest.devices.len()).map(|index| Vcpu::new(Side::Device, writers + index)).collect(),
        places: (vcpu_places, device_places),
        overlap,
        sender: Sender::new(machine.order),
        pipe: Pipe::new(link),
        round: Round::default(),
        memory,
        samples: Vec::new(),
        events: Vec::new(),
        now: 0.0,
        steps: 0,
        pauses: 0.0,
        said_since: None,
    }
    .migrate(patience.as_secs_f64())
}

/// Whether any two working sets have a page in common.
fn overlap<'a>(places: impl Iterator<Item = &'a Vec<(usize, usize)>>) -> bool {
    let mut all: Vec<_> = places.flatten().filter(|(_, pages)| *pages > 0).collect();
    all.sort();
    all.windows(2).any(|two| two[0].0 + two[0].1 > two[1].0)
}

/// The current round.
#[derive(Debug, Default)]
struct Round {
    start: f64,
    pages: usize,
    struck_off: usize,
    /// Per vCPU, when it began.
    throttled: Vec<f64>,
}

struct Simulation<'a> {
    guest: &'a Guest,
    machine: &'a Machine,
    controller: Controller,
    vcpus: Vec<Vcpu>,
    devices: Vec<Vcpu>,
    places: (Places, Places),
    overlap: bool,
    memory: Memory,
    sender: Sender,
    pipe: Pipe<'a>,
    round: Round,
    samples: Vec<VcpuSample>,
    events: Vec<Event>,
    now: f64,
    steps: u32,
    /// How long the guest stood still for nothing.
    pauses: f64,
    /// Since which round it has been said that it will not end.
    said_since: Option<usize>,
}

impl Simulation<'_> {
    fn clock(&self) -> Duration {
        duration(self.now)
    }

    /// Lets everyone work for `step`; the sender only if `sending`.
    fn step(&mut self, step: f64, sending: bool) {
        self.steps = self.steps.saturating_add(1);
        let mut world = World {
            machine: self.machine,
            writer: &Writer::default(),
            places: &[],
            side: Side::Vcpu,
            number: self.steps,
            shared: self.overlap,
        };
        let sides = [
            (Side::Vcpu, &mut self.vcpus, &self.guest.writers, &self.places.0),
            (Side::Device, &mut self.devices, &self.guest.devices, &self.places.1),
        ];
        for (side, hands, writers, places) in sides {
            world.side = side;
            for ((vcpu, writer), places) in hands.iter_mut().zip(writers).zip(places) {
                (world.writer, world.places) = (writer, places);
                vcpu.run(&world, &mut self.memory, self.now, step);
            }
        }
        if sending && self.memory.unsent() > 0 {
            let ahead = self.pipe.rate(self.now, true) * AHEAD_S / WIRE_PAGE_BYTES;
            let ahead = in_memory(Pages::floor(ahead)).max(AHEAD_PAGES_MIN);
            while self.memory.behind.len() > 0
                && (self.controller.is_braking() || self.memory.ready.len() < ahead)
            {
                self.memory.protect(ahead);
            }
            let room = self.pipe.room(self.now, step, true, WIRE_PAGE_BYTES);
            let sent = self.sender.send(&mut self.memory, room);
            self.pipe.send(self.now + step, sent, WIRE_PAGE_BYTES, sent < room);
        }
        self.now += step;
        self.pipe.arrive(self.now);
    }

    /// Everything that can be seen to be dirty is to be sent; after a switchover that was called off, besides what was
    /// not sent.
    fn start_round(&mut self) {
        self.memory.protect(usize::MAX);
        let mut runs = Vec::new();
        let asks_for_age = self.sender.asks_for_age();
        for vcpu in &mut self.vcpus {
            vcpu.harvest(self.machine, |run, protect| {
                self.memory.harvest(run, protect);
                if asks_for_age {
                    runs.push(run);
                }
            });
        }
        for device in &mut self.devices {
            device.hand.entries.take(usize::MAX, |run, _| self.memory.drain(run));
        }
        self.sender.round_started(&self.memory, runs);
        self.begin_round();
    }

    fn begin_round(&mut self) {
        self.round = Round {
            start: self.now,
            pages: self.memory.unsent(),
            struck_off: 0,
            throttled: self.vcpus.iter().map(|vcpu| vcpu.throttled).collect(),
        };
        self.controller.round_started(self.clock(), pages(self.round.pages));
    }

    fn outcome_of_round(&self) -> RoundOutcome {
        let (dirty, logged) = self.memory.dirtied();
        let held = |(vcpu, before): &(&Vcpu, &f64)| vcpu.throttled > **before;
        RoundOutcome {
            pages_to_send: pages(self.round.pages),
            pages_sent: pages(self.round.pages - self.memory.unsent() - self.round.struck_off),
            dirtied: pages(dirty + logged),
            took: duration(self.now - self.round.start),
            throttled_vcpus: self.vcpus.iter().zip(&self.round.throttled).filter(held).count(),
        }
    }

    fn migrate(mut self, patience: f64) -> Simulated {
        let mut rounds = Vec::new();
        let mut left = Vec::new();
        let (mut predicted_after_round_1, mut hopeless_since_round) = (None, None);
        let (mut ended, mut gave_up, mut called_off) = (None, None, 0);
        let (mut downtime, mut limit) = (0.0, LimitKept::NeverTried);
        self.sender.round_started(&self.memory, Vec::new());
        self.begin_round();
        while self.now < patience && rounds.len() < ROUNDS_MAX {
            let interval = self.controller.next_sample().max(self.machine.sample_interval);
            self.step(interval.as_secs_f64().max(1e-5), true);
            if left.len() as f64 * Simulated::LEFT_EVERY.as_secs_f64() <= self.now {
                left.push((self.clock(), pages(self.memory.left())));
            }
            let over = self.memory.unsent() == 0 && self.pipe.is_empty();
            let action = self.look(over);
            self.listen(rounds.len() + 1);
            match action {
                Action::GiveUp(reached) => {
                    gave_up = Some(reached);
                    break;
                }
                Action::Continue if !over => continue,
                Action::Continue | Action::SwitchOver(_) => {}
            }
            rounds.push(self.outcome_of_round());
            if let Action::SwitchOver(why) = action {
                let most = self.controller.settings().limits.downtime_at(self.clock());
                let stood_still = self.stand_still(why, patience);
                if let Some(stood_still) = stood_still {
                    downtime = stood_still;
                    limit = limit_kept(duration(downtime), most, &self.events);
                    ended = Some(why);
                    break;
                }
                called_off += 1;
            } else {
                self.step(self.machine.round_overhead.as_secs_f64(), false);
            }
            self.start_round();
            self.listen(rounds.len());
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
        self.events.extend(self.controller.take_events());
        let pauses = self.pauses + downtime;
        let vcpu = |vcpu: &Vcpu| VcpuOutcome {
            throttled: duration(vcpu.throttled),
            longest_stall: duration(vcpu.longest_stall),
            lost: duration(vcpu.throttled + pauses + vcpu.faults),
        };
        Simulated {
            ended,
            gave_up,
            total: self.clock(),
            downtime: duration(downtime),
            limit,
            called_off,
            called_off_pauses: duration(self.pauses),
            bytes: whole(self.pipe.sent()),
            rounds,
            vcpus: self.vcpus.iter().map(vcpu).collect(),
            predicted_after_round_1,
            hopeless_since_round,
            said_not_to_end_since: self.said_since.and_then(|round| u32::try_from(round).ok()),
            events: self.events,
            left,
        }
    }

    /// Whether the controller says, in this round, that it will not end.
    fn listen(&mut self, round: usize) {
        let says = self.controller.prediction().is_some_and(|prediction| !prediction.converges);
        self.said_since = if says { self.said_since.or(Some(round)) } else { None };
    }

    /// Looks at everything that can be seen, tells the controller, and closes the gates that it wants closed.
    fn look(&mut self, round_is_over: bool) -> Action {
        let now = self.clock();
        if self.controller.strikes_off_redirtied() {
            self.strike_off();
        }
        let named = self.controller.settings().per_vcpu;
        let (dirty, logged) = self.memory.dirtied();
        let logged = if round_is_over || self.guest.devices_seen == Seen::AtLooks { logged } else { 0 };
        let mut samples = std::mem::take(&mut self.samples);
        samples.clear();
        samples.extend(self.vcpus.iter().map(|vcpu| VcpuSample {
            dirtied: if named { pages(vcpu.visible()) } else { Pages(0) },
            throttled: duration(vcpu.throttled),
        }));
        let seen = Observation {
            vcpus: &samples,
            others: pages(if named { logged } else { dirty + logged }),
            pages_done: pages(self.round.pages - self.memory.unsent()),
            pages_struck_off: pages(self.round.struck_off),
            besides: Pages(0),
            unprotected: Pages(0),
            link: self.pipe.sample(),
        };
        let action = if round_is_over {
            self.controller.round_ended(now, &seen)
        } else {
            self.controller.observed(now, &seen)
        };
        self.samples = samples;
        let kick = self.machine.kick.as_secs_f64();
        for (vcpu, gate) in self.vcpus.iter_mut().zip(self.controller.gates()) {
            vcpu.gate(gate, self.now, kick);
        }
        self.events.extend(self.controller.take_events());
        action
    }

    /// Pages that are seen to be dirty again need not be sent in this round.
    fn strike_off(&mut self) {
        let Self { vcpus, devices, memory, round, .. } = self;
        for vcpu in vcpus {
            let visible = vcpu.visible();
            vcpu.hand.entries.look(visible, |run| round.struck_off += memory.strike_off(run));
        }
        if self.guest.devices_seen == Seen::AtLooks {
            for device in devices {
                device.hand.entries.look(usize::MAX, |run| round.struck_off += memory.strike_off(run));
            }
        }
    }

    /// What watches a standstill that may be called off.
    fn guard(&self, why: Why) -> Option<Guard> {
        let may = why == Why::Fits && self.controller.may_call_off();
        let limit = self.controller.pause_limit(self.clock());
        let round_trip = self.pipe.sample().round_trip;
        let besides = round_trip * self.machine.switchover_round_trips;
        may.then(|| Guard::new(limit, besides, round_trip))
    }

    /// Stops the guest and sends what is left: how long it stood still, unless that is called off.
    fn stand_still(&mut self, why: Why, patience: f64) -> Option<f64> {
        self.step(self.machine.kick.as_secs_f64(), true);
        let stopped = self.now;
        self.pipe.stopped.get_or_insert(stopped);
        self.vcpus.iter_mut().for_each(Vcpu::exit);
        let left = self.memory.left();
        let check = self.controller.last_check(self.clock(), why, pages(left));
        self.events.extend(self.controller.take_events());
        self.now += self.machine.switchover.as_secs_f64();
        if check == LastCheck::CallOff {
            self.pauses += self.now - stopped;
            return None;
        }
        let mut guard = self.guard(why);
        let mut to_go = left;
        while to_go > 0 && self.now < patience * 2.0 {
            let rate = self.pipe.rate(self.now, false);
            let step = if rate > 0.0 { to_go as f64 * WIRE_PAGE_BYTES / rate } else { STANDSTILL_STEP_S };
            let step = step.clamp(1e-6, STANDSTILL_STEP_S);
            let room = self.pipe.room(self.now, step, false, WIRE_PAGE_BYTES).min(to_go);
            self.now += step;
            self.pipe.send(self.now, room, WIRE_PAGE_BYTES, room == to_go);
            to_go -= room;
            let for_now = duration(self.now - stopped);
            if let Some(too_long) = guard.as_mut().and_then(|guard| guard.look(for_now, pages(to_go).0)) {
                // What has been sent of them is sent again.
                self.controller.called_off(
                    self.clock(),
                    Pages(too_long.pages_left),
                    Pages(too_long.pages_fit),
                );
                self.events.extend(self.controller.take_events());
                self.pauses += self.now - stopped;
                return None;
            }
        }
        let round_trip = self.pipe.sample().round_trip * self.machine.switchover_round_trips;
        self.now += round_trip.as_secs_f64();
        Some(self.now - stopped)
    }
}

fn pages(pages: usize) -> Pages {
    Pages(u64::try_from(pages).unwrap_or(u64::MAX))
}
