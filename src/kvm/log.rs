//! A slot's dirty logging: the flag that both backends need, and the bitmap that one of them reads.
#![expect(unsafe_code, reason = "slots and bitmaps are handed to KVM as addresses")]

use std::io;
use std::os::fd::BorrowedFd;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use super::{KvmError, sys};
use crate::layout::{PAGE_SIZE, Region, SlotId};

/// `KVM_CLEAR_DIRTY_LOG` counts pages in 32 bits and wants multiples of 64: 4 TiB at a time.
const CLEAR_PAGES_MAX: u32 = 1 << 30;

fn error(name: &'static str, source: io::Error) -> KvmError {
    match source.raw_os_error() {
        Some(libc::ENXIO) => KvmError::RingInUse,
        _ => KvmError::Ioctl { name, source },
    }
}

/// Sets or clears `KVM_MEM_LOG_DIRTY_PAGES` on an existing slot. `region` comes from a `GuestMemory`.
pub(super) fn set_dirty_logging(vm: BorrowedFd<'_>, region: &Region, enabled: bool) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: region.slot.0,
        flags: if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.pages.first.address().0,
        memory_size: region.pages.pages * PAGE_SIZE as u64,
        userspace_addr: region.host.addr() as u64,
    };
    // SAFETY:
    // * Every region comes from a `GuestMemory`, a clone of which the slot table keeps, and whose constructor
    //   demands that this range stays mapped and is never referenced by Rust.
    unsafe { sys::set_user_memory_region(vm, &region) }
        .map_err(|source| error("KVM_SET_USER_MEMORY_REGION", source))
}

/// Fills `words` with the bitmap of a slot of `pages` pages and leaves the pages as they are.
pub(super) fn get(vm: BorrowedFd<'_>, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(error("KVM_GET_DIRTY_LOG", io::Error::from_raw_os_error(libc::EINVAL)));
    }
    // SAFETY:
    // * There is a bit for each of the slot's pages, by the check above. That the slot has as many pages as its
    //   region is so because KVM refused any other size when its logging was switched on.
    unsafe { sys::get_dirty_log(vm, slot.0, words) }.map_err(|source| error("KVM_GET_DIRTY_LOG", source))
}

/// Clears the bits of `words` in the bitmap of a slot of `pages` pages and protects these pages.
pub(super) fn clear(vm: BorrowedFd<'_>, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError> {
    let mut first = 0;
    while first < pages {
        let count = u32::try_from(pages - first).unwrap_or(u32::MAX).min(CLEAR_PAGES_MAX);
        let word = usize::try_from(first / 64).unwrap_or(usize::MAX);
        sys::clear_dirty_log(vm, slot.0, first, count, words.get(word..).unwrap_or(&[]))
            .map_err(|source| error("KVM_CLEAR_DIRTY_LOG", source))?;
        first += u64::from(count);
    }
    Ok(())
}
