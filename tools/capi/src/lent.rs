//! What a VMM in C lends: files of guest memory and vCPUs, as numbers of descriptors.
#![expect(unsafe_code, reason = "C gives descriptors as numbers, and texts as pointers")]

use std::ffi::c_char;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use ringferry::SlotId;
use ringferry::offload::RegionFile;

use crate::handle::text;
use crate::slots::whole_pages;
use crate::status::{Failure, Status};

/// A piece of guest memory in a file. Where it is mapped, rf_tracker_add_slot() was told.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LentRegion {
    /// The memory slot, as rf_tracker_add_slot() was given it; for a block that is none, any number that no slot has.
    pub slot: u32,
    /// A memfd (or a file on hugetlbfs), which is not cut short while it is lent. It is duplicated.
    pub fd: i32,
    /// The guest physical address of its first page.
    pub guest_address: u64,
    /// How long it is. All are multiples of 4096.
    pub bytes: u64,
    /// Where in the file its first page is.
    pub file_offset: u64,
    /// The name of a block of memory outside guest-physical space (VRAM, ROM); NULL for RAM.
    pub name: *const c_char,
}

/// A vCPU that is attached to the tracker.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LentVcpu {
    /// Its index, as rf_vcpu_attach() was given it.
    pub index: u32,
    /// Its descriptor, which is duplicated.
    pub fd: i32,
}

impl LentRegion {
    /// # Safety
    ///
    /// `fd` is negative, or open and the caller's; `name` is NULL or a text.
    pub(crate) unsafe fn to_file(self) -> Result<RegionFile, Failure> {
        Ok(RegionFile {
            slot: SlotId(self.slot),
            pages: whole_pages(self.guest_address, self.bytes)?,
            // SAFETY: the caller's promise.
            file: unsafe { duplicate(self.fd, "the descriptor of a region") }?,
            offset: self.file_offset,
            // SAFETY: the caller's promise.
            name: unsafe { text(self.name, "the name of a region") }?.to_owned(),
        })
    }
}

impl LentVcpu {
    /// # Safety
    ///
    /// `fd` is negative, or open and the caller's.
    pub(crate) unsafe fn to_descriptor(self) -> Result<(usize, OwnedFd), Failure> {
        // SAFETY: the caller's promise.
        Ok((self.index as usize, unsafe { duplicate(self.fd, "the descriptor of a vCPU") }?))
    }
}

/// # Safety
///
/// `fd` is negative, or stays open during the call.
unsafe fn duplicate(fd: i32, name: &'static str) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(Failure::Named(Status::Argument, name, "is negative"));
    }
    // SAFETY: not negative, and open by the caller's promise.
    let duplicated = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    duplicated.map_err(|error| Failure::Said(Status::Kernel, format!("{name} cannot be duplicated: {error}")))
}

/// Takes over a connection.
///
/// # Safety
///
/// `fd` is negative, or open, and nobody else closes it.
pub(crate) unsafe fn own(fd: i32) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(Failure::Named(Status::Argument, "connection", "is negative"));
    }
    // SAFETY: not negative, and the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
