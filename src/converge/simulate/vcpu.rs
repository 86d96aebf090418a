//! A vCPU: its hand, its ring, and the gate that it may have to wait at.

use super::guest::{Machine, Writer, in_memory};
use super::memory::{Memory, Side};
use super::pages::Run;
use super::writer::Hand;
use crate::converge::{GateState, Pages};

/// A vCPU, or a device, which has no gate.
#[derive(Clone, Debug)]
pub(super) struct Vcpu {
    pub hand: Hand,
    phase: Option<usize>,
    /// Of its entries, the last ones that nobody can see yet.
    hidden: usize,
    closed_from: f64,
    closed_until: f64,
    stall: f64,
    pub longest_stall: f64,
    pub throttled: f64,
    /// Time that it lost to faults.
    pub faults: f64,
}

impl Vcpu {
    /// One that has not run yet.
    pub fn new(side: Side, seed: usize) -> Self {
        Self {
            hand: Hand::new(side, seed),
            phase: None,
            hidden: 0,
            closed_from: 0.0,
            closed_until: 0.0,
            stall: 0.0,
            longest_stall: 0.0,
            throttled: 0.0,
            faults: 0.0,
        }
    }

    /// Entries that can be seen.
    pub fn visible(&self) -> usize {
        self.hand.entries.len() - self.hidden
    }

    /// It leaves the guest, which shows everything.
    pub fn exit(&mut self) {
        self.hidden = 0;
    }

    /// Its gate is to be so.
    pub fn gate(&mut self, gate: GateState, now: f64, kick: f64) {
        match gate {
            GateState::ClosedUntil(until) => {
                let until = until.as_secs_f64();
                let waits = self.closed_from <= now && now < self.closed_until;
                if !waits && until > self.closed_until {
                    self.closed_from = now + kick;
                }
                self.closed_until = self.closed_until.max(until);
            }
            GateState::Open => self.closed_until = self.closed_until.min(now),
        }
    }

    /// Runs from `from` for `step` seconds, the `number`th step of the simulation.
    pub fn run(&mut self, world: &World<'_>, memory: &mut Memory, from: f64, step: f64) {
        let closed = (self.closed_until.min(from + step) - self.closed_from.max(from)).clamp(0.0, step);
        if closed > 0.0 {
            self.exit();
            self.throttled += closed;
            self.stall += closed;
            self.longest_stall = self.longest_stall.max(self.stall);
        }
        if self.closed_until <= from + step {
            self.stall = 0.0;
        }
        let Some((index, phase)) = world.writer.phase(from) else { return };
        if self.phase != Some(index) {
            self.phase = Some(index);
            self.hand.go_to(world.places[index], phase.order);
        }
        if !phase.writes(from) || closed >= step {
            return;
        }
        let is_vcpu = world.side == Side::Vcpu;
        let costs = world.machine.costs(phase.writes_per_s, is_vcpu);
        let new = self.hand.write(memory, step - closed, costs, world.number, world.shared);
        if is_vcpu {
            self.faults += new as f64 * (costs.clean - costs.dirty);
            let buffer = in_memory(Pages(world.machine.held_back.into()));
            self.hidden = if buffer > 0 { (self.hidden + new) % buffer } else { 0 };
        }
    }

    /// A harvest takes what can be seen. Of what went through the ring, only what is still in it is protected.
    pub fn harvest(&mut self, machine: &Machine, mut taken: impl FnMut(Run, bool)) {
        let ring = in_memory(Pages(machine.ring_entries.into())).max(1);
        let visible = self.visible();
        // It was recycled whenever it was full.
        let recycled = if visible > ring { (visible - 1) / ring * ring } else { 0 };
        self.hand.entries.take(visible, |run, before| {
            let unprotected = recycled.saturating_sub(before).min(run.pages);
            if unprotected > 0 {
                taken(Run { pages: unprotected, ..run }, false);
            }
            if unprotected < run.pages {
                taken(Run { first: run.first + unprotected, pages: run.pages - unprotected, ..run }, true);
            }
        });
    }
}

/// What a vCPU finds around it in one step.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub machine: &'a Machine,
    pub writer: &'a Writer,
    pub places: &'a [(usize, usize)],
    pub side: Side,
    /// The number of the step.
    pub number: u32,
    /// Whether working sets overlap.
    pub shared: bool,
}
