//! The backend `pagemap` on memory that real threads, and the kernel for them, write.
#![expect(unsafe_code, reason = "guest RAM is a mapping given by address")]
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its memory fails")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::MmapRaw;
use ringferry::testing::{AnonymousRam, Backing};
use ringferry::track::{Observed, PagemapError, PagemapTracker, TrackError};
use ringferry::{DirtySource, GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId};

const PAGES: usize = 4096;
const NONE: [usize; 0] = [];

fn ram(backing: Backing) -> AnonymousRam {
    let all = PageRun { first: PageIndex(0), pages: PAGES as u64 };
    AnonymousRam::with_slots(&[(SlotId(7), all)], backing).unwrap()
}

fn tracker(ram: &AnonymousRam) -> PagemapTracker {
    PagemapTracker::new(ram.memory().clone()).unwrap()
}

fn at(index: usize) -> PageIndex {
    PageIndex(index as u64)
}

fn harvest(tracker: &mut PagemapTracker) -> Vec<usize> {
    let mut dirty = PageSet::new(PageIndex(PAGES as u64));
    tracker.harvest(&mut dirty).unwrap();
    dirty.runs().flat_map(|run| run.first.0..run.end().0).map(|page| usize::try_from(page).unwrap()).collect()
}

/// A small xorshift generator: the writers need no better one.
fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state % PAGES as u64).unwrap()
}

/// What a migration does, on one word per page: copy what each harvest names while writers go on, and in the end
/// have a copy that equals the original.
fn copy_while_threads_write(backing: Backing) {
    const WRITERS: u64 = 2;
    let ram = ram(backing);
    // Some memory exists before, some comes while it is tracked.
    (0..PAGES / 2).for_each(|page| ram.write(at(page), 1));
    let mut tracker = tracker(&ram);
    tracker.start().unwrap();
    let mut copy: Vec<u64> = (0..PAGES).map(|page| ram.read(at(page))).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 1..=WRITERS {
            let (ram, stop) = (&ram, &stop);
            scope.spawn(move || {
                let mut state = writer.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                for value in 1.. {
                    ram.write(at(random(&mut state)), value * WRITERS + writer);
                    if value % 64 == 0 && stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        for _ in 0..100 {
            for page in harvest(&mut tracker) {
                copy[page] = ram.read(at(page));
            }
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
    for page in harvest(&mut tracker) {
        copy[page] = ram.read(at(page));
    }
    let stale = (0..PAGES).filter(|page| copy[*page] != ram.read(at(*page))).count();
    assert_eq!(stale, 0, "pages were written and not harvested");
    assert_eq!(harvest(&mut tracker), NONE);
}

#[test]
fn no_write_of_threads_to_private_memory_is_lost() {
    copy_while_threads_write(Backing::SmallPages);
}

#[test]
fn no_write_of_threads_to_huge_pages_is_lost() {
    copy_while_threads_write(Backing::HugePages);
}

#[test]
fn no_write_of_threads_to_a_memfd_is_lost() {
    copy_while_threads_write(Backing::Memfd);
}

#[test]
fn a_write_to_a_huge_page_makes_one_small_page_dirty() {
    let ram = ram(Backing::HugePages);
    (0..PAGES).for_each(|page| ram.write(at(page), 1));
    let mut tracker = tracker(&ram);
    tracker.start().unwrap();
    ram.write(at(1000), 2);
    assert_eq!(harvest(&mut tracker), [1000]);
}

#[test]
fn what_the_kernel_writes_for_a_thread_is_dirty() {
    let ram = ram(Backing::SmallPages);
    (0..PAGES).for_each(|page| ram.write(at(page), 1));
    let mut tracker = tracker(&ram);
    tracker.start().unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[7; PAGE_SIZE]).unwrap();
    let inside = ram.memory().regions()[0].host.wrapping_add(99 * PAGE_SIZE + 5);
    // SAFETY: a page of the RAM and part of the next, which live on.
    let read = unsafe { libc::read(reader.as_raw_fd(), inside.cast(), PAGE_SIZE) };
    assert_eq!(read, 4096, "{}", std::io::Error::last_os_error());
    assert_eq!(harvest(&mut tracker), [99, 100]);
}

#[test]
fn a_read_is_not_a_write_and_a_first_write_is() {
    for backing in [Backing::SmallPages, Backing::Memfd] {
        let ram = ram(backing);
        ram.write(at(0), 1);
        let mut tracker = tracker(&ram);
        tracker.start().unwrap();
        assert_eq!(ram.read(at(0)), 1);
        assert_eq!(harvest(&mut tracker), NONE);
        // A page that did not exist, beside one that did, and one in a part of memory without a page table.
        ram.write(at(1), 1);
        ram.write(at(3000), 1);
        assert_eq!(tracker.observe().unwrap(), Observed::Total(2));
        assert_eq!(harvest(&mut tracker), [1, 3000]);
    }
    // Private memory that was only read is the page of zeroes; of a memfd, reading makes a real page.
    let ram = ram(Backing::SmallPages);
    let mut tracker = tracker(&ram);
    tracker.start().unwrap();
    assert_eq!(ram.read(at(5)), 0);
    assert_eq!(harvest(&mut tracker), NONE);
    ram.write(at(5), 1);
    assert_eq!(harvest(&mut tracker), [5]);
}

#[test]
fn what_is_written_after_a_stop_is_not_tracked() {
    let ram = ram(Backing::SmallPages);
    ram.write(at(0), 1);
    let mut tracker = tracker(&ram);
    tracker.start().unwrap();
    tracker.stop().unwrap();
    ram.write(at(0), 2);
    tracker.start().unwrap();
    assert_eq!(harvest(&mut tracker), NONE);
}

#[test]
fn memory_that_another_userfaultfd_has_is_refused_by_the_name_of_its_slot() {
    let ram = ram(Backing::SmallPages);
    let (mut first, mut second) = (tracker(&ram), tracker(&ram));
    first.start().unwrap();
    let refused = second.start().unwrap_err();
    assert!(
        matches!(&refused, TrackError::Pagemap(PagemapError::NotProtectable(SlotId(7), _))),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("another userfaultfd"), "{refused}");
    // The refused start left nothing behind, and did not disturb the first.
    ram.write(at(1), 1);
    assert_eq!(harvest(&mut first), [1]);
    first.stop().unwrap();
    second.start().unwrap();
}

#[test]
fn a_file_on_a_disk_cannot_be_protected_and_the_error_says_what_can() {
    let path = std::env::temp_dir().join(format!("ringferry-pagemap-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(PAGE_SIZE as u64).unwrap();
    let map = MmapRaw::map_raw(&file).unwrap();
    let pages = PageRun { first: PageIndex(0), pages: 1 };
    // SAFETY: the mapping outlives the value.
    let memory = unsafe { GuestMemory::new(vec![Region::new(SlotId(3), pages, map.as_mut_ptr())]) }.unwrap();
    match PagemapTracker::new(memory).unwrap().start() {
        // A temporary directory in memory can.
        Ok(()) => {}
        Err(error) => assert!(error.to_string().contains("memfd can"), "{error}"),
    }
}
