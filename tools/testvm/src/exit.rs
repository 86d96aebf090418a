//! Exits of a vCPU after which it cannot run on, read from `kvm_run`.
#![expect(unsafe_code, reason = "kvm_run is a union whose valid member the exit reason names")]

use kvm_bindings::{KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SHUTDOWN};
use kvm_ioctls::VcpuFd;
use ringferry::track::GuestMode;

use crate::error::VcpuError;
use crate::workload::mailbox::KERNEL_MODE_FLAG;

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

/// Where the guest was when the vCPU left it. Our own guest runs at CPL 3 throughout, which is native everywhere, and marks
/// its kernel by a flag.
///
/// Two ioctls, made only when a stall is about to begin. A VMM that has its registers synced at each exit
/// (`KVM_CAP_SYNC_REGS`) finds both in `kvm_run`.
pub(crate) fn guest_mode(fd: &VcpuFd) -> GuestMode {
    let privileged = fd.get_sregs().is_ok_and(|sregs| sregs.cs.dpl < 3);
    if privileged || fd.get_regs().is_ok_and(|regs| regs.rflags & KERNEL_MODE_FLAG != 0) {
        GuestMode::Kernel
    } else {
        GuestMode::User
    }
}
