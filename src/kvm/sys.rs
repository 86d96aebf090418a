//! The ioctls, one function each, on whatever file descriptor the VMM has. Nothing else in the library issues
//! one. What they mean and in which order they may be called is told in `caps`, `ring` and `log`.
#![expect(unsafe_code, reason = "ioctls and signal masks have no safe interface in libc")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};

const IOC_NONE: u32 = 0;
const IOC_WRITE: u32 = 1;
const IOC_READ: u32 = 2;

/// An ioctl number as `<asm-generic/ioctl.h>` builds it: direction, argument size, type, number. An `unsigned long` in
/// glibc, an `int` in musl, of which the kernel looks at these 32 bits.
const fn request(direction: u32, argument_bytes: u32, number: u32) -> libc::Ioctl {
    (direction << 30 | argument_bytes << 16 | KVMIO << 8 | number) as libc::Ioctl
}

const _: () = {
    assert!(size_of::<kvm_dirty_log>() == 16);
    assert!(size_of::<kvm_userspace_memory_region>() == 32);
    assert!(size_of::<kvm_enable_cap>() == 104);
    assert!(size_of::<kvm_clear_dirty_log>() == 24);
};

const KVM_CHECK_EXTENSION: libc::Ioctl = request(IOC_NONE, 0, 0x03);
const KVM_GET_DIRTY_LOG: libc::Ioctl = request(IOC_WRITE, 16, 0x42);
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = request(IOC_WRITE, 32, 0x46);
const KVM_ENABLE_CAP: libc::Ioctl = request(IOC_WRITE, 104, 0xa3);
const KVM_CLEAR_DIRTY_LOG: libc::Ioctl = request(IOC_WRITE | IOC_READ, 24, 0xc0);
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = request(IOC_NONE, 0, 0xc7);
/// Nobody's.
const NO_REQUEST: libc::Ioctl = 0xc7;

fn outcome(returned: libc::c_int) -> io::Result<u32> {
    // Negative means that errno is set.
    u32::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// A descriptor of our own for the same open file, closed on exec.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` takes numbers only; a descriptor that is not open is answered with `EBADF`.
    let fd = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a descriptor is a vCPU of this process.
///
/// A vCPU answers calls of other devices with `EINVAL`, before it takes any lock, or with `EIO` in another process. Files and VMs say
/// `ENOTTY`, and what else says `EINVAL` cannot be mapped as a vCPU can.
pub(super) fn is_vcpu(fd: RawFd) -> bool {
    // SAFETY: no device has this number, so that no memory is touched whatever the descriptor is.
    let answer = outcome(unsafe { libc::ioctl(fd, NO_REQUEST, 0) });
    answer.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

/// Whether a descriptor is something of KVM's that another process made: it answers every call with `EIO`.
#[cfg(feature = "offload")]
pub(super) fn is_of_another_process(fd: RawFd) -> bool {
    // SAFETY: no device has this number, so that no memory is touched whatever the descriptor is.
    let answer = outcome(unsafe { libc::ioctl(fd, NO_REQUEST, 0) });
    answer.is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
}

/// `KVM_CHECK_EXTENSION`: 0 when `capability` is missing, otherwise what KVM has to say about it.
pub(super) fn check_extension(vm: BorrowedFd<'_>, capability: u32) -> io::Result<u32> {
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * The argument is a number; KVM reads and writes no memory of ours.
    outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CHECK_EXTENSION, libc::c_ulong::from(capability)) })
}

/// `KVM_ENABLE_CAP` with one argument.
pub(super) fn enable_cap(vm: BorrowedFd<'_>, capability: u32, argument: u64) -> io::Result<()> {
    let cap = kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * KVM only reads `cap`, which has the layout that the request number announces.
    outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_ENABLE_CAP, &raw const cap) }).map(drop)
}

