//! The VMs of this host as the kernel holds them: processes, vCPUs, dirty rings, memory slots.
//!
//! Read through a BPF iterator over all open files (`bpf/profile.bpf.c`, `inventory`), because neither /proc nor any
//! ioctl of another process tells whether a VM has rings, which slots log, and where they lie. It is a look, not a
//! lock: a VM that changes its slots meanwhile can give one wrong line, gone at the next look.

use std::collections::BTreeMap;
use std::fmt;

use zerocopy::FromBytes;

use crate::layout::{RECORD_SLOT, RECORD_VCPU, RECORD_VM, Record, SlotBody, VcpuBody, VmBody};

/// Which VM of the host: distinct for VMs that exist at the same time, meaningless otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub(crate) u64);

/// Which ring, hence which vCPU, of the host; as [`VmId`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingId(pub(crate) u64);

// Both are kernel addresses, which no log needs in full.
impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId(…{:06x})", self.0 & 0xff_ffff)
    }
}

impl fmt::Debug for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RingId(…{:06x})", self.0 & 0xff_ffff)
    }
}

/// KVM_MEM_LOG_DIRTY_PAGES of `linux/kvm.h`.
const LOG_DIRTY_PAGES: u32 = 1;

/// All VMs that some process holds a descriptor of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// In the order of (process, descriptor).
    pub vms: Vec<Vm>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Identity within one run.
    pub id: VmId,
    /// The process that runs it.
    pub pid: u32,
    /// Its descriptor in that process; `None` if only those of its vCPUs are still open.
    pub fd: Option<u32>,
    /// The thread that created it, by thread id.
    pub creator_tid: u32,
    /// In the order of their numbers.
    pub vcpus: Vec<Vcpu>,
    /// In the order of their guest addresses.
    pub slots: Vec<Slot>,
}

/// A vCPU of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its ring, whether or not it is in use.
    pub ring: RingId,
    /// The number it was created with.
    pub vcpu: u32,
    /// The thread that ran it last; `None` before its first run.
    pub tid: Option<u32>,
    /// Size of its ring, 0 if the VM has no rings.
    pub ring_entries: u32,
    /// Pushes to the ring since it was made, modulo 2^32: the kernel's own index.
    pub dirty_index: u32,
    /// Entries that are pushed and not recycled; more than `ring_entries` means that some are overwritten.
    pub ring_used: u32,
}

/// A memory slot of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Address space << 16 | slot id, as in a ring entry.
    pub slot: u32,
    /// Its first guest page.
    pub first_page: u64,
    /// Its length in pages.
    pub pages: u64,
    /// Where it lies in the process.
    pub address: u64,
    /// Whether its writes are logged, in rings or in a bitmap.
    pub logs: bool,
}

impl Vm {
    /// Whether it reports through dirty rings.
    pub fn has_rings(&self) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.ring_entries > 0)
    }

    /// Whether most of its memory logs writes. A frame buffer that a VMM logs for its display alone does not count.
    pub fn logs(&self) -> bool {
        let all = self.pages();
        let logged: u64 = self.slots.iter().filter(|slot| slot.logs).map(|slot| slot.pages).sum();
        logged * 2 > all
    }

    /// Pages of all its slots.
    pub fn pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages).sum()
    }
}

impl Inventory {
    /// Builds the inventory from the bytes that the iterator wrote; lines that make no sense are left out.
    pub(crate) fn from_records(mut bytes: &[u8]) -> Self {
        let mut vms: BTreeMap<u64, Vm> = BTreeMap::new();
        while let Ok((record, rest)) = Record::read_from_prefix(bytes) {
            bytes = rest;
            if record.kvm == 0 {
                continue;
            }
            let vm = vms.entry(record.kvm).or_insert_with(|| Vm {
                id: VmId(record.kvm),
                pid: record.tgid,
                fd: None,
                creator_tid: 0,
                vcpus: Vec::new(),
                slots: Vec::new(),
            });
            vm.add(&record);
        }
        let mut vms: Vec<Vm> = vms.into_values().collect();
        for vm in &mut vms {
            // The same descriptor may be open twice.
            vm.vcpus.sort_by_key(|vcpu| (vcpu.vcpu, vcpu.ring));
            vm.vcpus.dedup_by_key(|vcpu| vcpu.ring);
            vm.slots.sort_by_key(|slot| (slot.first_page, slot.slot));
            vm.slots.dedup_by_key(|slot| slot.slot);
        }
        vms.sort_by_key(|vm| (vm.pid, vm.fd, vm.id));
        Self { vms }
    }

    /// The VMs of one process.
    pub fn of_process(&self, pid: u32) -> impl Iterator<Item = &Vm> {
        self.vms.iter().filter(move |vm| vm.pid == pid)
    }
}

impl Vm {
    fn add(&mut self, record: &Record) {
        match record.kind {
            RECORD_VM => {
                let Ok((body, _)) = VmBody::read_from_prefix(&record.body) else { return };
                self.fd = Some(self.fd.map_or(record.fd, |fd| fd.min(record.fd)));
                self.creator_tid = body.creator;
            }
            RECORD_VCPU => {
                let Ok(body) = VcpuBody::read_from_bytes(&record.body) else { return };
                self.creator_tid = body.creator;
                self.vcpus.push(Vcpu {
                    ring: RingId(body.ring),
                    vcpu: body.vcpu,
                    tid: (body.tid != 0).then_some(body.tid),
                    ring_entries: body.ring_entries,
                    dirty_index: body.dirty_index,
                    ring_used: if body.ring_entries == 0 {
                        0
                    } else {
                        body.dirty_index.wrapping_sub(body.reset_index)
                    },
                });
            }
            RECORD_SLOT => {
                let Ok(body) = SlotBody::read_from_bytes(&record.body) else { return };
                // What KVM accepts (KVM_MEM_MAX_NR_PAGES): anything else is a slot that went away while it was read.
                if body.pages == 0 || body.pages > (1 << 31) - 1 || body.base_gfn >> 52 != 0 {
                    return;
                }
                self.slots.push(Slot {
                    slot: body.slot,
                    first_page: body.base_gfn,
                    pages: body.pages,
                    address: body.address,
                    logs: body.flags & LOG_DIRTY_PAGES != 0,
                });
            }
            _ => {}
        }
    }
}
