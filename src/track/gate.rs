//! The gate that a vCPU passes before each `KVM_RUN`, and that a throttle may close for a while.
//!
//! A gate does not know why or for how long a vCPU should wait: `converge` computes that. It promises that an
//! open gate costs one relaxed load, that a closed one opens by itself, and that every wait is counted.

use std::sync::atomic::Ordering;
#[cfg(feature = "offload")]
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use super::lent_page::GateWords;
#[cfg(feature = "offload")]
use super::lent_page::LentGate;
use crate::os::futex::{self, Waiters, monotonic_ns};

/// `opens_at_ns` of an open gate.
const OPEN: u64 = 0;
/// A time that nobody waits for: the gate is open, and the next pass is to be counted.
const LONG_PAST: u64 = 1;
/// Another process has the gate: its words are in a lent page.
#[cfg(feature = "offload")]
const LENT: u64 = u64::MAX;

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

/// One vCPU's gate, which `throttle` gives out. Any thread may close and open it; while it is lent, any thread of the other process, too.
#[derive(Default, Debug)]
pub(super) struct Gate {
    words: GateWords,
    #[cfg(feature = "offload")]
    lent: RwLock<Option<LentGate>>,
}

impl Gate {
    /// The longest that one closing may last: a vCPU that waits longer looks hung to its guest.
    pub(super) const CLOSED_MAX: Duration = Duration::from_millis(10);

    /// Keeps the vCPU out of the guest for `wait` from now, 10 ms at most; what was set before no longer counts.
    /// A vCPU that is inside must be kicked to notice.
    pub(super) fn close_for(&self, wait: Duration) {
        let wait_ns = u64::try_from(wait.min(Self::CLOSED_MAX).as_nanos()).unwrap_or(u64::MAX);
        self.with(|words, waiters| words.set(monotonic_ns() + wait_ns, waiters));
    }

    /// Lets the vCPU into the guest at once.
    pub(super) fn open(&self) {
        self.with(|words, waiters| {
            if words.opens_at_ns.load(Ordering::Relaxed) > LONG_PAST {
                words.set(OPEN, waiters);
            }
        });
    }

    /// How long vCPUs have waited here altogether.
    pub(super) fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_ns())
    }

    pub(super) fn throttled_ns(&self) -> u64 {
        let ours = self.words.throttled_ns.load(Ordering::Relaxed);
        self.with(|words, waiters| match waiters {
            Waiters::Ours => ours,
            Waiters::Everybody => ours.saturating_add(words.throttled_ns.load(Ordering::Relaxed)),
        })
    }

    /// Passes counted so far; the next one will be.
    ///
    /// So a full ring learns whether its vCPU has been in `KVM_RUN` since it was full the last time, and an open gate
    /// costs one load all the same.
    pub(super) fn count_next_pass(&self) -> u64 {
        self.with(|words, _| {
            // If a throttle sets its own value over this, or this fails over a throttle's, the pass is counted too.
            let _ = words.opens_at_ns.compare_exchange(OPEN, LONG_PAST, Ordering::Relaxed, Ordering::Relaxed);
            words.counted_passes.load(Ordering::Relaxed)
        })
    }

    /// Waits until the gate is open, a signal comes, or the gate is closed anew.
    #[inline]
    pub(super) fn pass(&self) -> BeforeRun {
        // Relaxed: a vCPU that just misses a closing is kicked, and sees it the next time.
        if self.words.opens_at_ns.load(Ordering::Relaxed) == OPEN {
            return BeforeRun::Run;
        }
        self.pass_slowly()
    }

    #[cold]
    fn pass_slowly(&self) -> BeforeRun {
        self.with(|words, waiters| {
            if words.opens_at_ns.load(Ordering::Relaxed) == OPEN {
                BeforeRun::Run
            } else {
                words.wait(waiters)
            }
        })
    }

    /// Does something with the words, wherever they are.
    #[cfg(not(feature = "offload"))]
    fn with<T>(&self, act: impl FnOnce(&GateWords, Waiters) -> T) -> T {
        act(&self.words, Waiters::Ours)
    }

    /// Does something with the words, wherever they are.
    #[cfg(feature = "offload")]
    fn with<T>(&self, act: impl FnOnce(&GateWords, Waiters) -> T) -> T {
        // Acquire, pairs with the release in `lend`.
        if self.words.opens_at_ns.load(Ordering::Acquire) == LENT {
            // A clone, which counts and does not allocate: nobody waits at a gate with the lock.
            let lent = self.lent.read().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(lent) = lent {
                return act(lent.words(), Waiters::Everybody);
            }
        }
        act(&self.words, Waiters::Ours)
    }

    /// A gate whose words are in a page of another process.
    #[cfg(feature = "offload")]
    pub(super) fn borrowed(lent: LentGate) -> Self {
        let gate = Self::default();
        gate.lend(lent);
        gate
    }

    /// From now on the words in the page count. The gate is open there.
    #[cfg(feature = "offload")]
    pub(super) fn lend(&self, lent: LentGate) {
        *self.lent.write().unwrap_or_else(PoisonError::into_inner) = Some(lent);
        self.words.opens_at_ns.store(LENT, Ordering::Release);
        self.words.wake(Waiters::Ours);
    }

    /// The gate is open, and nobody but this process closes it again.
    #[cfg(feature = "offload")]
    pub(super) fn take_back(&self) {
        self.words.opens_at_ns.store(OPEN, Ordering::Release);
        let lent = self.lent.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(lent) = lent {
            let throttled_ns = lent.words().throttled_ns.load(Ordering::Relaxed);
            self.words.throttled_ns.fetch_add(throttled_ns, Ordering::Relaxed);
            // A vCPU that waits there goes on here.
            lent.words().set(OPEN, Waiters::Everybody);
        }
    }
}

