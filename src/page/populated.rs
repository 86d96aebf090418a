//! Which pages of a guest's RAM were ever populated, found without touching one of them.
//!
//! The first round of a migration reads these and no other: most of a large guest's RAM was never written, and
//! reading it would cost more than sending the rest. The order that loses nothing: start tracking, then look
//! here. What is populated later was written later, so it is dirty.
//!
//! A page of a private anonymous mapping exists exactly if our own page table knows it: present, or swapped out.
//! A page of a shared mapping or a file may also exist where our table is empty, because another process (a
//! vhost-user backend) or a `write` put it there, so the file is asked as well, by the first way that works:
//!
//! 1. `SEEK_DATA` on the mapping's own file, reached through `/proc/self/map_files`. It knows pages in memory and
//!    in swap. It takes `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
//! 2. `mincore`, which looks into the page cache of shared memory. It does not see what was swapped out, so it is
//!    asked only where there is no swap; nor what lies on a disk or in hugetlbfs, so only for shared memory.
//! 3. Otherwise every page counts as populated, and [`Populated::assumed_pages`] says how many that were.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::layout::{GuestMemory, PAGE_SIZE, Region};
use crate::os::file::{memfd, next_data, next_hole};
use crate::os::memory::mincore;
use crate::os::pagemap::{Filter, Pagemap, category};
use crate::page_set::PageSet;

/// What [`populated`] found.
#[derive(Clone, Debug)]
pub struct Populated {
    /// Every page that may hold something else than zeroes.
    pub pages: PageSet,
    /// How many of them are there only because nothing could be found out about them.
    pub assumed_pages: u64,
}

/// One line of `/proc/self/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapping {
    host: Range<usize>,
    offset: u64,
    device: (u32, u32),
    /// 0 for private anonymous memory, which has no file.
    inode: u64,
}

/// Finds the pages that were ever populated. Costs what the page tables cost, not what the RAM does: a fraction of
/// a millisecond per never-touched GiB. Never fails: what cannot be found out counts as populated.
pub fn populated(memory: &GuestMemory) -> Populated {
    let mappings = mappings().unwrap_or_else(|error| {
        tracing::debug!(%error, "/proc/self/maps cannot be read: all RAM counts as populated");
        Vec::new()
    });
    let mut found = Populated { pages: PageSet::new(memory.end()), assumed_pages: 0 };
    for region in memory.regions() {
        let host = region.host_range();
        let mut known_to = host.start;
        for mapping in &mappings {
            let part = mapping.host.start.max(host.start)..mapping.host.end.min(host.end);
            if part.is_empty() {
                continue;
            }
            found.assume(region, known_to..part.start);
            known_to = part.end;
            if let Err(error) = found.scan(region, mapping, part.clone()) {
                tracing::debug!(%error, slot = ?region.slot, "a part of this slot counts as populated");
                found.assume(region, part);
            }
        }
        found.assume(region, known_to..host.end);
    }
    found
}

impl Populated {
    fn assume(&mut self, region: &Region, part: Range<usize>) {
        let known = self.pages.len();
        self.pages.insert_run(region.pages_at(part));
        self.assumed_pages += self.pages.len() - known;
    }

    fn scan(&mut self, region: &Region, mapping: &Mapping, part: Range<usize>) -> io::Result<()> {
        let mut add = |host: Range<usize>| self.pages.insert_run(region.pages_at(host));
        if mapping.inode != 0 {
            pages_of_file(mapping, part.clone(), &mut add)?;
        }
        pages_of_ours(part, &mut add)
    }
}

/// What our page table knows. Pages that were only ever read share the page of zeroes and do not count.
fn pages_of_ours(part: Range<usize>, mut add: impl FnMut(Range<usize>)) -> io::Result<()> {
    let pagemap = Pagemap::open()?;
    let not_only_read = Filter {
        inverted: category::PFNZERO,
        mask: category::PFNZERO,
        anyof: category::PRESENT | category::SWAPPED,
        ..Filter::default()
    };
    // A kernel without the ioctl refuses it before it reports anything; pages reported twice do no harm.
    pagemap.scan(part.clone(), not_only_read, &mut add).or_else(|_| present_or_swapped(part, add))
}

