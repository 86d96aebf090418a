//! A memory fence in every thread of the process at once.
#![expect(unsafe_code, reason = "membarrier is a bare system call")]

use std::io;

/// Commands of include/uapi/linux/membarrier.h.
const MEMBARRIER_CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

/// When this returns, each running thread of the process has passed a full memory fence, and each other thread
/// will or has: what it wrote before is visible here, or its next look at a flag sees what was stored here.
///
/// # Errors
///
/// The kernel's; seccomp may forbid the call.
pub(crate) fn every_thread_passes_a_fence() -> io::Result<()> {
    for command in [MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, MEMBARRIER_CMD_PRIVATE_EXPEDITED] {
        // SAFETY: a system call without pointers; registering twice is allowed.
        if unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
