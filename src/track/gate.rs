//! The gate that a vCPU passes before each `KVM_RUN`, and that a throttle may close for a while.
//!
//! A gate does not know why or for how long a vCPU should wait: `converge` computes that. It promises that an
//! open gate costs one relaxed load, that a closed one opens by itself, and that every wait is counted.

#[cfg(feature = "offload")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
#[cfg(feature = "offload")]
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

#[cfg(feature = "offload")]
use super::lent_page::LentGate;
use super::lent_page::{GateWords, RunWords};
use super::run_timer::RunTimer;
use crate::os::futex::{self, Waiters, monotonic_ns};

/// `opens_at_ns` of an open gate.
const OPEN: u64 = 0;
/// A time that nobody waits for: the gate is open, and the next pass is to be counted.
const LONG_PAST: u64 = 1;
/// The gate is open until the vCPU's timer says that its run is over.
const TIMED_RUN: u64 = 2;
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

/// Where the guest is on a vCPU that has left it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestMode {
    /// Its kernel, which may hold a lock: CPL 0 to 2.
    Kernel,
    /// A program: CPL 3.
    User,
}

/// One vCPU's gate, which `throttle` gives out. Any thread may close and open it; while it is lent, any thread of the other process, too.
#[derive(Default, Debug)]
pub(super) struct Gate {
    words: GateWords,
    run: RunWords,
    #[cfg(feature = "offload")]
    lent: RwLock<Option<LentGate>>,
}

/// The words of a gate, wherever they are.
#[derive(Clone, Copy)]
struct Words<'w> {
    gate: &'w GateWords,
    run: &'w RunWords,
    waiters: Waiters,
}

