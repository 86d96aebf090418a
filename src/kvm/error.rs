//! What KVM refused, and what to do about it.

use std::fmt;
use std::io;

use crate::layout::SlotId;

/// Why something could not be had of KVM.
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
    /// This kernel has pages of another size than 4 KiB (arm64 with 16 or 64), in which KVM then tracks.
    PageSize {
        /// Their size.
        bytes: usize,
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
    /// The slot is not there (any more).
    SlotGone(SlotId),
    /// The slot is there, and KVM refuses to switch its logging (`EINVAL`): it is read-only, or KVM has it with another
    /// size, at another host address, or on guest_memfd.
    SlotDiffers(SlotId),
    /// Any other answer.
    Ioctl {
        /// Which call.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A descriptor that is no vCPU of this process was given for one.
    NotVcpu,
    /// A vCPU of another VM than those that were attached before.
    VcpuOfOtherVm,
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
            Self::PageSize { bytes } => write!(
                f,
                "this kernel's pages have {bytes} bytes, and dirty tracking here knows pages of 4096 only: a kernel with \
                 4 KiB pages is needed on this host"
            ),
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
            Self::SlotGone(slot) => write!(
                f,
                "KVM has no slot {slot:?}: call `remove_slot` before a slot is deleted, and `add_memory` after it was created"
            ),
            Self::SlotDiffers(slot) => write!(
                f,
                "KVM cannot switch dirty logging of {slot:?}: the slot is read-only or on guest_memfd, and is then left \
                 out of `add_memory`, or its size or host address is not what `add_memory` was told"
            ),
            Self::Ioctl { name, source } => write!(f, "{name}: {source}"),
            Self::NotVcpu => write!(
                f,
                "the descriptor is not a vCPU of this process: attach what KVM_CREATE_VCPU returned"
            ),
            Self::VcpuOfOtherVm => {
                write!(
                    f,
                    "the vCPU belongs to another VM than the one attached first: each VM has a tracker of its own"
                )
            }
            Self::Map(source) => write!(
                f,
                "the dirty ring of a vCPU cannot be mapped: {source} (is this a vCPU, created after the rings \
                 were enabled?)"
            ),
        }
    }
}

impl KvmError {
    /// Whether the kernel's answer to a call was `EINVAL`.
    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self, Self::Ioctl { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
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
