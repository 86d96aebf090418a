//! What a channel's link is given: frames of a few milliseconds, so that a slow link never sits on much, and no
//! more under way than its bandwidth-delay product needs.
//!
//! What is under way cannot be taken back: it delays whatever comes next, the switchover before all. Twice the round
//! trip is what the link itself needs. Beyond that, a slack of a few milliseconds covers the time until our thread and
//! the destination's have had their turn on their CPUs. How long that is differs with the machine and the hour, so
//! the slack is found out: it shrinks slowly as long as the link never runs dry, and grows at once when it did.

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::converge::bandwidth::{Bandwidth, Estimator};
use crate::layout::PAGE_SIZE;
use crate::transport::pacing::Pace;
use crate::transport::socket::{self, Buffer};

/// A frame holds what the link carries in this time, so that the channels end a round together.
const FRAME_TIME: Duration = Duration::from_millis(2);
const FRAME_PAGES_MIN: u64 = 4;
/// On a link that nothing is known about yet.
const FRAME_PAGES_UNSURE: u64 = 64;
/// Larger frames do not send faster, and leave the second-level cache between zero scan and copy.
const FRAME_PAGES_MAX: u64 = 128;

/// What may be unacknowledged at least on a link of which fewer than [`SURE_SAMPLES`] are known.
const WINDOW_BYTES_UNSURE: u64 = 1 << 20;
const SURE_SAMPLES: u64 = 10;
const WINDOW_BYTES_MIN: u64 = 64 << 10;
const WINDOW_BYTES_MAX: u64 = 128 << 20;

const SLACK_MIN: Duration = Duration::from_millis(5);
const SLACK_FIRST: Duration = Duration::from_millis(10);
const SLACK_MAX: Duration = Duration::from_millis(50);
/// It balances where the link runs dry once in some fifty times that the window was full.
const SLACK_GROWTH: f64 = 1.25;
const SLACK_DECAY: f64 = 1.0 - 1.0 / 256.0;

/// Beyond twice the round trip, what covers the time until our thread fills the socket's buffer again.
const BUFFER_SLACK: Duration = Duration::from_millis(1);

/// A sample of the bandwidth covers at least this: several round trips of any link that migrations run over.
const SAMPLE_S: f64 = 0.02;
/// What is older fades: a channel follows its link at once.
const MEMORY_S: f64 = 0.5;

/// What is known of a link, all of it from the kernel's own counts.
#[derive(Debug)]
pub(super) struct Link {
    begun: Instant,
    estimator: Estimator,
    min_rtt: Duration,
    /// From a frame's leaving to its acknowledgement, the shortest seen: where something that is no wire acknowledges bytes
    /// on the way, this is the round trip.
    min_frame_time: Option<Duration>,
    bytes_acked: u64,
    /// What the link holds under way, the largest seen.
    held_bytes: u32,
    slack: Duration,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            estimator: Estimator::new(SAMPLE_S, MEMORY_S),
            min_rtt: Duration::ZERO,
            min_frame_time: None,
            bytes_acked: 0,
            held_bytes: 0,
            slack: SLACK_FIRST,
        }
    }
}

