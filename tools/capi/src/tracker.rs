//! The tracker of a VM, as C holds it.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use parking_lot::Mutex;
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, ExternalId, Initially};
use ringferry::{GuestMemory, Region, SlotId};

use crate::handle::{Handle, borrow, give, out, take_back};
use crate::slots::{Slots, pages_touched, whole_pages};
use crate::status::{Failure, Status, done};

/// Dirty tracking of one VM, for all of the VM's life. Any thread may use it, several at once.
#[derive(Debug)]
pub struct Tracker {
    pub(crate) shared: Arc<Shared>,
}

/// What a tracker and its sessions have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) tracker: DirtyTracker,
    /// Locked while slots change, and while pages are taken: the sizes of both then agree.
    pub(crate) slots: Mutex<Slots>,
    /// External sources, by the number that C has of each.
    pub(crate) sources: Mutex<Vec<Option<ExternalId>>>,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Tracker {
    const MARK: [u8; 8] = *b"rf track";
}

/// Memory as it is added while a session is open: whether its content is already known to whoever harvests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub enum Content {
    /// Nobody needs the content that is there now.
    Clean = 0,
    /// All of it is dirty, for every session that is open.
    Dirty = 1,
}

/// Gives every vCPU that is created from now on a dirty ring of `ring_entries` entries: a power of two from 256 to 65536, 16
/// bytes each, or 0 for the largest. Call it after KVM_CREATE_VM and before the first KVM_CREATE_VCPU; on arm64 also before
/// the first memory slot. It cannot be undone: from then on KVM answers ENXIO to KVM_GET_DIRTY_LOG for this VM, and
/// rf_session_take_slot_bitmap() stands in for it.
///
/// The descriptor is duplicated; the VMM may close its own.
///
/// # Safety
///
/// `tracker` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_enable(
    vm_fd: i32,
    ring_entries: u32,
    tracker: *mut *mut Tracker,
) -> Status {
    // SAFETY: the caller's promise.
    unsafe { new_tracker(tracker, || Ok(DirtyTracker::enable(&vm_fd, ring_size(ring_entries)?)?)) }
}

/// Tracks by KVM's bitmap instead, with manual protection.
///
/// # Safety
///
/// As for rf_tracker_enable().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_enable_bitmap(vm_fd: i32, tracker: *mut *mut Tracker) -> Status {
    // SAFETY: the caller's promise.
    unsafe { new_tracker(tracker, || Ok(DirtyTracker::enable_bitmap(&vm_fd)?)) }
}

/// As rf_tracker_enable() where this kernel has rings, else as rf_tracker_enable_bitmap(). Any other failure is one: the
/// bitmap is no answer to a call that comes too late.
///
/// # Safety
///
/// As for rf_tracker_enable().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_enable_or_bitmap(
    vm_fd: i32,
    ring_entries: u32,
    tracker: *mut *mut Tracker,
) -> Status {
    let enable = || Ok(DirtyTracker::enable_or_bitmap(&vm_fd, ring_size(ring_entries)?)?);
    // SAFETY: the caller's promise.
    unsafe { new_tracker(tracker, enable) }
}

fn ring_size(entries: u32) -> Result<RingSize, Failure> {
    Ok(if entries == 0 { RingSize::MAX } else { RingSize::from_entries(entries)? })
}

/// # Safety
///
/// `tracker` is NULL or can be written.
unsafe fn new_tracker(
    tracker: *mut *mut Tracker,
    enable: impl FnOnce() -> Result<DirtyTracker, Failure>,
) -> Status {
    done(|| {
        let tracker = out(tracker, "tracker")?;
        let shared =
            Arc::new(Shared { tracker: enable()?, slots: Mutex::default(), sources: Mutex::default() });
        // SAFETY: the caller's promise.
        unsafe { give(tracker, Tracker { shared }) };
        Ok(())
    })
}

/// Frees the handle. Sessions, vCPUs and gates of the tracker live on until they are freed themselves; the rings of the VM
/// stay. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_free(tracker: *mut Tracker) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(tracker, "tracker") }.map(drop))
}

/// How it tracks: "ring" or "bitmap", a constant text; NULL if `tracker` is no tracker.
///
/// # Safety
///
/// `tracker` is a tracker or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_backend(tracker: *const Tracker) -> *const c_char {
    let mut name = std::ptr::null();
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        name = match tracker.shared.tracker.backend() {
            "ring" => c"ring",
            "bitmap" => c"bitmap",
            _ => c"other",
        }
        .as_ptr();
        Ok(())
    });
    name
}

/// Tracks a memory slot from now on. Call it after KVM_SET_USER_MEMORY_REGION has created the slot, and leave
/// KVM_MEM_LOG_DIRTY_PAGES alone: the tracker sets and clears it. Slots that are read-only or on guest_memfd are left out.
///
/// `slot` is what KVM was given, the address space in its upper 16 bits. `host` is where its first page is mapped in this
/// process, `content` one of RF_CONTENT_CLEAN and RF_CONTENT_DIRTY. All are multiples of 4096.
///
/// # Safety
///
/// `tracker` is a tracker or NULL. [`host`, `host` + `bytes`) stays mapped readable and writable until rf_tracker_remove_slot()
/// has returned, or all handles of the tracker are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_add_slot(
    tracker: *const Tracker,
    slot: u32,
    guest_address: u64,
    bytes: u64,
    host: *mut c_void,
    content: i32,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        if host.is_null() {
            return Err(Failure::Null("host"));
        }
        let initially = match content {
            clean if clean == Content::Clean as i32 => Initially::Clean,
            dirty if dirty == Content::Dirty as i32 => Initially::Dirty,
            _ => {
                let text = "content is neither RF_CONTENT_CLEAN nor RF_CONTENT_DIRTY";
                return Err(Failure::Here(Status::Argument, text));
            }
        };
        let pages = whole_pages(guest_address, bytes)?;
        let region = Region::new(SlotId(slot), pages, host.cast());
        // SAFETY: the caller's promise of the mapping. No reference to it is ever made.
        let memory = unsafe { GuestMemory::new(vec![region]) }.map_err(|_| {
            Failure::With(Status::Argument, "the slot is not page-aligned or too large", bytes)
        })?;
        let mut slots = tracker.shared.slots.lock();
        tracker.shared.tracker.add_memory_as(&memory, initially)?;
        slots.insert(slot, pages);
        Ok(())
    })
}

/// Forgets a slot. Call it before KVM_SET_USER_MEMORY_REGION deletes or moves the slot: a ring entry that names it would count
/// for the next slot with this id. A slot that was moved is added anew. RF_SLOT_UNKNOWN tells that the slot was not
/// tracked.
///
/// # Safety
///
/// `tracker` is a tracker or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_remove_slot(tracker: *const Tracker, slot: u32) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let mut slots = tracker.shared.slots.lock();
        slots.get(slot)?;
        tracker.shared.tracker.remove_slot(SlotId(slot))?;
        slots.remove(slot);
        Ok(())
    })
}

/// Marks the pages dirty in which `bytes` bytes at `guest_address` are: the VMM itself wrote them, or a device on its behalf.
/// Neither rings nor bitmap see such writes. Call it after the write, from any thread. It costs a fence and a load while no
/// session is open. Addresses that no slot has are ignored.
///
/// # Safety
///
/// `tracker` is a tracker or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_mark_dirty(
    tracker: *const Tracker,
    guest_address: u64,
    bytes: u64,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        if let Some(run) = pages_touched(guest_address, bytes) {
            tracker.shared.tracker.mark_dirty(run);
        }
        Ok(())
    })
}
