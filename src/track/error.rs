//! Why tracking failed, and what to do about it.

use std::fmt;
use std::io;

use crate::kvm::KvmError;
use crate::layout::{LayoutError, PageIndex, SlotId};
use crate::os::userfault::Refused;
use crate::vm::VmError;

/// Why tracking failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrackError {
    /// KVM refused.
    Kvm(KvmError),
    /// The memory of ordinary threads cannot be tracked.
    Pagemap(PagemapError),
    /// Tracking was started twice; the first start stands.
    AlreadyTracking,
    /// The tracker was ended: nothing can be added or started any more.
    Ended,
    /// Another process follows the rings: nothing can be added, removed or started meanwhile. A VMM that wants to keeps them
    /// when it lends its VM.
    Lent,
    /// The VMM, which tracks for this process, could not.
    Vmm(VmError),
    /// Something was asked that only a started tracker can answer.
    NotTracking,
    /// A slot was added that the tracker has already.
    SlotKnown(SlotId),
    /// Memory was added whose pages or host memory another slot has.
    Layout(LayoutError),
    /// Memory on guest_memfd, whose writes nobody can log.
    Private(SlotId),
    /// A slot was named that the tracker does not have.
    SlotUnknown(SlotId),
    /// A vCPU was attached under an index that is taken.
    VcpuKnown(usize),
    /// No vCPU is attached under this index: it never was, or it was detached.
    VcpuUnknown(usize),
    /// The caller's set ends before guest RAM does; nothing was harvested.
    SetTooSmall {
        /// Where the set ends.
        capacity: PageIndex,
        /// Where guest RAM ends.
        needed: PageIndex,
    },
    /// A source of dirty pages outside KVM cannot log.
    External {
        /// Which: [`ExternalSource::name`](super::ExternalSource::name).
        name: &'static str,
        /// Why.
        source: VmError,
    },
    /// A vCPU's thread cannot have a timer.
    Timer {
        /// What it was to send.
        signal: i32,
        /// Why not.
        source: io::Error,
    },
    /// The ring of this vCPU overflowed and could not be brought in step with KVM again. The vCPU will exit with
    /// "ring full" for ever: stop tracking and stop the vCPU.
    RingLost(usize),
}

impl fmt::Display for TrackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm(error) => error.fmt(f),
            Self::Pagemap(error) => error.fmt(f),
            Self::AlreadyTracking => {
                write!(
                    f,
                    "dirty tracking is on already: another migration or snapshot uses it; stop that first"
                )
            }
            Self::Ended => write!(f, "dirty tracking of this VM was ended for good"),
            Self::Lent => write!(
                f,
                "another process migrates this VM and follows its rings: wait until it is done, or end it; a VMM that has \
                 other use for them meanwhile lends the VM and keeps its rings"
            ),
            Self::Vmm(error) => write!(f, "the VMM could not track for the migration: {error}"),
            Self::NotTracking => write!(f, "dirty tracking is off: call `start` first"),
            Self::SlotKnown(slot) => write!(f, "{slot:?} is tracked already: remove it before it is reused"),
            Self::Layout(error) => {
                write!(f, "{error}: remove what was there from the tracker before its place is used again")
            }
            Self::Private(slot) => write!(
                f,
                "{slot:?} is on guest_memfd, and KVM logs no writes to it: a guest with private memory cannot be tracked"
            ),
            Self::SlotUnknown(slot) => write!(f, "{slot:?} is not tracked: add its memory first"),
            Self::VcpuUnknown(index) => write!(f, "no vCPU with index {index} is attached: attach it first"),
            Self::VcpuKnown(index) => write!(f, "a vCPU with index {index} is attached already"),
            Self::SetTooSmall { capacity, needed } => write!(
                f,
                "the page set ends at {}, guest RAM at {}: create it with `GuestMemory::end`",
                capacity.address(),
                needed.address()
            ),
            Self::External { name, source } => {
                write!(
                    f,
                    "the writes of {name} cannot be logged: {source}; without its log, pages would be lost"
                )
            }
            Self::Timer { signal, source } => write!(
                f,
                "no timer that sends signal {signal}: {source}; name the signal that kicks vCPUs, and raise the limit of \
                 pending signals (ulimit -i) if there are too many"
            ),
            Self::RingLost(vcpu) => write!(
                f,
                "the dirty ring of vCPU {vcpu} overflowed and is out of step with KVM: stop tracking and restart \
                 the VM, no page was reported clean"
            ),
        }
    }
}

impl std::error::Error for TrackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Kvm(error) => Some(error),
            Self::Pagemap(error) => Some(error),
            Self::Layout(error) => Some(error),
            Self::External { source, .. } | Self::Vmm(source) => Some(&**source),
            Self::Timer { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<PagemapError> for TrackError {
    fn from(error: PagemapError) -> Self {
        Self::Pagemap(error)
    }
}

impl From<LayoutError> for TrackError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl From<KvmError> for TrackError {
    fn from(error: KvmError) -> Self {
        Self::Kvm(error)
    }
}

/// Why memory cannot be tracked by `pagemap`.
#[derive(Debug)]
#[non_exhaustive]
pub enum PagemapError {
    /// `/proc/self/pagemap` cannot be opened.
    NoPagemap(io::Error),
    /// Neither userfaultfd(2), in the mode that needs no privilege, nor `/dev/userfaultfd` gave a descriptor.
    NoUserfaultfd(io::Error),
    /// This kernel's userfaultfd has no asynchronous write protection.
    NoAsyncWriteProtection(io::Error),
    /// The memory behind this slot cannot be write-protected.
    NotProtectable(SlotId, io::Error),
    /// `PAGEMAP_SCAN` failed.
    Scan(io::Error),
}

impl fmt::Display for PagemapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPagemap(error) => {
                write!(f, "/proc/self/pagemap: {error}; mount /proc, and allow the process to open it")
            }
            Self::NoUserfaultfd(error) => write!(
                f,
                "userfaultfd: {error}; allow the system call in seccomp, or give access to /dev/userfaultfd"
            ),
            Self::NoAsyncWriteProtection(error) => write!(
                f,
                "userfaultfd without asynchronous write protection: {error}; Linux 6.7 or newer with \
                 CONFIG_PTE_MARKER_UFFD_WP has it"
            ),
            Self::NotProtectable(slot, error) => write!(
                f,
                "the memory of {slot:?} cannot be write-protected: {error}; anonymous memory and memfd can, unless \
                 another userfaultfd has it"
            ),
            Self::Scan(error) => write!(f, "PAGEMAP_SCAN: {error}"),
        }
    }
}

impl std::error::Error for PagemapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let (Self::NoPagemap(error)
        | Self::NoUserfaultfd(error)
        | Self::NoAsyncWriteProtection(error)
        | Self::NotProtectable(_, error)
        | Self::Scan(error)) = self;
        Some(error)
    }
}

impl From<Refused> for PagemapError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Descriptor(error) => Self::NoUserfaultfd(error),
            Refused::AsyncWriteProtection(error) => Self::NoAsyncWriteProtection(error),
        }
    }
}
