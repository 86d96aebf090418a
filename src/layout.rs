//! Guest RAM: regions, slots, and the way between a guest physical address, a page and a host address.
//!
//! A page is named by its **guest frame number** ([`PageIndex`]), on this host, on the wire and at the
//! destination alike, so no table has to be agreed on when slots come and go. Holes cost a [`PageSet`] nothing
//! but address space.
//!
//! This file owns the geometry. It never reads a page: `page` and `transport` do, through the host runs that
//! [`GuestMemory::host_runs`] gives out.
//!
//! [`PageSet`]: crate::page_set::PageSet
#![expect(unsafe_code, reason = "regions carry host pointers, whose validity the VMM vouches for once, here")]

#[cfg(test)]
mod tests;
#[cfg(any(feature = "vm-memory-0-16", feature = "vm-memory-0-17", feature = "vm-memory-0-18"))]
mod vm_memory;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes in a page of guest memory: KVM tracks dirtiness in units of 4 KiB on x86, whatever backs the page.
pub const PAGE_SIZE: usize = 4096;
const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Guest RAM ends here at the latest: 64 TiB, above every machine sold and low enough that a peer's layout
/// cannot make a [`PageSet`] over it larger than 2 GiB of untouched address space.
///
/// [`PageSet`]: crate::page_set::PageSet
pub const RAM_END_MAX: PageIndex = PageIndex(1 << 34);

/// A guest physical address, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddress(pub u64);

/// The name of a guest page: its guest frame number, that is the guest physical address divided by
/// [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A KVM memory slot as dirty-ring entries name it: address space in the upper 16 bits, id in the lower.
///
/// A vCPU sees address space 0, and address space 1 in system management mode (x86). Both number the same guest pages: a
/// page that both have is one page, and has to be one piece of host memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl SlotId {
    /// The address space that the slot is in: 0, or 1 for what system management mode sees.
    pub const fn address_space(self) -> u32 {
        self.0 >> 16
    }
}

impl GuestAddress {
    /// The page that holds this address.
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 >> PAGE_SHIFT)
    }
}

impl PageIndex {
    /// The address of the page's first byte.
    pub const fn address(self) -> GuestAddress {
        GuestAddress(self.0 << PAGE_SHIFT)
    }
}

impl fmt::Debug for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestAddress({:#x})", self.0)
    }
}

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageIndex({:#x})", self.0)
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotId({}:{})", self.address_space(), self.0 & 0xffff)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// `pages` consecutive guest pages from `first` on. Never empty where this crate hands one out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many pages, the first included.
    pub pages: u64,
}

impl PageRun {
    /// The page after the last one; saturates, so that a run from a peer cannot wrap round to low pages.
    pub const fn end(self) -> PageIndex {
        PageIndex(self.first.0.saturating_add(self.pages))
    }
}

/// What KVM can log of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum RegionKind {
    /// The guest's writes, as of ordinary RAM.
    #[default]
    Logged,
    /// Nothing: the guest cannot write it, and KVM refuses to log it. Dirty once, for those that copy it.
    ReadOnly,
    /// Nothing, by the VMM's wish: whoever writes it has a log of their own, or it does not move with the VM.
    NotLogged,
    /// Nothing: the memory is private, on guest_memfd. A tracker refuses it, because its writes would be lost in silence.
    GuestMemfd,
}

/// A piece of guest RAM: consecutive guest pages, one memory slot, one host mapping.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Region {
    /// The KVM memory slot behind it.
    pub slot: SlotId,
    /// Its pages, by guest frame number.
    pub pages: PageRun,
    /// Where its first page is mapped in this process. Page-aligned.
    pub host: *mut u8,
    /// What KVM can log of it.
    pub kind: RegionKind,
}

impl Region {
    /// Ordinary RAM: pages `pages`, in the slot `slot`, mapped at `host`.
    pub const fn new(slot: SlotId, pages: PageRun, host: *mut u8) -> Self {
        Self { slot, pages, host, kind: RegionKind::Logged }
    }

    /// The same as another kind of memory.
    pub const fn of_kind(self, kind: RegionKind) -> Self {
        Self { kind, ..self }
    }

    /// The same in a slot with this id in another address space: 1 is what system management mode sees.
    pub const fn in_address_space(self, address_space: u16) -> Self {
        Self { slot: SlotId((address_space as u32) << 16 | self.slot.0 & 0xffff), ..self }
    }

