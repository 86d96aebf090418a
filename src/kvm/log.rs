//! A slot's dirty logging: the flag that both backends need, and the bitmap that one of them reads.
#![expect(unsafe_code, reason = "slots and bitmaps are handed to KVM as addresses")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use super::{KvmError, sys};
use crate::layout::{PAGE_SIZE, Region, SlotId};

/// `KVM_CLEAR_DIRTY_LOG` counts pages in 32 bits and wants multiples of 64: 4 TiB at a time.
const CLEAR_PAGES_MAX: u32 = 1 << 30;

fn error(name: &'static str, slot: SlotId, source: io::Error) -> KvmError {
    match source.raw_os_error() {
        Some(libc::ENXIO) => KvmError::RingInUse,
        Some(libc::ENOENT) => KvmError::SlotGone(slot),
        _ => KvmError::Ioctl { name, source },
    }
}

/// A page that no slot of a VMM's is mapped to.
#[repr(align(4096))]
struct Decoy([AtomicU8; PAGE_SIZE]);
static DECOY: Decoy = Decoy([const { AtomicU8::new(0) }; PAGE_SIZE]);

/// Sets or clears `KVM_MEM_LOG_DIRTY_PAGES` on an existing slot. `region` comes from a `GuestMemory`.
pub(super) fn set_dirty_logging(vm: BorrowedFd<'_>, region: &Region, enabled: bool) -> Result<(), KvmError> {
    check_exists(vm, region)?;
    let slot = region.slot;
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
    unsafe { sys::set_user_memory_region(vm, &region) }.map_err(|source| match source.raw_os_error() {
        // The slot is there, and KVM changes nothing of a slot but its address and its logging.
        Some(libc::EINVAL) => KvmError::SlotDiffers(slot),
        _ => error("KVM_SET_USER_MEMORY_REGION", slot, source),
    })
}

/// Switching the logging of a slot that the VMM has deleted would create it anew, and no call of KVM's tells whether a slot
/// exists. But KVM never gives a slot that exists other host memory: it refuses the decoy then. If it takes the decoy, it
/// has created the slot, which is deleted at once.
fn check_exists(vm: BorrowedFd<'_>, region: &Region) -> Result<(), KvmError> {
    let decoy = kvm_userspace_memory_region {
        slot: region.slot.0,
        flags: 0,
        guest_phys_addr: region.pages.first.address().0,
        memory_size: PAGE_SIZE as u64,
        userspace_addr: DECOY.0.as_ptr().addr() as u64,
    };
    let gone = Err(KvmError::SlotGone(region.slot));
    // SAFETY:
    // * The page is static, of atomics and therefore writable, and nobody reads it.
    let refused = match unsafe { sys::set_user_memory_region(vm, &decoy) } {
        Ok(()) => {
            let nothing = kvm_userspace_memory_region { memory_size: 0, ..decoy };
            // SAFETY: a slot without size is deleted, and gives no memory to anybody.
            unsafe { sys::set_user_memory_region(vm, &nothing) }
                .map_err(|source| error("KVM_SET_USER_MEMORY_REGION", region.slot, source))?;
            return gone;
        }
        Err(refused) => refused,
    };
    match refused.raw_os_error() {
        Some(libc::EINVAL) => Ok(()),
        // Another slot has the address.
        Some(libc::EEXIST) => gone,
        _ => Err(error("KVM_SET_USER_MEMORY_REGION", region.slot, refused)),
    }
}

/// Fills `words` with the bitmap of a slot of `pages` pages and leaves the pages as they are.
pub(super) fn get(vm: BorrowedFd<'_>, slot: SlotId, pages: u64, words: &mut [u64]) -> Result<(), KvmError> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(error("KVM_GET_DIRTY_LOG", slot, io::Error::from_raw_os_error(libc::EINVAL)));
    }
    // SAFETY:
    // * There is a bit for each of the slot's pages, by the check above. That the slot has as many pages as its
    //   region is so because KVM refused any other size when its logging was switched on.
    unsafe { sys::get_dirty_log(vm, slot.0, words) }
        .map_err(|source| error("KVM_GET_DIRTY_LOG", slot, source))
}

/// Clears the bits of `words` in the bitmap of a slot of `pages` pages and protects these pages.
pub(super) fn clear(vm: BorrowedFd<'_>, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError> {
    let mut first = 0;
    while first < pages {
        let count = u32::try_from(pages - first).unwrap_or(u32::MAX).min(CLEAR_PAGES_MAX);
        let word = usize::try_from(first / 64).unwrap_or(usize::MAX);
        sys::clear_dirty_log(vm, slot.0, first, count, words.get(word..).unwrap_or(&[]))
            .map_err(|source| error("KVM_CLEAR_DIRTY_LOG", slot, source))?;
        first += u64::from(count);
    }
    Ok(())
}
