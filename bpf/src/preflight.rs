//! Before anything is loaded: may we, and is this a kernel that the programs understand?
//!
//! Owns the list of fields and tracepoints that `bpf/profile.bpf.c` relies on.

use std::fs;

use crate::kernel_types::MemberKind::{Array, Embedded, Number, Pointer};
use crate::kernel_types::{KernelTypes, MemberKind};
use crate::{Error, error};

const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Checks the effective capabilities of this thread.
///
/// # Errors
///
/// [`Error::MissingRights`] with the names of those that are missing.
pub fn check_rights() -> Result<(), Error> {
    let doing = || "read /proc/thread-self/status".to_owned();
    let status = fs::read_to_string("/proc/thread-self/status")
        .map_err(|error| error::Error::Read { doing: doing(), error })?;
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    let missing = missing_rights(effective);
    if missing.is_empty() { Ok(()) } else { Err(Error::MissingRights { missing }) }
}

fn missing_rights(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective >> capability & 1 == 1;
    // CAP_SYS_ADMIN contains the other two, as it did before Linux 5.8 split them off.
    let needed = [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")];
    needed
        .into_iter()
        .filter(|&(capability, _)| !has(CAP_SYS_ADMIN) && !has(capability))
        .map(|(_, name)| name)
        .collect()
}

/// Which of the optional programs this kernel can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// `kvm_mmu_set_spte`: shadow or EPT entries that become writable.
    pub set_spte: bool,
    /// `fast_page_fault`: write protection lifted without taking the MMU lock.
    pub fast_fault: bool,
    /// `kvm_pml_full`: the processor's page-modification log ran full.
    pub pml_full: bool,
}

/// The required tracepoints, with their arguments.
const TRACEPOINTS: [(&str, usize); 4] = [
    ("kvm_dirty_ring_push", 3),
    ("kvm_dirty_ring_reset", 1),
    ("kvm_dirty_ring_exit", 1),
    ("kvm_userspace_exit", 2),
];

const FIELDS: [(&str, &str, MemberKind); 20] = [
    ("kvm_dirty_ring", "dirty_index", Number),
    ("kvm_dirty_ring", "reset_index", Number),
    ("kvm_dirty_ring", "size", Number),
    // Embedded: the vCPU is found from the address of its ring.
    ("kvm_vcpu", "dirty_ring", Embedded),
    ("kvm_vcpu", "kvm", Pointer),
    ("kvm_vcpu", "vcpu_id", Number),
    ("kvm_vcpu", "pid", Pointer),
    ("kvm", "mm", Pointer),
    ("kvm", "memslots", Array),
    ("kvm", "userspace_pid", Number),
    ("kvm", "dirty_ring_size", Number),
    ("pid", "numbers", Array),
    ("task_struct", "mm", Pointer),
    ("task_struct", "tgid", Number),
    ("file", "private_data", Pointer),
    ("file", "f_inode", Pointer),
    ("inode", "i_sb", Pointer),
    ("super_block", "s_magic", Number),
    ("dentry", "d_name", Embedded),
    ("bpf_iter__task_file", "file", Pointer),
];

/// Checks that every field the programs read is what they take it for, and finds the optional tracepoints.
///
/// # Errors
///
/// [`Error::Tracepoint`] or [`Error::Field`], naming the first one that is missing or different.
pub fn check_kernel(types: &KernelTypes) -> Result<Sources, Error> {
    for (tracepoint, expected) in TRACEPOINTS {
        let found = match types.tracepoint_arguments(tracepoint) {
            Some(found) if found == expected => continue,
            Some(found) => format!("it has {found} here"),
            None => "this kernel does not have it".to_owned(),
        };
        return Err(Error::Tracepoint { tracepoint, expected, found });
    }
    for (record, field, expected) in FIELDS {
        let found = match types.member(record, field) {
            Some(found) if found == expected => continue,
            Some(found) => format!("it is {found:?} here, and {expected:?} is expected"),
            None => "this kernel does not have it".to_owned(),
        };
        return Err(Error::Field { record, field, found });
    }
    let has = |tracepoint, arguments| types.tracepoint_arguments(tracepoint) == Some(arguments);
    Ok(Sources {
        set_spte: has("kvm_mmu_set_spte", 3),
        fast_fault: has("fast_page_fault", 5),
        pml_full: has("kvm_pml_full", 1),
    })
}
