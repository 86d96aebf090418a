//! What this kernel offers for dirty tracking, and switching it on for a VM.
//!
//! Ring and bitmap exclude each other: once the rings are on, the bitmap ioctls of that VM fail with `ENXIO`, and
//! the rings cannot be switched off again. So the choice is made before the first vCPU exists, for good.

use std::fmt;
use std::os::fd::BorrowedFd;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

use super::{KvmError, sys};
use crate::layout::PAGE_SIZE;
use crate::os::memory::page_bytes;

/// Bytes of one ring entry, `struct kvm_dirty_gfn`.
const ENTRY_BYTES: u32 = 16;

/// Entries that KVM keeps free at the end of a ring: 64, and 512 more on a host with PML.
pub(crate) const RESERVED_ENTRIES: u32 = 64 + 512;

/// How many entries a vCPU's dirty ring has.
///
/// KVM makes a vCPU exit with "ring full" at its soft limit: 64 entries below the size, and another 512 below on
/// a host with Intel's PML, so such hosts need at least 1,024. The memory is the kernel's, unswappable, and there as long as the vCPU is.
/// What a ring covers is what its vCPU may write between two harvests without an exit:
///
/// | entries | memory per vCPU | covers | with PML | 1,000 microVMs of 2 vCPUs |
/// |---|---|---|---|---|
/// | 1,024 | 16 KiB | 3.8 MiB | 1.8 MiB | 31 MiB |
/// | 4,096 | 64 KiB | 15.8 MiB | 13.8 MiB | 125 MiB |
/// | **8,192** (default) | 128 KiB | 31.8 MiB | 29.8 MiB | 250 MiB |
/// | 16,384 | 256 KiB | 63.8 MiB | 61.8 MiB | 500 MiB |
/// | 65,536 | 1 MiB | 255.8 MiB | 253.8 MiB | 2 GiB |
///
/// Beyond that a full ring is recycled: where its pages can be left unprotected
/// ([`recycles_without_protecting`](crate::track::DirtyTracker::recycles_without_protecting)), for an exit; else for an exit and a fault for
/// every page at its next write.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingSize(u32);

impl RingSize {
    /// The smallest ring, a page of 256 entries.
    pub const MIN: Self = Self(4096 / ENTRY_BYTES);
    /// The largest ring that KVM accepts, 65,536 entries (`KVM_DIRTY_RING_MAX_ENTRIES`): 1 MiB per vCPU, and
    /// 256 MiB of guest memory before a vCPU must stop to recycle it.
    pub const MAX: Self = Self(65_536);

    /// A ring of so many entries.
    ///
    /// # Errors
    ///
    /// [`KvmError::RingSize`] unless it is a power of two from 256 to 65,536.
    pub fn from_entries(entries: u32) -> Result<Self, KvmError> {
        if entries.is_power_of_two() && (Self::MIN.0..=Self::MAX.0).contains(&entries) {
            Ok(Self(entries))
        } else {
            Err(KvmError::RingSize { entries })
        }
    }

    /// The smallest ring that covers `bytes` per vCPU between two harvests, with or without PML; the largest, if none does.
    pub fn for_working_set(bytes: u64) -> Self {
        let pages = bytes.div_ceil(PAGE_SIZE as u64);
        let entries = pages.saturating_add(u64::from(RESERVED_ENTRIES)).clamp(1_024, u64::from(Self::MAX.0));
        // Between two powers of two, so that the next one is no larger than the second.
        Self(u32::try_from(entries).unwrap_or(Self::MAX.0).next_power_of_two())
    }

    /// Its number of entries.
    pub const fn entries(self) -> u32 {
        self.0
    }

    /// Its size in bytes.
    pub const fn bytes(self) -> usize {
        (self.0 * ENTRY_BYTES) as usize
    }
}

impl Default for RingSize {
    /// 8,192 entries: a fleet of microVMs can bear them, and nearly 30 MiB are covered. A VMM that knows its guests chooses
    /// [`for_working_set`](Self::for_working_set).
    fn default() -> Self {
        Self(8_192)
    }
}

