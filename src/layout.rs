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

/// A piece of guest RAM: consecutive guest pages, one memory slot, one host mapping.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The KVM memory slot behind it.
    pub slot: SlotId,
    /// Its pages, by guest frame number.
    pub pages: PageRun,
    /// Where its first page is mapped in this process. Page-aligned.
    pub host: *mut u8,
}

impl Region {
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
        Ok(Self { slot, pages, host })
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
pub enum LayoutError {
    /// No region, or a region or run without a page.
    Empty,
    /// Guest address, size or host address of the region of this slot is not a multiple of 4096.
    Unaligned(SlotId),
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
            region.slot = SlotId(u32::from(address_space) << 16 | region.slot.0 & 0xffff);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(slot: u32, first: u64, pages: u64, host: usize) -> Region {
        let pages = PageRun { first: PageIndex(first), pages };
        Region { slot: SlotId(slot), pages, host: std::ptr::without_provenance_mut(host) }
    }

    fn memory(regions: Vec<Region>) -> Result<GuestMemory, LayoutError> {
        // SAFETY: nothing here or in this module's code under test dereferences a host pointer.
        unsafe { GuestMemory::new(regions) }
    }

    /// Regions with and without holes between them, guest order unrelated to host order.
    fn layouts() -> impl Strategy<Value = Vec<Region>> {
        prop::collection::vec((0..3_u64, 1..6_u64, any::<u16>()), 1..6).prop_map(|parts| {
            let (mut next, mut regions) = (0, Vec::new());
            for (slot, (hole, pages, order)) in (0..).zip(parts) {
                let host = (usize::from(order) * 8 + slot as usize) << 20;
                regions.push(region(slot, next + hole, pages, host));
                next += hole + pages;
            }
            regions.sort_by_key(|region| region.host.addr());
            regions
        })
    }

    fn naive(regions: &[Region], page: u64) -> Option<(SlotId, usize)> {
        regions.iter().find(|r| (r.pages.first.0..r.pages.first.0 + r.pages.pages).contains(&page)).map(|r| {
            let offset = usize::try_from(page - r.pages.first.0).unwrap() * PAGE_SIZE;
            (r.slot, r.host.addr() + offset)
        })
    }

    proptest! {
        #[test]
        fn host_runs_are_what_looking_up_each_page_gives(regions in layouts(), first in 0..40_u64, pages in 1..40_u64) {
            let memory = memory(regions.clone()).unwrap();
            let lookup: Vec<_> = (first..first + pages).map(|page| naive(&regions, page)).collect();
            match memory.host_runs(PageRun { first: PageIndex(first), pages }) {
                Err(error) => {
                    let outside = lookup.iter().position(Option::is_none).expect("refused a run that is all RAM");
                    prop_assert_eq!(error, LayoutError::NotRam(PageIndex(first + outside as u64)));
                }
                Ok(runs) => {
                    let mut given = Vec::new();
                    for run in runs {
                        prop_assert_eq!(run.run.first.0, first + given.len() as u64);
                        prop_assert_eq!(run.len_bytes() as u64, run.run.pages * PAGE_SIZE as u64);
                        let slot = memory.regions()[run.region].slot;
                        given.extend((0..run.len_bytes()).step_by(PAGE_SIZE).map(|at| Some((slot, run.host.addr() + at))));
                    }
                    prop_assert_eq!(given, lookup);
                }
            }
        }

        #[test]
        fn regions_end_in_guest_order_and_are_counted_without_holes(regions in layouts()) {
            let memory = memory(regions.clone()).unwrap();
            prop_assert!(memory.regions().is_sorted_by_key(|region| region.pages.first));
            prop_assert_eq!(memory.pages(), (0..100).filter(|page| naive(&regions, *page).is_some()).count() as u64);
            let last = (0..100).rev().find(|page| naive(&regions, *page).is_some()).unwrap();
            prop_assert_eq!(memory.end(), PageIndex(last + 1));
        }
    }

    #[test]
    fn what_cannot_be_ram_is_refused_by_name() {
        let refused = |regions: Vec<Region>| memory(regions).expect_err("an impossible layout was accepted");
        let (a, b) = (SlotId(1), SlotId(2));
        assert_eq!(refused(vec![]), LayoutError::Empty);
        assert_eq!(refused(vec![region(1, 0, 0, 0x1000)]), LayoutError::Empty);
        assert_eq!(refused(vec![region(1, 0, 1, 0x1008)]), LayoutError::Unaligned(a));
        assert_eq!(refused(vec![region(1, RAM_END_MAX.0, 1, 0x1000)]), LayoutError::TooLarge(a));
        assert_eq!(refused(vec![region(1, u64::MAX, u64::MAX, 0x1000)]), LayoutError::TooLarge(a));
        assert_eq!(refused(vec![region(1, 0, 16, usize::MAX - 0xfff)]), LayoutError::TooLarge(a));
        let overlap = vec![region(2, 9, 4, 0x100_0000), region(1, 0, 10, 0x200_0000)];
        assert_eq!(refused(overlap), LayoutError::Overlap(PageIndex(9)));
        let aliased = vec![region(2, 100, 4, 0x9000), region(1, 0, 10, 0x1000)];
        assert_eq!(refused(aliased), LayoutError::Aliased(a, b));
        let adjacent = vec![region(2, 10, 4, 0xb000), region(1, 0, 10, 0x1000)];
        assert_eq!(memory(adjacent).unwrap().pages(), 14);
    }

