//! A submission and a completion queue, as one thread uses them for one connection.
//!
//! A [`Ring`] is made, used and dropped on one thread (single issuer, deferred task run: completions are worked
//! off inside our own waits, nowhere else).

use std::io;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};

use crate::transport::error::TransportError;

/// Waits that nothing else bounds end this often, to see that they were cancelled.
pub(in crate::transport) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Ends of rings: no operation is awaited longer than this after its connection was aborted, for none can last.
const DRAIN: Duration = Duration::from_secs(2);

/// Completions that wait for us at most, without the kernel's having to put them aside: a frame has three, and the
/// notifications of all that are unacknowledged may come at once.
const COMPLETIONS: u32 = 256;

/// Without `CAP_IPC_LOCK`, a ring's memory counts against `RLIMIT_MEMLOCK`, and so does for a moment that of a ring
/// that was just closed: the kernel releases it in the background. It is asked again this often.
const SETUP_RETRIES: u32 = 50;
const SETUP_PAUSE: Duration = Duration::from_millis(20);

/// A submission and a completion queue of this thread's own.
pub(super) struct Ring {
    pub(super) io: IoUring,
    /// Operations submitted whose last completion is outstanding, notifications not counted.
    pub(super) in_flight: u32,
}

impl Ring {
    pub(super) fn new(entries: u32) -> Result<Self, TransportError> {
        let setup = || {
            IoUring::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_cqsize(COMPLETIONS)
                .build(entries)
        };
        let mut ring = setup();
        for _ in 0..SETUP_RETRIES {
            match &ring {
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {}
                _ => break,
            }
            std::thread::sleep(SETUP_PAUSE);
            ring = setup();
        }
        let io = ring.map_err(|source| TransportError::Ring { what: "io_uring_setup", source })?;
        Ok(Self { io, in_flight: 0 })
    }

    /// Queues entries that belong together, so that one `io_uring_enter` takes them all.
    ///
    /// # Safety
    ///
    /// Everything that the entries point to stays valid, and what the kernel reads stays unchanged, until their
    /// completions arrived.
    pub(super) unsafe fn push(&mut self, entries: &[squeue::Entry]) -> io::Result<()> {
        let mut queue = self.io.submission();
        if queue.capacity() - queue.len() < entries.len() {
            drop(queue);
            self.io.submit()?;
            queue = self.io.submission();
        }
        // SAFETY: the caller's promise is what `push_multiple` asks for.
        let pushed = unsafe { queue.push_multiple(entries) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::StorageFull))?;
        self.in_flight += u32::try_from(entries.len()).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Submits what is queued.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self.io.submit() {
            Ok(_) => Ok(()),
            // The next `enter` takes them.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Submits what is queued and waits for a completion, at most `timeout`.
    pub(super) fn enter(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        match self.io.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout)) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Time is up, a signal came, or completions must be worked off first: the caller takes what there is.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Works off what comes back until no operation is in flight, to be called when the connection was aborted. False if the
    /// kernel keeps one all the same: what it was given then belongs to the kernel for good.
    ///
    /// Notifications are not awaited: they concern pages that the kernel itself holds.
    pub(super) fn drain(&mut self) -> bool {
        let deadline = Instant::now() + DRAIN;
        while self.completion().is_some() {}
        while self.in_flight > 0 && Instant::now() < deadline {
            if self.enter(POLL_INTERVAL).is_err() {
                break;
            }
            while self.completion().is_some() {}
        }
        if self.in_flight > 0 {
            tracing::error!(operations = self.in_flight, "io_uring keeps operations of an aborted socket");
        }
        self.in_flight == 0
    }

    /// The next completion that is already there.
    pub(super) fn completion(&mut self) -> Option<cqueue::Entry> {
        let entry = self.io.completion().next()?;
        if !cqueue::notif(entry.flags()) {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        Some(entry)
    }
}

/// The result of an operation: bytes, or the error.
pub(super) fn result_of(entry: &cqueue::Entry) -> io::Result<usize> {
    usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()))
}