impl Link {
    /// Whether it is time to [`sample`](Self::sample) again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.estimator.is_due(self.seconds(now))
    }

    fn seconds(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.begun).as_secs_f64()
    }

    /// Asks the kernel what arrived; `busy` if more is under way. The bytes that did since the last sample.
    pub(super) fn sample(&mut self, stream: &TcpStream, now: Instant, busy: bool) -> io::Result<u64> {
        let info = socket::tcp_info(stream)?;
        let arrived = info.bytes_acked.saturating_sub(self.bytes_acked);
        self.bytes_acked = info.bytes_acked;
        self.min_rtt = info.min_rtt;
        let now = self.seconds(now);
        if busy {
            self.estimator.observe(now, info.bytes_acked);
        } else {
            self.estimator.stop(now, info.bytes_acked);
        }
        Ok(arrived)
    }

    pub(super) fn bandwidth(&self) -> Bandwidth {
        self.estimator.bandwidth()
    }

    /// The link's own round trip, as far as known.
    pub(super) fn round_trip(&self) -> Duration {
        self.min_rtt
    }

    /// What the link holds under way, as far as known.
    pub(super) fn held_bytes(&self) -> u32 {
        self.held_bytes
    }

    /// Sees to it that the send buffer holds what the link does; the receive buffer follows by what frames say. Returns
    /// what to do if the system forbids it.
    pub(super) fn make_room(&mut self, stream: &TcpStream) -> io::Result<Option<String>> {
        let held = self.carries(self.min_rtt * 2 + BUFFER_SLACK).unwrap_or(0).min(socket::BUFFER_BYTES_MAX);
        let held = u32::try_from(held).unwrap_or(u32::MAX);
        // In steps, so that a wavering estimate does not cost a system call each time.
        if held <= self.held_bytes + self.held_bytes / 4 {
            return Ok(None);
        }
        self.held_bytes = held;
        let room = socket::make_room(stream, Buffer::Send, held.into())?;
        Ok(room.map(|room| {
            format!("the link holds {held} bytes, the send buffer {room}: raise net.core.wmem_max")
        }))
    }

    /// Pages for the next frame, under `pace`.
    pub(super) fn frame_pages(&self, pace: Pace) -> u64 {
        let pages_in = |bytes: u64| bytes / PAGE_SIZE as u64;
        let mut by_link = self.carries(FRAME_TIME).map_or(FRAME_PAGES_UNSURE, pages_in);
        let limit = match pace {
            Pace::Free => None,
            Pace::Lifted => {
                by_link = by_link.max(FRAME_PAGES_UNSURE);
                None
            }
            Pace::Limited(bytes_per_s) => Some(bytes_per_s.get()),
        };
        // A limit shall be smooth, whatever the link could swallow at once.
        let by_limit = limit.map_or(FRAME_PAGES_MAX, |bytes_per_s| pages_in(bytes_per_s / 200));
        by_link.min(by_limit).clamp(FRAME_PAGES_MIN, FRAME_PAGES_MAX)
    }

    /// Bytes that may be unacknowledged.
    pub(super) fn window_bytes(&self, pace: Pace) -> u64 {
        // What a limit lets through says nothing of what the link holds, and queues nowhere.
        let sure = self.estimator.bandwidth().samples >= SURE_SAMPLES && pace == Pace::Free;
        let min = if sure { WINDOW_BYTES_MIN } else { WINDOW_BYTES_UNSURE };
        let frame_time = self.min_frame_time.unwrap_or_default() * 2;
        self.carries((self.min_rtt * 2 + self.slack).max(frame_time))
            .unwrap_or(0)
            .clamp(min, WINDOW_BYTES_MAX)
    }

    /// The destination acknowledged a frame so long after it left.
    pub(super) fn acknowledged_after(&mut self, time: Duration) {
        self.min_frame_time = Some(self.min_frame_time.map_or(time, |shortest| shortest.min(time)));
    }

    /// The shortest such time; nothing before the first.
    pub(super) fn frame_time(&self) -> Duration {
        self.min_frame_time.unwrap_or_default()
    }

    /// The window was full, and when we polled, `left` bytes of it were still under way, in frames of
    /// `frame_bytes`.
    pub(super) fn emptied_to(&mut self, left: u64, frame_bytes: u64) {
        let dry = left <= self.carries(self.min_rtt).unwrap_or(0) + frame_bytes;
        let factor = if dry { SLACK_GROWTH } else { SLACK_DECAY };
        self.slack = self.slack.mul_f64(factor).clamp(SLACK_MIN, SLACK_MAX);
    }

    /// Bytes that the link carries in `time`, once it is known.
    fn carries(&self, time: Duration) -> Option<u64> {
        let bandwidth = self.estimator.bandwidth();
        let bytes = bandwidth.bytes_per_s * time.as_secs_f64();
        // A byte per nanosecond: `Duration` does what a cast would, without its traps.
        (bandwidth.samples > 0)
            .then(|| Duration::from_secs_f64(bytes.clamp(0.0, 1e12) * 1e-9).as_nanos())
            .and_then(|bytes| u64::try_from(bytes).ok())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    /// A link that was watched for half a second.
    fn link(bytes_per_s: u64, min_rtt: Duration) -> Link {
        let mut link = Link { min_rtt, ..Link::default() };
        for i in 0..20 {
            link.estimator.observe(0.025 * i as f64, bytes_per_s / 40 * i);
        }
        link
    }

    fn limited(bytes_per_s: u64) -> Pace {
        Pace::Limited(NonZeroU64::new(bytes_per_s).unwrap())
    }

    #[test]
    fn a_slow_link_gets_small_frames_and_little_under_way_and_a_fast_long_one_all_it_holds() {
        let ms = Duration::from_millis;
        assert_eq!(
            (Link::default().frame_pages(Pace::Free), Link::default().window_bytes(Pace::Free)),
            (64, 1 << 20)
        );
        let slow = link(1_250_000, ms(1));
        assert_eq!(
            (slow.frame_pages(Pace::Free), slow.window_bytes(Pace::Free)),
            (FRAME_PAGES_MIN, WINDOW_BYTES_MIN)
        );
        let gigabit = link(125_000_000, Duration::from_micros(200));
        assert_eq!(gigabit.frame_pages(Pace::Free), 61);
        assert!(
            (1_290_000..1_310_000).contains(&gigabit.window_bytes(Pace::Free)),
            "{}",
            gigabit.window_bytes(Pace::Free)
        );
        // 25 Gbit/s over 5 ms hold 15.6 MB; twice that, and 10 ms more.
        let long = link(3_125_000_000, ms(5));
        assert_eq!(long.frame_pages(Pace::Free), FRAME_PAGES_MAX);
        assert!(
            (62_000_000..63_000_000).contains(&long.window_bytes(Pace::Free)),
            "{}",
            long.window_bytes(Pace::Free)
        );
        // 100 MB/s: 5 ms of it, although the link would take more.
        assert_eq!(long.frame_pages(limited(100_000_000)), 122);
        assert_eq!(long.frame_pages(limited(1_000)), FRAME_PAGES_MIN);
        // What it learned under a limit is not what it goes by when the limit is lifted.
        assert_eq!((slow.frame_pages(Pace::Lifted), slow.window_bytes(Pace::Lifted)), (64, 1 << 20));
    }

    #[test]
    fn the_window_shrinks_to_milliseconds_while_the_link_stays_full_and_grows_when_it_ran_dry() {
        let mut link = link(100_000_000, Duration::from_micros(100));
        let frame = 200_000;
        (0..1000).for_each(|_| link.emptied_to(link.window_bytes(Pace::Free) - frame, frame));
        assert_eq!(link.window_bytes(Pace::Free), 520_000);
        (0..20).for_each(|_| link.emptied_to(0, frame));
        assert_eq!(link.window_bytes(Pace::Free), 5_020_000);
        // Dry once in a hundred times: that costs less than a longer queue would.
        for _ in 0..20 {
            (0..99).for_each(|_| link.emptied_to(link.window_bytes(Pace::Free) - frame, frame));
            link.emptied_to(0, frame);
        }
        assert!(link.window_bytes(Pace::Free) < 700_000, "{}", link.window_bytes(Pace::Free));
    }
}