    #[test]
    fn slots_of_one_vm_share_a_page_only_as_the_same_memory_in_two_address_spaces() {
        let (one, smm) = (region(1, 10, 10, 0x10_0000), SlotId(0x1_0001));
        assert_eq!(smm.address_space(), 1);
        let conflict = |slot, first, pages, host| one.conflict(&region(slot, first, pages, host));
        let overlap = |page| Some(LayoutError::Overlap(PageIndex(page)));
        assert_eq!(conflict(2, 20, 4, 0x11_0000), None);
        assert_eq!(conflict(2, 5, 5, 0x20_0000), None);
        assert_eq!(conflict(2, 19, 4, 0x20_0000), overlap(19));
        assert_eq!(conflict(2, 5, 6, 0x20_0000), overlap(10));
        assert_eq!(conflict(2, 12, 2, 0x10_2000), overlap(12));
        assert_eq!(conflict(2, 30, 4, 0x10_9000), Some(LayoutError::Aliased(one.slot, SlotId(2))));
        assert_eq!(conflict(smm.0, 12, 2, 0x10_2000), None);
        assert_eq!(conflict(smm.0, 12, 2, 0x20_0000), overlap(12));
        assert_eq!(conflict(smm.0, 30, 2, 0x10_2000), Some(LayoutError::Aliased(one.slot, smm)));
    }

    #[test]
    fn a_run_that_wraps_or_is_empty_gives_no_memory() {
        let memory = memory(vec![region(1, 0, 10, 0x1000)]).unwrap();
        let runs =
            |first, pages| memory.host_runs(PageRun { first: PageIndex(first), pages }).map(|_| ()).err();
        assert_eq!(runs(3, u64::MAX), Some(LayoutError::NotRam(PageIndex(10))));
        assert_eq!(runs(u64::MAX, 2), Some(LayoutError::NotRam(PageIndex(u64::MAX))));
        assert_eq!(runs(u64::MAX, u64::MAX), Some(LayoutError::NotRam(PageIndex(u64::MAX))));
        assert_eq!(runs(3, 0), Some(LayoutError::Empty));
    }

    #[test]
    fn blocks_outside_guest_physical_space_are_listed_by_name() {
        let mut memory = memory(vec![
            region(0, 0, 16, 0x1000),
            region(1, 0x100, 4, 0x2_0000),
            region(2, 0x200, 8, 0x4_0000),
        ])
        .unwrap();
        assert_eq!(memory.blocks().count(), 0);
        memory.name_block(PageIndex(0x200), "vga.vram").unwrap();
        memory.name_block(PageIndex(0x100), &"b".repeat(BLOCK_NAME_BYTES_MAX)).unwrap();
        let blocks: Vec<_> =
            memory.blocks().map(|(name, run)| (name.len(), run.first.0, run.pages)).collect();
        assert_eq!(blocks, [(64, 0x100, 4), (8, 0x200, 8)]);
        assert_eq!(memory.clone().blocks().count(), 2);
    }

    #[test]
    fn a_name_that_is_no_name_or_names_no_block_is_refused_and_changes_nothing() {
        let mut memory = memory(vec![region(0, 0, 16, 0x1000), region(1, 0x100, 4, 0x2_0000)]).unwrap();
        let (first, second) = (PageIndex(0), PageIndex(0x100));
        assert_eq!(memory.name_block(PageIndex(1), "rom"), Err(LayoutError::NoBlock(PageIndex(1))));
        for name in ["", &"n".repeat(BLOCK_NAME_BYTES_MAX + 1), "ro\nm"] {
            assert_eq!(memory.name_block(second, name), Err(LayoutError::BlockName(second)));
        }
        assert_eq!(memory.blocks().count(), 0);
        memory.name_block(second, "rom").unwrap();
        assert_eq!(memory.name_block(second, "other"), Err(LayoutError::BlockNamed(second)));
        assert_eq!(memory.name_block(first, "rom"), Err(LayoutError::BlockNamed(first)));
        assert_eq!(memory.blocks().count(), 1);
    }

    #[test]
    fn addresses_pages_and_slots_print_as_the_field_writes_them() {
        assert_eq!(GuestAddress(0x1_2fff).page(), PageIndex(0x12));
        assert_eq!(PageIndex(0x12).address().to_string(), "0x12000");
        assert_eq!(format!("{:?} {:?}", SlotId(0x1_0003), PageIndex(18)), "SlotId(1:3) PageIndex(0x12)");
    }
}
