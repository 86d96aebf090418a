//! The kernel's ABI and nothing else: the only ioctls, the only memory shared with KVM.
//!
//! `sys` issues the ioctls, [`caps`] asks what there is and switches it on, `ring` follows one vCPU's ring through
//! the memory it shares with the kernel, `log` gets and clears the bitmap of a slot. What the pages in them mean,
//! and when they may be read, is decided one floor up, in [`track`](crate::track).

pub mod caps;
pub(crate) mod log;
pub(crate) mod ring;
mod sys;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub use self::caps::{Capabilities, RingSize};
pub(crate) use self::sys::ResetCount;
use crate::layout::{Region, SlotId};

/// What KVM refused, and what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvmError {
    /// Not a possible ring size.
    RingSize {
        /// What was asked for.
        entries: u32,
    },
    /// This kernel has no dirty ring.
    RingUnsupported,
    /// This kernel's rings are smaller (`E2BIG`).
    RingTooLarge {
        /// What was asked for.
        entries: u32,
        /// What there is.
        entries_max: u32,
    },
    /// KVM answered `EINVAL` to a valid size: a vCPU exists already, or the rings are on already, or the host
    /// reserves more entries (PML) than this ring has.
    RingRefused {
        /// What was asked for.
        entries: u32,
    },
    /// KVM refused the bitmap beside the rings (arm64): a memory slot exists already.
    BitmapBesideRingRefused,
    /// This kernel cannot get the bitmap without clearing it.
    ManualProtectUnsupported,
    /// The bitmap of a VM was asked for whose rings are on (`ENXIO`).
    RingInUse,
    /// Any other answer.
    Ioctl {
        /// Which call.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The ring of a vCPU could not be mapped.
    Map(io::Error),
}

impl fmt::Display for KvmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RingSize { entries } => write!(
                f,
                "a dirty ring of {entries} entries was asked for: choose a power of two from 256 to 65536"
            ),
            Self::RingUnsupported => {
                write!(
                    f,
                    "KVM has no dirty ring here (Linux 5.11 or later on x86, 6.1 on arm64): use the bitmap"
                )
            }
            Self::RingTooLarge { entries, entries_max } => {
                write!(f, "a dirty ring of {entries} entries was asked for, KVM allows {entries_max} at most")
            }
            Self::RingRefused { entries } => write!(
                f,
                "KVM refused dirty rings of {entries} entries: they must be enabled once, before the first vCPU \
                 is created, with at least 1024 entries on hosts with PML"
            ),
            Self::BitmapBesideRingRefused => write!(
                f,
                "KVM refused the bitmap for pages that no vCPU dirties: on this architecture tracking must be enabled \
                 before the first memory slot is created"
            ),
            Self::ManualProtectUnsupported => {
                write!(f, "KVM cannot protect pages separately from getting the bitmap (Linux 5.0 or later)")
            }
            Self::RingInUse => {
                write!(f, "the VM has dirty rings, so KVM keeps no bitmap for it: use the ring")
            }
            Self::Ioctl { name, source } => write!(f, "{name}: {source}"),
            Self::Map(source) => write!(
                f,
                "the dirty ring of a vCPU cannot be mapped: {source} (is this a vCPU, created after the rings \
                 were enabled?)"
            ),
        }
    }
}

impl std::error::Error for KvmError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Ioctl { source, .. } | Self::Map(source) => Some(source),
            _ => None,
        }
    }
}

/// What tracking needs of a kernel: the real one is [`VmFd`], and tests have one that misbehaves on demand.
pub(crate) trait Kernel: Send + Sync + fmt::Debug {
    /// Resets every flagged entry of every ring and protects its page. An interrupted call counts fewer, and may
    /// have left unprotected the pages of the last ones that it counts.
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError>;

    /// Switches dirty logging of a slot on, which protects every page of it, or off.
    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError>;

    /// Fills `words` with the bitmap of a slot of `pages` pages, without clearing it.
    fn get_dirty_log(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError>;

    /// Clears the bits of `words` in the bitmap of a slot of `pages` pages and protects these pages.
    fn clear_dirty_log(&self, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError>;
}

/// Our own descriptor of the VMM's VM: the VM lives as long as we may ask something of it.
#[derive(Debug)]
pub(crate) struct VmFd(OwnedFd);

impl VmFd {
    pub(crate) fn duplicate(vm: &impl AsRawFd) -> Result<Self, KvmError> {
        sys::duplicate(vm.as_raw_fd()).map(Self).map_err(|source| KvmError::Ioctl { name: "fcntl", source })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Kernel for VmFd {
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError> {
        sys::reset_dirty_rings(self.as_fd())
            .map_err(|source| KvmError::Ioctl { name: "KVM_RESET_DIRTY_RINGS", source })
    }

    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError> {
        log::set_dirty_logging(self.as_fd(), region, enabled)
    }

    fn get_dirty_log(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError> {
        log::get(self.as_fd(), slot, pages, words)
    }

    fn clear_dirty_log(&self, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError> {
        log::clear(self.as_fd(), slot, pages, words)
    }
}
