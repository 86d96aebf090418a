//! Memory that two processes share: a sealed memfd of records, each of nothing but atomics.
//!
//! Neither process trusts the other to be alive, or to write sense: every bit pattern is a record, and the seals keep
//! either from shrinking what the other one touches.
#![expect(unsafe_code, reason = "records lie in a mapping, behind a pointer")]

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::slice;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

use super::file::memfd_of_fixed_size;

/// What may lie in memory that another process writes.
///
/// # Safety
///
/// The type is `repr(C)` and consists of atomics only, so that every bit pattern is a value of it, all access is atomic,
/// and both processes see the same layout. A page holds a whole number of them.
pub(crate) unsafe trait Record: Sync {}

// SAFETY: an atomic, of which a page holds 512.
unsafe impl Record for AtomicU64 {}

/// Records in memory that another process may map, too.
pub(crate) struct Shared<R> {
    map: MmapRaw,
    records: usize,
    _of: PhantomData<R>,
}

fn bytes_of<R>(records: usize) -> io::Result<usize> {
    let too_many = || io::Error::from(io::ErrorKind::OutOfMemory);
    let bytes = records.checked_mul(size_of::<R>()).ok_or_else(too_many)?;
    bytes.checked_next_multiple_of(crate::layout::PAGE_SIZE).ok_or_else(too_many)
}

impl<R: Record> Shared<R> {
    /// So many records of zeroes, and the file to pass on.
    pub(crate) fn create(name: &CStr, records: usize) -> io::Result<(Self, File)> {
        let file = memfd_of_fixed_size(name, bytes_of::<R>(records)? as u64)?;
        Ok((Self::map(&file, records)?, file))
    }

    /// The records of a file that another process has made.
    ///
    /// # Errors
    ///
    /// The kernel's, or `InvalidInput` for a file that is too short, or that somebody could still shorten.
    pub(crate) fn open(file: &File, records: usize) -> io::Result<Self> {
        let bytes = bytes_of::<R>(records)?;
        // SAFETY: a call without pointers.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || file.metadata()?.len() < bytes as u64 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Self::map(file, records)
    }

    fn map(file: &File, records: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(bytes_of::<R>(records)?).map_raw(file)?;
        Ok(Self { map, records, _of: PhantomData })
    }
}

impl<R: Record> Deref for Shared<R> {
    type Target = [R];

    fn deref(&self) -> &[R] {
        // SAFETY:
        // * The mapping is as long as so many records, is page-aligned, and lives as long as `self`. Its file cannot be
        //   shortened.
        // * Records are atomics only, as the trait demands: shared references are right although others write them.
        unsafe { slice::from_raw_parts(self.map.as_ptr().cast(), self.records) }
    }
}

impl<R> fmt::Debug for Shared<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({} records)", self.records)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_mapping_stores_the_other_loads() {
        let (ours, file) = Shared::<AtomicU64>::create(c"shared", 3).unwrap();
        let theirs = Shared::<AtomicU64>::open(&file, 3).unwrap();
        ours[2].store(7, Ordering::Relaxed);
        assert_eq!(theirs[2].load(Ordering::Relaxed), 7);
        assert_eq!(theirs.len(), 3);
    }

    #[test]
    fn a_file_that_is_too_short_or_could_be_shortened_is_refused() {
        let (_ours, file) = Shared::<AtomicU64>::create(c"shared", 3).unwrap();
        let refused = |file: &File, records| Shared::<AtomicU64>::open(file, records).unwrap_err().kind();
        assert_eq!(refused(&file, 513), io::ErrorKind::InvalidInput);
        assert_eq!(refused(&file, usize::MAX), io::ErrorKind::OutOfMemory);
        let unsealed = super::super::file::memfd(c"unsealed").unwrap();
        unsealed.set_len(4096).unwrap();
        assert_eq!(refused(&unsealed, 3), io::ErrorKind::InvalidInput);
    }
}
