//! To copy or not to copy: which way of sending costs this thread less, for runs of this length, on this link.
//!
//! Zero-copy spares the copy and pays for pinning and for notifications, so it loses on short scattered runs and
//! wins on long ones; where the line is depends on the machine. So the thread's own CPU time per byte is
//! measured for both, by class of run length, and the cheaper one is used, with the other tried again now and
//! then. When the kernel reports that it copied after all (loopback, veth, a NIC without scatter-gather or
//! checksum offload), notifications are paid for nothing, and only a rare probe is sent that way.

use std::time::Duration;

use super::pacing::precise;

/// Classes of run length: 1, 2-3, 4-7, … pages, the last one from 1024 pages on.
const CLASSES: usize = CLASSES_MAX as usize + 1;
const CLASSES_MAX: u8 = 10;

/// Frames of each method in a class before they are compared.
const TRIALS: u32 = 8;
/// One frame in this many is sent by the method that looked more expensive.
const EXPLORE_EVERY: u32 = 64;
/// This many reports in a row that the kernel copied, and zero-copy is only probed.
const COPIED_IN_A_ROW: u32 = 8;
/// One frame in this many is such a probe.
const PROBE_EVERY: u32 = 1024;
/// Weight of the newest cost in its average.
const NEWEST: f64 = 1.0 / 16.0;

/// What the user wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum ZeroCopy {
    /// Whatever costs less CPU here, found out on the way.
    #[default]
    Auto,
    /// Always copy.
    Never,
    /// Always zero-copy, pages pinned for each send: for comparisons.
    Always,
    /// Always zero-copy, out of guest RAM that is registered (and with that populated) at the start, whatever
    /// [`register_memory`](super::SendOptions::register_memory) says: for comparisons, and for guests that are backed by
    /// pinned memory anyway.
    AlwaysRegistered,
}

/// What a frame costs by one method: CPU nanoseconds per byte, averaged.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    ns_per_byte: f64,
    trials: u32,
}

impl Cost {
    fn add(&mut self, cpu: Duration, bytes: u64) {
        let ns = cpu.as_secs_f64() * 1e9 / precise(bytes.max(1));
        self.trials = self.trials.saturating_add(1);
        // The first trial pays for cold caches and tables: the second replaces it.
        self.ns_per_byte =
            if self.trials <= 2 { ns } else { self.ns_per_byte + NEWEST * (ns - self.ns_per_byte) };
    }
}

/// The decision of one channel.
#[derive(Debug)]
pub(super) struct Policy {
    wish: ZeroCopy,
    refused: bool,
    copy: [Cost; CLASSES],
    zero_copy: [Cost; CLASSES],
    frames: u32,
    copied_in_a_row: u32,
    zero_copied: u64,
}

/// The class of a frame whose runs of data are `pages / runs` long on average.
pub(super) fn class_of(pages: u64, runs: usize) -> u8 {
    let mean = pages / (runs as u64).max(1);
    u8::try_from(mean.max(1).ilog2()).map_or(CLASSES_MAX, |class| class.min(CLASSES_MAX))
}

impl Policy {
    pub(super) fn new(wish: ZeroCopy) -> Self {
        Self {
            wish,
            refused: false,
            copy: [Cost::default(); CLASSES],
            zero_copy: [Cost::default(); CLASSES],
            frames: 0,
            copied_in_a_row: 0,
            zero_copied: 0,
        }
    }

    /// Whether the next frame, of this class, shall go zero-copy.
    pub(super) fn zero_copy(&mut self, class: u8) -> bool {
        self.frames = self.frames.wrapping_add(1);
        match self.wish {
            _ if self.refused => false,
            ZeroCopy::Never => false,
            ZeroCopy::Always | ZeroCopy::AlwaysRegistered => true,
            ZeroCopy::Auto if self.kernel_copies() => self.frames.is_multiple_of(PROBE_EVERY),
            ZeroCopy::Auto => {
                let class = usize::from(class).min(CLASSES - 1);
                let (copy, zero_copy) = (self.copy[class], self.zero_copy[class]);
                if zero_copy.trials < TRIALS || copy.trials < TRIALS {
                    return zero_copy.trials <= copy.trials;
                }
                let cheaper = zero_copy.ns_per_byte < copy.ns_per_byte;
                cheaper != self.frames.is_multiple_of(EXPLORE_EVERY)
            }
        }
    }

