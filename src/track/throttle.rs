//! What a throttle holds of a vCPU: its gate, and not its ring, which is the business of the vCPU's own thread (`handle`).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use super::vcpu::Vcpu;

/// A vCPU's gate, for whoever throttles, and for a VMM that calls the vCPU out for good. Any thread may use it, several at once.
///
/// It says which vCPU it is of, and cannot enter the guest or recycle a ring: only the
/// [`VcpuHandle`](super::VcpuHandle) of the vCPU's thread does that.
///
/// ```compile_fail,E0599
/// # fn f(throttle: &ringferry::track::VcpuThrottle) {
/// throttle.ring_full().unwrap(); // on whose thread?
/// # }
/// ```
#[derive(Clone)]
pub struct VcpuThrottle {
    vcpu: Arc<Vcpu>,
}

impl VcpuThrottle {
    /// The longest that one closing may last: a vCPU that waits longer looks hung to its guest.
    pub const CLOSED_MAX: Duration = Gate::CLOSED_MAX;

    pub(super) fn new(vcpu: Arc<Vcpu>) -> Self {
        Self { vcpu }
    }

    /// The VMM's index of the vCPU: what [`attach_vcpu`](super::DirtyTracker::attach_vcpu) was given, and what
    /// `Vm::kick` takes. Not its place among the attached.
    pub fn index(&self) -> usize {
        self.vcpu.index
    }

    /// Keeps the vCPU out of the guest for `wait` from now, [`CLOSED_MAX`](Self::CLOSED_MAX) at most; what was set before no
    /// longer counts. A vCPU that is inside must be kicked to notice.
    pub fn close_for(&self, wait: Duration) {
        self.vcpu.gate.close_for(wait);
    }

    /// Keeps it out for `wait` as [`close_for`](Self::close_for) does, lets it run for `run` if it is
    /// [timed](super::VcpuHandle::time_with), and then keeps it out for `stall` unless something else is said before. Whether
    /// it waits at the gate: else it must be kicked.
    #[cfg(feature = "migrate")]
    pub(crate) fn close_and_time(&self, wait: Duration, run: Duration, stall: Duration) -> bool {
        self.vcpu.gate.close_and_time(wait, run, stall)
    }

    /// Whether the vCPU can time its own runs.
    #[cfg(feature = "migrate")]
    pub(crate) fn is_timed(&self) -> bool {
        self.vcpu.gate.is_timed()
    }

    /// How long it had a CPU in timed runs altogether.
    #[cfg(feature = "migrate")]
    pub(crate) fn ran(&self) -> Duration {
        self.vcpu.gate.ran()
    }

    /// Lets the vCPU into the guest at once.
    pub fn open(&self) {
        self.vcpu.gate.open();
    }

    /// How long the vCPU has waited altogether.
    pub fn throttled(&self) -> Duration {
        self.vcpu.gate.throttled()
    }

    /// Whether both are of the same attachment of the same vCPU: an index may be used again once its vCPU was detached.
    #[cfg(feature = "migrate")]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.vcpu, &other.vcpu)
    }
}

impl fmt::Debug for VcpuThrottle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VcpuThrottle(vCPU {})", self.index())
    }
}
