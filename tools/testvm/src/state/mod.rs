//! The state of a VM besides RAM, as bytes: the format, and reading it without believing it.
//!
//! A header, then one record per part, always in the same order: for each vCPU the parts of [`VCPU_PARTS`], then
//! those of the VM, [`VM_PARTS`], and the registers of its `device`. The bytes come from a peer: lengths are checked before they are used, and
//! nothing is allocated by what they say. What is inside a part of the kernel's, only the kernel knows, and it checks it when the part
//! is set. `kernel` moves the parts between KVM and this format.

mod kernel;

use std::io;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use self::kernel::SkippedMsr;
pub(crate) use self::kernel::{Shape, match_tsc, restore_vcpu, restore_vm, save_vcpu, save_vm};
use self::kernel::{VCPU_PARTS, VM_PARTS};
use crate::device::Registers;
use crate::workload::mailbox::MAX_VCPUS;

const MAGIC: [u8; 8] = *b"RFTESTVM";
/// Raised with every change of the format.
pub const STATE_VERSION: u32 = 2;
/// The record of the VM itself, not of a vCPU.
const OF_VM: u16 = u16::MAX;

/// Why state could not be read or set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Not state of a test VM.
    #[error("the bytes do not begin like the state of a test VM; was the source another VMM?")]
    NotState,
    /// Another version of the format.
    #[error(
        "the state has format version {found}, this program reads {STATE_VERSION}; use the same version on both"
    )]
    Version {
        /// Which.
        found: u32,
    },
    /// Another number of vCPUs.
    #[error("the state is of {found} vCPUs, this VM has {expected}; build it with {found}")]
    Vcpus {
        /// In the state.
        found: u32,
        /// In this VM.
        expected: usize,
    },
    /// The bytes end too early.
    #[error("the state ends within {within}: {missing} bytes are missing")]
    Truncated {
        /// What was being read.
        within: &'static str,
        /// How many bytes more it needs.
        missing: usize,
    },
    /// Bytes after the end.
    #[error("{0} bytes follow the end of the state")]
    Trailing(usize),
    /// A record that is not the one due.
    #[error("the state has record {kind} of vCPU {vcpu} where {expected} was due")]
    Unexpected {
        /// Its kind.
        kind: u16,
        /// Its vCPU; 65535 is the VM.
        vcpu: u16,
        /// What should be there.
        expected: &'static str,
    },
    /// A record of a length that its kind cannot have.
    #[error("{part} of {found} bytes; {expected}")]
    Length {
        /// Which part.
        part: &'static str,
        /// Its length in the state.
        found: usize,
        /// What would do.
        expected: String,
    },
    /// The kernel refused.
    #[error("{call} for {of}: {error}; {hint}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// The vCPU, or the VM.
        of: String,
        /// What the kernel said.
        error: io::Error,
        /// What it usually means.
        hint: &'static str,
    },
    /// The clocks of the two hosts do not agree and this one cannot be scaled.
    #[error(
        "the guest's TSC ran at {saved_khz} kHz, here it runs at {here_khz} kHz and cannot be scaled: {error}"
    )]
    TscFrequency {
        /// At the source.
        saved_khz: u32,
        /// Here.
        here_khz: u32,
        /// What the kernel said.
        error: io::Error,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    vcpus: U32,
    tsc_khz: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RecordHeader {
    kind: U16,
    vcpu: U16,
    bytes: U32,
}

/// How long a part is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Length {
    /// Exactly.
    Exact(usize),
    /// A multiple of the first number, up to the second.
    UpTo(usize, usize),
}

impl Length {
    fn accepts(self, bytes: usize) -> bool {
        match self {
            Self::Exact(exact) => bytes == exact,
            Self::UpTo(unit, most) => bytes <= most && bytes.is_multiple_of(unit),
        }
    }
}

/// A part of the state as the format knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub name: &'static str,
    pub kind: u16,
    pub length: Length,
}

