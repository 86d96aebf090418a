//! What is known of one vCPU, and what was decided for it.

use std::time::Duration;

use super::curve::Curve;
use super::throttle::{GateState, Quota, Throttle};
use super::units::{Pages, sane};

/// A vCPU that was held back for no more than this share of a round still teaches how fast it dirties.
const HARDLY_HELD: f64 = 0.1;
/// Weight of the newest overrun of a gate.
const NEWEST_OVERRUN: f64 = 0.05;
/// One overrun that is larger than so many usual ones is an accident, and counts no more than those.
const MOST_OVERRUN: f64 = 5.0;

/// What has been seen of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuSample {
    /// Different pages that it dirtied since the last recycle.
    pub dirtied: Pages,
    /// Time that it spent behind its closed gate, since the migration's start.
    pub throttled: Duration,
}

/// One vCPU's part in the current round.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Share {
    /// nᵢ: what it would dirty by the end of the round if nobody held it back.
    pub predicted: Pages,
    /// How it is held back, if it is.
    pub quota: Option<Quota>,
}

/// One vCPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vcpu {
    /// How fast it dirties.
    pub curve: Curve,
    /// Pages that it dirties between two stalls because closing its gate takes time, once measured.
    pub overrun: Option<f64>,
    /// How it is held back.
    pub throttle: Throttle,
    /// Where its gate is to be.
    pub gate: GateState,
    /// Its part in this round.
    pub share: Share,
    /// Pages counted since the last recycle.
    pub counted: Pages,
    /// Seconds behind its gate since the migration's start, as last seen, and when the round started.
    pub throttled_s: f64,
    throttled_at_start_s: Option<f64>,
}

/// What the round is like in which a vCPU is seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Seconds since the round started.
    pub elapsed_s: f64,
    /// Whether pages come with the vCPU that dirtied them.
    pub per_vcpu: bool,
    /// Pages are dirty that are not protected, and so cannot be seen to be dirtied again.
    pub unprotected: bool,
    /// Pages may be dirty that KVM has not told yet: that none are new says nothing.
    pub lags: bool,
}

impl Vcpu {
    /// Takes a sample. Returns how many seconds of the round it was not behind its gate.
    pub fn learn(&mut self, sample: &VcpuSample, seen: Seen) -> f64 {
        let throttled = sample.throttled.as_secs_f64();
        let before = self.throttled_s;
        // Of the time that it has been throttled before it is first seen in a round, this much can be of it.
        let at_start = *self
            .throttled_at_start_s
            .get_or_insert_with(|| (throttled - seen.elapsed_s).max(before.min(throttled)));
        self.throttled_s = throttled;
        let held_s = (throttled - at_start).max(0.0);
        let running_s = (seen.elapsed_s - held_s).max(0.0);
        if seen.per_vcpu {
            let is_news = !seen.lags || sample.dirtied > self.counted;
            self.counted = sample.dirtied;
            if !is_news {
                return running_s;
            }
            let by_time = matches!(self.share.quota, Some(Quota::Time(_) | Quota::QemuTime(_)));
            if seen.unprotected || (!by_time && held_s > seen.elapsed_s * HARDLY_HELD) {
                self.curve.observe_held(running_s, sample.dirtied.as_f64());
            } else {
                self.curve.observe(running_s, sample.dirtied.as_f64());
            }
        }
        running_s
    }

    /// A round starts: everything was recycled, and counts begin at 0.
    pub fn recycled(&mut self) {
        self.curve.recycled();
        self.throttle.recycled();
        self.counted = Pages(0);
        self.throttled_at_start_s = None;
    }

    /// Sets or lifts its quota.
    pub fn hold(&mut self, quota: Option<Quota>, now: Duration) {
        self.throttle.set(quota, now, self.counted);
        self.share.quota = quota;
    }

    /// Finds where its gate is to be. Closing a gate takes `gate_s`.
    pub fn poll(&mut self, now: Duration, longest_stall: Duration, gate_s: f64, after_a_stall: f64) {
        self.gate = self.throttle.poll(now, self.counted, longest_stall);
        if let Some(pages) = self.throttle.take_overrun() {
            let mean = self.overrun_in(gate_s, after_a_stall);
            let pages = pages.as_f64().min(MOST_OVERRUN * mean.max(1.0));
            self.overrun = Some(mean + NEWEST_OVERRUN * (pages - mean));
        }
    }

    /// Pages that it dirties between two stalls, measured, or expected of one that comes `after_a_stall`.
    pub fn overrun_in(&self, gate_s: f64, after_a_stall: f64) -> f64 {
        sane(self.overrun.unwrap_or_else(|| after_a_stall * self.curve.overrun_in(gate_s)))
    }
}
