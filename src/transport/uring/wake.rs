//! Ends the wait of another thread in its ring.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// Something that a ring waits for beside its own operations, and that any thread may set off.
#[derive(Debug)]
pub(in crate::transport) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Ends the wait that goes on now, or the next one.
    pub(in crate::transport) fn wake(&self) {
        // A counter that is full wakes just as well.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes note of having been woken.
    pub(super) fn reset(&self) {
        // Nothing to read means that nobody called since.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
