//! The timer with which a vCPU's thread ends its own runs, so that a gate closes in time however late the thread is that
//! throttles.
//!
//! Only the vCPU's thread uses it. Its words are atomics because the handle may be shared; they order nothing.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::os::futex::monotonic_ns;
use crate::os::timer::{ThreadTimer, thread_cpu_ns};

/// A stall that begins in the guest's kernel is put off for so long at a time, and no longer than this in all: about as
/// long as a lock of a kernel's is held.
const PUT_OFF_NS: u64 = 50_000;
const PUT_OFF_MAX_NS: u64 = 200_000;
/// A run of which the thread had a CPU for less than this share goes on.
const LEAST_SHARE: u64 = 2;

#[derive(Debug)]
pub(super) struct RunTimer {
    timer: ThreadTimer,
    /// By `monotonic_ns`; 0: no run is timed.
    ends_ns: AtomicU64,
    /// By `thread_cpu_ns`, when the run began.
    began_ns: AtomicU64,
    run_ns: AtomicU64,
    /// By `monotonic_ns`: until when a stall may be put off; 0: it has not been.
    put_off_until_ns: AtomicU64,
}

impl RunTimer {
    /// Of the calling thread.
    pub(super) fn new(signal: libc::c_int) -> io::Result<Self> {
        Ok(Self {
            timer: ThreadTimer::for_this_thread(signal)?,
            ends_ns: AtomicU64::new(0),
            began_ns: AtomicU64::new(0),
            run_ns: AtomicU64::new(0),
            put_off_until_ns: AtomicU64::new(0),
        })
    }

    /// The vCPU is about to enter the guest, for `run_ns`.
    pub(super) fn start(&self, run_ns: u64) {
        self.put_off_until_ns.store(0, Ordering::Relaxed);
        self.run_ns.store(run_ns, Ordering::Relaxed);
        self.began_ns.store(thread_cpu_ns(), Ordering::Relaxed);
        self.ring_in(run_ns);
    }

    fn ring_in(&self, ns: u64) {
        self.ends_ns.store(monotonic_ns().saturating_add(ns), Ordering::Relaxed);
        self.timer.start(Duration::from_nanos(ns));
    }

    /// How long the vCPU has run, if its run is over. One whose thread had to wait for a CPU goes on.
    pub(super) fn run_is_over(&self) -> Option<u64> {
        if monotonic_ns() < self.ends_ns.load(Ordering::Relaxed) {
            return None;
        }
        let run_ns = self.run_ns.load(Ordering::Relaxed);
        let ran_ns = thread_cpu_ns().saturating_sub(self.began_ns.load(Ordering::Relaxed));
        if ran_ns < run_ns / LEAST_SHARE {
            self.ring_in(run_ns - ran_ns);
            return None;
        }
        Some(ran_ns)
    }

    /// A stall is to begin in the guest's kernel: lets the vCPU run on for a moment, unless it was let for long enough.
    /// The second value says whether this is the first time.
    pub(super) fn puts_off(&self) -> Option<bool> {
        let now = monotonic_ns();
        let until = self.put_off_until_ns.load(Ordering::Relaxed);
        if until != 0 && now.saturating_add(PUT_OFF_NS / 2) > until {
            return None;
        }
        if until == 0 {
            self.put_off_until_ns.store(now.saturating_add(PUT_OFF_MAX_NS), Ordering::Relaxed);
        }
        self.ring_in(PUT_OFF_NS);
        Some(until == 0)
    }

    /// No run is timed.
    pub(super) fn stop(&self) {
        self.put_off_until_ns.store(0, Ordering::Relaxed);
        if self.ends_ns.swap(0, Ordering::Relaxed) != 0 {
            self.timer.stop();
        }
    }
}