    pub(crate) const fn is_logged(&self) -> bool {
        matches!(self.kind, RegionKind::Logged)
    }

    /// The region of a slot as the VMM told KVM of it, in bytes and addresses, which are multiples of 4096.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Unaligned`] if one is not.
    pub fn from_bytes(
        slot: SlotId,
        address: GuestAddress,
        len_bytes: u64,
        host: *mut u8,
    ) -> Result<Self, LayoutError> {
        let is_aligned = |bytes: u64| bytes.is_multiple_of(PAGE_SIZE as u64);
        if !(is_aligned(address.0) && is_aligned(len_bytes) && is_aligned(host.addr() as u64)) {
            return Err(LayoutError::Unaligned(slot));
        }
        let pages = PageRun { first: address.page(), pages: len_bytes >> PAGE_SHIFT };
        Ok(Self::new(slot, pages, host))
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        // Checked in `GuestMemory::new`: the region fits the address space.
        usize::try_from(self.pages.pages << PAGE_SHIFT).unwrap_or(usize::MAX)
    }

    /// The host addresses of all its bytes.
    pub(crate) fn host_range(&self) -> Range<usize> {
        self.host.addr()..self.host.addr() + self.len_bytes()
    }

    /// The host addresses of a run of its pages.
    pub(crate) fn host_range_of(&self, pages: PageRun) -> Range<usize> {
        assert!(self.pages.first <= pages.first && pages.end() <= self.pages.end(), "a run of this region");
        let bytes = |pages: u64| usize::try_from(pages << PAGE_SHIFT).unwrap_or(usize::MAX);
        let start = self.host.addr() + bytes(pages.first.0 - self.pages.first.0);
        start..start + bytes(pages.pages)
    }

    /// The guest pages behind a page-aligned part of its host addresses.
    pub(crate) fn pages_at(&self, part: Range<usize>) -> PageRun {
        let offset_pages = (part.start - self.host.addr()) / PAGE_SIZE;
        PageRun {
            first: PageIndex(self.pages.first.0 + offset_pages as u64),
            pages: (part.len() / PAGE_SIZE) as u64,
        }
    }

    /// Why the two cannot be slots of one VM; `None` if they can. Two address spaces may have the same pages, if it is the
    /// same memory.
    pub(crate) fn conflict(&self, other: &Self) -> Option<LayoutError> {
        let (host, other_host) = (self.host_range(), other.host_range());
        let shares_pages = self.pages.first < other.pages.end() && other.pages.first < self.pages.end();
        let shares_host = host.start < other_host.end && other_host.start < host.end;
        let origin = |region: &Self| (region.host.addr() as u64).wrapping_sub(region.pages.first.address().0);
        let is_same_memory = origin(self) == origin(other);
        if shares_pages && (!is_same_memory || self.slot.address_space() == other.slot.address_space()) {
            Some(LayoutError::Overlap(self.pages.first.max(other.pages.first)))
        } else if shares_host && !is_same_memory {
            Some(LayoutError::Aliased(self.slot, other.slot))
        } else {
            None
        }
    }

    fn contains(&self, page: PageIndex) -> bool {
        self.pages.first <= page && page < self.pages.end()
    }
}

/// A run of guest pages with the host memory behind it, inside one region.
#[derive(Clone, Copy, Debug)]
pub struct HostRun {
    /// Which pages.
    pub run: PageRun,
    /// Index into [`GuestMemory::regions`].
    pub region: usize,
    /// Host address of the first page.
    pub host: *mut u8,
}

impl HostRun {
    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        usize::try_from(self.run.pages << PAGE_SHIFT).unwrap_or(usize::MAX)
    }
}

