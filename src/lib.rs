//! Ringferry follows KVM's per-vCPU dirty rings and ferries a running VM's memory to another host.
//!
//! Read the modules in the order in which a dirty page lives: [`kvm`] takes it out of the ring, [`track`] puts
//! it in a set and says who dirtied it, and with the feature `migrate` (on by default) `converge` decides who
//! must slow down, `page` what the page becomes, `wire` what the bytes mean, `transport` moves them, and
//! `source` and `destination` are the two state machines that tie this together.
//!
//! With default features off, only the tracking layer is compiled: that is what a VMM links that wants to
//! know its dirty pages and nothing else.
//!
//! # Linking the tracking layer
//!
//! Five places of a VMM are touched. It may use any version of kvm-ioctls and vm-memory, or none: the tracker takes descriptors,
//! numbers and addresses. Names that vm-memory has as well ([`GuestAddress`], [`GuestMemory`]) are best imported with a
//! path, `ringferry::GuestMemory`, or renamed.
//!
//! ```no_run
//! use std::os::fd::{AsRawFd, OwnedFd};
//!
//! use ringferry::kvm::RingSize;
//! use ringferry::track::{BeforeRun, DirtyTracker, KVM_EXIT_DIRTY_RING_FULL, Observed, VcpuHandle};
//! use ringferry::{GuestMemory, PageSet, SlotId, TrackError};
//!
//! struct Vmm {
//!     vm: OwnedFd,
//!     memory: GuestMemory,
//! }
//!
//! fn build(vmm: &Vmm) -> Result<DirtyTracker, TrackError> {
//!     // 1. After the VM, before the first vCPU: a ring for every vCPU to come.
//!     let tracker = DirtyTracker::enable(&vmm.vm, RingSize::for_working_set(64 << 20))?;
//!     // 2. Each memory slot, plugged ones too. Before one is deleted: `remove_slot`.
//!     tracker.add_memory(&vmm.memory)?;
//!     Ok(tracker)
//! }
//!
//! fn new_vcpu(tracker: &DirtyTracker, index: usize, vcpu: &impl AsRawFd) -> Result<VcpuHandle, TrackError> {
//!     // 3. Each vCPU, hot-plugged ones too: a handle for its thread.
//!     tracker.attach_vcpu(index, vcpu)
//! }
//!
//! fn run_once(handle: &VcpuHandle, kvm_run: impl FnOnce() -> u32) -> Result<(), TrackError> {
//!     // 4. Around KVM_RUN: one relaxed load before, and an answer to exit reason 31 after.
//!     if handle.before_run() == BeforeRun::Interrupted {
//!         return Ok(()); // look whether somebody wants this vCPU paused, then come again
//!     }
//!     if kvm_run() == KVM_EXIT_DIRTY_RING_FULL {
//!         handle.ring_full()?;
//!     }
//!     Ok(())
//! }
//!
//! fn migrate(vmm: &Vmm, tracker: &DirtyTracker) -> Result<(), TrackError> {
//!     // 5. Whoever wants dirty pages has a session. Others may have theirs meanwhile.
//!     let session = tracker.start()?;
//!     let mut dirty = PageSet::new(vmm.memory.end());
//!     session.harvest(&mut dirty)?;
//!     for run in dirty.runs() {
//!         println!("{} pages from {}", run.pages, run.first.address());
//!     }
//!     if let Observed::PerVcpu { vcpus, others } = session.observe()? {
//!         println!("dirtied since: {vcpus:?} by vCPUs, {others} by others");
//!     }
//!     let words: Vec<u64> = session.take_slot_bitmap(SlotId(0))?; // what KVM_GET_DIRTY_LOG said
//!     # let _ = words;
//!     Ok(())
//! }
//! ```
//!
//! `tools/example-vmm` is such a VMM as a whole, on kvm-ioctls and vm-memory.

pub mod kvm;
pub mod layout;
mod os;
pub mod page_set;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod track;
pub mod vm;

#[cfg(feature = "migrate")]
pub mod converge;
#[cfg(feature = "migrate")]
pub mod destination;
#[cfg(feature = "offload")]
pub mod offload;
#[cfg(feature = "migrate")]
pub mod page;
#[cfg(feature = "migrate")]
pub mod progress;
#[cfg(feature = "migrate")]
pub mod source;
#[cfg(feature = "migrate")]
pub mod transport;
#[cfg(feature = "migrate")]
pub mod wire;

pub use layout::{
    GuestAddress, GuestMemory, PAGE_SIZE, PageIndex, PageRun, RAM_END_MAX, Region, RegionKind, SlotId,
};
pub use page_set::{AtomicPageSet, PageSet};
pub use track::{DirtySource, Redirtied, TrackError};
pub use vm::{Paused, Quiesced, Settled, Vm};
