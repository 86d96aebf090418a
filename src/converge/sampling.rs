//! When to sample the vCPUs again, and how long closing a gate takes: a late sample closes it late.

use std::time::Duration;

use super::throttle::SHORTEST_RUN;
use super::vcpu::Vcpu;
use super::{GateState, Quota};

/// Time between two samples, and while vCPUs are held back by pages.
const INTERVAL: Duration = Duration::from_millis(1);
const INTERVAL_WHILE_BRAKING: Duration = Duration::from_micros(200);
/// And while one of them has come out of a stall and, as likely as not, has to go into the next one.
const INTERVAL_BETWEEN_STALLS: Duration = Duration::from_micros(100);
/// Weights of the newest sample if it came late, and if it came in time: a vCPU that is held back leaves a CPU to the
/// thread that samples.
const NEWEST_LATE: f64 = 0.02;
const NEWEST_IN_TIME: f64 = 0.06;
/// The longest time that closing a gate is believed to take. One sample counts no more than twice what is expected.
const LONGEST_GATE_S: f64 = 0.1;

/// When the last sample was taken, and how late samples are.
#[derive(Debug)]
pub(super) struct Sampling {
    gate_s: f64,
    last: Duration,
    due: Duration,
}

impl Sampling {
    /// None yet; closing a gate takes `gate_latency` until it is measured.
    pub(super) fn new(gate_latency: Duration) -> Self {
        Self { gate_s: gate_latency.as_secs_f64(), last: Duration::ZERO, due: Duration::MAX }
    }

    /// From a vCPU's overdraft to its gate being closed on it, as expected, in seconds.
    pub(super) fn gate_s(&self) -> f64 {
        self.gate_s
    }

    /// A round starts, after which the next sample is due as usual.
    pub(super) fn round_started(&mut self, now: Duration) {
        self.due = now + INTERVAL;
    }

    /// A sample is being taken. Closing a gate takes `gate_latency` where it begins in time.
    pub(super) fn begins(&mut self, now: Duration, gate_latency: Duration) {
        let late = now.saturating_sub(self.due).as_secs_f64().min(2.0 * self.gate_s).min(LONGEST_GATE_S);
        let gate = gate_latency.as_secs_f64() + late;
        let weight = if gate < self.gate_s { NEWEST_IN_TIME } else { NEWEST_LATE };
        self.gate_s += weight * (gate - self.gate_s);
    }

    /// It was taken, with these gates.
    pub(super) fn ends(&mut self, now: Duration, vcpus: &[Vcpu]) {
        self.last = now;
        self.due = now + self.next(vcpus);
    }

    /// How long to wait until the next one. While a vCPU is held back by pages, what it overdraws is what it dirties
    /// between two samples.
    pub(super) fn next(&self, vcpus: &[Vcpu]) -> Duration {
        let of_vcpu = |vcpu: &Vcpu| match (vcpu.share.quota, vcpu.gate) {
            (Some(Quota::Pages(_)), GateState::ClosedUntil(until)) => {
                until.saturating_sub(self.last) + SHORTEST_RUN
            }
            (Some(Quota::Pages(_)), GateState::Open) if vcpu.throttle.is_between_stalls(self.last) => {
                INTERVAL_BETWEEN_STALLS
            }
            (Some(Quota::Pages(_)), GateState::Open) => INTERVAL_WHILE_BRAKING,
            _ => INTERVAL,
        };
        vcpus.iter().map(of_vcpu).fold(INTERVAL, Duration::min)
    }
}
