//! A short time slice for the thread that steers.
//!
//! Where vCPUs fill every CPU, the thread that looks at them waits for its turn: some milliseconds of the vCPUs' slice
//! each time that it wakes up, during which a vCPU that has to be held back dirties on. The scheduler (EEVDF, Linux 6.12)
//! lets a thread that asks for shorter slices run sooner, for no more CPU time in all. That needs no
//! privilege; older kernels take the wish and ignore it.
#![expect(unsafe_code, reason = "the scheduler's attributes have no safe interface")]

use std::marker::PhantomData;

/// The shortest slice that the kernel grants, in nanoseconds.
const SHORTEST_NS: u64 = 100_000;

/// Timers of a thread may come so much later, in nanoseconds; 50,000 unless it asks for less.
const TIMER_SLACK_NS: libc::c_ulong = 1_000;

/// While it lives, the thread that made it has the shortest slice, and timers that come in time.
#[derive(Debug)]
pub(crate) struct ShortSlice {
    before_ns: Option<u64>,
    /// It is this thread's: not to be dropped by another.
    _of_this_thread: PhantomData<*const ()>,
}

impl ShortSlice {
    /// Asks for it. A refusal (seccomp, a policy other than the usual one) changes nothing.
    pub(crate) fn for_this_thread() -> Self {
        set_timer_slack(TIMER_SLACK_NS);
        Self { before_ns: set(SHORTEST_NS), _of_this_thread: PhantomData }
    }
}

impl Drop for ShortSlice {
    fn drop(&mut self) {
        // 0 is back to what the thread began with.
        set_timer_slack(0);
        if let Some(before_ns) = self.before_ns {
            set(before_ns);
        }
    }
}

fn set_timer_slack(slack_ns: libc::c_ulong) {
    // SAFETY: a call without pointers, about this thread only; refused, it changes nothing.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, slack_ns) };
}

/// Sets this thread's slice and returns what it was; `None` if it could not be set.
fn set(slice_ns: u64) -> Option<u64> {
    // SAFETY: an all-zero `sched_attr` is a valid one, it holds integers only.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = u32::try_from(size_of::<libc::sched_attr>()).ok()?;
    // SAFETY: the kernel writes at most `size` bytes to a live value of that size.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got != 0 || attributes.sched_policy != libc::SCHED_OTHER.unsigned_abs() {
        return None;
    }
    let before_ns = attributes.sched_runtime;
    attributes.size = size;
    attributes.sched_runtime = slice_ns;
    // SAFETY: the kernel reads `size` bytes of a live value of that size.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    (set == 0).then_some(before_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_slice_ends_with_its_guard() {
        let before = set(SHORTEST_NS).expect("any thread may ask for a shorter slice");
        set(before);
        drop(ShortSlice::for_this_thread());
        assert_eq!(set(before), Some(before));
    }
}
