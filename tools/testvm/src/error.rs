//! What can go wrong with a test VM, each case saying what was tried, what was found and what to do.

use std::io;
use std::path::PathBuf;

use ringferry::layout::LayoutError;
use ringferry::track::TrackError;

use crate::device::DeviceError;
use crate::guest::GuestError;
use crate::multiboot::ImageError;
use crate::state::StateError;

/// Why a VM could not be built or driven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestVmError {
    /// The configuration contradicts itself or the limits of the test VMM.
    #[error("the configuration asks for {what}: {limit}")]
    Config {
        /// What was asked.
        what: String,
        /// What is possible.
        limit: String,
    },
    /// There is no `/dev/kvm`, or nothing behind it.
    #[error(
        "opening /dev/kvm: there is no such device; load the module of this CPU (modprobe kvm_intel, kvm_amd), enable \
         virtualization in the firmware, or nested virtualization if this is a VM"
    )]
    NoKvm,
    /// `/dev/kvm` is there and not for us.
    #[error(
        "opening /dev/kvm: permission denied; add this user to the group that owns it (usermod -aG kvm USER, \
         then log in again) or run as root"
    )]
    KvmPermission,
    /// KVM is there and lacks something that the test VMM is built on.
    #[error("KVM of this kernel lacks {what}; needed for {purpose}; use a newer kernel or another host")]
    MissingCapability {
        /// The capability, by its kernel name.
        what: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// A system call of KVM failed.
    #[error("{call} failed: {error}; {hint}")]
    Kvm {
        /// The call by its kernel name.
        call: &'static str,
        /// What the kernel said.
        error: io::Error,
        /// What this usually means.
        hint: &'static str,
    },
    /// Guest RAM could not be had.
    #[error("mapping {bytes} bytes of guest RAM ({backing}): {error}; {hint}")]
    Memory {
        /// The length of the mapping that failed.
        bytes: u64,
        /// Its backing, in words.
        backing: &'static str,
        /// What the kernel said.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Not enough huge pages are reserved.
    #[error(
        "{needed} huge pages of 2 MiB are needed for guest RAM, {free} are free; reserve them with \
         `sysctl vm.nr_hugepages=N`, or take transparent huge pages, which need no reservation"
    )]
    NoHugePages {
        /// How many the guest needs.
        needed: u64,
        /// How many are free, by `/proc/meminfo`.
        free: u64,
    },
    /// The image file could not be read.
    #[error("reading the image {path}: {error}")]
    ImageFile {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The image is not one that can be booted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An access outside guest RAM.
    #[error("accessing {bytes} bytes of guest RAM at {address:#x}: {error}")]
    NotRam {
        /// Guest physical address.
        address: u64,
        /// Length of the access.
        bytes: usize,
        /// Which page is not RAM.
        error: LayoutError,
    },
    /// Guest RAM cannot be laid out like this.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A thread for a vCPU could not be made.
    #[error("starting the thread of vCPU {vcpu}: {error}; the limit on processes (ulimit -u) may be reached")]
    Thread {
        /// Which vCPU.
        vcpu: usize,
        /// What the kernel said.
        error: io::Error,
    },
    /// The VM is not in the state that the call demands.
    #[error("{tried}: the VM is {found}")]
    WrongPhase {
        /// What was asked.
        tried: &'static str,
        /// What the VM does.
        found: &'static str,
    },
    /// A vCPU did not leave `KVM_RUN` in time.
    #[error("pausing the VM: vCPU {vcpu} did not leave KVM_RUN within {waited_ms} ms; the VM runs on")]
    PauseTimeout {
        /// The first vCPU that did not.
        vcpu: usize,
        /// How long the VMM waited.
        waited_ms: u64,
    },
    /// A vCPU has died.
    #[error("vCPU {vcpu} has stopped: {error}")]
    Vcpu {
        /// Which vCPU.
        vcpu: usize,
        /// Why.
        error: VcpuError,
    },
    /// The workload of a VM of threads cannot start.
    #[error("starting the workload: {0}")]
    Workload(String),
    /// RAM does not hold the guest that it should.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Saved state could not be read or set.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device cannot be had, or cannot go on.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Dirty tracking could not be set up.
    #[error("setting up dirty tracking: {0}")]
    Tracking(#[from] TrackError),
    /// The kernel's statistics were not in the documented form.
    #[error("reading KVM statistics: {0}")]
    Stats(String),
}

/// What KVM answered to `call`.
pub(crate) fn kvm_error(call: &'static str, error: kvm_ioctls::Error, hint: &'static str) -> TestVmError {
    TestVmError::Kvm { call, error: io::Error::from_raw_os_error(error.errno()), hint }
}

/// Why a vCPU does not run any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The guest shut the machine down, most likely by a triple fault.
    #[error("shutdown (usually a triple fault of the guest) at rip {rip:#x}")]
    Shutdown {
        /// Where it was.
        rip: u64,
    },
    /// KVM could not go on.
    #[error(
        "KVM internal error, suberror {suberror}, at rip {rip:#x}; the guest did what KVM cannot emulate"
    )]
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Where it was.
        rip: u64,
    },
    /// The CPU refused the guest's state.
    #[error("entry to the guest failed, hardware reason {reason:#x}, on CPU {cpu}")]
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// The host's CPU.
        cpu: u32,
    },
    /// An exit that the test VMM does not know.
    #[error("unexpected exit reason {reason} at rip {rip:#x}")]
    UnexpectedExit {
        /// `KVM_EXIT_*`.
        reason: u32,
        /// Where it was.
        rip: u64,
    },
    /// `KVM_RUN` itself failed.
    #[error("KVM_RUN failed: errno {errno} ({}) at rip {rip:#x}", io::Error::from_raw_os_error(*errno))]
    Run {
        /// The errno.
        errno: i32,
        /// Where it was.
        rip: u64,
    },
    /// Its full dirty ring could not be emptied.
    #[error("the dirty ring is full: {0}")]
    RingFull(String),
    /// The thread of the vCPU panicked: a defect of the test VMM.
    #[error("the thread of the vCPU panicked")]
    Panicked,
}