    /// A frame of this class went, and cost this thread `cpu`.
    pub(super) fn sent(&mut self, class: u8, zero_copy: bool, cpu: Duration, bytes: u64) {
        let costs = if zero_copy { &mut self.zero_copy } else { &mut self.copy };
        costs[usize::from(class).min(CLASSES - 1)].add(cpu, bytes);
    }

    /// The kernel's report about a zero-copy send.
    pub(super) fn reported(&mut self, copied: bool) {
        if copied {
            self.copied_in_a_row = self.copied_in_a_row.saturating_add(1);
        } else {
            self.copied_in_a_row = 0;
            self.zero_copied += 1;
        }
    }

    /// Zero-copy sends are refused here (`EOPNOTSUPP`, memlock): no more of them.
    pub(super) fn refused(&mut self) {
        self.refused = true;
    }

    /// Whether reports say that zero-copy is no such thing here.
    pub(super) fn kernel_copies(&self) -> bool {
        self.copied_in_a_row >= COPIED_IN_A_ROW
    }

    /// Whether registering guest RAM is worth its price: sends really are zero-copied.
    pub(super) fn pays_to_register(&self) -> bool {
        self.wish == ZeroCopy::AlwaysRegistered || (self.wish == ZeroCopy::Auto && self.zero_copied >= 32)
    }

    /// Whether pages are copied at the moment, by choice or by the kernel.
    pub(super) fn copies(&self) -> bool {
        self.refused || self.wish == ZeroCopy::Never || self.kernel_copies()
    }

    /// The shortest run, in pages, from which on zero-copy is used; `None` if it is not.
    pub(super) fn threshold_pages(&self) -> Option<u64> {
        if self.copies() {
            return None;
        }
        let wins = |class: &usize| {
            let (copy, zero_copy) = (self.copy[*class], self.zero_copy[*class]);
            zero_copy.trials >= TRIALS && copy.trials >= TRIALS && zero_copy.ns_per_byte < copy.ns_per_byte
        };
        (0..CLASSES).find(wins).map(|class| 1 << class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which copying costs `copy` ns a byte and zero-copy `pin` ns a run of `run_bytes`.
    fn share_of_zero_copy(policy: &mut Policy, run_pages: u64, pin_ns: u64, copied: bool) -> f64 {
        let class = class_of(run_pages * 100, 100);
        let bytes = run_pages * 4096;
        let mut zero_copies = 0.0;
        for _ in 0..4000 {
            let zero_copy = policy.zero_copy(class);
            let cost =
                if zero_copy { Duration::from_nanos(pin_ns) } else { Duration::from_nanos(bytes / 10) };
            policy.sent(class, zero_copy, cost, bytes);
            if zero_copy {
                zero_copies += 1.0;
                policy.reported(copied);
            }
        }
        zero_copies / 4000.0
    }

    #[test]
    fn short_runs_are_copied_and_long_ones_are_not_where_pinning_costs_as_much_as_three_pages_of_copy() {
        let mut policy = Policy::new(ZeroCopy::Auto);
        assert!(share_of_zero_copy(&mut policy, 1, 1300, false) < 0.03);
        assert!(share_of_zero_copy(&mut policy, 256, 1300, false) > 0.97);
        assert!(share_of_zero_copy(&mut policy, 8, 1300, false) > 0.97);
        assert_eq!(policy.threshold_pages(), Some(8));
    }

    #[test]
    fn where_the_kernel_copies_anyway_only_a_probe_in_a_thousand_pays_for_a_notification() {
        let mut policy = Policy::new(ZeroCopy::Auto);
        assert!(share_of_zero_copy(&mut policy, 256, 1, true) < 0.02);
        assert!(policy.kernel_copies() && policy.threshold_pages().is_none());
        // And it is found out when that changes.
        let share: f64 = (0..3).map(|_| share_of_zero_copy(&mut policy, 256, 1, false)).sum();
        assert!(share > 1.5, "{share}");
    }

    #[test]
    fn a_wish_is_a_wish_and_a_refusal_is_final() {
        let mut policy = Policy::new(ZeroCopy::Never);
        assert!(!policy.zero_copy(10));
        let mut policy = Policy::new(ZeroCopy::AlwaysRegistered);
        (0..100).for_each(|_| policy.reported(true));
        assert!(policy.zero_copy(0) && policy.pays_to_register());
        policy.refused();
        assert!(!policy.zero_copy(0));
    }
}
