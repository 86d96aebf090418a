//! Moving the parts of a VM's state between KVM and bytes, in an order that KVM accepts.
//!
//! Most parts are structures of the kernel that nobody here looks into: an ioctl fills a buffer, and at the
//! destination another takes it and checks it. CPUID and MSRs carry a count and are handled as lists.
//!
//! Getting: `KVM_GET_MP_STATE` comes first, because it makes KVM act on an INIT or SIPI that is still latched,
//! which changes registers. Setting, the order of the table below, and why:
//!
//! 1. CPUID: says which bits of control registers, MSRs and XSAVE components are valid at all.
//! 2. SREGS: control registers, EFER and the base of the APIC; loads the PDPTEs from RAM if the guest uses PAE
//!    paging and the kernel has no SREGS2, so RAM comes before state.
//! 3. REGS. 4. XCRS: which components XSAVE has. 5. XSAVE. 6. DEBUGREGS.
//! 7. LAPIC: after its base and mode are known from SREGS.
//! 8. MSRs: the TSC deadline is armed only in a LAPIC that is set up for it. Setting `MSR_KVM_WALL_CLOCK_NEW` writes guest
//!    RAM, if the guest has registered a page for it.
//! 9. VCPU_EVENTS: SREGS also touches pending interrupts; this has the last word.
//! 10. MP_STATE: last, for SREGS may wake a vCPU that looks freshly reset.
//!
//! Then the VM: PICs, IOAPIC (its pending interrupts reach LAPICs that are there), PIT, and at last the clock,
//! which runs from that moment on. Time stood still for the guest between save and restore, for kvmclock and TSC
//! alike.
#![expect(unsafe_code, reason = "ioctls that kvm-ioctls has not, or only as unsafe functions")]

use std::ffi::c_ulong;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Length, Record, StateError};
use crate::error::{TestVmError, kvm_error};

/// One part of the state: a kind of record, and how KVM gives and takes it.
#[derive(Debug)]
pub(crate) struct Part {
    pub record: Record,
    how: How,
}

#[derive(Debug)]
enum How {
    /// A structure of the kernel, moved as it is.
    Structure {
        get: c_ulong,
        set: c_ulong,
        /// What its first word says, for those that are asked for by number.
        selector: u32,
    },
    /// A structure whose length the host's CPU decides.
    Xsave,
    /// A list, of [`CpuidEntry`].
    Cpuid,
    /// A list, of [`MsrEntry`].
    Msrs,
}

/// Ioctl numbers of KVM, `_IOR` and `_IOW` of <asm-generic/ioctl.h>.
const fn ioctl_number(direction: c_ulong, number: c_ulong, bytes: usize) -> c_ulong {
    const KVMIO: c_ulong = 0xae;
    direction << 30 | (bytes as c_ulong) << 16 | KVMIO << 8 | number
}
const WRITE: c_ulong = 1;
const READ: c_ulong = 2;

const fn structure<T>(name: &'static str, kind: u16, get: c_ulong, set: c_ulong) -> Part {
    let bytes = size_of::<T>();
    let (get, set) = (ioctl_number(READ, get, bytes), ioctl_number(WRITE, set, bytes));
    Part {
        record: Record { name, kind, length: Length::Exact(bytes) },
        how: How::Structure { get, set, selector: 0 },
    }
}

const fn chip(name: &'static str, kind: u16, selector: u32) -> Part {
    let bytes = size_of::<kvm_irqchip>();
    // <linux/kvm.h> has the direction of the second the wrong way round, and that is the ABI.
    let (get, set) = (ioctl_number(READ | WRITE, 0x62, bytes), ioctl_number(READ, 0x63, bytes));
    Part {
        record: Record { name, kind, length: Length::Exact(bytes) },
        how: How::Structure { get, set, selector },
    }
}

/// Larger than any XSAVE area: AMX, the largest component there is, makes it 11 KiB.
const MAX_XSAVE_BYTES: usize = 64 << 10;
const MAX_MSRS: usize = 512;
const KVM_GET_XSAVE2: c_ulong = ioctl_number(READ, 0xcf, size_of::<kvm_xsave>());
const KVM_SET_XSAVE: c_ulong = ioctl_number(WRITE, 0xa5, size_of::<kvm_xsave>());

