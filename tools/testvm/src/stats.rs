//! KVM's own counters of a vCPU, through `KVM_GET_STATS_FD`: whether a guest runs natively, and what it cost.
//!
//! The file's layout is that of `struct kvm_stats_header` and `kvm_stats_desc` (Documentation/virt/kvm/api.rst,
//! 4.133): a header, descriptors with names, values. It describes itself, so every offset in it is checked.
#![expect(unsafe_code, reason = "an ioctl that kvm-ioctls has not")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use crate::error::{TestVmError, kvm_error};

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// The kernel has some 60 counters, with names of at most 48 bytes and histograms of a few dozen words.
const MAX_COUNTERS: usize = 1024;
const MAX_NAME_BYTES: usize = 256;
const MAX_WORDS: usize = 1024;

/// The counters of one vCPU or VM, readable while it runs.
#[derive(Debug)]
pub(crate) struct Stats {
    file: File,
    fields: Vec<Field>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Field {
    name: String,
    /// Offset in the file.
    at: u64,
}

impl Stats {
    /// # Errors
    ///
    /// [`TestVmError::Kvm`], or [`TestVmError::Stats`] if the file is not what the kernel documents.
    pub fn open(fd: &impl AsRawFd) -> Result<Self, TestVmError> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or an error.
        let stats = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD) };
        if stats < 0 {
            let error = kvm_ioctls::Error::last();
            return Err(kvm_error("KVM_GET_STATS_FD", error, "this kernel is older than 5.14"));
        }
        // SAFETY: the descriptor is fresh from the kernel and nobody else's.
        let file = unsafe { File::from_raw_fd(stats) };
        let read = |at: u64, bytes: usize| {
            let mut buffer = vec![0; bytes];
            file.read_exact_at(&mut buffer, at).map(|()| buffer)
        };
        let fields = describe(read).map_err(|error| TestVmError::Stats(error.to_string()))?;
        Ok(Self { file, fields })
    }

    /// Every counter of one value by its kernel name. Histograms are left out.
    ///
    /// # Errors
    ///
    /// [`TestVmError::Stats`]: the kernel would not let us read.
    pub fn read(&self) -> Result<BTreeMap<String, u64>, TestVmError> {
        let value = |field: &Field| {
            let mut word = [0; 8];
            self.file.read_exact_at(&mut word, field.at)?;
            Ok((field.name.clone(), u64::from_ne_bytes(word)))
        };
        let values: io::Result<_> = self.fields.iter().map(value).collect();
        values.map_err(|error| TestVmError::Stats(error.to_string()))
    }
}

/// Reads header and descriptors through `read(offset, bytes)`.
fn describe(read: impl Fn(u64, usize) -> io::Result<Vec<u8>>) -> io::Result<Vec<Field>> {
    let malformed = |what: &str| io::Error::other(format!("the kernel's description is malformed: {what}"));
    let header = read(0, HEADER_BYTES)?;
    let word = |bytes: &[u8], index: usize| -> io::Result<u32> {
        let word = bytes.get(index * 4..).and_then(|tail| tail.first_chunk::<4>());
        word.map(|word| u32::from_ne_bytes(*word)).ok_or_else(|| malformed("too short"))
    };
    let length = |value: u32, most: usize, what| {
        usize::try_from(value).ok().filter(|v| *v <= most).ok_or_else(|| malformed(what))
    };
    // Flags, length of names, number of descriptors, offsets of identity, descriptors and values.
    let name_bytes = length(word(&header, 1)?, MAX_NAME_BYTES, "names")?;
    let count = length(word(&header, 2)?, MAX_COUNTERS, "number of counters")?;
    let (descriptors_at, values_at) = (u64::from(word(&header, 4)?), u64::from(word(&header, 5)?));

    let one = DESCRIPTOR_BYTES + name_bytes;
    let descriptors = read(descriptors_at, one * count)?;
    let mut fields = Vec::with_capacity(count);
    for descriptor in descriptors.chunks_exact(one) {
        // Flags; exponent and number of words; offset; size of buckets; name.
        let words = length(word(descriptor, 1)? >> 16, MAX_WORDS, "words of a counter")?;
        let name = &descriptor[DESCRIPTOR_BYTES..];
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| malformed("a name is not text"))?.to_owned();
        if words == 1 {
            fields.push(Field { name, at: values_at + u64::from(word(descriptor, 2)?) });
        }
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reader(file: &[u8]) -> impl Fn(u64, usize) -> io::Result<Vec<u8>> {
        |at, bytes| {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            let end = at.checked_add(bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
            file.get(at..end).map(<[u8]>::to_vec).ok_or(io::ErrorKind::UnexpectedEof.into())
        }
    }

    #[test]
    fn counters_are_found_where_the_descriptors_say_and_histograms_left_out() {
        let mut file: Vec<u8> = [0u32, 8, 2, 24, 24, 72].iter().flat_map(|w| w.to_ne_bytes()).collect();
        for (words, offset, name) in [(1u32, 8u32, b"exits\0\0\0"), (20, 16, b"hist\0\0\0\0")] {
            file.extend([0, words << 16, offset, 0].iter().flat_map(|w| w.to_ne_bytes()));
            file.extend(name);
        }
        let fields = describe(reader(&file)).unwrap();
        assert_eq!(fields, [Field { name: "exits".to_owned(), at: 80 }]);
    }

    proptest! {
        #[test]
        fn no_description_makes_the_reader_panic(
            header in any::<[u8; 24]>(), small in any::<bool>(), tail in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut file = header.to_vec();
            if small {
                file.iter_mut().enumerate().filter(|(i, _)| i % 4 != 0).for_each(|(_, byte)| *byte = 0);
            }
            file.extend(tail);
            let _ = describe(reader(&file));
        }
    }
}
