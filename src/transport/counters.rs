//! What was sent, by whom: counters that any thread may read while the channels run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::channel_spec::ChannelSpec;
use crate::converge::bandwidth::Bandwidth;

/// A sum that one channel thread writes and anybody reads. Relaxed: each is a figure of its own, and no reader
/// concludes from one about another.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one channel did since it was first connected.
#[derive(Debug)]
pub(super) struct ChannelCounters {
    pub spec: ChannelSpec,
    pub connected: AtomicBool,
    pub pages_sent: Counter,
    pub zero_pages: Counter,
    pub pages_returned: Counter,
    pub bytes_sent: Counter,
    pub bytes_acknowledged: Counter,
    pub zero_copy_sends: Counter,
    pub copied_sends: Counter,
    pub reconnects: Counter,
    pub(super) bandwidth: Mutex<Bandwidth>,
    /// In microseconds; 0 while unknown.
    pub(super) round_trip_us: AtomicU64,
    pub(super) sending: Mutex<Sending>,
}

/// How a channel sends at the moment, and why not better.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Sending {
    /// Whether pages are copied, by our own choice or, as it reports, by the kernel.
    pub copies: bool,
    /// Runs of data from this many pages on go zero-copy, as far as has been measured.
    pub zero_copy_from_pages: Option<u64>,
    /// Bytes of guest RAM registered with the kernel.
    pub registered_bytes: u64,
    /// Why a better way was given up, in words.
    pub fallback: Option<String>,
    /// Bytes that may be under way, unacknowledged, at most: what the link needs to stay full, and what anything that
    /// comes next waits for.
    pub window_bytes: u64,
}

impl ChannelCounters {
    fn new(spec: ChannelSpec) -> Self {
        Self {
            spec,
            connected: AtomicBool::new(false),
            pages_sent: Counter::default(),
            zero_pages: Counter::default(),
            pages_returned: Counter::default(),
            bytes_sent: Counter::default(),
            bytes_acknowledged: Counter::default(),
            zero_copy_sends: Counter::default(),
            copied_sends: Counter::default(),
            reconnects: Counter::default(),
            bandwidth: Mutex::default(),
            round_trip_us: AtomicU64::new(0),
            sending: Mutex::default(),
        }
    }
}

/// One channel's figures at one moment.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ChannelSnapshot {
    /// Its place among the channels that the sender was given.
    pub index: usize,
    /// The channel.
    pub channel: ChannelSpec,
    /// Whether it has a connection.
    pub connected: bool,
    /// Figures since it was first connected.
    pub totals: Totals,
    /// What its link carries.
    pub bandwidth: Bandwidth,
    /// How it sends.
    pub sending: Sending,
}

/// Sums since some beginning, as every report has them. Pages count when the destination has them in place, bytes when our kernel has taken
/// them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Totals {
    /// Pages whose content arrived.
    pub pages_sent: u64,
    /// Pages that were zero, and cost no content.
    pub zero_pages: u64,
    /// Pages that were struck off their round before they were sent, because they were dirty again.
    pub pages_struck_off: u64,
    /// Pages that were on their way when a channel died, and were sent again by another.
    pub pages_returned: u64,
    /// Bytes of frames, headers counted.
    pub bytes_sent: u64,
    /// Frames whose pages the kernel sent without a copy, by its own report.
    pub zero_copy_sends: u64,
    /// Frames whose pages were copied: by choice, or by the kernel although asked not to.
    pub copied_sends: u64,
    /// Connections made after the first one.
    pub reconnects: u64,
}

impl Totals {
    /// What was added since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            pages_sent: self.pages_sent - earlier.pages_sent,
            zero_pages: self.zero_pages - earlier.zero_pages,
            pages_struck_off: self.pages_struck_off - earlier.pages_struck_off,
            pages_returned: self.pages_returned - earlier.pages_returned,
            bytes_sent: self.bytes_sent - earlier.bytes_sent,
            zero_copy_sends: self.zero_copy_sends - earlier.zero_copy_sends,
            copied_sends: self.copied_sends - earlier.copied_sends,
            reconnects: self.reconnects - earlier.reconnects,
        }
    }

    /// Both sums together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            pages_sent: self.pages_sent + other.pages_sent,
            zero_pages: self.zero_pages + other.zero_pages,
            pages_struck_off: self.pages_struck_off + other.pages_struck_off,
            pages_returned: self.pages_returned + other.pages_returned,
            bytes_sent: self.bytes_sent + other.bytes_sent,
            zero_copy_sends: self.zero_copy_sends + other.zero_copy_sends,
            copied_sends: self.copied_sends + other.copied_sends,
            reconnects: self.reconnects + other.reconnects,
        }
    }
}