/// The same on kernels without `PAGEMAP_SCAN`: eight bytes per page are read, whether it exists or not, and the
/// page of zeroes counts as present. Documentation/admin-guide/mm/pagemap.rst.
fn present_or_swapped(part: Range<usize>, mut add: impl FnMut(Range<usize>)) -> io::Result<()> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    let file = File::open("/proc/self/pagemap")?;
    let mut entries = [0_u8; 64 << 10];
    let mut at = part.start;
    while at < part.end {
        let pages = ((part.end - at) / PAGE_SIZE).min(entries.len() / 8);
        let bytes = &mut entries[..pages * 8];
        file.read_exact_at(bytes, (at / PAGE_SIZE * 8) as u64)?;
        for entry in bytes.as_chunks::<8>().0 {
            if u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0 {
                add(at..at + PAGE_SIZE);
            }
            at += PAGE_SIZE;
        }
    }
    Ok(())
}

fn pages_of_file(
    mapping: &Mapping,
    part: Range<usize>,
    add: &mut impl FnMut(Range<usize>),
) -> io::Result<()> {
    let path = format!("/proc/self/map_files/{:x}-{:x}", mapping.host.start, mapping.host.end);
    match File::open(path) {
        Ok(file) => pages_by_seek(&file, mapping, part, add),
        Err(_) if is_shared_memory(mapping)? && !swap_exists() => pages_by_mincore(part, add),
        Err(error) => Err(error),
    }
}

fn pages_by_seek(
    file: &File,
    mapping: &Mapping,
    part: Range<usize>,
    add: &mut impl FnMut(Range<usize>),
) -> io::Result<()> {
    let offset_of = |host: usize| mapping.offset + (host - mapping.host.start) as u64;
    let (mut at, end) = (offset_of(part.start), offset_of(part.end));
    while at < end {
        let Some(data) = next_data(file, at)?.filter(|data| *data < end) else { break };
        let hole = next_hole(file, data)?.min(end);
        // Data of a file on a disk may begin or end inside a page.
        let host_of = |offset: u64| part.start + usize::try_from(offset - offset_of(part.start)).unwrap_or(0);
        let page = PAGE_SIZE as u64;
        add(host_of(data.max(at) / page * page)..host_of(hole.next_multiple_of(page).min(end)));
        if hole <= at {
            return Err(io::Error::other("SEEK_HOLE does not advance"));
        }
        at = hole;
    }
    Ok(())
}

fn pages_by_mincore(part: Range<usize>, add: &mut impl FnMut(Range<usize>)) -> io::Result<()> {
    let mut resident = [0_u8; 16 << 10];
    for start in part.clone().step_by(resident.len() * PAGE_SIZE) {
        let length = (part.end - start).min(resident.len() * PAGE_SIZE);
        mincore(start..start + length, &mut resident)?;
        for (page, flags) in (start..start + length).step_by(PAGE_SIZE).zip(resident) {
            if flags & 1 != 0 {
                add(page..page + PAGE_SIZE);
            }
        }
    }
    Ok(())
}

/// Whether a mapping's file lives where the kernel keeps memfds and shared anonymous memory. Files in hugetlbfs
/// carry the same names and do not.
fn is_shared_memory(mapping: &Mapping) -> io::Result<bool> {
    let probe = memfd(c"ringferry")?;
    let device = probe.metadata()?.dev();
    Ok(mapping.device == (libc::major(device), libc::minor(device)))
}

/// Whether this machine may have swapped anything out.
fn swap_exists() -> bool {
    // One line of headings, then one line per swap area.
    fs::read_to_string("/proc/swaps").map_or(true, |swaps| swaps.lines().count() > 1)
}

fn mappings() -> io::Result<Vec<Mapping>> {
    // Names of files need not be UTF-8; the fields before them are ASCII.
    let maps = fs::read("/proc/self/maps")?;
    let unknown = || io::Error::other("a line of /proc/self/maps is not in the format of proc(5)");
    String::from_utf8_lossy(&maps).lines().map(|line| parse_mapping(line).ok_or_else(unknown)).collect()
}