/// Why a set of regions is not a guest's RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LayoutError {
    /// No region, or a region or run without a page.
    Empty,
    /// Guest address, size or host address of the region of this slot is not a multiple of 4096.
    Unaligned(SlotId),
    /// The region of this slot is mapped without the right to read or to write it.
    NotWritable(SlotId),
    /// The region of this slot reaches beyond [`RAM_END_MAX`] or the host's address space.
    TooLarge(SlotId),
    /// Two regions claim this page.
    Overlap(PageIndex),
    /// The regions of these slots share host memory: a write through one would not be dirty in the other.
    Aliased(SlotId, SlotId),
    /// A run of pages that is not wholly inside guest RAM; the first page outside.
    NotRam(PageIndex),
    /// A name was given to a block that does not begin here: no region does.
    NoBlock(PageIndex),
    /// The block at this page was to have a name that is empty, longer than [`BLOCK_NAME_BYTES_MAX`], or has control
    /// characters.
    BlockName(PageIndex),
    /// The block at this page has a name already, or was to have that of another block.
    BlockNamed(PageIndex),
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "guest RAM without a region, or a region or run without a page"),
            Self::Unaligned(slot) => {
                write!(f, "guest address, size or host address of {slot:?} is not a multiple of 4096")
            }
            Self::NotWritable(slot) => {
                write!(f, "{slot:?} is mapped without the right to read or write it, and cannot be guest RAM")
            }
            Self::TooLarge(slot) => write!(f, "{slot:?} reaches beyond the address space"),
            Self::Overlap(page) => write!(f, "two regions of guest RAM claim the page at {}", page.address()),
            Self::Aliased(a, b) => write!(f, "{a:?} and {b:?} are mapped to the same host memory"),
            Self::NotRam(page) => write!(f, "the page at {} is not guest RAM", page.address()),
            Self::NoBlock(page) => write!(f, "no region begins at {page:?}, so no block there can be named"),
            Self::BlockName(page) => write!(
                f,
                "the name of the block at {page:?} must have 1 to {BLOCK_NAME_BYTES_MAX} bytes of printable ASCII, no spaces"
            ),
            Self::BlockNamed(page) => {
                write!(f, "the block at {page:?} has a name already, or another block has this one")
            }
        }
    }
}

impl std::error::Error for LayoutError {}

/// The longest name of a block, in bytes.
pub const BLOCK_NAME_BYTES_MAX: usize = 64;

/// All of a guest's RAM as this process maps it, in guest-physical order.
///
/// A VMM may have memory that moves with the VM and has no place in guest-physical space, or a changing one: VRAM behind a
/// BAR, a ROM, a device's own buffers. It is a region like any other, at page indexes that no guest RAM has and that the VMM
/// chooses, and it has a name besides: [`name_block`](Self::name_block). Source and destination give it the same of both.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    /// First page and name of each region that has one.
    names: Vec<(PageIndex, String)>,
    /// Dropped with the last clone.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY:
