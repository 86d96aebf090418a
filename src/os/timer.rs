//! A timer that sends its own thread a signal, and the time that the thread has run.
#![expect(unsafe_code, reason = "POSIX timers have no interface in std")]

use std::io;
use std::mem;
use std::ptr;
use std::time::Duration;

/// A timer of the thread that made it. The signal goes to that thread, whoever starts the timer.
#[derive(Debug)]
pub(crate) struct ThreadTimer(libc::timer_t);

// SAFETY: the id names a timer of the process, not of a thread, and each call on it is one atomic system call.
unsafe impl Send for ThreadTimer {}
// SAFETY: as above.
unsafe impl Sync for ThreadTimer {}

impl ThreadTimer {
    /// A stopped timer that will send `signal` to the calling thread.
    ///
    /// # Errors
    ///
    /// The kernel's: there is no such signal (`EINVAL`), or there are too many timers (`EAGAIN`).
    pub(crate) fn for_this_thread(signal: libc::c_int) -> io::Result<Self> {
        // SAFETY: an all-zero `sigevent` is a valid one, it holds integers and pointers that may be null.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: a call without arguments that cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: the event and the place for the id are live; the C library keeps neither.
        let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if made == 0 { Ok(Self(timer)) } else { Err(io::Error::last_os_error()) }
    }

    /// The signal comes once, after `wait`. What was set before no longer counts.
    pub(crate) fn start(&self, wait: Duration) {
        self.set(wait.max(Duration::from_nanos(1)));
    }

    /// No signal comes any more, but for one that is under way.
    pub(crate) fn stop(&self) {
        self.set(Duration::ZERO);
    }

    fn set(&self, wait: Duration) {
        let times = libc::itimerspec { it_interval: timespec(Duration::ZERO), it_value: timespec(wait) };
        // SAFETY: the timer lives as long as `self`, and the kernel only reads `times`, which are in range.
        unsafe { libc::timer_settime(self.0, 0, &raw const times, ptr::null_mut()) };
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `for_this_thread` and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs().try_into().unwrap_or(0), tv_nsec: time.subsec_nanos().into() }
}

/// How long the calling thread has had a CPU, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable; this clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    // Neither is negative.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// A signal that ends a sleep of a test, and does nothing else.
#[cfg(test)]
pub(crate) fn test_signal() -> libc::c_int {
    extern "C" fn handler(_: libc::c_int) {}
    let signal = libc::SIGRTMIN() + 9;
    // SAFETY: an all-zero `sigaction` is valid, and the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(signal, &raw const action, ptr::null_mut());
    }
    signal
}

/// Whether a sleep went on to its end, for tests.
#[cfg(test)]
pub(crate) fn sleep(time: Duration) -> bool {
    let time = timespec(time);
    // SAFETY: the time is live and in range, and nothing is written.
    unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_ends_one_sleep_of_its_thread_unless_it_is_stopped() {
        let timer = ThreadTimer::for_this_thread(test_signal()).unwrap();
        let ms = Duration::from_millis;
        timer.start(ms(1));
        assert!(!sleep(ms(10_000)));
        assert!(sleep(ms(5)));
        timer.start(ms(100));
        timer.stop();
        assert!(sleep(ms(200)));
        assert!(ThreadTimer::for_this_thread(-1).is_err());
    }
}
