//! userfaultfd's asynchronous write protection (Linux 6.7): the kernel marks pages as written and wakes nobody.
#![expect(unsafe_code, reason = "userfaultfd is used by bare ioctls on address ranges")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A userfaultfd that does nothing but asynchronous write protection: no event ever comes, nobody reads it. It acts on the
/// memory of the process that opened it, whoever has it.
#[derive(Debug)]
pub(crate) struct Userfault {
    file: File,
}

/// Why there is no [`Userfault`].
#[derive(Debug)]
pub(crate) enum Refused {
    /// Neither the system call, in the mode that needs no privilege, nor `/dev/userfaultfd` gave a descriptor.
    Descriptor(io::Error),
    /// The kernel has no asynchronous write protection.
    AsyncWriteProtection(io::Error),
}

/// `struct uffdio_api` of include/uapi/linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register` of the same.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect` of the same.
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

const _: () =
    assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<WriteProtect>() == 24);

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
/// `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`.
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// `_IO(0xAA, 0x00)`, on /dev/userfaultfd (Linux 6.1).
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFD_API: u64 = 0xaa;
/// Faults of kernel code are not delivered, which is what needs privilege (Linux 5.11). Asynchronous protection
/// delivers none, so nothing is given up.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// How often a change is tried again that another thread's `mmap` or `munmap` was in the way of.
const CHANGES_RETRIED: u32 = 100;
const REGISTER_MODE_WP: u64 = 1 << 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

impl Userfault {
    /// A userfaultfd without any range yet.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub(crate) fn open() -> Result<Self, Refused> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: a system call without pointers.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match libc::c_int::try_from(result) {
            Ok(fd @ 0..) => fd,
            _ => {
                let refused = io::Error::last_os_error();
                Self::from_device(flags).ok_or(Refused::Descriptor(refused))?
            }
        };
        // SAFETY: the kernel has just opened `fd` for us, and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let features = FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM
            | FEATURE_WP_UNPOPULATED
            | FEATURE_WP_ASYNC;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the kernel's struct, by the size assertion and the field order above, alive during the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), UFFDIO_API, &raw mut api) } != 0 {
            return Err(Refused::AsyncWriteProtection(io::Error::last_os_error()));
        }
        Ok(Self { file })
    }

    fn from_device(flags: libc::c_int) -> Option<libc::c_int> {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
        // SAFETY: a call without pointers; it takes the flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        (fd >= 0).then_some(fd)
    }

    /// Takes on a range of memory: from now on its pages can be protected, by [`change`](Self::change) or by a scan. None is
    /// yet.
    ///
    /// # Errors
    ///
    /// The kernel's: the range is not mapped, or of memory that cannot be protected.
    pub(crate) fn register(&self, host: Range<usize>) -> io::Result<()> {
        let (start, len) = (host.start as u64, host.len() as u64);
        let mut register = Register { start, len, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY:
        // * The kernel's struct, by the size assertion and the field order above, alive during the call.
        // * Protection changes no byte of the range, and no access to it blocks: `WP_ASYNC` is on.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sets or removes the write protection of a range that was taken on. Either way KVM unmaps the range from its guests,
    /// with their TLBs flushed, before this returns: Linux tells KVM of a change of protection before it looks whether
    /// anything changes (`change_pmd_range`, 6.18).
    ///
    /// # Errors
    ///
    /// The kernel's: `EINVAL` if the range is not aligned to its huge pages of hugetlbfs, `ENOENT` if it is not taken on.
    pub(crate) fn change(&self, host: Range<usize>, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let change = WriteProtect { start: host.start as u64, len: host.len() as u64, mode };
        for _ in 0..=CHANGES_RETRIED {
            let mut change = WriteProtect { ..change };
            // SAFETY:
            // * The kernel's struct, by the size assertion and the field order above, alive during the call.
            // * Protection changes no byte of the range, and no access to it blocks: `WP_ASYNC` is on.
            if unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut change) } == 0 {
                return Ok(());
            }
            // Mappings of this process are being changed by another thread.
            if io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
                break;
            }
        }
        Err(io::Error::last_os_error())
    }
}
