//! The kernel's ABI and nothing else: the only ioctls, the only memory shared with KVM.
//!
//! `sys` issues the ioctls, [`caps`] asks what there is and switches it on, `ring` follows one vCPU's ring through
//! the memory it shares with the kernel, `log` gets and clears the bitmap of a slot, `unmap` takes pages from a guest
//! that no ring speaks of. What the pages in them mean, and when they may be read, is decided one floor up, in
//! [`track`](crate::track).

pub mod caps;
mod error;
pub(crate) mod log;
pub(crate) mod ring;
mod sys;
pub(crate) mod unmap;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub(crate) use self::caps::ManualProtect;
pub use self::caps::{Capabilities, RingSize};
pub use self::error::KvmError;
pub(crate) use self::sys::ResetCount;
pub use self::unmap::UnmapError;
use self::unmap::Unmapper;
pub(crate) use self::unmap::{Granule, Protection, Until};
use crate::layout::{Region, SlotId};

/// What tracking needs of a kernel: the real one is [`VmFd`], and tests have one that misbehaves on demand.
pub(crate) trait Kernel: Send + Sync + fmt::Debug {
    /// Resets every flagged entry of every ring and protects its page. An interrupted call counts fewer, and may
    /// have left unprotected the pages of the last ones that it counts.
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError>;

    /// Switches dirty logging of a slot on, which protects every page of it, or off. A slot that is gone stays gone.
    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError>;

    /// Fills `words` with the bitmap of a slot of `pages` pages, without clearing it.
    fn get_dirty_log(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError>;

    /// Clears the bits of `words` in the bitmap of a slot of `pages` pages and protects these pages.
    fn clear_dirty_log(&self, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError>;

    /// Whether pages of this slot can be protected by [`protect`](Self::protect), and how many at once at least.
    fn can_protect(&self, region: &Region) -> Result<Granule, UnmapError>;

    /// Protects pages of a slot that no ring entry names, range by range: when this returns, the next write to each of them
    /// makes an entry. All ranges are of the slot, in whole granules of it.
    fn protect(&self, region: &Region, ranges: &[Protection]) -> Result<(), UnmapError>;

    /// Pages that a vCPU may have dirtied and its processor not yet told KVM of, at most.
    fn unseen_per_vcpu(&self) -> u64 {
        caps::pml_entries()
    }
}

/// Our own descriptor of the VMM's VM: the VM lives as long as we may ask something of it.
#[derive(Debug)]
pub(crate) struct VmFd {
    fd: OwnedFd,
    manual_protect: ManualProtect,
    unmapper: Result<Unmapper, UnmapError>,
}

impl VmFd {
    pub(crate) fn duplicate(vm: &impl AsRawFd, manual_protect: ManualProtect) -> Result<Self, KvmError> {
        let fd =
            sys::duplicate(vm.as_raw_fd()).map_err(|source| KvmError::Ioctl { name: "fcntl", source })?;
        // The bitmap always protects what it clears.
        let unmapper = match manual_protect {
            ManualProtect::Off => Unmapper::probe(),
            ManualProtect::On => Err(UnmapError::NotAsked),
        };
        Ok(Self { fd, manual_protect, unmapper })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Kernel for VmFd {
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError> {
        sys::reset_dirty_rings(self.as_fd())
            .map_err(|source| KvmError::Ioctl { name: "KVM_RESET_DIRTY_RINGS", source })
    }

    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError> {
        if enabled {
            // Each time: the VMM may have set it otherwise since.
            caps::set_manual_protect(self.as_fd(), self.manual_protect)?;
        }
        log::set_dirty_logging(self.as_fd(), region, enabled)
    }

    fn get_dirty_log(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError> {
        log::get(self.as_fd(), slot, pages, words)
    }

    fn clear_dirty_log(&self, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError> {
        log::clear(self.as_fd(), slot, pages, words)
    }

    fn can_protect(&self, region: &Region) -> Result<Granule, UnmapError> {
        self.unmapper.as_ref().map_err(Clone::clone)?.take_on(region)
    }

    fn protect(&self, region: &Region, ranges: &[Protection]) -> Result<(), UnmapError> {
        let unmapper = self.unmapper.as_ref().map_err(Clone::clone)?;
        ranges.iter().try_for_each(|range| unmapper.unmap(region, *range))
    }
}
