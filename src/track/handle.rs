//! What a vCPU's thread holds: the calls around its `KVM_RUN`, none of which allocates.

use std::sync::{Arc, OnceLock};

use super::error::TrackError;
use super::gate::{BeforeRun, GuestMode};
use super::run_timer::RunTimer;
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
    timer: OnceLock<RunTimer>,
}

impl VcpuHandle {
    pub(super) fn new(shared: Arc<Shared>, vcpu: Arc<Vcpu>) -> Self {
        Self { shared, vcpu, timer: OnceLock::new() }
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

    /// To be called before each `KVM_RUN`. One relaxed load when nobody throttles; else one futex wait of at most 10 ms, and
    /// starting or stopping a timer if there is [one](Self::time_with).
    ///
    /// It is for throttling: a VMM that forgets it has vCPUs that a migration cannot hold back, and loses no page. It does not belong
    /// before a `KVM_RUN` with `immediate_exit` set, which only completes pending I/O: a closed gate would send that back as
    /// [`BeforeRun::Interrupted`], and the I/O would stay pending.
    ///
    /// A kick that calls a vCPU out for good (to pause or end it) ends the wait at once if it says so to the vCPU's
    /// thread first, then sends the signal, then [opens](super::VcpuThrottle::open) the gate.
    #[inline]
    pub fn before_run(&self) -> BeforeRun {
        self.vcpu.gate.pass(self.timer.get(), || None)
    }

    /// [`before_run`](Self::before_run) for a VMM that can say where the guest is. `mode` is asked only when a stall is about
    /// to begin.
    ///
    /// A stall that would begin in the guest's kernel, where it may hold a lock that other vCPUs spin on, is put off for
    /// 0.2 ms at most if this thread has a timer ([`time_with`](Self::time_with)): it begins as soon as the guest is seen in user
    /// mode. The figures tell how many began where.
    #[inline]
    pub fn before_run_in(&self, mode: impl FnOnce() -> GuestMode) -> BeforeRun {
        self.vcpu.gate.pass(self.timer.get(), || Some(mode()))
    }

    /// Lets a held-back vCPU end its own runs: once, on the vCPU's thread, which is to make all calls of
    /// [`before_run`](Self::before_run).
    ///
    /// From then on `before_run` starts a timer when it lets a held-back vCPU back into the guest, which sends `signal` to
    /// this thread when the vCPU has run for long enough. It must end `KVM_RUN` as the VMM's kicks do: the same signal will do.
    /// So what a vCPU dirties between two stalls no longer depends on when the thread that throttles gets a CPU. While nobody
    /// throttles, no timer runs.
    ///
    /// # Errors
    ///
    /// [`TrackError::Timer`]: the kernel has no such signal, or no timer left. The vCPU is held back as before.
    pub fn time_with(&self, signal: i32) -> Result<(), TrackError> {
        if self.timer.get().is_none() {
            let timer = RunTimer::new(signal).map_err(|source| TrackError::Timer { signal, source })?;
            // Whoever else was first, the timer is one of this thread's.
            let _ = self.timer.set(timer);
            self.vcpu.gate.set_timed();
        }
        Ok(())
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
