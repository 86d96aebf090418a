//! Files that have no name, and the holes in files.
#![expect(unsafe_code, reason = "memfd_create, file seals and SEEK_DATA have no safe interface in std")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A file in memory, empty.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn memfd(name: &CStr) -> io::Result<File> {
    create(name, 0)
}

/// A file in memory of `bytes` zeroes, which nobody can shrink or grow any more: whoever maps it can touch all of it.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn memfd_of_fixed_size(name: &CStr, bytes: u64) -> io::Result<File> {
    let file = create(name, libc::MFD_ALLOW_SEALING)?;
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a call without pointers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn create(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string; the call keeps no pointer.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened `fd` for us, and nobody else knows it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Where the first data at or behind `offset` begins; none if there is only a hole up to the end. Moves the file's
/// position.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, offset, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(Some),
    }
}

/// Where the first hole at or behind `offset` begins; the end of the file is one. Moves the file's position.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn next_hole(file: &File, offset: u64) -> io::Result<u64> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a call without pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}