/// Stalls of a vCPU, by where the guest was when they began.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Stalls {
    pub(super) in_user: u64,
    pub(super) in_kernel: u64,
    pub(super) anywhere: u64,
    pub(super) put_off: u64,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Gate {
    /// The longest that one closing may last: a vCPU that waits longer looks hung to its guest.
    pub(super) const CLOSED_MAX: Duration = Duration::from_millis(10);

    /// Keeps the vCPU out of the guest for `wait` from now, 10 ms at most; what was set before no longer counts.
    /// A vCPU that is inside must be kicked to notice.
    pub(super) fn close_for(&self, wait: Duration) {
        self.close(wait, None);
    }

    /// The same; and a vCPU that has a timer then runs for the first of two times, and waits for the second unless
    /// its gate is closed or opened anew before. Whether the vCPU waits at the gate, so that it need not be kicked.
    #[cfg_attr(not(feature = "migrate"), allow(dead_code, reason = "only a migration times runs"))]
    pub(super) fn close_and_time(&self, wait: Duration, run: Duration, stall: Duration) -> bool {
        self.close(wait, Some((run, stall)))
    }

    fn close(&self, wait: Duration, then: Option<(Duration, Duration)>) -> bool {
        let wait_ns = nanos(wait.min(Self::CLOSED_MAX));
        self.with(|words| {
            let (run, stall) = then.unwrap_or_default();
            words.run.stall_ns.store(nanos(stall.min(Self::CLOSED_MAX)), Ordering::Relaxed);
            words.run.run_ns.store(nanos(run), Ordering::Relaxed);
            words.set(monotonic_ns() + wait_ns);
            words.run.waits.load(Ordering::SeqCst) == 1
        })
    }

    /// Lets the vCPU into the guest at once.
    pub(super) fn open(&self) {
        self.with(|words| {
            if words.gate.opens_at_ns.load(Ordering::Relaxed) > LONG_PAST {
                words.run.run_ns.store(0, Ordering::Relaxed);
                // A vCPU whose run is timed stops its timer at the next pass.
                words.set(LONG_PAST);
            }
        });
    }

    /// How long vCPUs have waited here altogether.
    pub(super) fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_ns())
    }

    pub(super) fn throttled_ns(&self) -> u64 {
        self.sum(|words| words.gate.throttled_ns.load(Ordering::Relaxed))
    }

    /// How long the vCPU had a CPU in timed runs.
    #[cfg_attr(not(feature = "migrate"), allow(dead_code, reason = "only a migration times runs"))]
    pub(super) fn ran(&self) -> Duration {
        Duration::from_nanos(self.sum(|words| words.run.ran_ns.load(Ordering::Relaxed)))
    }

    pub(super) fn stalls(&self) -> Stalls {
        let sum = |count: fn(&RunWords) -> u64| self.sum(|words| count(words.run));
        Stalls {
            in_user: sum(|run| run.stalls_in_user.load(Ordering::Relaxed)),
            in_kernel: sum(|run| run.stalls_in_kernel.load(Ordering::Relaxed)),
            anywhere: sum(|run| run.stalls_anywhere.load(Ordering::Relaxed)),
            put_off: sum(|run| run.stalls_put_off.load(Ordering::Relaxed)),
        }
    }

    /// What was counted here and, while the gate is lent, there.
    fn sum(&self, count: impl Fn(Words<'_>) -> u64) -> u64 {
        let ours = count(self.ours());
        self.with(|words| match words.waiters {
            Waiters::Ours => ours,
            Waiters::Everybody => ours.saturating_add(count(words)),
        })
    }

    /// Whether the vCPU's thread has a timer.
    #[cfg_attr(not(feature = "migrate"), allow(dead_code, reason = "only a migration times runs"))]
    pub(super) fn is_timed(&self) -> bool {
        self.with(|words| words.run.timed.load(Ordering::Relaxed) == 1)
    }

    /// It has one.
    pub(super) fn set_timed(&self) {
        self.run.timed.store(1, Ordering::Relaxed);
        self.with(|words| words.run.timed.store(1, Ordering::Relaxed));
    }

    /// Passes counted so far; the next one will be.
    ///
    /// So a full ring learns whether its vCPU has been in `KVM_RUN` since it was full the last time, and an open gate
    /// costs one load all the same.
    pub(super) fn count_next_pass(&self) -> u64 {
        self.with(|Words { gate, .. }| {
            // If a throttle sets its own value over this, or this fails over a throttle's, the pass is counted too.
            let _ = gate.opens_at_ns.compare_exchange(OPEN, LONG_PAST, Ordering::Relaxed, Ordering::Relaxed);
            gate.counted_passes.load(Ordering::Relaxed)
        })
    }

    /// Waits until the gate is open, a signal comes, or the gate is closed anew. `mode` is asked when a stall is about to
    /// begin.
    #[inline]
    pub(super) fn pass(
        &self,
        timer: Option<&RunTimer>,
        mode: impl FnOnce() -> Option<GuestMode>,
    ) -> BeforeRun {
        // Relaxed: a vCPU that just misses a closing is kicked, and sees it the next time.
        if self.words.opens_at_ns.load(Ordering::Relaxed) == OPEN {
            return BeforeRun::Run;
        }
        self.pass_slowly(timer, mode)
    }

    #[cold]
    fn pass_slowly(&self, timer: Option<&RunTimer>, mode: impl FnOnce() -> Option<GuestMode>) -> BeforeRun {
        self.with(|words| {
            if words.gate.opens_at_ns.load(Ordering::Relaxed) == OPEN {
                BeforeRun::Run
            } else {
                words.pass(timer, mode)
            }
        })
    }

    fn ours(&self) -> Words<'_> {
        Words { gate: &self.words, run: &self.run, waiters: Waiters::Ours }
    }

    /// Does something with the words, wherever they are.
    #[cfg(not(feature = "offload"))]
    fn with<T>(&self, act: impl FnOnce(Words<'_>) -> T) -> T {
        act(self.ours())
    }

    /// Does something with the words, wherever they are.
    #[cfg(feature = "offload")]
    fn with<T>(&self, act: impl FnOnce(Words<'_>) -> T) -> T {
        // Acquire, pairs with the release in `lend`.
        if self.words.opens_at_ns.load(Ordering::Acquire) == LENT {
            // A clone, which counts and does not allocate: nobody waits at a gate with the lock.
            let lent = self.lent.read().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(lent) = lent {
                let (gate, run) = lent.words();
                return act(Words { gate, run, waiters: Waiters::Everybody });
            }
        }
        act(self.ours())
    }

    /// A gate whose words are in a page of another process.
    #[cfg(feature = "offload")]
    pub(super) fn borrowed(lent: LentGate) -> Self {
        let gate = Self::default();
        *gate.lent.write().unwrap_or_else(PoisonError::into_inner) = Some(lent);
        gate.words.opens_at_ns.store(LENT, Ordering::Release);
        gate
    }

    /// From now on the words in the page count. The gate is open there.
    #[cfg(feature = "offload")]
    pub(super) fn lend(&self, lent: LentGate) {
        let (there, run) = lent.words();
        run.timed.store(self.run.timed.load(Ordering::Relaxed), Ordering::Relaxed);
        // A vCPU whose run is timed stops its timer at the next pass.
        there.opens_at_ns.store(LONG_PAST, Ordering::Relaxed);
        *self.lent.write().unwrap_or_else(PoisonError::into_inner) = Some(lent);
        self.words.opens_at_ns.store(LENT, Ordering::Release);
        self.ours().wake();
    }

    /// The gate is open, and nobody but this process closes it again.
    #[cfg(feature = "offload")]
    pub(super) fn take_back(&self) {
        self.words.opens_at_ns.store(LONG_PAST, Ordering::Release);
        let lent = self.lent.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(lent) = lent {
            let (gate, run) = lent.words();
            let add = |ours: &AtomicU64, theirs: &AtomicU64| {
                ours.fetch_add(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
            };
            add(&self.words.throttled_ns, &gate.throttled_ns);
            add(&self.run.ran_ns, &run.ran_ns);
            add(&self.run.stalls_in_user, &run.stalls_in_user);
            add(&self.run.stalls_in_kernel, &run.stalls_in_kernel);
            add(&self.run.stalls_anywhere, &run.stalls_anywhere);
            add(&self.run.stalls_put_off, &run.stalls_put_off);
            // A vCPU that waits there goes on here.
            Words { gate, run, waiters: Waiters::Everybody }.set(OPEN);
        }
    }
}

impl Words<'_> {
    fn set(self, opens_at_ns: u64) {
        // SeqCst, as the load of `waits` that follows and their counterparts in `wait`: a vCPU that is not seen to wait
        // sees this time, or is kicked.
        self.gate.opens_at_ns.store(opens_at_ns, Ordering::SeqCst);
        self.wake();
    }

    fn wake(self) {
        // Release, pairs with the acquire in `wait`: a vCPU that sees the new count sees the new time. One that does not see it
        // before waiting has its wait refused by the kernel, which compares the count under its own lock.
        self.gate.changes.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.gate.changes, self.waiters);
    }

    fn pass(self, timer: Option<&RunTimer>, mode: impl FnOnce() -> Option<GuestMode>) -> BeforeRun {
        self.gate.counted_passes.fetch_add(1, Ordering::Relaxed);
        let changes = self.gate.changes.load(Ordering::Acquire);
        let mut opens_at_ns = self.gate.opens_at_ns.load(Ordering::Relaxed);
        if opens_at_ns == TIMED_RUN {
            let Some(ran_ns) = timer.map_or(Some(0), RunTimer::run_is_over) else {
                return BeforeRun::Run;
            };
            opens_at_ns = self.end_run(ran_ns);
        }
        let now_ns = monotonic_ns();
        if opens_at_ns <= now_ns {
            return self.enter(opens_at_ns, timer);
        }
        if self.run.waits.load(Ordering::Relaxed) == 0 {
            let mode = mode();
            if mode == Some(GuestMode::Kernel)
                && let Some(first) = timer.and_then(RunTimer::puts_off)
            {
                self.run.stalls_put_off.fetch_add(first.into(), Ordering::Relaxed);
                return BeforeRun::Run;
            }
            if let Some(timer) = timer {
                timer.stop();
            }
            let stalls = match mode {
                Some(GuestMode::User) => &self.run.stalls_in_user,
                Some(GuestMode::Kernel) => &self.run.stalls_in_kernel,
                None => &self.run.stalls_anywhere,
            };
            stalls.fetch_add(1, Ordering::Relaxed);
        }
        self.wait(changes, opens_at_ns, now_ns, timer)
    }

    /// The vCPU closes its own gate, unless somebody else has set it meanwhile. When it opens.
    fn end_run(self, ran_ns: u64) -> u64 {
        self.run.ran_ns.fetch_add(ran_ns, Ordering::Relaxed);
        let opens_at_ns = monotonic_ns().saturating_add(self.run.stall_ns.load(Ordering::Relaxed));
        let set = self.gate.opens_at_ns.compare_exchange(
            TIMED_RUN,
            opens_at_ns,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        set.map_or_else(|other| other, |_| opens_at_ns)
    }

    /// Sleeps once at most. A signal that comes a moment before the sleep does not end it; so every change has to, or a
    /// vCPU whose gate is closed anew before it opens would never look at why it was kicked.
    fn wait(self, changes: u32, opens_at_ns: u64, came_ns: u64, timer: Option<&RunTimer>) -> BeforeRun {
        self.run.waits.store(1, Ordering::SeqCst);
        // Until the time, a change or a signal comes. Whoever wrote the time, no closing lasts longer than its bound.
        let until_ns = opens_at_ns.min(came_ns.saturating_add(nanos(Gate::CLOSED_MAX)));
        futex::wait(&self.gate.changes, self.waiters, changes, until_ns);
        let now_ns = monotonic_ns();
        self.gate.throttled_ns.fetch_add(now_ns.saturating_sub(came_ns), Ordering::Relaxed);
        let opens_at_ns = self.gate.opens_at_ns.load(Ordering::Relaxed);
        if opens_at_ns > now_ns {
            return BeforeRun::Interrupted;
        }
        self.enter(opens_at_ns, timer)
    }

    /// The gate has opened, or was open.
    fn enter(self, opens_at_ns: u64, timer: Option<&RunTimer>) -> BeforeRun {
        let run_ns = self.run.run_ns.swap(0, Ordering::Relaxed);
        let timer_of_run = timer.filter(|_| run_ns > 0 && opens_at_ns > LONG_PAST);
        let open = if timer_of_run.is_some() { TIMED_RUN } else { OPEN };
        // Nobody has closed it again since: the next pass costs one load. Else: they have, and it stays.
        let _ =
            self.gate.opens_at_ns.compare_exchange(opens_at_ns, open, Ordering::Relaxed, Ordering::Relaxed);
        // SeqCst, see `set`: whoever closed the gate before this did not kick.
        if self.run.waits.swap(0, Ordering::SeqCst) == 1
            && self.gate.opens_at_ns.load(Ordering::SeqCst) > monotonic_ns()
        {
            self.run.run_ns.store(run_ns, Ordering::Relaxed);
            self.run.waits.store(1, Ordering::SeqCst);
            return BeforeRun::Interrupted;
        }
        match (timer_of_run, timer) {
            (Some(timer), _) => timer.start(run_ns),
            (None, Some(timer)) => timer.stop(),
            (None, None) => {}
        }
        BeforeRun::Run
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::os::timer;

    #[test]
    fn an_open_gate_is_passed_without_waiting() {
        let gate = Gate::default();
        assert_eq!(gate.pass(None, || None), BeforeRun::Run);
        assert_eq!(gate.throttled(), Duration::ZERO);
    }

    #[test]
    fn a_closed_gate_opens_by_itself_and_counts_the_wait() {
        let gate = Gate::default();
        gate.close_for(Duration::from_millis(3));
        assert_eq!(gate.pass(None, || None), BeforeRun::Run);
        assert!(gate.throttled() > Duration::ZERO);
        let once = gate.throttled();
        assert_eq!(gate.pass(None, || None), BeforeRun::Run);
        assert_eq!(gate.throttled(), once, "the second pass found it open");
    }

    #[test]
    fn no_closing_lasts_longer_than_its_bound() {
        let gate = Gate::default();
        gate.close_for(Duration::MAX);
        assert_eq!(gate.pass(None, || None), BeforeRun::Run);
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
                let _ = gate.pass(None, || None);
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
            let vcpu = scope.spawn(|| gate.pass(None, || None));
            gate.open();
            assert_eq!(vcpu.join().unwrap(), BeforeRun::Run);
        });
    }

    /// A vCPU in the guest, which comes out when its timer or somebody else sends it a signal, or after a second. Whether
    /// it was called out.
    fn run_guest() -> bool {
        !timer::sleep(Duration::from_secs(1))
    }

    fn timer() -> RunTimer {
        RunTimer::new(timer::test_signal()).unwrap()
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_vcpu_ends_its_own_run_and_closes_its_gate_once_though_nobody_comes() {
        let (gate, timer) = (Gate::default(), timer());
        gate.set_timed();
        gate.close_and_time(MS, MS, 3 * MS);
        assert_eq!(gate.pass(Some(&timer), || None), BeforeRun::Run);
        let throttled = gate.throttled();
        // A run whose thread had no CPU goes on.
        let began_ns = timer::thread_cpu_ns();
        while timer::thread_cpu_ns() < began_ns + 1_000_000 {
            std::hint::spin_loop();
        }
        assert_eq!(gate.pass(Some(&timer), || None), BeforeRun::Run, "it waited, and its gate has opened");
        assert!(gate.throttled() - throttled >= MS, "{:?}", gate.throttled() - throttled);
        assert!(gate.ran() >= MS / 2);
        assert_eq!(gate.stalls().anywhere, 2);
        assert_eq!(gate.pass(Some(&timer), || None), BeforeRun::Run);
        assert_eq!(gate.stalls().anywhere, 2, "nobody holds it back any more");
    }

    #[test]
    fn the_timer_calls_a_vcpu_out_of_its_guest() {
        let (gate, timer) = (Gate::default(), timer());
        gate.close_and_time(MS, MS, MS);
        assert_eq!(gate.pass(Some(&timer), || None), BeforeRun::Run);
        assert!(run_guest());
        gate.open();
        assert_eq!(gate.pass(Some(&timer), || None), BeforeRun::Run);
        // One signal may have been under way.
        run_guest();
        assert!(!run_guest(), "the timer of an open gate runs");
    }

    #[test]
    fn a_stall_is_put_off_in_the_kernel_for_a_moment_and_begins_in_user_mode_at_once() {
        let (gate, timer) = (Gate::default(), timer());
        let in_kernel = || Some(GuestMode::Kernel);
        gate.close_for(Gate::CLOSED_MAX);
        assert_eq!(gate.pass(Some(&timer), in_kernel), BeforeRun::Run);
        assert!(run_guest(), "nobody looks again");
        assert_eq!(gate.stalls(), Stalls { put_off: 1, ..Stalls::default() });
        while gate.stalls().in_user == 0 {
            gate.close_for(Gate::CLOSED_MAX);
            let _ = gate.pass(Some(&timer), || Some(GuestMode::User));
        }
        assert_eq!(gate.stalls(), Stalls { put_off: 1, in_user: 1, ..Stalls::default() });
        // A kernel that never leaves waits after all.
        while gate.stalls().in_kernel == 0 {
            gate.close_for(Gate::CLOSED_MAX);
            let _ = gate.pass(Some(&timer), in_kernel);
        }
        assert!(gate.stalls().put_off >= 2);
        // Without a timer nobody would look again.
        let (alone, put_off) = (Gate::default(), Stalls { in_kernel: 1, ..Stalls::default() });
        while alone.stalls().in_kernel == 0 {
            alone.close_for(MS);
            let _ = alone.pass(None, in_kernel);
        }
        assert_eq!(alone.stalls(), put_off);
    }

    #[test]
    fn whoever_closes_the_gate_of_a_vcpu_that_waits_need_not_kick_it() {
        let gate = Gate::default();
        assert!(!gate.close_and_time(Gate::CLOSED_MAX, MS, MS), "it may be inside");
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| while gate.pass(None, || None) == BeforeRun::Interrupted {});
            while !gate.close_and_time(Gate::CLOSED_MAX, MS, MS) {
                thread::yield_now();
            }
            gate.open();
            vcpu.join().unwrap();
        });
        assert!(!gate.close_and_time(MS, MS, MS), "it has gone in");
    }
}