// * `GuestMemory` only computes with the host pointers; whoever dereferences one argues for itself.
// * `new` demands that the mappings outlive the value and may be accessed from any thread.
unsafe impl Send for GuestMemory {}
// SAFETY: as for `Send`: no interior mutability.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Puts regions in guest-physical order and checks that they are page-aligned and share no page, neither of
    /// the guest nor of the host.
    ///
    /// # Safety
    ///
    /// For each region, `[host, host + pages × 4096)` is mapped readable and writable, stays mapped for as long
    /// as the value and its clones live, and is shared memory in the sense of the memory model: the guest, the
    /// kernel and other threads write it at any time, so no Rust reference to it may exist anywhere.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] names the first region that cannot be RAM.
    pub unsafe fn new(mut regions: Vec<Region>) -> Result<Self, LayoutError> {
        regions.sort_by_key(|region| region.pages.first);
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        let mut free_from = PageIndex(0);
        for region in &regions {
            if region.pages.pages == 0 {
                return Err(LayoutError::Empty);
            }
            if region.host.addr() % PAGE_SIZE != 0 {
                return Err(LayoutError::Unaligned(region.slot));
            }
            let pages_to_bytes_end = |first: u64| {
                first.checked_add(region.pages.pages).filter(|end| *end <= u64::MAX >> PAGE_SHIFT)
            };
            let host_fits = pages_to_bytes_end((region.host.addr() / PAGE_SIZE) as u64).is_some();
            if !host_fits || region.pages.end() > RAM_END_MAX {
                return Err(LayoutError::TooLarge(region.slot));
            }
            if region.pages.first < free_from {
                return Err(LayoutError::Overlap(region.pages.first));
            }
            free_from = region.pages.end();
        }
        let mut by_host: Vec<&Region> = regions.iter().collect();
        by_host.sort_by_key(|region| region.host.addr());
        if let Some(pair) =
            by_host.windows(2).find(|r| r[1].host.addr() - r[0].host.addr() < r[0].len_bytes())
        {
            return Err(LayoutError::Aliased(pair[0].slot, pair[1].slot));
        }
        Ok(Self { regions, names: Vec::new(), owner: None })
    }

    /// Keeps `owner`, which holds the mappings, for as long as the value and its clones live: the easy way to fulfil
    /// what [`new`](Self::new) demands.
    pub fn kept_by(mut self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        self.owner = Some(owner);
        self
    }

    /// The same memory in the slots of another address space, with the same ids there.
    ///
    /// What system management mode sees is told to a tracker in this way: `add_memory(&memory.in_address_space(1))`.
    pub fn in_address_space(&self, address_space: u16) -> Self {
        let mut there = self.clone();
        for region in &mut there.regions {
            *region = region.in_address_space(address_space);
        }
        there
    }

    /// Names the region that begins at `first`, as a block of memory outside guest-physical space.
    ///
    /// The name is its identity, for people and for the peer: `vga.vram`, `bios`. A block that no memory slot of KVM maps
    /// has no writes that KVM knows of: it is left out of what [`DirtyTracker::add_memory`](crate::track::DirtyTracker::add_memory)
    /// is given, and whoever writes it is an [external source](crate::track::external) of dirty pages.
    ///
    /// # Errors
    ///
    /// [`LayoutError::NoBlock`], [`LayoutError::BlockName`] or [`LayoutError::BlockNamed`]; nothing has changed then.
    pub fn name_block(&mut self, first: PageIndex, name: &str) -> Result<(), LayoutError> {
        if !self.regions.iter().any(|region| region.pages.first == first) {
            return Err(LayoutError::NoBlock(first));
        }
        let is_printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        if !(1..=BLOCK_NAME_BYTES_MAX).contains(&name.len()) || !is_printable {
            return Err(LayoutError::BlockName(first));
        }
        if self.names.iter().any(|(page, known)| *page == first || known == name) {
            return Err(LayoutError::BlockNamed(first));
        }
        self.names.push((first, name.to_owned()));
        Ok(())
    }

    /// Name and pages of each named block, in the order of their pages.
    pub fn blocks(&self) -> impl Iterator<Item = (&str, PageRun)> {
        self.regions.iter().filter_map(|region| {
            let (_, name) = self.names.iter().find(|(first, _)| *first == region.pages.first)?;
            Some((name.as_str(), region.pages))
        })
    }

    /// The regions in guest-physical order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Pages of RAM, holes not counted.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages.pages).sum()
    }

    /// One past the highest page of RAM: the capacity that a [`PageSet`](crate::PageSet) over it needs.
    pub fn end(&self) -> PageIndex {
        self.regions.last().map_or(PageIndex(0), |region| region.pages.end())
    }

    /// The host memory behind `run`, split where one region ends and the next begins.
    ///
    /// # Errors
    ///
    /// [`LayoutError::NotRam`] if any page of the run is outside RAM, [`LayoutError::Empty`] if it has none;
    /// nothing is handed out then.
    pub fn host_runs(&self, run: PageRun) -> Result<impl Iterator<Item = HostRun> + '_, LayoutError> {
        if run.pages == 0 {
            return Err(LayoutError::Empty);
        }
        let first_region = self.regions.partition_point(|region| region.pages.end() <= run.first);
        let mut next = run.first;
        for region in &self.regions[first_region..] {
            if next >= run.end() || !region.contains(next) {
                break;
            }
            next = region.pages.end();
        }
        // The second: `end` saturates, so a run at the end of all numbers may seem to have no page.
        if next < run.end() || next == run.first {
            return Err(LayoutError::NotRam(next));
        }
        let overlapping = self.regions[first_region..].iter().take_while(move |r| r.pages.first < run.end());
        Ok(overlapping.enumerate().map(move |(i, region)| {
            let first = run.first.max(region.pages.first);
            let end = run.end().min(region.pages.end());
            let offset_pages = usize::try_from(first.0 - region.pages.first.0).unwrap_or(usize::MAX);
            HostRun {
                run: PageRun { first, pages: end.0 - first.0 },
                region: first_region + i,
                // Inside the region, by the two lines above.
                host: region.host.wrapping_add(offset_pages << PAGE_SHIFT),
            }
        }))
    }
}
