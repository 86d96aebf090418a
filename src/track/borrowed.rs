//! The tracker in the process that follows another one's rings.
//!
//! It is the same tracker, on a kernel that is asked across a connection, with rings that are mapped from the VMM's vCPUs
//! and gates that both processes share.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::error::TrackError;
use super::gate::Gate;
use super::handle::VcpuHandle;
use super::lent_page::{LentGate, LentPage, bell, full_vcpus, has_room, show_life, wait_for_bell};
use super::rings::Rings;
use super::shared::Backend;
use super::throttle::VcpuThrottle;
use super::tracker::DirtyTracker;
use super::vcpu::Vcpu;
use crate::kvm::ring::DirtyRing;
use crate::kvm::{Kernel, KvmError, RingSize};
use crate::layout::GuestMemory;

/// A vCPU as its VMM lends it.
#[derive(Debug)]
pub(crate) struct BorrowedVcpu {
    /// The VMM's index.
    pub(crate) index: usize,
    pub(crate) fd: OwnedFd,
    /// How far its ring is taken.
    pub(crate) position: u32,
}

impl DirtyTracker {
    /// A tracker of the rings of `vcpus`, which are in the order of `page`.
    ///
    /// # Errors
    ///
    /// [`TrackError::Kvm`] for a descriptor that is no vCPU with such a ring, [`TrackError::VcpuKnown`] for an index that
    /// comes twice, [`TrackError::Layout`].
    pub(crate) fn borrowed(
        kernel: Box<dyn Kernel>,
        size: RingSize,
        memory: &GuestMemory,
        vcpus: &[BorrowedVcpu],
        page: &Arc<LentPage>,
    ) -> Result<Self, TrackError> {
        let tracker = Self::on(kernel, Backend::Ring { size, rings: Rings::default(), beside: None });
        tracker.add_memory(memory)?;
        let state = &mut *tracker.shared.lock();
        for (at, vcpu) in vcpus.iter().enumerate() {
            if state.vcpus.iter().any(|known| known.index == vcpu.index) {
                return Err(TrackError::VcpuKnown(vcpu.index));
            }
            let gate = LentGate::new(page, at).ok_or(TrackError::Kvm(KvmError::NotVcpu))?;
            let of_page = Arc::clone(page);
            // Release, pairs with the acquire of the VMM that takes the rings back.
            let publish = move |position| of_page[at].taken.store(position, Ordering::Release);
            let ring = DirtyRing::map_borrowed(&vcpu.fd, size, vcpu.position, publish)?;
            let known = Arc::new(Vcpu::borrowed(vcpu.index, Gate::borrowed(gate)));
            if let Backend::Ring { rings, .. } = &mut state.backend {
                rings.push(ring, Arc::clone(&known));
            }
            state.vcpus.push(known);
            state.pending.vcpu_attached();
        }
        Ok(tracker.clone())
    }

    /// What recycles the rings, on one thread of this process instead of the vCPUs' own.
    pub(crate) fn handles(&self) -> Vec<VcpuHandle> {
        VcpuHandle::all(&self.shared)
    }
}

/// The gate at a place of a page, of a vCPU whose ring its VMM follows. Where there is none, it holds back nobody.
pub(crate) fn borrowed_throttle(page: &Arc<LentPage>, index: usize, place: usize) -> VcpuThrottle {
    let gate = LentGate::new(page, place).map_or_else(Gate::default, Gate::borrowed);
    VcpuThrottle::new(Arc::new(Vcpu::borrowed(index, gate)))
}

/// How often the VMM is shown that this process lives.
const SHOW_LIFE_EVERY: Duration = Duration::from_millis(100);

/// Recycles the ring of each vCPU that waits for room, until `ends`: a thread of its own does that, as the vCPU's thread
/// does within one process. `look` is called at least every 100 ms.
pub(crate) fn serve_full_rings(
    page: &LentPage,
    vcpus: &[VcpuHandle],
    ends: &AtomicBool,
    mut look: impl FnMut(),
) {
    // Relaxed: a flag without data, read again soon.
    while !ends.load(Ordering::Relaxed) {
        show_life(page);
        look();
        let heard = bell(page);
        let full: Vec<usize> = full_vcpus(page).take(vcpus.len()).collect();
        for at in &full {
            if let Some(Err(error)) = vcpus.get(*at).map(VcpuHandle::ring_full) {
                tracing::warn!(vcpu = at, %error, "a full ring cannot be recycled");
            }
            has_room(page, *at);
        }
        if full.is_empty() {
            wait_for_bell(page, heard, SHOW_LIFE_EVERY);
        }
    }
}