impl fmt::Debug for RingSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RingSize({} entries)", self.0)
    }
}

/// What KVM offers for tracking dirty pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// The largest ring for `KVM_CAP_DIRTY_LOG_RING_ACQ_REL` in entries, 0 without. Linux 6.1.
    pub ring_acq_rel_entries: u32,
    /// The same for `KVM_CAP_DIRTY_LOG_RING`, only on hosts with total store order. Linux 5.11.
    pub ring_tso_entries: u32,
    /// Whether pages dirtied by no vCPU go to a bitmap beside the rings (arm64).
    pub ring_with_bitmap: bool,
    /// Whether the bitmap can be got without protecting the pages in the same step. Linux 5.0.
    pub manual_protect: bool,
}

impl Capabilities {
    /// Asks KVM. `kvm` is a VM, or `/dev/kvm` itself.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] when the descriptor is not KVM's.
    pub fn probe(kvm: BorrowedFd<'_>) -> Result<Self, KvmError> {
        let check = |capability| {
            sys::check_extension(kvm, capability)
                .map_err(|source| KvmError::Ioctl { name: "KVM_CHECK_EXTENSION", source })
        };
        Ok(Self {
            ring_acq_rel_entries: check(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)? / ENTRY_BYTES,
            ring_tso_entries: check(KVM_CAP_DIRTY_LOG_RING)? / ENTRY_BYTES,
            ring_with_bitmap: check(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)? != 0,
            manual_protect: check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)? & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
                != 0,
        })
    }

    /// The capability to enable rings by, preferred first, and the largest ring it allows.
    fn ring(self) -> Option<(u32, u32)> {
        [
            (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, self.ring_acq_rel_entries),
            (KVM_CAP_DIRTY_LOG_RING, self.ring_tso_entries),
        ]
        .into_iter()
        .find(|(_, entries)| *entries != 0)
    }
}

/// Pages that the processor may have logged for a vCPU and KVM not yet pushed, on a host with Intel's page-modification
/// logging: `struct pml_log` is a page of 512 entries. KVM tells nobody whether it uses it but by this file.
pub(crate) fn pml_entries() -> u64 {
    match std::fs::read_to_string("/sys/module/kvm_intel/parameters/pml") {
        Ok(pml) if !matches!(pml.trim(), "N" | "0") => 512,
        _ => 0,
    }
}

/// KVM tracks in pages of the host. A kernel that does not say has what all of ours have.
fn check_page_size(bytes: Option<usize>) -> Result<(), KvmError> {
    match bytes {
        Some(bytes) if bytes != PAGE_SIZE => Err(KvmError::PageSize { bytes }),
        _ => Ok(()),
    }
}

/// Gives every future vCPU of the VM a dirty ring. Returns whether there is a bitmap beside the rings, for the pages
/// that no vCPU dirtied.
///
/// That is so on arm64, where the interrupt controller's tables are saved into guest memory with no vCPU at hand. The
/// bitmap must be enabled before the first memory slot exists; and it is collected last, once no vCPU runs, as it is
/// not meant to be read while entries are still made.
pub(crate) fn enable_ring(vm: BorrowedFd<'_>, size: RingSize) -> Result<bool, KvmError> {
    check_page_size(page_bytes())?;
    let capabilities = Capabilities::probe(vm)?;
    let (capability, entries_max) = capabilities.ring().ok_or(KvmError::RingUnsupported)?;
    let too_large = KvmError::RingTooLarge { entries: size.entries(), entries_max };
    if size.entries() > entries_max {
        return Err(too_large);
    }
    sys::enable_cap(vm, capability, size.bytes() as u64).map_err(|source| match source.raw_os_error() {
        Some(libc::E2BIG) => too_large,
        // Size and power of two are right by construction, so what is left is what KVM checks next.
        Some(libc::EINVAL) => KvmError::RingRefused { entries: size.entries() },
        _ => KvmError::Ioctl { name: "KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING)", source },
    })?;
    if capabilities.ring_with_bitmap {
        sys::enable_cap(vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EINVAL) => KvmError::BitmapBesideRingRefused,
                _ => KvmError::Ioctl { name: "KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)", source },
            }
        })?;
    }
    Ok(capabilities.ring_with_bitmap)
}

