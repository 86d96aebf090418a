//! What a vCPU's thread holds: three calls around its `KVM_RUN`, none of which allocates.

use std::sync::Arc;

use super::error::TrackError;
use super::gate::BeforeRun;
use super::shared::Shared;
use super::vcpu::Vcpu;

/// The exit reason for a full dirty ring. Compare `kvm_run.exit_reason` itself: kvm-ioctls 0.25 reports it as
/// `VcpuExit::Unsupported(31)`, and a later version will name it.
pub const KVM_EXIT_DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// A vCPU's end of the tracker, for the vCPU's own thread: so it cannot be cloned, and it gives its gate to nobody. Whoever
/// throttles has a [`VcpuThrottle`](super::VcpuThrottle) of the tracker.
///
/// It shares no lock with the VMM and may live as long as it likes: what its ring still holds is harvested after the vCPU and
/// the handle are gone.
///
/// ```compile_fail,E0599
/// # fn f(handle: &ringferry::track::VcpuHandle) {
/// handle.close_for(std::time::Duration::from_millis(1)); // a vCPU does not hold itself back
/// # }
/// ```
#[derive(Debug)]
pub struct VcpuHandle {
    shared: Arc<Shared>,
    vcpu: Arc<Vcpu>,
}

impl VcpuHandle {
    pub(super) fn new(shared: Arc<Shared>, vcpu: Arc<Vcpu>) -> Self {
        Self { shared, vcpu }
    }

    /// Handles of all vCPUs, in the order of attachment: for the process that follows another one's rings, on one thread.
    #[cfg(feature = "offload")]
    pub(super) fn all(shared: &Arc<Shared>) -> Vec<Self> {
        shared.lock().vcpus.iter().map(|vcpu| Self::new(Arc::clone(shared), Arc::clone(vcpu))).collect()
    }

    /// The VMM's index of the vCPU: what [`attach_vcpu`](super::DirtyTracker::attach_vcpu) was given, and what
    /// `Vm::kick` takes. Not its place among the attached.
    pub fn index(&self) -> usize {
        self.vcpu.index
    }

    /// To be called before each `KVM_RUN`. One relaxed load when nobody throttles; else one futex wait of at most 10 ms.
    ///
    /// It is for throttling: a VMM that forgets it has vCPUs that a migration cannot hold back, and loses no page. It does not belong
    /// before a `KVM_RUN` with `immediate_exit` set, which only completes pending I/O: a closed gate would send that back as
    /// [`BeforeRun::Interrupted`], and the I/O would stay pending.
    ///
    /// A kick that calls a vCPU out for good (to pause or end it) ends the wait at once if it says so to the vCPU's
    /// thread first, then sends the signal, then [opens](super::VcpuThrottle::open) the gate.
    #[inline]
    pub fn before_run(&self) -> BeforeRun {
        self.vcpu.gate.pass()
    }

    /// To be called when `KVM_RUN` returned with [`KVM_EXIT_DIRTY_RING_FULL`]: recycles this vCPU's ring, here and
    /// now. Afterwards run the vCPU again; if it comes back at once, call again.
    ///
    /// # Errors
    ///
    /// What the kernel refused, or [`TrackError::RingLost`]. The vCPU cannot run on; nothing dirty is lost.
    pub fn ring_full(&self) -> Result<(), TrackError> {
        self.vcpu.counters.ring_full_exits.add(1);
        self.shared.ring_full(&self.vcpu)
    }
}
