//! What loads, and what is refused before it is loaded.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its kernel fails")]

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use common::profiler;
use ringferry_bpf::{Counting, KernelTypes, Options, Sources, check_kernel};

#[test]
fn the_programs_load_under_every_combination_of_features() {
    let countings = [Counting::EveryPush, Counting::EveryPushAndRegions, Counting::Indices];
    for (features, counting) in (0..8_u32).flat_map(|features| countings.map(|counting| (features, counting)))
    {
        let bit = |index: u32| features >> index & 1 == 1;
        let sources = Sources { set_spte: bit(0), fast_fault: bit(1), pml_full: bit(2) };
        let options = Options { counting, sources: Some(sources), ..Options::default() };
        let Some(mut profiler) = profiler(options) else { return };
        let loaded = profiler.sources();
        // What was not asked for is not there; what the kernel lacks is not there either.
        assert!(!loaded.set_spte || sources.set_spte);
        assert!(!loaded.fast_fault || sources.fast_fault);
        assert!(!loaded.pml_full || sources.pml_full);
        // Attaches the optional ones too.
        profiler.watch_threads(&[std::process::id()].into()).unwrap();
        profiler.watch_threads(&[].into()).unwrap();
    }
}

#[test]
fn map_memory_is_bounded_whatever_the_number_of_vcpus_asked_for() {
    let Some(small) = profiler(Options { vcpus_max: Some(1), ..Options::default() }) else { return };
    assert!(small.map_bytes().unwrap() < 128 << 10);
    let Some(usual) = profiler(Options { counting: Counting::EveryPushAndRegions, ..Options::default() })
    else {
        return;
    };
    assert!(usual.map_bytes().unwrap() < 64 << 20, "{}", usual.map_bytes().unwrap());
}

/// The types of a kernel as clang writes them down for `source`.
fn kernel(source: &str) -> Option<KernelTypes> {
    static COMPILED: AtomicU32 = AtomicU32::new(0);
    let number = COMPILED.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("ringferry-btf-{}-{number}", std::process::id()));
    let (c, object) = (path.with_extension("c"), path.with_extension("o"));
    std::fs::write(&c, source).unwrap();
    let compiled =
        Command::new("clang").args(["-g", "-target", "bpf", "-c", "-o"]).arg(&object).arg(&c).status();
    std::fs::remove_file(&c).unwrap();
    let Ok(compiled) = compiled else {
        ringferry_testvm::skip("clang is not installed (apt-get install clang)");
        return None;
    };
    assert!(compiled.success());
    let elf = std::fs::read(&object).unwrap();
    std::fs::remove_file(&object).unwrap();
    // The section .BTF, by its header: magic, version 1, no flags, 24 bytes long.
    let header = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
    let at = elf.windows(header.len()).position(|bytes| bytes == header).unwrap();
    let mut types = KernelTypes::default();
    types.add(&elf[at..]).unwrap();
    Some(types)
}

/// As Linux has them, as far as the programs look.
const LINUX: &str = "
struct kvm_dirty_ring { unsigned dirty_index, reset_index, size; int index; };
struct upid { int nr; };
struct pid { struct upid numbers[1]; };
struct mm_struct;
struct task_struct { int tgid; struct mm_struct *mm; };
struct kvm_memslots;
struct kvm { struct mm_struct *mm; struct kvm_memslots *memslots[2]; int userspace_pid; unsigned dirty_ring_size; };
struct kvm_vcpu { struct kvm *kvm; int vcpu_id; struct pid *pid; struct kvm_dirty_ring dirty_ring; };
struct super_block { unsigned long s_magic; };
struct inode { struct super_block *i_sb; };
struct qstr { const unsigned char *name; };
struct dentry { union { struct qstr __d_name; const struct qstr d_name; }; };
struct path { struct dentry *dentry; };
struct file { void *private_data; struct inode *f_inode; struct path f_path; };
struct bpf_iter__task_file { union { struct file *file; }; };
typedef void (*btf_trace_kvm_dirty_ring_push)(void *, struct kvm_dirty_ring *, unsigned, unsigned long long);
typedef void (*btf_trace_kvm_dirty_ring_reset)(void *, struct kvm_dirty_ring *);
typedef void (*btf_trace_kvm_dirty_ring_exit)(void *, struct kvm_vcpu *);
typedef void (*btf_trace_kvm_userspace_exit)(void *, unsigned, int);
struct kvm_dirty_ring ring; struct kvm_vcpu vcpu; struct file file; struct dentry dentry; struct task_struct task; struct bpf_iter__task_file iter;
btf_trace_kvm_dirty_ring_push push; btf_trace_kvm_dirty_ring_reset reset; btf_trace_kvm_dirty_ring_exit full;
btf_trace_kvm_userspace_exit userspace_exit; struct kvm kvm; struct inode inode; struct super_block super; struct pid pid;
";

#[test]
fn a_kernel_without_the_optional_tracepoints_is_accepted_without_their_programs() {
    let Some(types) = kernel(LINUX) else { return };
    let none = Sources { set_spte: false, fast_fault: false, pml_full: false };
    assert_eq!(check_kernel(&types).unwrap(), none);
}

#[test]
fn an_optional_tracepoint_of_another_shape_is_left_out() {
    let types = kernel(&format!(
        "{LINUX} typedef void (*btf_trace_kvm_pml_full)(void *, unsigned, int); btf_trace_kvm_pml_full pml;"
    ));
    let Some(types) = types else { return };
    assert!(!check_kernel(&types).unwrap().pml_full);
    let types = kernel(&format!(
        "{LINUX} typedef void (*btf_trace_kvm_pml_full)(void *, unsigned); btf_trace_kvm_pml_full full2;"
    ));
    assert!(check_kernel(&types.unwrap()).unwrap().pml_full);
}

#[test]
fn a_kernel_whose_fields_differ_is_refused_by_the_name_of_the_field() {
    for (from, to, said) in [
        (
            "struct kvm_dirty_ring dirty_ring;",
            "struct kvm_dirty_ring *dirty_ring;",
            "kvm_vcpu.dirty_ring: it is Pointer",
        ),
        (
            "unsigned dirty_index, reset_index, size;",
            "unsigned dirty_index, size;",
            "kvm_dirty_ring.reset_index",
        ),
        ("int userspace_pid;", "", "kvm.userspace_pid"),
        (
            "kvm_dirty_ring_reset",
            "kvm_ring_reset",
            "tracepoint kvm_dirty_ring_reset: this kernel does not have it",
        ),
        (
            "*, unsigned, unsigned long long)",
            "*, unsigned long long)",
            "tracepoint kvm_dirty_ring_push: it has 2 here",
        ),
    ] {
        let changed = LINUX.replace(from, to);
        assert_ne!(changed, LINUX);
        let Some(types) = kernel(&changed) else { return };
        let error = check_kernel(&types).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn type_information_that_is_cut_short_anywhere_is_an_error_or_less_never_a_panic() {
    let Ok(blob) = std::fs::read("/sys/kernel/btf/vmlinux") else {
        ringferry_testvm::skip("no /sys/kernel/btf/vmlinux");
        return;
    };
    assert!(KernelTypes::default().add(&[]).is_err());
    for length in (0..64).chain((64..blob.len()).step_by(blob.len() / 16)) {
        assert!(KernelTypes::default().add(&blob[..length]).is_err(), "{length} bytes were taken for all");
    }
}
