//! The link: how fast it is when, and what is on its way.

use std::collections::VecDeque;
use std::time::Duration;

use crate::converge::LinkSample;
use crate::converge::units::{sane, whole};

/// From `at` on, the link carries this share of its rate.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    /// Since the migration's start.
    pub at: Duration,
    /// `None`: for good.
    pub until: Option<Duration>,
    /// The share of the rate, that of other steps included.
    pub share: f64,
}

/// The link carries less once the guest was stopped for the first time.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cliff {
    /// So long after that.
    pub after: Duration,
    /// For so long.
    pub lasts: Duration,
    /// The share of the rate.
    pub share: f64,
}

/// A link.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Link {
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Its rate goes up and down by this share of itself, 0 to 1, as a wave of [`Link::RIPPLE`].
    pub ripple: f64,
    /// Nothing moves in these intervals.
    pub stalls: Vec<(Duration, Duration)>,
    /// When it carries less, or more.
    pub steps: Vec<Step>,
    /// What becomes of it when the guest stands still.
    pub cliff: Option<Cliff>,
    /// From sending a byte to its acknowledgement, queues not counted.
    pub round_trip: Duration,
    /// The user's limit for rounds (`max-bandwidth`), in bytes per second; the switchover is not held to it.
    pub max_bandwidth: Option<f64>,
}

impl Link {
    /// Length of the wave.
    pub const RIPPLE: Duration = Duration::from_millis(1700);

    /// A link that never varies.
    pub fn steady(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, ..Self::default() }
    }

    /// What it carries `at` seconds after the start; the guest was first stopped at `stopped`.
    pub(super) fn rate(&self, at: f64, stopped: Option<f64>) -> f64 {
        let within = |from: Duration, to: Duration| from.as_secs_f64() <= at && at < to.as_secs_f64();
        if self.stalls.iter().any(|(from, to)| within(*from, *to)) {
            return 0.0;
        }
        let mut share = 1.0;
        for step in &self.steps {
            if within(step.at, step.until.unwrap_or(Duration::MAX)) {
                share *= sane(step.share);
            }
        }
        if let (Some(cliff), Some(stopped)) = (self.cliff, stopped) {
            let since = at - stopped - cliff.after.as_secs_f64();
            if (0.0..cliff.lasts.as_secs_f64()).contains(&since) {
                share *= sane(cliff.share);
            }
        }
        let wave = if self.ripple > 0.0 {
            (at / Self::RIPPLE.as_secs_f64() * std::f64::consts::TAU).sin()
        } else {
            0.0
        };
        sane(self.bytes_per_s) * share * (1.0 + sane(self.ripple).min(1.0) * wave)
    }
}

/// What is on its way, and what has arrived.
#[derive(Debug)]
pub(super) struct Pipe<'a> {
    link: &'a Link,
    /// When the guest was first stopped.
    pub stopped: Option<f64>,
    /// When bytes are acknowledged, and how many by then.
    on_the_way: VecDeque<(f64, f64)>,
    sent: f64,
    acked: f64,
    /// What a page is short of, or over.
    credit: f64,
    /// The rate that was last seen to be one.
    unpaced: Option<f64>,
}

impl<'a> Pipe<'a> {
    /// Nothing is on its way.
    pub fn new(link: &'a Link) -> Self {
        let on_the_way = VecDeque::new();
        Self { link, stopped: None, on_the_way, sent: 0.0, acked: 0.0, credit: 0.0, unpaced: None }
    }

    /// Bytes per second that may be sent now.
    pub fn rate(&self, at: f64, paced: bool) -> f64 {
        let rate = self.link.rate(at, self.stopped);
        if paced { self.link.max_bandwidth.map_or(rate, |most| rate.min(sane(most))) } else { rate }
    }

    /// How many messages of `bytes` each fit into `step` seconds, with what was left of the steps before.
    pub fn room(&mut self, at: f64, step: f64, paced: bool, bytes: f64) -> usize {
        self.credit += self.rate(at, paced) * step;
        usize::try_from(whole(self.credit / bytes)).unwrap_or(usize::MAX)
    }

    /// So many of them were sent. Where there was nothing more to send, the rest of the room is gone.
    pub fn send(&mut self, at: f64, messages: usize, bytes: f64, nothing_more: bool) {
        let sent = messages as f64 * bytes;
        self.credit = if nothing_more { 0.0 } else { self.credit - sent };
        self.sent += sent;
        if messages > 0 {
            self.on_the_way.push_back((at + self.link.round_trip.as_secs_f64(), self.sent));
        }
    }

    /// Takes the acknowledgements that are there at `at`.
    pub fn arrive(&mut self, at: f64) {
        while let Some((_, bytes)) = self.on_the_way.front().filter(|(when, _)| *when <= at + 1e-9) {
            self.acked = *bytes;
            self.on_the_way.pop_front();
        }
        let rate = self.link.rate(at - self.link.round_trip.as_secs_f64(), self.stopped);
        if self.acked > 0.0 && rate > 0.0 {
            self.unpaced = Some(rate);
        }
    }

    /// Whether everything was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.on_the_way.is_empty()
    }

    /// All bytes sent.
    pub fn sent(&self) -> f64 {
        self.sent
    }

    /// What a source sees of it.
    pub fn sample(&self) -> LinkSample {
        LinkSample {
            bytes_acked: whole(self.acked),
            unpaced_bytes_per_s: self.unpaced.filter(|_| self.link.max_bandwidth.is_some()),
            round_trip: self.link.round_trip,
        }
    }
}
