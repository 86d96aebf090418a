//! Raw system calls and nothing else: each file wraps one interface of the kernel in functions that are safe to call.
//!
//! A call belongs here if libc offers it as an unsafe function and no library that we link wraps it. Its numbers and
//! structs, with the kernel's header that they are from, stand beside it; what its answer means is for the caller
//! to say. The floor knows nobody above it, but for the size of a page. Not here: KVM's interface (`kvm::sys`, `kvm::ring`) and io_uring's
//! (`transport::uring`), which are memory shared with the kernel and not only calls.
#![cfg_attr(not(feature = "migrate"), allow(dead_code, reason = "tracking alone uses a part of the floor"))]

pub(crate) mod file;
pub(crate) mod futex;
pub(crate) mod membarrier;
pub(crate) mod memory;
pub(crate) mod pagemap;
pub(crate) mod sched;
pub(crate) mod shared;
#[cfg(feature = "migrate")]
pub(crate) mod tcp;
pub(crate) mod timer;
pub(crate) mod userfault;
