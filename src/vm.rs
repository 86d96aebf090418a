//! The few things that only the VMM can do, and the proof that it has done the most important one.

use std::error::Error;

/// Why the VMM could not do what was asked; whatever error type it has, boxed.
pub type VmError = Box<dyn Error + Send + Sync>;

/// Proof that every vCPU of the VM is outside `KVM_RUN` and stays there.
///
/// A final harvest demands it: on hosts with PML, entries reach the ring only when a vCPU leaves guest mode,
/// so any earlier look can miss pages. It cannot be cloned; handing it to [`Vm::resume`] gives it up.
#[derive(Debug)]
#[must_use = "a paused VM stands still until the proof is handed to `Vm::resume`"]
pub struct Paused(());

impl Paused {
    /// The VMM declares that every vCPU is outside `KVM_RUN`, and that none enters it again while the value
    /// exists. A false declaration loses guest writes.
    pub fn declare_every_vcpu_is_outside_kvm_run() -> Self {
        Self(())
    }
}

/// What the migration asks of the VMM that owns the VM.
pub trait Vm: Send {
    /// Stops every vCPU and returns once all are outside `KVM_RUN`, throttled ones included.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM is then running, as before the call.
    fn pause(&mut self) -> Result<Paused, VmError>;

    /// Lets every vCPU run again.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM is then still paused.
    fn resume(&mut self, paused: Paused) -> Result<(), VmError>;

    /// Everything that the guest can observe besides RAM (vCPU and device state), in the VMM's own format.
    ///
    /// # Errors
    ///
    /// The VMM's own.
    fn save_state(&mut self, paused: &Paused) -> Result<Vec<u8>, VmError>;

    /// The inverse of [`save_state`](Self::save_state), at the destination, where RAM is already in place.
    ///
    /// # Errors
    ///
    /// The VMM's own: unknown format, missing feature, refused by the kernel.
    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError>;

    /// Forces vCPU `index` out of `KVM_RUN` soon, as an overdrawn throttle asks. Must not block.
    fn kick(&self, index: usize);
}
