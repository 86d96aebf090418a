//! Guest RAM: its geometry on a PC, its host mappings, and the VMM's own accesses to it.
//!
//! The guest writes this memory at any time, so the VMM only touches it with atomic accesses.
#![expect(unsafe_code, reason = "guest RAM is memory shared with a running guest, reachable only by pointer")]

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use ringferry::layout::LayoutError;
use ringferry::track::DirtyTracker;
use ringferry::{GuestAddress, GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};

use crate::config::{Backing, Config, HugePages};
use crate::error::TestVmError;

/// Where RAM stops below 4 GiB: a PC keeps the last GiB of the 32-bit space for devices.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM continues.
pub const HOLE_END: u64 = 4 << 30;

/// The pages of each region, in order: `memory_bytes` cut into `regions` nearly equal pieces in units of
/// `unit_bytes`, and once more where the hole of a PC begins.
pub fn pc_layout(memory_bytes: u64, regions: usize, unit_bytes: u64) -> Vec<PageRun> {
    let units = memory_bytes / unit_bytes;
    let pages_per_unit = unit_bytes / PAGE_SIZE as u64;
    let hole = HOLE_START / PAGE_SIZE as u64;
    let hole_pages = (HOLE_END - HOLE_START) / PAGE_SIZE as u64;
    let regions = regions as u64;
    let mut layout = Vec::new();
    for index in 0..regions {
        let first = units * index / regions * pages_per_unit;
        let end = units * (index + 1) / regions * pages_per_unit;
        let below = (first, end.min(hole));
        let above = (first.max(hole) + hole_pages, end + hole_pages);
        for (first, end) in [below, above] {
            if first < end {
                layout.push(PageRun { first: PageIndex(first), pages: end - first });
            }
        }
    }
    layout
}

/// Guest RAM, mapped for as long as the value or a clone of its `memory` lives.
#[derive(Debug)]
pub(crate) struct Ram {
    memory: GuestMemory,
    /// The file of each region, where there are files.
    files: Vec<File>,
    tracker: Option<DirtyTracker>,
}

impl Ram {
    /// Maps what `config` asks for; nothing is touched, so nothing is populated.
    /// `tracker` is told of every page that the VMM itself writes: no ring and no bitmap sees those.
    pub fn new(config: &Config, tracker: Option<DirtyTracker>) -> Result<Self, TestVmError> {
        let layout = pc_layout(config.memory_bytes, config.regions, config.page_bytes());
        if config.huge_pages == HugePages::Reserved {
            let (needed, free) = (config.memory_bytes >> 21, free_huge_pages());
            if free < needed {
                return Err(TestVmError::NoHugePages { needed, free });
            }
        }
        let mut mappings = Vec::with_capacity(layout.len());
        let mut files = Vec::new();
        let mut regions = Vec::with_capacity(layout.len());
        for (slot, pages) in (0u32..).zip(layout) {
            let (mapping, file) = map(pages.pages * PAGE_SIZE as u64, config)?;
            files.extend(file);
            regions.push(Region::new(SlotId(slot), pages, mapping.as_mut_ptr()));
            mappings.push(mapping);
        }
        // SAFETY:
        // * each region is one mapping of its length, readable and writable, page-aligned by mmap;
        // * the value and its clones keep the mappings, and nobody makes references into them.
        let memory = unsafe { GuestMemory::new(regions) }?.kept_by(Arc::new(mappings));
        Ok(Self { memory, files, tracker })
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The file of each region of `memory`; none where RAM is anonymous.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Copies guest RAM from `address` on into `bytes`.
    pub fn read(&self, address: GuestAddress, bytes: &mut [u8]) -> Result<(), TestVmError> {
        let mut done = 0;
        for piece in self.pieces(address, bytes.len())? {
            load(&piece, &mut bytes[done..done + piece.bytes]);
            done += piece.bytes;
        }
        Ok(())
    }

    /// Copies `bytes` into guest RAM from `address` on.
    pub fn write(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), TestVmError> {
        let mut done = 0;
        for piece in self.pieces(address, bytes.len())? {
            store(&piece, &bytes[done..done + piece.bytes]);
            done += piece.bytes;
        }
        // After the write: a harvest that takes the mark is followed by a read of what was written.
        if let (Some(tracker), Some(run)) = (&self.tracker, page_run(address, bytes.len())) {
            tracker.mark_dirty(run);
        }
        Ok(())
    }

    /// The host memory behind a range, in order.
    fn pieces(&self, address: GuestAddress, bytes: usize) -> Result<Vec<Piece>, TestVmError> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let not_ram = |error| TestVmError::NotRam { address: address.0, bytes, error };
        let run = page_run(address, bytes).ok_or_else(|| not_ram(LayoutError::NotRam(address.page())))?;
        let mut skip = usize::try_from(address.0 % PAGE_SIZE as u64).unwrap_or(0);
        let mut left = bytes;
        let mut pieces = Vec::new();
        for host in self.memory.host_runs(run).map_err(not_ram)? {
            let take = (host.len_bytes() - skip).min(left);
            pieces.push(Piece { host: host.host.wrapping_add(skip), bytes: take });
            skip = 0;
            left -= take;
        }
        Ok(pieces)
    }
}