/// The counters of all channels of a sender.
#[derive(Debug)]
pub struct SendCounters {
    pub(super) channels: Vec<ChannelCounters>,
    /// No channel's.
    pub(super) pages_struck_off: Counter,
    pub(super) losses: Mutex<Vec<ChannelLoss>>,
}

/// A connection that died, and what that cost.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ChannelLoss {
    /// Its place among the channels that the sender was given.
    pub index: usize,
    /// The channel.
    pub channel: ChannelSpec,
    /// When, after the sender connected.
    pub at: Duration,
    /// The round that was being sent.
    pub round: u32,
    /// Pages that were on their way and were sent again by others.
    pub pages_returned: u64,
    /// Why.
    pub reason: String,
}

/// Losses that are remembered one by one; a channel that comes and goes for ever must not fill memory.
const LOSSES_MAX: usize = 256;

impl SendCounters {
    pub(super) fn new(channels: &[ChannelSpec]) -> Self {
        Self {
            channels: channels.iter().cloned().map(ChannelCounters::new).collect(),
            pages_struck_off: Counter::default(),
            losses: Mutex::default(),
        }
    }

    pub(super) fn lost(&self, loss: ChannelLoss) {
        let mut losses = self.losses.lock();
        if losses.len() < LOSSES_MAX {
            losses.push(loss);
        }
    }

    /// The figures of each channel.
    pub fn channels(&self) -> Vec<ChannelSnapshot> {
        self.channels
            .iter()
            .enumerate()
            .map(|(index, channel)| ChannelSnapshot {
                index,
                channel: channel.spec.clone(),
                connected: channel.connected.load(Ordering::Relaxed),
                totals: Totals {
                    pages_sent: channel.pages_sent.get(),
                    zero_pages: channel.zero_pages.get(),
                    pages_struck_off: 0,
                    pages_returned: channel.pages_returned.get(),
                    bytes_sent: channel.bytes_sent.get(),
                    zero_copy_sends: channel.zero_copy_sends.get(),
                    copied_sends: channel.copied_sends.get(),
                    reconnects: channel.reconnects.get(),
                },
                bandwidth: *channel.bandwidth.lock(),
                sending: channel.sending.lock().clone(),
            })
            .collect()
    }

    /// The sums over all channels.
    pub fn totals(&self) -> Totals {
        let of_none = Totals { pages_struck_off: self.pages_struck_off.get(), ..Totals::default() };
        self.channels().iter().map(|channel| channel.totals).fold(of_none, Totals::plus)
    }

    /// Bytes that the destination's kernel acknowledged, over all channels: while it grows, the destination's host lives.
    pub fn bytes_acknowledged(&self) -> u64 {
        self.channels.iter().map(|channel| channel.bytes_acknowledged.get()).sum()
    }

    /// The shortest time from a frame's leaving to its acknowledgement, on the slowest of the links that are up; `None` before
    /// the first acknowledgement.
    pub fn round_trip(&self) -> Option<Duration> {
        let up = self.channels.iter().filter(|channel| channel.connected.load(Ordering::Relaxed));
        let longest = up.map(|channel| channel.round_trip_us.load(Ordering::Relaxed)).max()?;
        (longest > 0).then(|| Duration::from_micros(longest))
    }

    /// What the links that are up carry together. The channels send at the same time, so their rates add up.
    pub fn bandwidth(&self) -> Bandwidth {
        let channels = self.channels();
        let up = channels.iter().filter(|channel| channel.connected);
        up.map(|channel| channel.bandwidth).fold(Bandwidth::default(), Bandwidth::beside)
    }

    /// What the links of all channels but `own` carry together.
    pub(super) fn bandwidth_beside(&self, own: &ChannelCounters) -> Bandwidth {
        let others = self.channels.iter().filter(|channel| !std::ptr::eq(*channel, own));
        let up = others.filter(|channel| channel.connected.load(Ordering::Relaxed));
        up.map(|channel| *channel.bandwidth.lock()).fold(Bandwidth::default(), Bandwidth::beside)
    }

    /// The connections that died so far, in order.
    pub fn losses(&self) -> Vec<ChannelLoss> {
        self.losses.lock().clone()
    }
}