/// The registers of the VM's device, if it has one; they follow the parts that the kernel keeps.
const DEVICE: Record = {
    let bytes = size_of::<Registers>();
    Record { name: "device registers", kind: 16, length: Length::UpTo(bytes, bytes) }
};

/// State that has the right form: the parts as slices of the bytes that were read.
#[derive(Debug)]
pub(crate) struct Saved<'a> {
    pub tsc_khz: u32,
    /// For each vCPU, by index, its parts in the order of [`VCPU_PARTS`].
    pub vcpus: Vec<Vec<&'a [u8]>>,
    /// In the order of [`VM_PARTS`].
    pub vm: Vec<&'a [u8]>,
    /// The registers of the device; none if the VM has none.
    pub device: Option<&'a Registers>,
}

/// State as bytes: the parts of each vCPU in the order of [`VCPU_PARTS`], then of the VM, then the device's registers.
pub(crate) fn write(
    tsc_khz: u32,
    vcpus: &[Vec<Vec<u8>>],
    vm: &[Vec<u8>],
    device: Option<&Registers>,
) -> Vec<u8> {
    let header = Header {
        magic: MAGIC,
        version: STATE_VERSION.into(),
        // At most MAX_VCPUS.
        vcpus: u32::try_from(vcpus.len()).unwrap_or(u32::MAX).into(),
        tsc_khz: tsc_khz.into(),
        reserved: 0.into(),
    };
    let mut state = header.as_bytes().to_vec();
    let mut record = |part: &Record, vcpu: u16, bytes: &[u8]| {
        let header = RecordHeader {
            kind: part.kind.into(),
            vcpu: vcpu.into(),
            // A few KiB: bounded by the part's `Length`.
            bytes: u32::try_from(bytes.len()).unwrap_or(u32::MAX).into(),
        };
        state.extend_from_slice(header.as_bytes());
        state.extend_from_slice(bytes);
    };
    for (index, parts) in (0..OF_VM).zip(vcpus) {
        VCPU_PARTS.iter().zip(parts).for_each(|(part, bytes)| record(&part.record, index, bytes));
    }
    VM_PARTS.iter().zip(vm).for_each(|(part, bytes)| record(&part.record, OF_VM, bytes));
    record(&DEVICE, OF_VM, device.map_or(&[], |registers| registers.as_bytes()));
    state
}

/// Reads state for a VM of `vcpus` vCPUs.
pub(crate) fn read(bytes: &[u8], vcpus: usize) -> Result<Saved<'_>, StateError> {
    let (header, mut rest) = Header::ref_from_prefix(bytes).map_err(|_| StateError::NotState)?;
    if header.magic != MAGIC {
        return Err(StateError::NotState);
    }
    if header.version.get() != STATE_VERSION {
        return Err(StateError::Version { found: header.version.get() });
    }
    debug_assert!(vcpus <= MAX_VCPUS);
    if usize::try_from(header.vcpus.get()) != Ok(vcpus) {
        return Err(StateError::Vcpus { found: header.vcpus.get(), expected: vcpus });
    }
    let mut saved = Saved {
        tsc_khz: header.tsc_khz.get(),
        vcpus: Vec::with_capacity(vcpus),
        vm: Vec::new(),
        device: None,
    };
    for vcpu in (0..OF_VM).take(vcpus) {
        let parts = VCPU_PARTS.iter().map(|part| record(&mut rest, &part.record, vcpu));
        saved.vcpus.push(parts.collect::<Result<_, _>>()?);
    }
    saved.vm =
        VM_PARTS.iter().map(|part| record(&mut rest, &part.record, OF_VM)).collect::<Result<_, _>>()?;
    saved.device = Registers::ref_from_bytes(record(&mut rest, &DEVICE, OF_VM)?).ok();
    if !rest.is_empty() {
        return Err(StateError::Trailing(rest.len()));
    }
    Ok(saved)
}