/// The parts of a vCPU in the order in which they are set.
pub(crate) const VCPU_PARTS: [Part; 10] = [
    Part {
        record: Record {
            name: "CPUID",
            kind: 1,
            length: Length::UpTo(size_of::<CpuidEntry>(), size_of::<CpuidEntry>() * KVM_MAX_CPUID_ENTRIES),
        },
        how: How::Cpuid,
    },
    structure::<kvm_sregs2>("SREGS2", 2, 0xcc, 0xcd),
    structure::<kvm_regs>("REGS", 3, 0x81, 0x82),
    structure::<kvm_xcrs>("XCRS", 4, 0xa6, 0xa7),
    Part {
        record: Record { name: "XSAVE", kind: 5, length: Length::UpTo(4, MAX_XSAVE_BYTES) },
        how: How::Xsave,
    },
    structure::<kvm_debugregs>("DEBUGREGS", 6, 0xa1, 0xa2),
    structure::<kvm_lapic_state>("LAPIC", 7, 0x8e, 0x8f),
    Part {
        record: Record {
            name: "MSRS",
            kind: 8,
            length: Length::UpTo(size_of::<MsrEntry>(), size_of::<MsrEntry>() * MAX_MSRS),
        },
        how: How::Msrs,
    },
    structure::<kvm_vcpu_events>("VCPU_EVENTS", 9, 0x9f, 0xa0),
    structure::<kvm_mp_state>("MP_STATE", 10, 0x98, 0x99),
];
const MP_STATE: usize = VCPU_PARTS.len() - 1;

/// The parts of the VM in the order in which they are set.
pub(crate) const VM_PARTS: [Part; 5] = [
    chip("IRQCHIP (PIC master)", 11, 0),
    chip("IRQCHIP (PIC slave)", 12, 1),
    chip("IRQCHIP (IOAPIC)", 13, 2),
    structure::<kvm_pit_state2>("PIT2", 14, 0x9f, 0xa0),
    structure::<kvm_clock_data>("CLOCK", 15, 0x7c, 0x7b),
];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CpuidEntry {
    /// Function, index, flags, EAX, EBX, ECX, EDX.
    words: [U32; 7],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MsrEntry {
    index: U32,
    data: U64,
}

/// An MSR that did not move: the guest may see another value at the destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SkippedMsr {
    /// Of which vCPU.
    pub vcpu: usize,
    /// Its number.
    pub index: u32,
    /// The value that could not be set here; none if it could not be read at the source.
    pub value: Option<u64>,
}

/// What this host's KVM has to say about state, asked once.
#[derive(Debug)]
pub(crate) struct Shape {
    xsave_bytes: usize,
    msrs: Vec<u32>,
}