/// `KVM_SET_USER_MEMORY_REGION`.
///
/// # Safety
///
/// Guest and kernel may read and write `region.userspace_addr` for `region.memory_size` bytes for as long as the
/// slot exists.
pub(super) unsafe fn set_user_memory_region(
    vm: BorrowedFd<'_>,
    region: &kvm_userspace_memory_region,
) -> io::Result<()> {
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * KVM only reads the struct, which has the layout that the request number announces.
    // * What KVM does with the memory afterwards is what our caller vouches for.
    outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, ptr::from_ref(region)) })
        .map(drop)
}

/// `KVM_GET_DIRTY_LOG`: fills `words` with the bitmap of a slot of at most 64 pages per word.
///
/// # Safety
///
/// The slot has at most `64 * words.len()` pages: KVM writes a bit for each.
pub(super) unsafe fn get_dirty_log(vm: BorrowedFd<'_>, slot: u32, words: &mut [u64]) -> io::Result<()> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * KVM reads `log` and writes the slot's bitmap rounded up to whole longs into `words`, which our caller
    //   vouches is long enough and which is ours alone.
    outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const log) }).map(drop)
}

/// `KVM_CLEAR_DIRTY_LOG`: protects those of the `pages` pages from `first` on whose bits are set in `words`.
/// `first` is a multiple of 64, and so is `pages` unless the range ends with the slot.
pub(super) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: u32,
    first: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    if (words.len() as u64) < u64::from(pages).div_ceil(64) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        // The field is a mutable pointer in the ABI; KVM only reads through it.
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * KVM reads `log` and as many bits of `words` as there are pages, which are there by the check above.
    outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const log) }).map(drop)
}

/// What `KVM_RESET_DIRTY_RINGS` did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ResetCount {
    /// Entries reset, of all rings.
    pub(crate) entries: u32,
    /// The thread slept meanwhile: for a lock of KVM's, or because it was stopped, and then the ioctl may have ended
    /// early.
    pub(crate) slept: bool,
}

/// `KVM_RESET_DIRTY_RINGS` with every signal blocked.
///
/// A pending signal makes the ioctl stop early (since 6.17), and forget to protect the pages of the batch at hand,
/// up to 64, whose entries it has counted. Blocked ones do not count as pending, which leaves `SIGSTOP`, a freezing
/// cgroup and task work. The first two put the thread to sleep before it returns from here.
pub(super) fn reset_dirty_rings(vm: BorrowedFd<'_>) -> io::Result<ResetCount> {
    let mut every = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY:
    // * `sigfillset` initialises `every`; `pthread_sigmask` reads it and initialises `before`.
    // * The only way for either to fail is an invalid argument, and these are valid.
    unsafe {
        libc::sigfillset(every.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, every.as_ptr(), before.as_mut_ptr());
    }
    let sleeps = sleeps_of_this_thread();
    // SAFETY:
    // * The descriptor is open for the call, as it is borrowed.
    // * The ioctl has no argument and touches no memory but the rings, whose entries are atomics.
    let outcome = outcome(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) });
    let slept = sleeps != sleeps_of_this_thread();
    // SAFETY: `before` was initialised above and is a mask of this same thread.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
    }
    outcome.map(|entries| ResetCount { entries, slept })
}

/// Voluntary context switches: a stopped or frozen thread makes one, a preempted one does not.
fn sleeps_of_this_thread() -> libc::c_long {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY:
    // * `usage` is writable, and a zeroed one is valid.
    // * The call cannot fail with a valid pointer and this constant.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_headers() {
        // From <linux/kvm.h> on x86-64 and arm64, whose ioctl encoding is the generic one.
        assert_eq!(KVM_CHECK_EXTENSION, 0xae03);
        assert_eq!(KVM_GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_aea3);
        assert_eq!(KVM_CLEAR_DIRTY_LOG, 0xc018_aec0_u32 as libc::Ioctl);
        assert_eq!(KVM_RESET_DIRTY_RINGS, 0xaec7);
    }
}
