//! Exits of a vCPU after which it cannot run on, read from `kvm_run`.
#![expect(unsafe_code, reason = "kvm_run is a union whose valid member the exit reason names")]

use kvm_bindings::{KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SHUTDOWN};
use kvm_ioctls::VcpuFd;

use crate::error::VcpuError;

/// Why the vCPU left the guest for good.
pub(crate) fn failure(fd: &mut VcpuFd) -> VcpuError {
    let rip = rip(fd);
    let run = fd.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_SHUTDOWN => VcpuError::Shutdown { rip },
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason says that the kernel filled this member.
            let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
            VcpuError::InternalError { suberror, rip }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says that the kernel filled this member.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            VcpuError::FailEntry { reason: entry.hardware_entry_failure_reason, cpu: entry.cpu }
        }
        reason => VcpuError::UnexpectedExit { reason, rip },
    }
}

/// The instruction pointer, or 0 if even that cannot be had.
pub(crate) fn rip(fd: &VcpuFd) -> u64 {
    fd.get_regs().map_or(0, |regs| regs.rip)
}
