//! The mailbox: the pages through which host and guest talk, at a fixed guest physical address.
//!
//! One header page, then for each vCPU a control page, which the host writes, and a statistics page, which the
//! guest writes. Every field is an aligned 8-byte word, read and written whole; [`core::mem::offset_of`] is the
//! only way in, so that guest and host cannot disagree about a place.

use core::mem::offset_of;

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;
/// Most vCPUs that the guest runs.
pub const MAX_VCPUS: usize = 16;
/// Most pieces of RAM without a hole that the guest uses; further ones are left alone.
pub const MAX_EXTENTS: usize = 32;
/// Longest error text, in bytes.
pub const MAX_ERROR_BYTES: usize = 512;

/// Guest physical address of the header page. The image lies below, from 1 MiB on.
pub const MAILBOX_ADDRESS: u64 = 0x20_0000;
/// Where the mailbox ends.
pub const MAILBOX_END: u64 = stats_address(MAX_VCPUS - 1) + PAGE_BYTES;
/// Guest physical address of the page into which KVM writes the time, if the guest finds kvmclock: the wall clock first,
/// then for each vCPU its system time, every [`KVMCLOCK_BYTES`].
pub const KVMCLOCK_ADDRESS: u64 = MAILBOX_END;
/// Bytes from one part of that page to the next: the ABI wants 4-byte alignment, and no part in two pages.
pub const KVMCLOCK_BYTES: u64 = 64;
/// Guest physical address of the guest's page directories.
pub const DIRECTORIES_ADDRESS: u64 = KVMCLOCK_ADDRESS + PAGE_BYTES;
/// The workload uses RAM from here on; below it are image, mailbox and page directories.
pub const RESERVED_END: u64 = 0x40_0000;

/// First word of the header, written once the rest of it is valid.
pub const MAGIC: u64 = u64::from_le_bytes(*b"RFGuest\0");
/// Of everything in this file.
pub const VERSION: u64 = 1;

/// Writing n to this port asks the VMM to let the vCPU sleep for n microseconds. Where nothing answers, the
/// guest waits by its own clock.
pub const IDLE_PORT: u16 = 0x5e0;
/// Writing n to this port ends the guest with code n. QEMU has it with
/// `-device isa-debug-exit,iobase=0xf4,iosize=4`, and exits with 2n + 1.
pub const EXIT_PORT: u16 = 0xf4;
/// The bit of RFLAGS (ID) that the guest sets while it works as a kernel does, with the lock held.
pub const KERNEL_MODE_FLAG: u64 = 1 << 21;
/// Code of a guest that cannot go on; the reason is on its serial port and in the header.
pub const EXIT_FAILED: u32 = 1;
/// The longest wait that the guest asks for at a time: how long it may take to see a changed control page.
pub const WAIT_MAX_US: u32 = 10_000;

/// The header page.
#[repr(C)]
#[derive(Debug)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u64,
    /// A [`GuestState`].
    pub state: u64,
    /// How many vCPUs run.
    pub vcpus: u64,
    /// Frequency of the guest's clock.
    pub tsc_khz: u64,
    /// How many of `extents` are valid.
    pub extents_count: u64,
    /// Length of `error`.
    pub error_bytes: u64,
    /// 1 while a vCPU holds the lock that all of them share.
    pub lock: u64,
    /// RAM that the workload uses, ascending; all of it in this order is the pool.
    pub extents: [Extent; MAX_EXTENTS],
    /// What part of the pool is whose.
    pub shares: [Share; MAX_VCPUS],
    /// How many pages of each share were ever part of a working set: only those can carry a stamp. Not on the
    /// statistics page, so that neither page can be lost without the other telling.
    pub touched_pages: [u64; MAX_VCPUS],
    /// Why the guest failed, UTF-8, eight bytes per word.
    pub error: [u64; MAX_ERROR_BYTES / 8],
}

/// Consecutive guest pages.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    /// Guest frame number of the first.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// A vCPU's part of the pool.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Share {
    /// Position of its first page in the pool.
    pub first: u64,
    /// How many pages; a working set is the first so many of them.
    pub pages: u64,
    /// Position in the share of the first page to be filled once at the start.
    pub fill_first: u64,
    /// How many pages are filled.
    pub fill_pages: u64,
}

