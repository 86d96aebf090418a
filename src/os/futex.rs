//! Waiting on a word that another thread changes, and the clock that the waits are bounded by.
#![expect(unsafe_code, reason = "futexes have no interface in std that a signal can interrupt")]

use std::ptr;
use std::sync::atomic::AtomicU32;

/// `FUTEX_WAIT_BITSET` with this mask is woken by any `FUTEX_WAKE`.
const ANY: libc::c_int = -1;

/// Who waits on a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Waiters {
    /// Threads of this process.
    Ours,
    /// Threads of each process that maps the word.
    #[cfg_attr(
        not(feature = "offload"),
        expect(dead_code, reason = "memory is shared with an offload process only")
    )]
    Everybody,
}

impl Waiters {
    fn flag(self) -> libc::c_int {
        match self {
            Self::Ours => libc::FUTEX_PRIVATE_FLAG,
            Self::Everybody => 0,
        }
    }
}

/// Sleeps while `word` holds `expected`, until [`wake_all`], a signal, or `until_ns` by [`monotonic_ns`]. Why it
/// returns, the caller finds out by looking.
pub(crate) fn wait(word: &AtomicU32, waiters: Waiters, expected: u32, until_ns: u64) {
    let until = libc::timespec {
        // Both fit: the first is at most 2^64 / 10^9. The name of its type is deprecated on musl.
        tv_sec: (until_ns / 1_000_000_000).try_into().unwrap_or(0),
        tv_nsec: (until_ns % 1_000_000_000).try_into().unwrap_or(0),
    };
    // SAFETY:
    // * The futex word is an aligned, live `AtomicU32`; the kernel only reads it.
    // * `until` is a valid absolute time on CLOCK_MONOTONIC, which FUTEX_WAIT_BITSET takes without a flag.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | waiters.flag(),
            expected,
            &raw const until,
            ptr::null::<u32>(),
            ANY,
        );
    }
}

/// Wakes every thread that sleeps on `word`.
pub(crate) fn wake_all(word: &AtomicU32, waiters: Waiters) {
    // SAFETY: the futex word is an aligned, live `AtomicU32`, and the kernel only uses its address.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | waiters.flag(), libc::c_int::MAX);
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable; this clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // Since boot and below a second: neither is negative.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
