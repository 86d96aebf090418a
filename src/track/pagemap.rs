//! Dirty tracking of memory that ordinary threads write: userfaultfd's asynchronous write protection, read and
//! re-armed by `PAGEMAP_SCAN` (both Linux 6.7).
//!
//! It serves the guest made of threads, which runs where there is no /dev/kvm. The kernel write-protects pages in
//! our own page table; the first write to one takes a fault that the kernel resolves by itself, no thread of ours
//! waits for it. A scan finds the pages that are no longer protected, and protects them again in the same step,
//! under the page table's lock and with the TLB flushed before it returns: a write is either in this harvest or in
//! the next one.
//!
//! What it does not see: writes through another mapping of a shared file, in this process or another, and pages
//! that `madvise` threw away; who does that marks them, see [`external`](super::external). It knows no vCPUs, so what
//! it observes is a total, and not of this very moment. A scan walks the page tables: it costs what is populated, not
//! what is dirty (`cargo bench --bench pagemap`).
#![expect(unsafe_code, reason = "userfaultfd is used by bare ioctls on address ranges")]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapRaw};

use super::{DirtySource, Observed, SeenDirty, TrackError};
use crate::layout::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use crate::page_set::PageSet;
use crate::pagemap::{CHECK_WPASYNC, Filter, Pagemap, WP_MATCHING, category};
use crate::vm::Settled;

/// Tracks the RAM of a guest made of this process's threads.
#[derive(Debug)]
pub struct PagemapTracker {
    memory: GuestMemory,
    pagemap: Pagemap,
    /// While tracking. Closing it removes the protection.
    userfault: Option<Userfault>,
    /// Harvested by a scan that failed later on, not handed out yet.
    found: PageSet,
    /// A scan failed half-way: pages may be protected that nobody was told of.
    lost_count: bool,
    given_back: PageSet,
    looked: Option<Look>,
}

/// An observation that may be asked for again.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    took: Duration,
    pages: u64,
}

/// An observation is repeated until it is so many times older than it took to make: two milliseconds per populated
/// GiB would be a core of its own for who asks every millisecond.
const LOOK_REST: u32 = 20;

/// Why memory cannot be tracked by `pagemap`.
#[derive(Debug)]
#[non_exhaustive]
pub enum PagemapError {
    /// `/proc/self/pagemap` cannot be opened.
    NoPagemap(io::Error),
    /// Neither userfaultfd(2), in the mode that needs no privilege, nor `/dev/userfaultfd` gave a descriptor.
    NoUserfaultfd(io::Error),
    /// This kernel's userfaultfd has no asynchronous write protection.
    NoAsyncWriteProtection(io::Error),
    /// The memory behind this slot cannot be write-protected.
    NotProtectable(SlotId, io::Error),
    /// `PAGEMAP_SCAN` failed.
    Scan(io::Error),
}

impl fmt::Display for PagemapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPagemap(error) => {
                write!(f, "/proc/self/pagemap: {error}; mount /proc, and allow the process to open it")
            }
            Self::NoUserfaultfd(error) => write!(
                f,
                "userfaultfd: {error}; allow the system call in seccomp, or give access to /dev/userfaultfd"
            ),
            Self::NoAsyncWriteProtection(error) => write!(
                f,
                "userfaultfd without asynchronous write protection: {error}; Linux 6.7 or newer with \
                 CONFIG_PTE_MARKER_UFFD_WP has it"
            ),
            Self::NotProtectable(slot, error) => write!(
                f,
                "the memory of {slot:?} cannot be write-protected: {error}; anonymous memory and memfd can, unless \
                 another userfaultfd has it"
            ),
            Self::Scan(error) => write!(f, "PAGEMAP_SCAN: {error}"),
        }
    }
}

impl std::error::Error for PagemapError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let (Self::NoPagemap(error)
        | Self::NoUserfaultfd(error)
        | Self::NoAsyncWriteProtection(error)
        | Self::NotProtectable(_, error)
        | Self::Scan(error)) = self;
        Some(error)
    }
}

/// The written pages. One that does not exist is not written: it will be when it is populated, for then nothing
/// protects it. Nor is the page of zeroes, to which a page is mapped that was only read.
const WRITTEN: Filter = Filter {
    flags: 0,
    inverted: category::PFNZERO,
    mask: category::WRITTEN | category::PFNZERO,
    anyof: category::PRESENT | category::SWAPPED,
};

impl PagemapTracker {
    /// A tracker of all of `memory`, off.
    ///
    /// # Errors
    ///
    /// [`PagemapError`]: what this kernel, or this process's rights, lack.
    pub fn new(memory: GuestMemory) -> Result<Self, PagemapError> {
        let pagemap = Pagemap::open().map_err(PagemapError::NoPagemap)?;
        // To fail here rather than at the start of a migration.
        Userfault::open()?;
        let empty = || PageSet::new(memory.end());
        let (found, given_back) = (empty(), empty());
        Ok(Self { memory, pagemap, userfault: None, found, lost_count: false, given_back, looked: None })
    }