impl GateWords {
    fn set(&self, opens_at_ns: u64, waiters: Waiters) {
        self.opens_at_ns.store(opens_at_ns, Ordering::Relaxed);
        self.wake(waiters);
    }

    fn wake(&self, waiters: Waiters) {
        // Release, pairs with the acquire in `wait`: a vCPU that sees the new count sees the new time. One that does not see it
        // before waiting has its wait refused by the kernel, which compares the count under its own lock.
        self.changes.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.changes, waiters);
    }

    /// Sleeps once at most. A signal that comes a moment before the sleep does not end it; so every change has to, or a
    /// vCPU whose gate is closed anew before it opens would never look at why it was kicked.
    fn wait(&self, waiters: Waiters) -> BeforeRun {
        self.counted_passes.fetch_add(1, Ordering::Relaxed);
        let changes = self.changes.load(Ordering::Acquire);
        let opens_at_ns = self.opens_at_ns.load(Ordering::Relaxed);
        let came_ns = monotonic_ns();
        if self.has_opened(opens_at_ns, came_ns) {
            return BeforeRun::Run;
        }
        // Until the time, a change or a signal comes. Whoever wrote the time, no closing lasts longer than its bound.
        let closed_max_ns = u64::try_from(Gate::CLOSED_MAX.as_nanos()).unwrap_or(u64::MAX);
        futex::wait(&self.changes, waiters, changes, opens_at_ns.min(came_ns.saturating_add(closed_max_ns)));
        let now = monotonic_ns();
        self.throttled_ns.fetch_add(now.saturating_sub(came_ns), Ordering::Relaxed);
        let opened = self.has_opened(self.opens_at_ns.load(Ordering::Relaxed), now);
        if opened { BeforeRun::Run } else { BeforeRun::Interrupted }
    }

    fn has_opened(&self, opens_at_ns: u64, now_ns: u64) -> bool {
        let open = opens_at_ns <= now_ns;
        if open {
            // Nobody has closed it again since: the next pass costs one load. Else: they have, and it stays.
            let _ =
                self.opens_at_ns.compare_exchange(opens_at_ns, OPEN, Ordering::Relaxed, Ordering::Relaxed);
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
