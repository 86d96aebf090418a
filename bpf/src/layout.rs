//! What the BPF programs and user space exchange: `bpf/layout.h` in Rust. Owns shapes only.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The whole of `.rodata`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Settings {
    pub only_tgid: u32,
    pub by_index: u32,
    pub cpus: u32,
}

/// What a CPU pushed to the ring that it pushed to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Tally {
    pub ring: u64,
    pub kvm: u64,
    pub pushes: u64,
    pub overwritten: u64,
    pub overflows: u64,
    pub high_water: u32,
    pub sequence: u32,
}

/// Of one ring, by one CPU, without its tally; the key is the ring's address in the kernel.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RingCounts {
    pub pushes: u64,
    pub overwritten: u64,
    pub overflows: u64,
    pub full_exits: u64,
    pub resets: u64,
    pub kvm: u64,
    pub tgid: u32,
    pub creator: u32,
    pub vcpu: u32,
    pub high_water: u32,
}

/// The indices of a ring when the programs last looked at them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Mark {
    pub dirty_index: u32,
    pub reset_index: u32,
}

/// Of a ring whose address a new ring has taken, over all CPUs.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct EndedRing {
    pub ring: u64,
    pub counts: RingCounts,
}

/// Of one vCPU thread, by one CPU; the key is the thread id.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ThreadCounts {
    pub spte_writable: u64,
    pub fast_fault_writable: u64,
    pub pml_full: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RegionKey {
    pub kvm: u64,
    pub slot: u32,
    pub region: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RegionCounts {
    pub pushes: u64,
    pub pages: [u64; 8],
}

/// Indices of the map `totals`.
pub(crate) const TOTAL_DROPPED_PUSHES: u32 = 0;
pub(crate) const TOTAL_DROPPED_REGION_PUSHES: u32 = 1;
pub(crate) const TOTAL_DROPPED_ENDED_PUSHES: u32 = 2;
pub(crate) const TOTAL_DROPPED_FULL_EXITS: u32 = 3;
pub(crate) const TOTAL_USERSPACE_EXITS_31: u32 = 4;

pub(crate) const RECORD_VM: u32 = 1;
pub(crate) const RECORD_VCPU: u32 = 2;
pub(crate) const RECORD_SLOT: u32 = 3;

/// One line of the inventory; `kind` says which of the bodies below the bytes are.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Record {
    pub kind: u32,
    pub tgid: u32,
    pub fd: u32,
    pub pad: u32,
    pub kvm: u64,
    pub body: [u8; 32],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct VmBody {
    pub creator: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct VcpuBody {
    pub ring: u64,
    pub vcpu: u32,
    pub tid: u32,
    pub dirty_index: u32,
    pub reset_index: u32,
    pub ring_entries: u32,
    pub creator: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SlotBody {
    pub base_gfn: u64,
    pub pages: u64,
    pub address: u64,
    pub flags: u32,
    pub slot: u32,
}

const _: () = {
    assert!(size_of::<Settings>() == 12);
    assert!(size_of::<Tally>() == 48);
    assert!(size_of::<RingCounts>() == 64);
    assert!(size_of::<EndedRing>() == 72);
    assert!(size_of::<ThreadCounts>() == 24);
    assert!(size_of::<RegionKey>() == 16);
    assert!(size_of::<RegionCounts>() == 72);
    assert!(size_of::<Record>() == 56);
    assert!(size_of::<VcpuBody>() == 32 && size_of::<SlotBody>() == 32);
};
