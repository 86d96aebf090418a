//! What an offload process may not do any more once it is connected to its VMM: start programs, look into other processes,
//! change files, and reach for the kernel's less travelled parts. A source's or a destination's bytes that took it over
//! would find no more than its sockets, the guest memory that it was lent, and files that its user may read.
//!
//! A list of what is refused, not of what is allowed: what it needs differs by kernel, C library and transport, and a
//! refusal in the middle of a standstill would cost the guest more than the attack.

use anyhow::{Context, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

/// Refused whatever their arguments.
const REFUSED: &[libc::c_long] = &[
    // Other programs and other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    // Files.
    libc::SYS_openat2,
    libc::SYS_open_by_handle_at,
    libc::SYS_truncate,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    // Namespaces and mounts.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    // The kernel's own.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_acct,
    libc::SYS_quotactl,
    // Other users.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
];

/// What the same calls are on x86 besides, under their older names.
#[cfg(target_arch = "x86_64")]
const REFUSED_BESIDES: &[libc::c_long] = &[
    libc::SYS_creat,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_BESIDES: &[libc::c_long] = &[];

/// Opening is refused for anything but reading. The call, and which of its arguments has the flags.
#[cfg(target_arch = "x86_64")]
const OPENING: &[(libc::c_long, u8)] = &[(libc::SYS_openat, 2), (libc::SYS_open, 1)];
#[cfg(not(target_arch = "x86_64"))]
const OPENING: &[(libc::c_long, u8)] = &[(libc::SYS_openat, 2)];

/// Puts all threads of this process, and those to come, into the sandbox. What is refused ends with `EPERM`.
pub fn enter() -> Result<()> {
    apply_filter_all_threads(&program()?).context("entering the sandbox (seccomp)")
}

fn program() -> Result<BpfProgram> {
    let writes = |argument: u8, flag: libc::c_int| -> Result<SeccompRule> {
        let flag = u64::try_from(flag)?;
        let is_set = SeccompCmpOp::MaskedEq(flag);
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is_set, flag)?;
        Ok(SeccompRule::new(vec![condition])?)
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_BESIDES).map(|call| (*call, Vec::new())).collect();
    for &(call, flags) in OPENING {
        let for_writing = [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT].map(|flag| writes(flags, flag));
        rules.insert(call, for_writing.into_iter().collect::<Result<_>>()?);
    }
    let refused = SeccompAction::Errno(u32::try_from(libc::EPERM)?);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refused, arch)?.try_into()?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::process::Command;
    use std::thread;

    use super::*;

    /// One thread of the test process is put into it: it has no other thread to spoil.
    #[test]
    fn a_thread_in_the_sandbox_reads_files_and_neither_writes_them_nor_starts_programs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "text").unwrap();
        let confined = thread::spawn(move || {
            seccompiler::apply_filter(&program().unwrap()).unwrap();
            let refused =
                |outcome: std::io::Result<()>| outcome.unwrap_err().raw_os_error() == Some(libc::EPERM);
            assert_eq!(fs::read_to_string(&path).unwrap(), "text");
            assert!(refused(File::create(&path).map(drop)));
            assert!(refused(File::options().append(true).open(&path).map(drop)));
            assert!(refused(fs::remove_file(&path)));
            assert!(refused(fs::rename(&path, path.with_extension("new"))));
            assert!(refused(Command::new("/bin/true").status().map(drop)));
            fs::read_to_string(&path).unwrap()
        });
        assert_eq!(confined.join().unwrap(), "text");
    }
}
