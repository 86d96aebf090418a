//! Ringferry follows KVM's per-vCPU dirty rings and ferries a running VM's memory to another host.
//!
//! Read the modules in the order in which a dirty page lives: [`kvm`] takes it out of the ring, [`track`] puts
//! it in a set and says who dirtied it, and with the feature `migrate` (on by default) `converge` decides who
//! must slow down, `page` what the page becomes, `wire` what the bytes mean, `transport` moves them, and
//! `source` and `destination` are the two state machines that tie this together.
//!
//! With default features off, only the tracking layer is compiled: that is what a VMM links that wants to
//! know its dirty pages and nothing else.

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

pub use layout::{GuestAddress, GuestMemory, PAGE_SIZE, PageIndex, PageRun, RAM_END_MAX, Region, SlotId};
pub use page_set::{AtomicPageSet, PageSet};
pub use track::{DirtySource, Redirtied, TrackError};
pub use vm::{Paused, Quiesced, Settled, Vm};