/// A vCPU's control page: what the host wants of it. Zero `sequence` means that the command line's work goes on.
#[repr(C)]
#[derive(Debug)]
pub struct Control {
    /// Odd while the five fields below and `lock` are being changed; each change ends with the next even number.
    pub sequence: u64,
    /// A [`Pattern`](super::command_line::Pattern).
    pub pattern: u64,
    /// A [`Content`](super::command_line::Content).
    pub content: u64,
    /// Pages of the working set, at most those of the share.
    pub working_set_pages: u64,
    /// Bytes written per page, header included.
    pub bytes_per_page: u64,
    /// Page writes, reads or compute steps per second; 0: as many as possible.
    pub pace_per_s: u64,
    /// Raised by the host while the VM is paused at a switchover: the gap over that pause is counted apart.
    pub resume_epoch: u64,
    /// Raised by the host to begin a new measurement of the longest gap.
    pub gap_epoch: u64,
    /// 1: every other turn takes the lock. One of the fields that `sequence` guards; 0 in older mailboxes.
    pub lock: u64,
}

/// A vCPU's statistics page.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Stats {
    /// Page writes; the last stamp given. Stored together with `stamp_sum`.
    pub writes: u64,
    /// The sum of the stamps that the vCPU's pages carry.
    pub stamp_sum: u64,
    /// Guest frame number of the page that is about to be written, or was written last. Stored together with
    /// `intent_stamp`, before the page.
    pub intent_page: u64,
    /// The stamp that it carried before.
    pub intent_stamp: u64,
    /// Times that as many steps were done as the working set has pages.
    pub passes: u64,
    /// Page reads.
    pub reads: u64,
    /// Compute steps.
    pub compute_steps: u64,
    /// A [`VcpuState`].
    pub state: u64,
    /// The longest time between two looks at the clock that the vCPU did not ask for, in ticks, since the
    /// control page's `gap_epoch` became `gap_epoch`.
    pub longest_gap_ticks: u64,
    /// The last `gap_epoch` seen.
    pub gap_epoch: u64,
    /// The gap over the last switchover, in ticks.
    pub pause_gap_ticks: u64,
    /// The last `resume_epoch` seen; stored after `pause_gap_ticks`.
    pub resume_epoch: u64,
    /// The last `sequence` of the control page that was looked at.
    pub sequence: u64,
    /// The last `sequence` that was refused, because it asked for what does not exist.
    pub refused: u64,
    /// How many pages have been filled.
    pub filled_pages: u64,
}

const _: () =
    assert!(size_of::<Header>() <= 4096 && size_of::<Control>() <= 4096 && size_of::<Stats>() <= 4096);
const _: () = assert!(offset_of!(Stats, writes) == 0 && offset_of!(Stats, intent_page) == 16);
const _: () =
    assert!(KVMCLOCK_BYTES * (1 + MAX_VCPUS as u64) <= PAGE_BYTES && DIRECTORIES_ADDRESS < RESERVED_END);

/// How far the guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestState {
    /// Nothing in the mailbox is valid yet.
    Booting = 0,
    /// All vCPUs are at work.
    Running = 1,
    /// It cannot go on; the header says why.
    Failed = 2,
}

/// How far a vCPU is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VcpuState {
    /// Not there yet.
    Absent = 0,
    /// It writes its part of the fill.
    Filling = 1,
    /// It does what its control page says.
    Working = 2,
}

impl GuestState {
    /// The state that a word of the mailbox means.
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Booting, Self::Running, Self::Failed].into_iter().find(|state| *state as u64 == word)
    }
}

impl VcpuState {
    /// The state that a word of the mailbox means.
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Absent, Self::Filling, Self::Working].into_iter().find(|state| *state as u64 == word)
    }
}

/// Guest physical address of a field of the header.
pub const fn header_field(offset: usize) -> u64 {
    MAILBOX_ADDRESS + offset as u64
}

/// Guest physical address of vCPU `vcpu`'s word in [`Header::touched_pages`].
pub const fn touched_address(vcpu: usize) -> u64 {
    header_field(offset_of!(Header, touched_pages) + vcpu * 8)
}

/// Guest physical address of vCPU `vcpu`'s control page.
pub const fn control_address(vcpu: usize) -> u64 {
    MAILBOX_ADDRESS + PAGE_BYTES * (1 + 2 * vcpu as u64)
}

/// Guest physical address of vCPU `vcpu`'s statistics page.
pub const fn stats_address(vcpu: usize) -> u64 {
    control_address(vcpu) + PAGE_BYTES
}
