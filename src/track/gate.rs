//! The gate that a vCPU passes before each `KVM_RUN`, and that a throttle may close for a while.
//!
//! A gate does not know why or for how long a vCPU should wait: `converge` computes that. It promises that an
//! open gate costs one relaxed load, that a closed one opens by itself, and that every wait is counted.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::figures::Counter;
use crate::os::futex::{self, monotonic_ns};

/// A time that nobody waits for.
const LONG_PAST: u64 = 1;

/// What the vCPU thread should do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "an interrupted wait may mean that somebody kicked this vCPU: look why before running it"]
pub enum BeforeRun {
    /// Enter the guest.
    Run,
    /// The gate is still closed, but a signal came, or it was closed anew: look whether the VMM wants something of this
    /// vCPU, then call `before_run` again.
    Interrupted,
}

/// One vCPU's gate. Any thread may close and open it.
#[derive(Default, Debug)]
pub struct Gate {
    /// `CLOCK_MONOTONIC` in nanoseconds at which the gate opens by itself; 0 when it is open, and [`LONG_PAST`] when it
    /// is open and the next pass is to be counted.
    opens_at_ns: AtomicU64,
    /// The futex: changes when `opens_at_ns` does.
    changes: AtomicU32,
    throttled_ns: Counter,
    counted_passes: AtomicU64,
}

impl Gate {
    /// The longest that one closing may last: a vCPU that waits longer looks hung to its guest.
    pub const CLOSED_MAX: Duration = Duration::from_millis(10);

    /// Keeps the vCPU out of the guest for `wait` from now, 10 ms at most; what was set before no longer counts.
    /// A vCPU that is inside must be kicked to notice.
    pub fn close_for(&self, wait: Duration) {
        let wait_ns = u64::try_from(wait.min(Self::CLOSED_MAX).as_nanos()).unwrap_or(u64::MAX);
        self.set(monotonic_ns() + wait_ns);
    }

    /// Lets the vCPU into the guest at once.
    pub fn open(&self) {
        if self.opens_at_ns.load(Ordering::Relaxed) > LONG_PAST {
            self.set(0);
        }
    }

    /// How long vCPUs have waited here altogether.
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_ns.get())
    }

    pub(super) fn throttled_ns(&self) -> u64 {
        self.throttled_ns.get()
    }

    /// Passes counted so far; the next one will be.
    ///
    /// So a full ring learns whether its vCPU has been in `KVM_RUN` since it was full the last time, and an open gate
    /// costs one load all the same.
    pub(super) fn count_next_pass(&self) -> u64 {
        // If a throttle sets its own value over this, or this fails over a throttle's, the pass is counted too.
        let _ = self.opens_at_ns.compare_exchange(0, LONG_PAST, Ordering::Relaxed, Ordering::Relaxed);
        self.counted_passes.load(Ordering::Relaxed)
    }

    fn set(&self, opens_at_ns: u64) {
        self.opens_at_ns.store(opens_at_ns, Ordering::Relaxed);
        // Release, pairs with the acquire in `wait`: a vCPU that sees the new count sees the new time. One that does not see it
        // before waiting has its wait refused by the kernel, which compares the count under its own lock.
        self.changes.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.changes);
    }

    /// Waits until the gate is open, a signal comes, or the gate is closed anew.
    #[inline]
    pub(super) fn pass(&self) -> BeforeRun {
        // Relaxed: a vCPU that just misses a closing is kicked, and sees it the next time.
        if self.opens_at_ns.load(Ordering::Relaxed) == 0 {
            return BeforeRun::Run;
        }
        self.wait()
    }

    /// Sleeps once at most. A signal that comes a moment before the sleep does not end it; so every change has to, or a
    /// vCPU whose gate is closed anew before it opens would never look at why it was kicked.
    #[cold]
    fn wait(&self) -> BeforeRun {
        self.counted_passes.fetch_add(1, Ordering::Relaxed);
        let changes = self.changes.load(Ordering::Acquire);
        let opens_at_ns = self.opens_at_ns.load(Ordering::Relaxed);
        let came_ns = monotonic_ns();
        if self.has_opened(opens_at_ns, came_ns) {
            return BeforeRun::Run;
        }
        // Until the time, a change or a signal comes.
        futex::wait(&self.changes, changes, opens_at_ns);
        let now = monotonic_ns();
        self.throttled_ns.add(now - came_ns);
        let opened = self.has_opened(self.opens_at_ns.load(Ordering::Relaxed), now);
        if opened { BeforeRun::Run } else { BeforeRun::Interrupted }
    }

    fn has_opened(&self, opens_at_ns: u64, now_ns: u64) -> bool {
        let open = opens_at_ns <= now_ns;
        if open {
            // Nobody has closed it again since: the next pass costs one load. Else: they have, and it stays.
            let _ = self.opens_at_ns.compare_exchange(opens_at_ns, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        open
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn an_open_gate_is_passed_without_waiting() {
        let gate = Gate::default();
        assert_eq!(gate.pass(), BeforeRun::Run);
        assert_eq!(gate.throttled(), Duration::ZERO);
    }

    #[test]
    fn a_closed_gate_opens_by_itself_and_counts_the_wait() {
        let gate = Gate::default();
        gate.close_for(Duration::from_millis(3));
        assert_eq!(gate.pass(), BeforeRun::Run);
        assert!(gate.throttled() > Duration::ZERO);
        let once = gate.throttled();
        assert_eq!(gate.pass(), BeforeRun::Run);
        assert_eq!(gate.throttled(), once, "the second pass found it open");
    }

    #[test]
    fn no_closing_lasts_longer_than_its_bound() {
        let gate = Gate::default();
        gate.close_for(Duration::MAX);
        assert_eq!(gate.pass(), BeforeRun::Run);
    }

    #[test]
    fn a_wait_ends_even_if_the_gate_is_always_closed_anew() {
        let gate = Gate::default();
        let done = AtomicBool::new(false);
        gate.close_for(Gate::CLOSED_MAX);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    gate.close_for(Gate::CLOSED_MAX);
                    thread::sleep(Duration::from_micros(100));
                }
            });
            // Each of these would be the moment to look at a kick.
            for _ in 0..100 {
                let _ = gate.pass();
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(gate.throttled() > Duration::ZERO);
    }

    #[test]
    fn opening_wakes_a_waiting_vcpu() {
        let gate = Gate::default();
        gate.close_for(Gate::CLOSED_MAX);
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| gate.pass());
            gate.open();
            assert_eq!(vcpu.join().unwrap(), BeforeRun::Run);
        });
    }
}
