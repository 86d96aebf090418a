//! A bare guest for tests, and signals to disturb it with.
#![expect(unsafe_code, reason = "signals and processes have no safe interface in libc")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]
#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]

use std::fs::OpenOptions;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use kvm_ioctls::Kvm;
use ringferry::{GuestMemory, PageRun};
pub use ringferry_testvm::bare::{BareVcpu, BareVm, CONTROL_PAGES, DATA, Exit, Pages, Privilege, Work};

/// `None` where there is no KVM to use: the test has then been noted as skipped.
pub fn kvm() -> Option<Kvm> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Some(Kvm::new().unwrap()),
        Err(error) => {
            ringferry_testvm::skip(&format!("/dev/kvm: {error}"));
            None
        }
    }
}

/// Tells other threads to stop, also when the test fails: else it would wait for them for ever.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The host takes these pages from the guest for a moment, as it does to move them: the next write is a fault again.
pub fn take_and_give_back(memory: &GuestMemory, run: PageRun) {
    for host in memory.host_runs(run).unwrap() {
        for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the memory stays where it is, holding what it holds, and nobody else writes it meanwhile.
            let failed = unsafe { libc::mprotect(host.host.cast(), host.len_bytes(), protection) };
            assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
        }
    }
}

/// A thread that can be kicked, from when it entered until it left.
#[derive(Default)]
pub struct Kickable(AtomicI32);

/// While this lives, its thread can be kicked.
#[must_use]
pub struct Inside<'a>(&'a Kickable);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// The signal that vCPU threads are kicked with does nothing but interrupt.
pub fn install_kick_handler() {
    let handler: extern "C" fn(libc::c_int) = ignore;
    // SAFETY: a zeroed sigaction with a handler that does nothing, which is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
}

impl Kickable {
    pub fn enter(&self) -> Inside<'_> {
        // SAFETY: no arguments, no memory.
        self.0.store(unsafe { libc::gettid() }, Ordering::Release);
        Inside(self)
    }

    /// Sends the signal, if the thread is there: whether it is.
    pub fn kick(&self) -> bool {
        let tid = self.0.load(Ordering::Acquire);
        if tid != 0 {
            // SAFETY: numbers only; a thread that is gone is an error that we ignore.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
        }
        tid != 0
    }
}

/// A process that stops and continues this one, a few hundred times a second.
pub struct Stopper {
    pid: libc::pid_t,
    ended: bool,
}

impl Stopper {
    pub fn stop_this_process_for(duration: Duration) -> Self {
        let stopped = libc::timespec { tv_sec: 0, tv_nsec: 200_000 };
        let running = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let times = duration.as_micros() / 1200;
        // SAFETY: the child only makes async-signal-safe calls, and ends with a continue and without unwinding.
        unsafe {
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                let parent = libc::getppid();
                for _ in 0..times {
                    libc::kill(parent, libc::SIGSTOP);
                    libc::nanosleep(&raw const stopped, std::ptr::null_mut());
                    libc::kill(parent, libc::SIGCONT);
                    libc::nanosleep(&raw const running, std::ptr::null_mut());
                }
                libc::_exit(0);
            }
            Self { pid, ended: false }
        }
    }

    fn wait(&mut self, flags: libc::c_int) -> bool {
        // SAFETY: our own child, waited for once.
        self.ended =
            self.ended || unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), flags) } == self.pid;
        self.ended
    }

    pub fn has_ended(&mut self) -> bool {
        self.wait(libc::WNOHANG)
    }
}

impl Drop for Stopper {
    fn drop(&mut self) {
        // Not killed: it might have stopped us a moment ago.
        self.wait(0);
    }
}