fn record<'a>(rest: &mut &'a [u8], part: &Record, vcpu: u16) -> Result<&'a [u8], StateError> {
    let name = part.name;
    let missing = |needed: usize, found: usize| StateError::Truncated {
        within: name,
        missing: needed.saturating_sub(found),
    };
    let (header, tail) =
        RecordHeader::ref_from_prefix(rest).map_err(|_| missing(size_of::<RecordHeader>(), rest.len()))?;
    if (header.kind.get(), header.vcpu.get()) != (part.kind, vcpu) {
        let (kind, vcpu) = (header.kind.get(), header.vcpu.get());
        return Err(StateError::Unexpected { kind, vcpu, expected: name });
    }
    let bytes = usize::try_from(header.bytes.get()).unwrap_or(usize::MAX);
    if !part.length.accepts(bytes) {
        let expected = match part.length {
            Length::Exact(exact) => format!("it has {exact}"),
            Length::UpTo(unit, most) => format!("it has a multiple of {unit}, at most {most}"),
        };
        return Err(StateError::Length { part: name, found: bytes, expected });
    }
    let (part, tail) = tail.split_at_checked(bytes).ok_or_else(|| missing(bytes, tail.len()))?;
    *rest = tail;
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::kernel::Part;
    use super::*;
    use proptest::prelude::*;

    /// Well-formed state whose parts are all of one byte.
    fn state(vcpus: usize, fill: u8) -> Vec<u8> {
        let filled = |part: &Part| match part.record.length {
            Length::Exact(exact) => vec![fill; exact],
            Length::UpTo(unit, most) => vec![fill; (unit * 3).min(most)],
        };
        let vcpu: Vec<_> = VCPU_PARTS.iter().map(filled).collect();
        let vm: Vec<_> = VM_PARTS.iter().map(filled).collect();
        write(2_000_000, &vec![vcpu; vcpus], &vm, None)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let bytes = state(3, 7);
        let saved = read(&bytes, 3).unwrap();
        assert_eq!((saved.tsc_khz, saved.vcpus.len()), (2_000_000, 3));
        assert!(saved.vcpus.iter().flatten().chain(&saved.vm).all(|part| part.iter().all(|b| *b == 7)));
    }

    #[test]
    fn no_two_kinds_of_record_share_a_number() {
        let mut kinds: Vec<u16> = VCPU_PARTS.iter().chain(&VM_PARTS).map(|part| part.record.kind).collect();
        kinds.push(DEVICE.kind);
        let all = kinds.len();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), all);
    }

    #[test]
    fn every_way_to_be_wrong_has_its_own_answer() {
        let bytes = state(2, 0);
        assert!(matches!(read(b"", 2), Err(StateError::NotState)));
        assert!(matches!(read(&[0; 100], 2), Err(StateError::NotState)));
        assert!(matches!(read(&bytes, 3), Err(StateError::Vcpus { found: 2, expected: 3 })));
        assert!(matches!(read(&[&bytes[..], b"x"].concat(), 2), Err(StateError::Trailing(1))));
        let mut newer = bytes.clone();
        newer[8] += 1;
        assert!(matches!(read(&newer, 2), Err(StateError::Version { found: 3 })));
        let mut swapped = bytes.clone();
        swapped[26] ^= 1;
        assert!(matches!(read(&swapped, 2), Err(StateError::Unexpected { vcpu: 1, .. })));
        let mut long = bytes.clone();
        long[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&long, 2), Err(StateError::Length { .. })));
    }

    #[test]
    fn state_cut_anywhere_is_refused() {
        let bytes = state(1, 0);
        for end in 0..bytes.len() {
            assert!(read(&bytes[..end], 1).is_err(), "cut at {end}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..4096), vcpus in 1usize..=16,
        ) {
            let _ = read(&bytes, vcpus);
        }

        #[test]
        fn changed_bytes_are_refused_or_read_as_parts_within_the_input(
            at in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = state(2, 1);
            for (index, value) in at {
                let index = index.index(bytes.len());
                bytes[index] = value;
            }
            if let Ok(saved) = read(&bytes, 2) {
                let parts: usize = saved.vcpus.iter().flatten().chain(&saved.vm).map(|part| part.len()).sum();
                prop_assert!(parts < bytes.len());
            }
        }
    }
}