impl Shape {
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, TestVmError> {
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        if !(size_of::<kvm_xsave>()..=MAX_XSAVE_BYTES).contains(&xsave_bytes) {
            let (what, purpose) = ("KVM_CAP_XSAVE2", "saving vector registers");
            return Err(TestVmError::MissingCapability { what, purpose });
        }
        let list = kvm.get_msr_index_list();
        let list = list.map_err(|e| kvm_error("KVM_GET_MSR_INDEX_LIST", e, "this kernel is too old"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(UNLISTED_MSRS.into_iter().flatten());
        msrs.sort_unstable();
        msrs.dedup();
        Ok(Self { xsave_bytes, msrs })
    }
}

/// MTRRs: KVM keeps them for the guest and leaves them off its list. Fixed ranges, default type, variable ranges.
const UNLISTED_MSRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff, 0x200..=0x20f];

/// The parts of a vCPU that is outside `KVM_RUN`, in the order of [`VCPU_PARTS`].
pub(crate) fn save_vcpu(
    fd: &VcpuFd,
    vcpu: usize,
    shape: &Shape,
    skipped: &mut Vec<SkippedMsr>,
) -> Result<Vec<Vec<u8>>, StateError> {
    let of = || format!("vCPU {vcpu}");
    let mp_state = get(fd, &VCPU_PARTS[MP_STATE], shape, &of)?;
    let mut parts = Vec::with_capacity(VCPU_PARTS.len());
    for part in &VCPU_PARTS[..MP_STATE] {
        parts.push(match part.how {
            How::Msrs => get_msrs(fd, vcpu, shape, skipped)?,
            How::Cpuid => get_cpuid(fd).map_err(|error| failed("KVM_GET_CPUID2", of(), error))?,
            How::Structure { .. } | How::Xsave => get(fd, part, shape, &of)?,
        });
    }
    parts.push(mp_state);
    Ok(parts)
}

/// Sets the parts of a vCPU that has not run yet.
pub(crate) fn restore_vcpu(
    fd: &VcpuFd,
    vcpu: usize,
    shape: &Shape,
    parts: &[&[u8]],
    skipped: &mut Vec<SkippedMsr>,
) -> Result<(), StateError> {
    let of = || format!("vCPU {vcpu}");
    for (part, bytes) in VCPU_PARTS.iter().zip(parts) {
        match part.how {
            How::Cpuid => set_cpuid(fd, bytes).map_err(|error| failed("KVM_SET_CPUID2", of(), error))?,
            How::Msrs => set_msrs(fd, vcpu, bytes, skipped)?,
            How::Structure { .. } | How::Xsave => set(fd, part, bytes, shape, &of)?,
        }
    }
    Ok(())
}

/// The parts of the VM in the order of [`VM_PARTS`]. Every vCPU is outside `KVM_RUN`.
pub(crate) fn save_vm(vm: &VmFd, shape: &Shape) -> Result<Vec<Vec<u8>>, StateError> {
    let mut parts = VM_PARTS
        .iter()
        .map(|part| get(vm, part, shape, &|| "the VM".to_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    // Flags of KVM_GET_CLOCK say what it could find out; KVM_SET_CLOCK takes only one of them, and that one would
    // let the clock jump over the time that the move took, while the TSC does not.
    if let Some(clock) = parts.last_mut() {
        clock[size_of::<u64>()..][..size_of::<u32>()].fill(0);
    }
    Ok(parts)
}

/// Sets the parts of the VM, after those of all vCPUs.
pub(crate) fn restore_vm(vm: &VmFd, shape: &Shape, parts: &[&[u8]]) -> Result<(), StateError> {
    let of = || "the VM".to_owned();
    VM_PARTS.iter().zip(parts).try_for_each(|(part, bytes)| set(vm, part, bytes, shape, &of))
}

/// Makes the TSC of a vCPU run as fast as it did at the source.
pub(crate) fn match_tsc(fd: &VcpuFd, saved_khz: u32, here_khz: u32) -> Result<(), StateError> {
    if saved_khz == here_khz {
        return Ok(());
    }
    // KVM accepts any rate that it can scale to, and tolerates a difference of 250 parts in a million.
    fd.set_tsc_khz(saved_khz).map_err(|error| StateError::TscFrequency {
        saved_khz,
        here_khz,
        error: errno(error),
    })
}

fn get(
    fd: &impl AsRawFd,
    part: &Part,
    shape: &Shape,
    of: &dyn Fn() -> String,
) -> Result<Vec<u8>, StateError> {
    let (number, mut bytes) = match (&part.how, part.record.length) {
        (How::Structure { get, selector, .. }, Length::Exact(length)) => {
            let mut bytes = vec![0; length];
            // Structures without a selector have only results, which overwrite the zero.
            bytes[..size_of::<u32>()].copy_from_slice(&selector.to_ne_bytes());
            (*get, bytes)
        }
        _ => (KVM_GET_XSAVE2, vec![0; shape.xsave_bytes]),
    };
    // SAFETY:
    // * the buffer is as long as what this ioctl writes: the structure's size, which its number carries too, or
    //   for XSAVE2 what KVM_CAP_XSAVE2 said, and nothing in this process enables more components afterwards;
    // * it keeps no pointer.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), number, bytes.as_mut_ptr()) };
    if returned < 0 {
        return Err(failed(part.record.name, format!("{}, saving", of()), io::Error::last_os_error()));
    }
    Ok(bytes)
}

fn set(
    fd: &impl AsRawFd,
    part: &Part,
    bytes: &[u8],
    shape: &Shape,
    of: &dyn Fn() -> String,
) -> Result<(), StateError> {
    let mut bytes = bytes.to_vec();
    let number = match &part.how {
        How::Structure { set, selector, .. } => {
            // Which chip is our decision, not the peer's.
            if *set == ioctl_number(READ, 0x63, size_of::<kvm_irqchip>()) {
                bytes[..size_of::<u32>()].copy_from_slice(&selector.to_ne_bytes());
            }
            *set
        }
        _ if bytes.len() > shape.xsave_bytes => {
            let expected = format!("this host's CPU has {}: it lacks vector extensions", shape.xsave_bytes);
            return Err(StateError::Length { part: part.record.name, found: bytes.len(), expected });
        }
        _ => {
            // The kernel reads as much as this host's area has.
            bytes.resize(shape.xsave_bytes, 0);
            KVM_SET_XSAVE
        }
    };
    // SAFETY:
    // * the buffer is as long as what this ioctl reads: the structure's size, checked when the state was read, or
    //   for XSAVE what KVM_CAP_XSAVE2 said;
    // * it keeps no pointer.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), number, bytes.as_ptr()) };
    if returned < 0 {
        return Err(failed(part.record.name, format!("{}, restoring", of()), io::Error::last_os_error()));
    }
    Ok(())
}

fn get_cpuid(fd: &VcpuFd) -> io::Result<Vec<u8>> {
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(errno)?;
    let entries = cpuid.as_slice().iter().map(|e| CpuidEntry {
        words: [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx].map(U32::new),
    });
    Ok(entries.flat_map(|entry| entry.as_bytes().to_vec()).collect())
}

fn set_cpuid(fd: &VcpuFd, bytes: &[u8]) -> io::Result<()> {
    let entries = <[CpuidEntry]>::ref_from_bytes(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    let entries: Vec<_> = entries
        .iter()
        .map(|entry| {
            let [function, index, flags, eax, ebx, ecx, edx] = entry.words.map(U32::get);
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
        })
        .collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidData)?;
    fd.set_cpuid2(&cpuid).map_err(errno)
}

fn get_msrs(
    fd: &VcpuFd,
    vcpu: usize,
    shape: &Shape,
    skipped: &mut Vec<SkippedMsr>,
) -> Result<Vec<u8>, StateError> {
    let mut bytes = Vec::new();
    let mut left = &shape.msrs[..];
    // Each turn takes at least one MSR off the list.
    while !left.is_empty() {
        let asked = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            asked.iter().map(|index| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() }).collect();
        let read = with_msrs(&entries, |msrs| fd.get_msrs(msrs));
        let (read, msrs) = read.map_err(|error| failed("KVM_GET_MSRS", format!("vCPU {vcpu}"), error))?;
        for msr in &msrs.as_slice()[..read.min(entries.len())] {
            let entry = MsrEntry { index: msr.index.into(), data: msr.data.into() };
            bytes.extend_from_slice(entry.as_bytes());
        }
        left = &left[read.min(asked.len())..];
        // KVM stops at the first that it cannot read. Those that it listed itself are worth a word; the others were
        // a question whether they exist.
        if let (true, Some((index, rest))) = (read < asked.len(), left.split_first()) {
            if !UNLISTED_MSRS.iter().any(|range| range.contains(index)) {
                skipped.push(SkippedMsr { vcpu, index: *index, value: None });
            }
            left = rest;
        }
    }
    Ok(bytes)
}

fn set_msrs(fd: &VcpuFd, vcpu: usize, bytes: &[u8], skipped: &mut Vec<SkippedMsr>) -> Result<(), StateError> {
    let entries = <[MsrEntry]>::ref_from_bytes(bytes).map_err(|_| StateError::Length {
        part: "MSRS",
        found: bytes.len(),
        expected: "it is a list of 12-byte entries".to_owned(),
    })?;
    let entries: Vec<_> = entries
        .iter()
        .map(|e| kvm_msr_entry { index: e.index.get(), data: e.data.get(), ..kvm_msr_entry::default() })
        .collect();
    let mut left = &entries[..];
    // Each turn takes at least one MSR off the list.
    while !left.is_empty() {
        let asked = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let written = with_msrs(asked, |msrs| fd.set_msrs(msrs));
        let (written, _) = written.map_err(|error| failed("KVM_SET_MSRS", format!("vCPU {vcpu}"), error))?;
        left = &left[written.min(asked.len())..];
        if let (true, Some((msr, rest))) = (written < asked.len(), left.split_first()) {
            // What cannot be set but has the value already is no loss.
            let same = with_msrs(&[*msr], |msrs| fd.get_msrs(msrs))
                .is_ok_and(|(read, msrs)| read == 1 && msrs.as_slice()[0].data == msr.data);
            if !same {
                skipped.push(SkippedMsr { vcpu, index: msr.index, value: Some(msr.data) });
            }
            left = rest;
        }
    }
    Ok(())
}

/// Calls KVM with a list of MSRs; how many it took, and the list.
fn with_msrs(
    entries: &[kvm_msr_entry],
    call: impl FnOnce(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> io::Result<(usize, Msrs)> {
    let mut msrs = Msrs::from_entries(entries).map_err(|_| io::ErrorKind::InvalidInput)?;
    let done = call(&mut msrs).map_err(errno)?;
    Ok((done, msrs))
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

fn failed(call: &'static str, of: String, error: io::Error) -> StateError {
    let hint = match error.raw_os_error() {
        Some(libc::EINVAL) => "this host's CPU or kernel cannot hold what the guest had at the source",
        _ => "see whether the kernel's log says more",
    };
    StateError::Kvm { call, of, error, hint }
}