/// Whether `KVM_GET_DIRTY_LOG` leaves the pages writable for `KVM_CLEAR_DIRTY_LOG` to protect.
///
/// Never with `KVM_DIRTY_LOG_INITIALLY_SET`: switching logging on then protects no page, as all count as dirty in the
/// bitmap. Where there are rings, KVM accepts it, nobody asks the bitmap, and no write is ever seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ManualProtect {
    /// As rings need it: the bitmap beside them is cleared by the getting.
    Off,
    /// As the bitmap needs it.
    On,
}

/// Sets `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, whatever it was set to before.
pub(crate) fn set_manual_protect(vm: BorrowedFd<'_>, protect: ManualProtect) -> Result<(), KvmError> {
    let flags = match protect {
        ManualProtect::Off => 0,
        ManualProtect::On => u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),
    };
    sys::enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags).map_err(|source| KvmError::Ioctl {
        name: "KVM_ENABLE_CAP(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)",
        source,
    })
}

/// Parts `KVM_GET_DIRTY_LOG` from the protecting, which `KVM_CLEAR_DIRTY_LOG` then does.
pub(crate) fn enable_manual_protect(vm: BorrowedFd<'_>) -> Result<(), KvmError> {
    check_page_size(page_bytes())?;
    if !Capabilities::probe(vm)?.manual_protect {
        return Err(KvmError::ManualProtectUnsupported);
    }
    set_manual_protect(vm, ManualProtect::On)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_size_is_a_power_of_two_between_a_page_and_a_mebibyte() {
        for entries in [0, 1, 255, 257, 1000, 65_535, 65_537, 131_072, u32::MAX] {
            assert!(RingSize::from_entries(entries).is_err(), "{entries}");
        }
        for shift in 8..=16 {
            let size = RingSize::from_entries(1 << shift).unwrap();
            assert_eq!(size.bytes(), 16 << shift);
        }
    }

    #[test]
    fn a_ring_for_a_working_set_covers_it_with_what_kvm_reserves() {
        let mib = |mib: u64| RingSize::for_working_set(mib << 20).entries();
        assert_eq!([0, 1, 2, 13, 14, 29, 30].map(mib), [1024, 1024, 2048, 4096, 8192, 8192, 16_384]);
        assert_eq!([253, 254, 1 << 40].map(mib), [65_536; 3]);
        assert_eq!(RingSize::for_working_set(u64::MAX), RingSize::MAX);
        assert_eq!(RingSize::for_working_set(29 << 20), RingSize::default());
    }

    #[test]
    fn a_kernel_with_larger_pages_is_refused_by_name() {
        for bytes in [16 << 10, 64 << 10] {
            let refused = check_page_size(Some(bytes)).unwrap_err();
            assert!(refused.to_string().contains(&bytes.to_string()), "{refused}");
        }
        check_page_size(Some(4096)).unwrap();
        check_page_size(page_bytes()).unwrap();
    }

    #[test]
    fn acquire_release_is_preferred_over_total_store_order() {
        let both = Capabilities {
            ring_acq_rel_entries: 65_536,
            ring_tso_entries: 65_536,
            ring_with_bitmap: false,
            manual_protect: true,
        };
        assert_eq!(both.ring(), Some((KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 65_536)));
        let old = Capabilities { ring_acq_rel_entries: 0, ..both };
        assert_eq!(old.ring(), Some((KVM_CAP_DIRTY_LOG_RING, 65_536)));
        assert_eq!(Capabilities { ring_tso_entries: 0, ..old }.ring(), None);
    }
}