/// `start-end perms offset major:minor inode [name]`, numbers in hexadecimal but the inode.
fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (_permissions, offset) = (fields.next()?, fields.next()?);
    let (major, minor) = fields.next()?.split_once(':')?;
    Some(Mapping {
        host: usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?,
        offset: u64::from_str_radix(offset, 16).ok()?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: fields.next()?.parse().ok()?,
    })
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a test's guest RAM is a mapping of its own")]
mod tests {
    use std::collections::BTreeSet;

    use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};

    use super::*;
    use crate::layout::{PageIndex, PageRun, SlotId};
    use crate::testing::{AnonymousRam, Backing};

    const FIRST: u64 = 0x100;
    const PAGES: usize = 2048;
    const TOUCHED: [usize; 5] = [0, 3, 511, 700, PAGES - 1];

    fn memory(host: *mut u8, pages: usize) -> GuestMemory {
        let run = PageRun { first: PageIndex(FIRST), pages: pages as u64 };
        // SAFETY: each test keeps its mapping for as long as the value, and holds no reference into it.
        unsafe { GuestMemory::new(vec![Region::new(SlotId(0), run, host)]) }.unwrap()
    }

    fn touch(host: *mut u8, page: usize) {
        // SAFETY: each test passes a page of its own mapping.
        unsafe { host.add(page * PAGE_SIZE).write_volatile(1) };
    }

    fn found(memory: &GuestMemory) -> BTreeSet<usize> {
        let Populated { pages, assumed_pages } = populated(memory);
        assert_eq!(assumed_pages, 0, "nothing was found out about some pages");
        members(&pages)
    }

    fn members(pages: &PageSet) -> BTreeSet<usize> {
        pages
            .runs()
            .flat_map(|run| run.first.0..run.end().0)
            .map(|page| usize::try_from(page - FIRST).unwrap())
            .collect()
    }

    fn page_at(index: usize) -> PageIndex {
        PageIndex(FIRST + index as u64)
    }

    fn ram() -> AnonymousRam {
        let run = PageRun { first: PageIndex(FIRST), pages: PAGES as u64 };
        AnonymousRam::with_slots(&[(SlotId(0), run)], Backing::SmallPages).unwrap()
    }

    #[test]
    fn exactly_the_written_pages_of_private_memory_are_populated_and_scanning_populates_none() {
        let ram = ram();
        assert_eq!(found(ram.memory()), BTreeSet::new());
        TOUCHED.iter().for_each(|page| ram.write(page_at(*page), 1));
        // A page that is only read is mapped to the page of zeroes.
        assert_eq!(ram.read(page_at(9)), 0);
        for _ in 0..2 {
            assert_eq!(found(ram.memory()), BTreeSet::from(TOUCHED));
        }
    }

    #[test]
    fn kernels_without_pagemap_scan_find_every_written_page_too() {
        let ram = ram();
        TOUCHED.iter().for_each(|page| ram.write(page_at(*page), 1));
        let mut pages = BTreeSet::new();
        let all = ram.memory().regions()[0].host_range();
        let add = |part: Range<usize>| {
            pages.extend(part.step_by(PAGE_SIZE).map(|at| (at - all.start) / PAGE_SIZE));
        };
        present_or_swapped(all.clone(), add).unwrap();
        assert_eq!(pages, BTreeSet::from(TOUCHED));
    }

    #[test]
    fn a_huge_page_is_populated_as_a_whole_and_nothing_beside_it() {
        const HUGE: usize = 512;
        let mut map = MmapMut::map_anon(4 * HUGE * PAGE_SIZE).unwrap();
        map.advise(Advice::HugePage).unwrap();
        let host = map.as_mut_ptr();
        let host = host.wrapping_add(host.align_offset(HUGE * PAGE_SIZE));
        let memory = memory(host, 3 * HUGE);
        touch(host, HUGE + 5);
        let pages = found(&memory);
        // All of the huge page, or the one small page where the kernel had no huge one.
        assert!(pages == (HUGE..2 * HUGE).collect() || pages == BTreeSet::from([HUGE + 5]), "{pages:?}");
    }

    #[test]
    fn pages_that_only_another_mapping_of_a_memfd_wrote_are_populated() {
        let file = memfd(c"populated").unwrap();
        file.set_len(((PAGES + 7) * PAGE_SIZE) as u64).unwrap();
        let ours = MmapRaw::from(
            // SAFETY: a file of our own that nobody truncates; it is written through raw pointers only.
            unsafe { MmapOptions::new().offset(7 * PAGE_SIZE as u64).map_mut(&file) }.unwrap(),
        );
        // SAFETY: as above.
        let mut theirs = unsafe { MmapMut::map_mut(&file) }.unwrap();
        let memory = memory(ours.as_mut_ptr(), PAGES);
        assert_eq!(found(&memory), BTreeSet::new());
        TOUCHED.iter().for_each(|page| touch(theirs.as_mut_ptr(), page + 7));
        assert_eq!(found(&memory), BTreeSet::from(TOUCHED));

        let mut by_mincore = BTreeSet::new();
        let host = ours.as_mut_ptr().addr();
        pages_by_mincore(host..host + PAGES * PAGE_SIZE, &mut |part| {
            by_mincore.extend(part.step_by(PAGE_SIZE).map(|at| (at - host) / PAGE_SIZE));
        })
        .unwrap();
        assert_eq!(by_mincore, BTreeSet::from(TOUCHED));
        let is_ours = |mapping: &Mapping| mapping.host.contains(&host);
        assert!(is_shared_memory(mappings().unwrap().iter().find(|m| is_ours(m)).unwrap()).unwrap());
    }

    #[test]
    fn a_private_mapping_has_the_pages_of_its_file_and_its_own() {
        let file = tempfile();
        let mut private = unsafe_private_map(&file);
        let host = private.as_mut_ptr();
        let memory = memory(host, PAGES);
        file.write_at(&[1], 3 * PAGE_SIZE as u64).unwrap();
        touch(host, 700);
        if populated(&memory).assumed_pages == PAGES as u64 {
            return ringferry_testvm::skip("asking the file behind a mapping takes CAP_CHECKPOINT_RESTORE");
        }
        let pages = found(&memory);
        // A file system may allocate, and so report, more than one page around the written one.
        assert!(pages.contains(&3) && pages.contains(&700), "{pages:?}");
        assert!(pages.len() < PAGES / 2, "a hole of the file counts as populated");
    }

    /// A sparse file on whatever file system holds temporary files, already unlinked.
    fn tempfile() -> File {
        let path = std::env::temp_dir().join(format!("ringferry-populated-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
        file
    }

    fn unsafe_private_map(file: &File) -> MmapMut {
        // SAFETY: a file of our own that nobody truncates.
        unsafe { MmapOptions::new().map_copy(file) }.unwrap()
    }

    #[test]
    fn ram_that_is_not_in_the_list_of_mappings_counts_as_populated() {
        let ram = ram();
        let memory = ram.memory();
        let region = &memory.regions()[0];
        let mut found = Populated { pages: PageSet::new(memory.end()), assumed_pages: 0 };
        let host = region.host.addr();
        found.assume(region, host + PAGE_SIZE..host + 3 * PAGE_SIZE);
        assert_eq!((members(&found.pages), found.assumed_pages), (BTreeSet::from([1, 2]), 2));
    }

    #[test]
    fn lines_of_proc_maps_are_read_as_proc_5_writes_them() {
        let line = "7f1c00000000-7f1c40000000 rw-s 00001000 00:01 2067     /memfd:guest ram (deleted)";
        let host = 0x7f1c_0000_0000..0x7f1c_4000_0000;
        let expected = Mapping { host, offset: 0x1000, device: (0, 1), inode: 2067 };
        assert_eq!(parse_mapping(line), Some(expected));
        assert_eq!(parse_mapping("7f1c00000000-7f1c40000000 rw-s"), None);
        assert!(mappings().unwrap().is_sorted_by_key(|mapping| mapping.host.start));
    }
}