/// Consecutive host bytes inside one mapping of a living [`Ram`].
struct Piece {
    host: *mut u8,
    bytes: usize,
}

const WORD: usize = size_of::<u64>();

impl Piece {
    /// The byte or, from an aligned address with enough left, the word at `offset`.
    fn word_at(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.host.wrapping_add(offset);
        // SAFETY:
        // * `offset + 8 ≤ bytes`, so the word lies inside one mapping, which `Ram` keeps;
        // * the address is aligned, and all accesses of this process to guest RAM are atomic.
        (at.addr().is_multiple_of(WORD) && offset + WORD <= self.bytes)
            .then(|| unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    fn byte_at(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.bytes);
        // SAFETY: inside the mapping, by the assertion; atomic as above.
        unsafe { AtomicU8::from_ptr(self.host.wrapping_add(offset)) }
    }
}

// Words where possible: a guest's aligned 8-byte counter is read and written whole. Acquire and release, so
// that a word which the guest publishes after others is seen after them, as x86 orders them anyway.
fn load(piece: &Piece, bytes: &mut [u8]) {
    let mut offset = 0;
    while offset < bytes.len() {
        if let Some(word) = piece.word_at(offset) {
            bytes[offset..offset + WORD].copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            offset += WORD;
        } else {
            bytes[offset] = piece.byte_at(offset).load(Ordering::Acquire);
            offset += 1;
        }
    }
}

fn store(piece: &Piece, bytes: &[u8]) {
    let mut offset = 0;
    while offset < bytes.len() {
        if let (Some(word), Some(value)) = (piece.word_at(offset), bytes[offset..].first_chunk::<WORD>()) {
            word.store(u64::from_ne_bytes(*value), Ordering::Release);
            offset += WORD;
        } else {
            piece.byte_at(offset).store(bytes[offset], Ordering::Release);
            offset += 1;
        }
    }
}

fn page_run(address: GuestAddress, bytes: usize) -> Option<PageRun> {
    let last = address.0.checked_add(u64::try_from(bytes).ok()?.checked_sub(1)?)?;
    let first = address.page();
    Some(PageRun { first, pages: GuestAddress(last).page().0 - first.0 + 1 })
}

fn map(bytes: u64, config: &Config) -> Result<(MmapRaw, Option<File>), TestVmError> {
    let reserved = config.huge_pages == HugePages::Reserved;
    let (backing, hint) = match (config.backing, reserved) {
        (Backing::Anonymous, false) => {
            ("anonymous memory", "give the guest less RAM, or free memory on the host")
        }
        (Backing::Memfd, false) => ("a memfd", "give the guest less RAM, or free memory on the host"),
        (_, true) => ("reserved huge pages", "reserve more with `sysctl vm.nr_hugepages=N`"),
    };
    let failed = |error| TestVmError::Memory { bytes, backing, error, hint };
    let length = usize::try_from(bytes).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    let mut options = MmapOptions::new();
    options.len(length);
    let mapping = match config.backing {
        Backing::Anonymous => {
            if reserved {
                options.huge(Some(21));
            }
            options.map_anon().map(|map: MmapMut| (map.into(), None))
        }
        Backing::Memfd => memfd(bytes, reserved).and_then(|file| Ok((options.map_raw(&file)?, Some(file)))),
    };
    let (mapping, file): (MmapRaw, _) = mapping.map_err(failed)?;
    if config.huge_pages == HugePages::Transparent {
        mapping.advise(Advice::HugePage).map_err(|error| TestVmError::Memory {
            bytes,
            backing: "transparent huge pages",
            error,
            hint: "this kernel has none (CONFIG_TRANSPARENT_HUGEPAGE)",
        })?;
    }
    Ok((mapping, file))
}

fn memfd(bytes: u64, huge: bool) -> io::Result<File> {
    const NAME: &CStr = c"ringferry-guest-ram";
    let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    // SAFETY: the name is a C string; the call keeps no pointer.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh from the kernel and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

fn free_huge_pages() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(memory_bytes: u64, regions: usize, unit: u64) -> Vec<(u64, u64)> {
        let layout = pc_layout(memory_bytes, regions, unit);
        layout.iter().map(|run| (run.first.address().0, run.pages * 4096)).collect()
    }

    #[test]
    fn ram_goes_around_the_hole_below_4_gib() {
        assert_eq!(ranges(3 << 30, 1, 4096), [(0, 3 << 30)]);
        assert_eq!(ranges(5 << 30, 1, 4096), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!(
            ranges(4 << 30, 2, 4096),
            [(0, 2 << 30), (2 << 30, 1 << 30), (4 << 30, 1 << 30)],
            "a cut and the hole"
        );
    }

    #[test]
    fn cuts_lie_on_the_unit_and_lose_nothing() {
        for regions in 1..=MAX {
            let layout = ranges(130 << 21, regions, 2 << 20);
            assert_eq!(layout.len(), regions);
            assert!(layout.iter().all(|(start, bytes)| start % (2 << 20) == 0 && bytes % (2 << 20) == 0));
            assert_eq!(layout.iter().map(|(_, bytes)| bytes).sum::<u64>(), 130 << 21);
            assert!(layout.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
        }
        const MAX: usize = 64;
    }

    fn small(backing: Backing, regions: usize) -> Config {
        Config { memory_bytes: 2 << 20, backing, regions, ..Config::default() }
    }

    #[test]
    fn what_is_written_is_read_back_across_regions_and_odd_addresses() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = Ram::new(&small(backing, 2), None).unwrap();
            let bytes: Vec<u8> = (0..=255u8).cycle().take(10_001).collect();
            for address in [0, 3, (1 << 20) - 5000, (1 << 20) - 5001] {
                ram.write(GuestAddress(address), &bytes).unwrap();
                let mut back = vec![0; bytes.len()];
                ram.read(GuestAddress(address), &mut back).unwrap();
                assert_eq!(back, bytes, "{backing:?} at {address:#x}");
            }
        }
    }

    #[test]
    fn an_access_outside_ram_is_refused_and_writes_nothing() {
        let ram = Ram::new(&small(Backing::Anonymous, 1), None).unwrap();
        let last = GuestAddress((2 << 20) - 4);
        assert!(matches!(ram.write(last, &[1; 8]), Err(TestVmError::NotRam { .. })));
        let mut bytes = [7; 4];
        ram.read(last, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        assert!(ram.read(GuestAddress(u64::MAX), &mut bytes).is_err());
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_with_advice() {
        let config = Config { memory_bytes: 1 << 44, ..small(Backing::Anonymous, 1) };
        // Where overcommit is unlimited, the mapping succeeds: nothing of it is touched.
        if let Err(error) = Ram::new(&config, None) {
            assert!(matches!(error, TestVmError::Memory { .. }), "{error}");
            assert!(error.to_string().contains("give the guest less RAM"), "{error}");
        }
    }

    #[test]
    fn transparent_huge_pages_are_asked_for() {
        let config = Config { huge_pages: HugePages::Transparent, ..small(Backing::Anonymous, 1) };
        if let Err(error) = Ram::new(&config, None) {
            crate::skip(&error.to_string());
        }
    }

    #[test]
    fn too_few_reserved_huge_pages_are_named() {
        let config =
            Config { huge_pages: HugePages::Reserved, memory_bytes: 1 << 40, ..small(Backing::Memfd, 1) };
        let error = Ram::new(&config, None).unwrap_err();
        assert!(matches!(error, TestVmError::NoHugePages { needed: 524_288, .. }), "{error}");
        assert!(error.to_string().contains("vm.nr_hugepages"));
    }
}
