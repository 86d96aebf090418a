//! What the guest's CPUs say about themselves: what KVM supports, with the identity of each vCPU filled in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::config::Config;
use crate::error::{TestVmError, kvm_error};

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const INDEXED: u32 = 1;

/// The CPUID of vCPU `index` of those that `config` asks for: one package of single-threaded cores, APIC id = index.
pub(crate) fn for_vcpu(kvm: &Kvm, index: usize, config: &Config, tsc_khz: u32) -> Result<CpuId, TestVmError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let supported =
        supported.map_err(|e| kvm_error("KVM_GET_SUPPORTED_CPUID", e, "this kernel is too old"))?;
    let mut entries = supported.as_slice().to_vec();
    identify(&mut entries, index, config.vcpus, tsc_khz);
    if !config.kvmclock {
        hide_kvmclock(&mut entries);
    }
    CpuId::from_entries(&entries).map_err(|_| TestVmError::Config {
        what: format!("{} CPUID entries", entries.len()),
        limit: format!("KVM takes {KVM_MAX_CPUID_ENTRIES}"),
    })
}

/// Takes KVM's clock out of what it offers to guests; they use the TSC then.
fn hide_kvmclock(entries: &mut [kvm_cpuid_entry2]) {
    // KVM_FEATURE_CLOCKSOURCE, _CLOCKSOURCE2 and _CLOCKSOURCE_STABLE_BIT of <asm/kvm_para.h>.
    const CLOCKS: u32 = 1 << 0 | 1 << 3 | 1 << 24;
    for entry in entries.iter_mut().filter(|entry| entry.function == 0x4000_0001) {
        entry.eax &= !CLOCKS;
    }
}

fn identify(entries: &mut Vec<kvm_cpuid_entry2>, index: usize, vcpus: usize, tsc_khz: u32) {
    let apic_id = u32::try_from(index).unwrap_or(u32::MAX);
    let count = u32::try_from(vcpus).unwrap_or(u32::MAX);
    // Bits of an APIC id that tell the cores of the package apart.
    let core_bits = count.next_power_of_two().trailing_zeros();

    // Topology leaves are written anew: what KVM passes through describes the host.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    let level = |function, level, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function,
        index: level,
        flags: INDEXED,
        eax,
        ebx,
        ecx: kind << 8 | level,
        edx: apic_id,
        ..kvm_cpuid_entry2::default()
    };
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in [0xb, 0x1f].into_iter().filter(|function| *function <= max_leaf) {
        // Thread, core, end of list: SDM volume 2, CPUID leaves 0BH and 1FH.
        entries.push(level(function, 0, 0, 1, 1));
        entries.push(level(function, 1, core_bits, count, 2));
        entries.push(level(function, 2, 0, 0, 0));
    }

    let mut timing_leaf = false;
    for entry in entries.iter_mut() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | apic_id << 24 | count << 16;
                const HTT: u32 = 1 << 28;
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
                // No nested virtualization: its state would have to move too.
                const VMX: u32 = 1 << 5;
                entry.ecx &= !VMX;
            }
            // Cores per package minus one; threads that share the cache minus one.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
            }
            0x4000_0000 if entry.eax < TIMING_LEAF => {
                entry.eax = TIMING_LEAF;
                timing_leaf = true;
            }
            0x8000_0001 => {
                const SVM: u32 = 1 << 2;
                entry.ecx &= !SVM;
            }
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if timing_leaf {
        // Frequencies in kHz of TSC and APIC timer, where VMware put them and Linux and QEMU look for them.
        const APIC_TIMER_KHZ: u32 = 1_000_000;
        entries.push(kvm_cpuid_entry2 {
            function: TIMING_LEAF,
            eax: tsc_khz,
            ebx: APIC_TIMER_KHZ,
            ..kvm_cpuid_entry2::default()
        });
    }
}

/// The leaf of the frequencies.
const TIMING_LEAF: u32 = 0x4000_0010;

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_all_agree_on_the_topology() {
        for vcpus in 1..=16usize {
            for index in 0..vcpus {
                let mut entries =
                    vec![leaf(0, 0xd), leaf(1, 0), leaf(0xb, 99), leaf(0x1f, 99), leaf(0x4000_0000, 0)];
                identify(&mut entries, index, vcpus, 2_100_000);
                let find = |function: u32, subleaf: u32| {
                    entries.iter().find(|e| e.function == function && e.index == subleaf)
                };
                let one = find(1, 0).unwrap();
                assert_eq!((one.ebx >> 24) as usize, index);
                assert_eq!((one.ebx >> 16 & 0xff) as usize, vcpus);
                let cores = find(0xb, 1).unwrap();
                assert_eq!((cores.edx as usize, cores.ebx as usize), (index, vcpus));
                assert!(index >> cores.eax == 0, "all in one package");
                assert!(find(0x1f, 0).is_none(), "a leaf beyond the maximum is not offered");
                assert_eq!(find(TIMING_LEAF, 0).unwrap().eax, 2_100_000);
                assert_eq!(find(0x4000_0000, 0).unwrap().eax, TIMING_LEAF);
            }
        }
    }
}