    /// Tracks a write of our own, to see whether this kernel and the rights of this process allow it.
    ///
    /// # Errors
    ///
    /// [`PagemapError`], as [`TrackError::Pagemap`]: what they lack.
    pub fn probe() -> Result<(), TrackError> {
        let map = MmapMut::map_anon(PAGE_SIZE).map(MmapRaw::from).map_err(PagemapError::NoPagemap)?;
        let page = PageRun { first: PageIndex(0), pages: 1 };
        let region = Region { slot: SlotId(0), pages: page, host: map.as_mut_ptr() };
        // SAFETY: the mapping outlives the tracker below, and nobody holds a reference into it.
        let memory = unsafe { GuestMemory::new(vec![region]) }
            .map_err(|error| PagemapError::NotProtectable(SlotId(0), io::Error::other(error)))?;
        let mut dirty = PageSet::new(memory.end());
        let mut tracker = Self::new(memory)?;
        tracker.start()?;
        // SAFETY: the first byte of our own mapping.
        unsafe { map.as_mut_ptr().write_volatile(1) };
        tracker.harvest(&mut dirty)?;
        if dirty.len() != 1 {
            return Err(PagemapError::Scan(io::Error::other("a write went unseen")).into());
        }
        Ok(())
    }

    /// Protects what is written and puts it into `found`.
    fn scan(&mut self) -> Result<(), PagemapError> {
        let filter = Filter { flags: WP_MATCHING | CHECK_WPASYNC, ..WRITTEN };
        let found = &mut self.found;
        for region in self.memory.regions() {
            let scanned = self.pagemap.scan(region.host_range(), filter, |part| {
                found.insert_run(region.pages_at(part));
            });
            if let Err(error) = scanned {
                self.lost_count = true;
                return Err(PagemapError::Scan(error));
            }
        }
        Ok(())
    }

    /// Counts the written pages and tells of them, unless the last look was a moment ago.
    fn look(&mut self, mut tell: impl FnMut(PageRun)) -> Result<Observed, TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotTracking);
        }
        if let Some(look) = self.looked.filter(|look| look.at.elapsed() < look.took * LOOK_REST) {
            return Ok(Observed::Total(look.pages));
        }
        let (at, mut pages) = (Instant::now(), 0);
        for region in self.memory.regions() {
            let found = |part: Range<usize>| {
                pages += (part.len() / PAGE_SIZE) as u64;
                tell(region.pages_at(part));
            };
            self.pagemap.scan(region.host_range(), WRITTEN, found).map_err(PagemapError::Scan)?;
        }
        self.looked = Some(Look { at, took: at.elapsed(), pages });
        Ok(Observed::Total(pages))
    }
}

impl DirtySource for PagemapTracker {
    fn backend(&self) -> &'static str {
        "pagemap"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if self.userfault.is_some() {
            return Err(TrackError::AlreadyTracking);
        }
        let userfault = Userfault::open()?;
        for region in self.memory.regions() {
            userfault
                .write_protect(region.host_range())
                .map_err(|error| PagemapError::NotProtectable(region.slot, error))?;
        }
        // Protects everything: all that exists counts as written until then.
        self.scan()?;
        self.found.clear();
        self.lost_count = false;
        self.userfault = Some(userfault);
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        self.look(|_| {})
    }

    fn observe_into(&mut self, seen: &mut SeenDirty) -> Result<Observed, TrackError> {
        self.look(|run| seen.pages_mut().insert_run(run))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotTracking);
        }
        let (capacity, needed) = (dirty.capacity(), self.memory.end());
        if capacity < needed {
            return Err(TrackError::SetTooSmall { capacity, needed });
        }
        self.looked = None;
        self.scan()?;
        if std::mem::take(&mut self.lost_count) {
            self.memory.regions().iter().for_each(|region| dirty.insert_run(region.pages));
        }
        for set in [&mut self.found, &mut self.given_back] {
            dirty.union(set);
            set.clear();
        }
        Ok(())
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        // A scan sees every write that has happened, so the last one needs nothing more.
        self.harvest(dirty)
    }

    fn give_back(&mut self, pages: &PageSet) {
        self.given_back.union(pages);
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.userfault = None;
        self.looked = None;
        self.found.clear();
        Ok(())
    }
}

/// A userfaultfd that does nothing but asynchronous write protection: no event ever comes, nobody reads it.
#[derive(Debug)]
struct Userfault {
    file: File,
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

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32);

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
/// `_IO(0xAA, 0x00)`, on /dev/userfaultfd (Linux 6.1).
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFD_API: u64 = 0xaa;
/// Faults of kernel code are not delivered, which is what needs privilege (Linux 5.11). Asynchronous protection
/// delivers none, so nothing is given up.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

impl Userfault {
    fn open() -> Result<Self, PagemapError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: a system call without pointers.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match libc::c_int::try_from(result) {
            Ok(fd @ 0..) => fd,
            _ => {
                let refused = io::Error::last_os_error();
                Self::from_device(flags).ok_or(PagemapError::NoUserfaultfd(refused))?
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
            return Err(PagemapError::NoAsyncWriteProtection(io::Error::last_os_error()));
        }
        Ok(Self { file })
    }

    fn from_device(flags: libc::c_int) -> Option<libc::c_int> {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
        // SAFETY: a call without pointers; it takes the flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        (fd >= 0).then_some(fd)
    }

    /// Puts a range under write protection; pages are protected by the first scan.
    fn write_protect(&self, host: Range<usize>) -> io::Result<()> {
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
}
