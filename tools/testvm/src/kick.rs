//! Getting a vCPU out of `KVM_RUN`, without a race: a byte that the kernel looks at before it enters the guest,
//! and a signal for when it already has.
//!
//! The thread that kicks stores 1 in `immediate_exit`, then sends the signal. If the vCPU's thread has not entered
//! the kernel yet, the byte turns it back at the door; if it has, the signal interrupts it. Only the vCPU's own
//! thread clears the byte, and only on its way to look at what is wanted of it.
#![expect(unsafe_code, reason = "signals to threads, and a byte shared with the kernel")]

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use memmap2::{MmapOptions, MmapRaw};
use parking_lot::Mutex;

/// The way to one vCPU's thread.
#[derive(Debug)]
pub(crate) struct Kick {
    /// A mapping of the vCPU's `kvm_run` of our own, so that no reference into kvm-ioctls' mapping is aliased.
    run_page: MmapRaw,
    /// The thread while it lives.
    thread: Mutex<Option<Target>>,
}

#[derive(Debug)]
struct Target {
    pthread: libc::pthread_t,
    thread: Thread,
}

impl Kick {
    /// # Errors
    ///
    /// The kernel's, from mapping `kvm_run` or installing the handler of the signal.
    pub fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        install_handler()?;
        let run_page = MmapOptions::new().len(size_of::<kvm_run>()).map_raw(vcpu.as_raw_fd())?;
        Ok(Self { run_page, thread: Mutex::new(None) })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self.run_page.as_mut_ptr().wrapping_add(offset_of!(kvm_run, immediate_exit));
        // SAFETY:
        // * the mapping is as long as `kvm_run`, so the byte lies inside it, and it lives as long as `self`;
        // * the kernel reads the byte and nobody makes another reference to it.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// The calling thread runs the vCPU from now on.
    pub fn adopt(&self) {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY:
        // * `sigemptyset` initializes the set before it is used;
        // * `pthread_self` cannot fail, and names a thread that clears the field before it ends (`leave`).
        let pthread = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::pthread_self()
        };
        *self.thread.lock() = Some(Target { pthread, thread: thread::current() });
    }

    /// The calling thread, which runs the vCPU, is about to end.
    pub fn leave(&self) {
        *self.thread.lock() = None;
    }

    /// Forces the vCPU out of `KVM_RUN`, or out of [`idle`](Self::idle), now or at the next attempt to enter.
    pub fn kick(&self) {
        // SeqCst on both sides: what the kicker wants was stored before this, and the vCPU's thread clears the
        // byte before it looks at what is wanted (`acknowledge`). One of the two sees the other.
        self.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(target) = &*self.thread.lock() {
            target.thread.unpark();
            // SAFETY: the thread lives: it takes the lock that we hold before it ends.
            unsafe { libc::pthread_kill(target.pthread, signal()) };
        }
    }

    /// Whether a kick has come that is not acknowledged yet.
    pub fn is_pending(&self) -> bool {
        self.immediate_exit().load(Ordering::SeqCst) != 0
    }

    /// The vCPU's thread has seen the kick and will now look at what is wanted of it.
    pub fn acknowledge(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Sleeps on the vCPU's thread until `limit` is over or a kick comes.
    pub fn idle(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while !self.is_pending() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // An `unpark` between the look and the park makes the park return at once.
            thread::park_timeout(left);
        }
    }
}

/// The signal that ends `KVM_RUN`.
pub(crate) fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Once per process. Without a handler the signal would end the process; without `SA_RESTART` it ends the ioctl.
fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY:
        // * all-zero is a valid `sigaction`: no flags, an empty mask;
        // * the handler does nothing, so it is async-signal-safe.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) != 0
        };
        if failed { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) } else { Ok(()) }
    });
    installed.map_err(io::Error::from_raw_os_error)
}
