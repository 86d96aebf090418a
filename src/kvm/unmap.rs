//! Taking single pages from a guest: its next write to them is a fault again, which KVM logs.
//!
//! `KVM_RESET_DIRTY_RINGS` protects the pages that ring entries name. A page whose entry was recycled without protection
//! has none, and switching the logging of its slot off and on would lose what is written in between. What is left is the host's own
//! page table: KVM follows each change of protection there, and maps the page anew when the guest touches it, with an
//! entry in the ring if it maps it writable. Userfaultfd's asynchronous write protection (Linux 6.7) changes protection range
//! by range, and no thread ever waits for it. `kernel-notes/dirty-ring.md`, "Recycled without protection", has the argument
//! and what it costs.

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::layout::{PAGE_SIZE, PageRun, Region};
use crate::os::userfault::{Refused, Userfault};

/// How many pages can be protected at once at least: those of a huge page of hugetlbfs, or one.
pub(crate) type Granule = NonZeroU64;

/// Pages of a granule: 4 KiB, and what hugetlbfs has on x86 and arm64.
const GRANULES: [u64; 6] = [1, 16, 512, 8192, 1 << 17, 1 << 18];

/// Until when a protection lasts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Until {
    /// Until the guest touches the page, be it only to read: KVM may log that as a write. The next write costs the guest
    /// what it costs after a reset of the ring (2.7 instead of 2.5 µs here).
    Touched,
    /// Until the guest writes the page, which costs it half as much again: the host has to take the protection off.
    Written,
}

/// A range of pages to be protected at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Protection {
    pub(crate) pages: PageRun,
    pub(crate) until: Until,
}

/// Why pages cannot be taken from a guest one by one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum UnmapError {
    /// Tracking by bitmap protects every page that it hands out.
    NotAsked,
    /// Neither userfaultfd(2), in the mode that needs no privilege, nor `/dev/userfaultfd` gave a descriptor.
    NoUserfaultfd(Arc<io::Error>),
    /// This kernel's userfaultfd has no asynchronous write protection (Linux 6.7).
    NoAsyncWriteProtection(Arc<io::Error>),
    /// The memory of a slot cannot be write-protected: a file on disk, a device, or another userfaultfd has it.
    NotProtectable(Arc<io::Error>),
    /// KVM did not free ring entries that name no slot: a ring can be recycled with protection only.
    NotFreed,
}

impl fmt::Display for UnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked => write!(f, "tracking by bitmap protects each page that it hands out"),
            Self::NoUserfaultfd(error) => write!(
                f,
                "userfaultfd: {error}; allow the system call in seccomp, or give access to /dev/userfaultfd"
            ),
            Self::NoAsyncWriteProtection(error) => {
                write!(
                    f,
                    "userfaultfd without asynchronous write protection: {error}; Linux 6.7 or newer has it"
                )
            }
            Self::NotProtectable(error) => write!(
                f,
                "guest memory cannot be write-protected: {error}; anonymous memory, memfd and hugetlbfs can, unless \
                 another userfaultfd has them"
            ),
            Self::NotFreed => write!(
                f,
                "KVM did not free ring entries that name no slot, so that every page of a full ring is protected: tell us \
                 the kernel's version, no released one was seen to do that"
            ),
        }
    }
}

impl std::error::Error for UnmapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotAsked | Self::NotFreed => None,
            Self::NoUserfaultfd(error)
            | Self::NoAsyncWriteProtection(error)
            | Self::NotProtectable(error) => Some(&**error),
        }
    }
}

impl From<Refused> for UnmapError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Descriptor(error) => Self::NoUserfaultfd(Arc::new(error)),
            Refused::AsyncWriteProtection(error) => Self::NoAsyncWriteProtection(Arc::new(error)),
        }
    }
}

/// Takes pages from the guests of this process.
#[derive(Debug)]
pub(crate) struct Unmapper {
    userfault: Userfault,
}

impl Unmapper {
    /// One, if this kernel and the rights of this process allow it: tried on a page of our own.
    pub(crate) fn probe() -> Result<Self, UnmapError> {
        let refused = |error| UnmapError::NotProtectable(Arc::new(error));
        let page = MmapMut::map_anon(PAGE_SIZE).map_err(refused)?;
        let host = page.as_ptr().addr()..page.as_ptr().addr() + PAGE_SIZE;
        let userfault = Userfault::open()?;
        userfault.register(host.clone()).map_err(refused)?;
        userfault.change(host.clone(), true).map_err(refused)?;
        userfault.change(host, false).map_err(refused)?;
        Ok(Self { userfault })
    }

    /// Takes on the memory of a slot. It stays taken on until it is unmapped or the descriptor is closed: giving it back
    /// would take every page of it from the guest once more.
    pub(super) fn take_on(&self, region: &Region) -> Result<Granule, UnmapError> {
        let refused = |error| UnmapError::NotProtectable(Arc::new(error));
        self.userfault.register(region.host_range()).map_err(refused)?;
        let mut outcome = Err(io::Error::from_raw_os_error(libc::EINVAL));
        for granule in GRANULES.into_iter().filter(|granule| *granule <= region.pages.pages) {
            let first = PageRun { pages: granule, ..region.pages };
            outcome = self.userfault.change(region.host_range_of(first), false).map(|()| granule);
            // The wrong size of page is EINVAL.
            if !matches!(&outcome, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
                break;
            }
        }
        let granule = outcome.map_err(refused)?;
        NonZeroU64::new(granule).ok_or_else(|| refused(io::Error::from_raw_os_error(libc::EINVAL)))
    }

    pub(super) fn unmap(&self, region: &Region, range: Protection) -> Result<(), UnmapError> {
        let Protection { pages, until } = range;
        let host = region.host_range_of(pages);
        // Protecting is what makes the kernel take the pages from every guest: that is what it promises. Unprotecting them
        // afterwards leaves them taken, and spares the guest's next write the host's fault.
        let protected = self.userfault.change(host.clone(), true);
        let changed = match until {
            Until::Written => protected,
            Until::Touched => protected.and_then(|()| self.userfault.change(host, false)),
        };
        changed.map_err(|error| UnmapError::NotProtectable(Arc::new(error)))
    }
}
