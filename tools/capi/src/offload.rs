//! A VMM in C lends its VM to a migration process beside it.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::ffi::c_char;

use ringferry::offload::{Ended, LentVm, Rings, lend};

use crate::callbacks::{CVm, VmCallbacks};
use crate::cancel::Cancel;
use crate::handle::{borrow, elements, out, text};
use crate::lent::{LentRegion, LentVcpu, own};
use crate::status::{Status, TEXT_BYTES, Text, done};
use crate::tracker::Tracker;

/// Bytes of the text in an rf_offload_outcome, its end mark included.
pub const RF_OFFLOAD_WHY_BYTES: usize = 512;

const _: () = assert!(RF_OFFLOAD_WHY_BYTES == TEXT_BYTES);

/// What a VMM lends.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LentParts {
    /// All of guest memory: `memory_count` elements.
    pub memory: *const LentRegion,
    /// See `memory`.
    pub memory_count: usize,
    /// Every vCPU that is attached to the tracker: `vcpu_count` elements.
    pub vcpus: *const LentVcpu,
    /// See `vcpus`.
    pub vcpu_count: usize,
    /// The VM's name among those of its owner; NULL if it has none.
    pub vm_id: *const c_char,
    /// What the destination's VMM has to know to build the VM: `description_bytes` bytes.
    pub description: *const u8,
    /// See `description`.
    pub description_bytes: usize,
    /// Not 0: the rings stay here, sessions run beside, slots and vCPUs come and go, and `vcpus` may be empty.
    pub keep_rings: u32,
}

/// Where a VM is when its offload process has done its work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub enum OffloadEnd {
    /// It runs on here; the migration failed.
    Stays = 0,
    /// The destination runs it. It stands still here, for good: free it.
    Moved = 1,
    /// It was handed over, and nobody knows whether the destination runs it. It stands still here until somebody has looked,
    /// and then there are two ways out: if it does not run there, let the vCPUs run again, as `resume` does; if it does,
    /// free the VM. A guess may leave two guests running, or none.
    Unconfirmed = 2,
}

/// How a migration has ended.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct OffloadOutcome {
    /// Where the VM is.
    pub end: OffloadEnd,
    /// Why, unless it moved.
    pub why: [c_char; RF_OFFLOAD_WHY_BYTES],
}

/// Lends a running VM to the offload process (`ringferry offload send`) that is connected on `connection`, a Unix socket of the
/// type SOCK_SEQPACKET, and serves it on this thread until the migration has ended. Any other thread goes on as before: the
/// vCPUs' threads call what they always call. Unless the rings are kept, the offload process follows them, and meanwhile no
/// session can be started, no slot and no vCPU comes or goes. They are kept on the bitmap, and while a session is open.
///
/// The library owns `connection` from the call on and closes it, also after an error. `vm` and `lent` are the VMM's again when
/// the call returns. Pass `sizeof *vm` as `vm_bytes`; `cancel` may be NULL.
///
/// RF_OK: `outcome` says where the VM is. After an error the VM runs here, tracking is the VMM's again, and `outcome` is not
/// written. Two errors are different: after RF_CALLBACK the guest stands still here, because `resume` failed; after
/// RF_INTERNAL it runs here unless `hand_over` was called. A frozen offload process keeps the rings until its socket ends.
///
/// Besides this thread, a second one serves resets while the call lasts. It calls nothing of the VMM's.
///
/// # Safety
///
/// `tracker` is a tracker or NULL. `connection` is negative or open. `vm`, what `lent` points to, and the functions of `vm` are
/// as described, or NULL. `cancel` is a cancel handle or NULL. `outcome` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_offload_lend(
    tracker: *const Tracker,
    connection: i32,
    vm: *const VmCallbacks,
    vm_bytes: usize,
    lent: *const LentParts,
    cancel: *const Cancel,
    outcome: *mut OffloadOutcome,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let connection = unsafe { own(connection) }?;
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        // SAFETY: the caller's promise.
        let mut vm = unsafe { CVm::new(vm, vm_bytes) }?;
        vm.can_send()?;
        // SAFETY: the caller's promise, of one element and of each array in it.
        let (parts, memory, vcpus) = unsafe {
            let parts = elements(lent, 1, "lent")?[0];
            let memory = elements(parts.memory, parts.memory_count, "lent->memory")?;
            let vcpus = elements(parts.vcpus, parts.vcpu_count, "lent->vcpus")?;
            let memory = memory.iter().map(|region| region.to_file()).collect::<Result<Vec<_>, _>>()?;
            let vcpus = vcpus.iter().map(|vcpu| vcpu.to_descriptor()).collect::<Result<Vec<_>, _>>()?;
            (parts, memory, vcpus)
        };
        // SAFETY: the caller's promise.
        let cancel = unsafe { Cancel::asked(cancel) }?;
        let outcome = out(outcome, "outcome")?;
        let lent = LentVm {
            tracker: &tracker.shared.tracker,
            rings: if parts.keep_rings != 0 { Rings::Keep } else { Rings::Lend },
            memory: &memory,
            vcpus: &vcpus,
            // SAFETY: the caller's promise.
            vm_id: unsafe { text(parts.vm_id, "lent->vm_id") }?,
            // SAFETY: the caller's promise.
            description: unsafe {
                elements(parts.description, parts.description_bytes, "lent->description")
            }?,
        };
        let (end, why) = match lend(connection, &mut vm, &lent, &cancel)? {
            Ended::Moved => (OffloadEnd::Moved, String::new()),
            Ended::StaysHere { why } => (OffloadEnd::Stays, why),
            // The proof is for Rust: C lets its VM run by its own means.
            Ended::Unconfirmed { why, .. } => (OffloadEnd::Unconfirmed, why),
        };
        let mut text = Text::new();
        text.set(format_args!("{why}"));
        // SAFETY: the caller's promise.
        unsafe {
            outcome.put(OffloadOutcome { end, why: text.bytes.map(|byte| c_char::from_ne_bytes([byte])) })
        };
        Ok(())
    })
}
