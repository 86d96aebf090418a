//! One conformance test that every source passes, and what each has besides.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::layout::{PAGE_SIZE, PageRun};

/// Where the tested region begins, and how many pages it has; neither a multiple of 64.
const FIRST: u64 = 1000;
const PAGES: u64 = 5000;
const END: PageIndex = PageIndex(FIRST + PAGES);

fn drained(source: &mut dyn ExternalSource) -> BTreeSet<u64> {
    let mut dirty = PageSet::new(END);
    source.drain_into(&mut dirty);
    assert_eq!(dirty.ignored(), 0);
    dirty.runs().flat_map(|run| run.first.0..run.end().0).collect()
}

/// What every source must do. `mark` does what its writer does after it wrote a page.
fn test_external_source(source: &mut dyn ExternalSource, mark: &(dyn Fn(PageIndex) + Sync)) {
    let ends = [FIRST, FIRST + 63, FIRST + 64, FIRST + PAGES - 1];
    let mark_all = |pages: &[u64]| pages.iter().for_each(|page| mark(PageIndex(*page)));

    assert!(!source.name().is_empty());
    mark(PageIndex(FIRST + 7));
    source.start().unwrap();
    assert_eq!(drained(source), BTreeSet::new(), "pages from before the start");

    mark_all(&ends);
    mark_all(&ends);
    assert_eq!(drained(source), BTreeSet::from(ends), "each marked page, once");
    assert_eq!(drained(source), BTreeSet::new(), "a drain takes what it reports");

    mark_all(&ends[..2]);
    let mut dirty = PageSet::new(END);
    dirty.insert(PageIndex(3));
    source.drain_into(&mut dirty);
    assert_eq!((dirty.len(), dirty.contains(PageIndex(3))), (3, true), "a drain adds to what is there");

    // Writers beside drains: each page is marked once, so a page lost by a race is lost for good.
    let (running, next) = (AtomicBool::new(true), AtomicU64::new(FIRST));
    let mut seen = BTreeSet::new();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while let page @ ..END_PAGE = next.fetch_add(1, Ordering::Relaxed) {
                        mark(PageIndex(page));
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            running.store(false, Ordering::Release);
        });
        while running.load(Ordering::Acquire) {
            seen.extend(drained(source));
        }
    });
    seen.extend(drained(source));
    assert_eq!(seen.len() as u64, PAGES, "marked beside drains");

    mark_all(&ends);
    source.stop();
    source.start().unwrap();
    assert_eq!(drained(source), BTreeSet::new(), "pages from before the second start");
    mark_all(&ends[2..]);
    assert_eq!(drained(source), BTreeSet::from([ends[2], ends[3]]), "after the second start");
    source.stop();
}

const END_PAGE: u64 = END.0;

fn offset(page: PageIndex) -> usize {
    usize::try_from(page.0 - FIRST).unwrap() * PAGE_SIZE
}

#[test]
fn a_region_log_is_an_external_source() {
    let log = RegionLog::new(usize::try_from(PAGES).unwrap() * PAGE_SIZE);
    test_external_source(&mut log.source(PageIndex(FIRST)), &|page| log.mark_dirty(offset(page) + 5, 1));
}

#[test]
fn an_existing_bitmap_is_an_external_source() {
    let bytes = usize::try_from(PAGES).unwrap() * PAGE_SIZE;
    let bitmap = Arc::new(
        <vm_memory_0_18::bitmap::AtomicBitmap as vm_memory_0_18::bitmap::NewBitmap>::with_len(bytes),
    );
    let theirs = Arc::clone(&bitmap);
    let mut source = BitmapSource::new("vm-memory", PageIndex(FIRST), move || theirs.get_and_reset());
    test_external_source(&mut source, &|page| bitmap.set_addr_range(offset(page), 1));
}

#[test]
fn a_shared_log_is_an_external_source() {
    let mut log = SharedLog::new(PageRun { first: PageIndex(FIRST), pages: PAGES }).unwrap();
    let writer = SharedLogWriter::open(log.file().try_clone_to_owned().unwrap()).unwrap();
    test_external_source(&mut log, &|page| writer.mark(PageRun { first: page, pages: 1 }));
    log.start().unwrap();
    // Runs of several words, and what the log is not for.
    for (first, pages) in [(FIRST + 60, 200), (0, FIRST + 1), (FIRST + PAGES - 1, u64::MAX), (0, FIRST)] {
        writer.mark(PageRun { first: PageIndex(first), pages });
    }
    let expected: BTreeSet<u64> = (FIRST + 60..FIRST + 260).chain([FIRST, FIRST + PAGES - 1]).collect();
    assert_eq!(drained(&mut log), expected);
}

#[test]
fn what_is_no_shared_log_is_refused_by_its_writer_and_beyond_all_memory_there_is_none() {
    let other = VhostUserLog::new(END).unwrap();
    let refused = SharedLogWriter::open(other.file().try_clone_to_owned().unwrap()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{refused}");
    for run in
        [PageRun { first: PageIndex(u64::MAX), pages: 2 }, PageRun { first: PageIndex(1), pages: 1 << 34 }]
    {
        assert_eq!(SharedLog::new(run).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_vhost_user_log_is_an_external_source() {
    let mut log = VhostUserLog::new(END).unwrap();
    let backend = log.backend();
    test_external_source(&mut log, &backend);
}

/// As `log_write` of `drivers/vhost/vhost.c`, which is given an address of this process and writes bits behind it.
#[expect(unsafe_code, reason = "vhost in the kernel writes by address")]
fn vhost_writes(base: u64, guest_address: u64) {
    const VHOST_PAGE_SIZE: u64 = 0x1000;
    let page = guest_address / VHOST_PAGE_SIZE;
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(base + page / 8).unwrap());
    // SAFETY: a byte of the log, which is mapped as long as the test has it; all access is atomic.
    unsafe { std::sync::atomic::AtomicU8::from_ptr(at) }.fetch_or(1 << (page % 8), Ordering::SeqCst);
}

#[test]
fn what_vhost_in_the_kernel_logs_at_the_base_that_it_is_given_is_drained() {
    let mut log = VhostUserLog::new(END).unwrap();
    log.start().unwrap();
    for page in [0, 7, 8, 63, 64, END.0 - 1] {
        vhost_writes(log.base(), page * 4096 + 17);
    }
    let before = log.base();
    log.swap(PageIndex(END.0 * 2)).unwrap();
    assert_ne!(log.base(), before);
    // The kernel still has the old one, and then the new.
    vhost_writes(before, 9 * 4096);
    log.every_backend_acknowledged();
    vhost_writes(log.base(), END.0 * 4096);
    let mut dirty = PageSet::new(PageIndex(END.0 * 2));
    log.drain_into(&mut dirty);
    let pages: Vec<u64> = dirty.runs().flat_map(|run| run.first.0..run.end().0).collect();
    assert_eq!(pages, [0, 7, 8, 9, 63, 64, END.0 - 1, END.0]);
    // What `base` is for: the ioctl takes a pointer to 64 bits.
    if let Ok(header) = std::fs::read_to_string("/usr/include/linux/vhost.h") {
        assert!(header.contains("#define VHOST_SET_LOG_BASE _IOW(VHOST_VIRTIO, 0x04, __u64)"));
    }
}

/// A device that logs what it writes and can be made to fail.
#[derive(Clone, Default)]
struct FakeDevice(Arc<Mutex<FakeDeviceState>>);

#[derive(Default)]
struct FakeDeviceState {
    ranges: Vec<IovaRange>,
    written: BTreeSet<u64>,
    broken: bool,
}

impl FakeDevice {
    fn dma(&self, iova: u64) {
        let mut state = self.0.lock().unwrap();
        if state.ranges.iter().any(|range| (range.iova..range.iova + range.bytes).contains(&iova)) {
            state.written.insert(iova / PAGE_SIZE as u64);
        }
    }
}

impl DmaLogging for FakeDevice {
    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), VmError> {
        let mut state = self.0.lock().unwrap();
        state.ranges = ranges.to_vec();
        state.written.clear();
        if state.broken { Err("no logging".into()) } else { Ok(()) }
    }

    fn report(&mut self, range: IovaRange, bitmap: &mut [u64]) -> Result<(), VmError> {
        let mut state = self.0.lock().unwrap();
        if state.broken {
            return Err("device lost".into());
        }
        assert!(bitmap.iter().all(|word| *word == 0));
        let page = |bytes: u64| bytes / PAGE_SIZE as u64;
        let first = page(range.iova);
        state.written.retain(|written| {
            let Some(bit) = written.checked_sub(first).filter(|bit| *bit < page(range.bytes)) else {
                return true;
            };
            bitmap[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
            false
        });
        Ok(())
    }

    fn stop(&mut self) {
        self.0.lock().unwrap().ranges.clear();
    }
}

const IOVA: u64 = 0xffff_0000_0000;

fn mapping(iova: u64, first: u64, pages: u64) -> DmaMapping {
    DmaMapping { iova, pages: PageRun { first: PageIndex(first), pages } }
}

#[test]
fn a_dma_logging_device_is_an_external_source() {
    let device = FakeDevice::default();
    // Two mappings, in another order than the guest's pages.
    let half = PAGES / 2;
    let upper = mapping(IOVA, FIRST + half, PAGES - half);
    let lower = mapping(IOVA + (1 << 32), FIRST, half);
    let mut source = DmaSource::new(device.clone(), [upper, lower]);
    let page_bytes = PAGE_SIZE as u64;
    test_external_source(&mut source, &|page| match page.0.checked_sub(FIRST + half) {
        Some(above) => device.dma(IOVA + above * page_bytes + 8),
        None => device.dma(IOVA + (1 << 32) + (page.0 - FIRST) * page_bytes),
    });
}

#[test]
fn a_device_that_fails_makes_all_its_pages_dirty() {
    let device = FakeDevice::default();
    let mut source = DmaSource::new(device.clone(), [mapping(IOVA, FIRST, 10)]);
    source.start().unwrap();
    device.0.lock().unwrap().broken = true;
    assert_eq!(drained(&mut source), (FIRST..FIRST + 10).collect());
    source.stop();
    assert!(source.start().is_err());
}

#[test]
fn what_a_device_wrote_through_a_mapping_that_is_gone_is_dirty() {
    let device = FakeDevice::default();
    let mut source = DmaSource::new(device.clone(), [mapping(IOVA, FIRST, 10)]);
    source.start().unwrap();
    device.dma(IOVA + 2 * PAGE_SIZE as u64);
    source.unmap(IOVA);
    device.dma(IOVA + 3 * PAGE_SIZE as u64);
    assert_eq!(drained(&mut source), BTreeSet::from([FIRST + 2]));
}

#[test]
fn what_a_device_wrote_through_a_mapping_of_memory_plugged_in_later_is_dirty() {
    let device = FakeDevice::default();
    let mut source = DmaSource::new(device.clone(), [mapping(IOVA, FIRST, 10)]);
    let plugged = FIRST + PAGES - 10;
    source.map(mapping(IOVA * 2, plugged, 10));
    source.start().unwrap();
    device.dma(IOVA + PAGE_SIZE as u64);
    device.dma(IOVA * 2 + 2 * PAGE_SIZE as u64);
    source.unmap(IOVA * 2);
    source.map(mapping(IOVA * 3, FIRST + 20, 2));
    source.unmap(IOVA * 3);
    let expected = BTreeSet::from([FIRST + 1, FIRST + 20, FIRST + 21, plugged + 2]);
    assert_eq!(drained(&mut source), expected);
}

#[test]
fn a_mapping_that_comes_while_the_device_logs_is_dirty_as_a_whole_until_the_next_start() {
    let mut source = DmaSource::new(FakeDevice::default(), [mapping(IOVA, FIRST, 10)]);
    source.start().unwrap();
    source.map(mapping(IOVA * 2, FIRST + 100, 2));
    for _ in 0..2 {
        assert_eq!(drained(&mut source), BTreeSet::from([FIRST + 100, FIRST + 101]));
    }
    source.stop();
    source.start().unwrap();
    assert_eq!(drained(&mut source), BTreeSet::new());
}

#[test]
fn a_vhost_user_log_that_is_swapped_while_backends_write_loses_no_page() {
    let mut log = VhostUserLog::new(PageIndex(FIRST + 100)).unwrap();
    log.start().unwrap();
    let old = log.backend();
    old(PageIndex(FIRST));
    log.swap(END).unwrap();
    assert_eq!(log.len_bytes() as u64, END.0.div_ceil(8).next_multiple_of(4096));
    let new = log.backend();
    new(PageIndex(FIRST + PAGES - 1));
    old(PageIndex(FIRST + 1));
    assert_eq!(drained(&mut log), BTreeSet::from([FIRST, FIRST + 1, FIRST + PAGES - 1]));
    old(PageIndex(FIRST + 2));
    log.every_backend_acknowledged();
    new(PageIndex(FIRST + 3));
    assert_eq!(drained(&mut log), BTreeSet::from([FIRST + 2, FIRST + 3]));
    assert_eq!(drained(&mut log), BTreeSet::new());
}

#[test]
fn a_backend_cannot_shrink_the_log() {
    let log = VhostUserLog::new(END).unwrap();
    let theirs = std::fs::File::from(log.file().try_clone_to_owned().unwrap());
    assert!(theirs.set_len(0).is_err());
    assert!(VhostUserLog::new(PageIndex(u64::MAX)).is_err());
}

#[test]
fn a_region_log_keeps_nothing_while_tracking_is_off_or_beyond_its_region() {
    let log = RegionLog::new(10 * PAGE_SIZE + 1);
    log.mark_dirty(0, 1);
    assert!(!log.dirty_at(0));
    let mut source = log.source(PageIndex(0));
    source.start().unwrap();
    log.mark_dirty(5 * PAGE_SIZE - 1, 2);
    log.mark_dirty(7 * PAGE_SIZE, 0);
    log.mark_dirty(10 * PAGE_SIZE, usize::MAX);
    log.mark_dirty(usize::MAX, 1);
    assert!(log.dirty_at(4 * PAGE_SIZE) && log.dirty_at(10 * PAGE_SIZE + 4095) && !log.dirty_at(usize::MAX));
    let mut dirty = PageSet::new(END);
    source.drain_into(&mut dirty);
    assert_eq!(dirty.runs().map(|run| (run.first.0, run.pages)).collect::<Vec<_>>(), [(4, 2), (10, 1)]);
}

#[test]
fn a_write_that_found_tracking_off_is_seen_by_who_switched_it_on() {
    // The store-buffer race that `membarrier` in `start` excludes: a writer writes, finds tracking off and marks
    // nothing, yet the thread that started tracking reads the page as it was before.
    let (page, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    let log = RegionLog::new(PAGE_SIZE);
    let (round, done) = (AtomicU64::new(0), AtomicU64::new(0));
    const ROUNDS: u64 = 3000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=ROUNDS {
                while round.load(Ordering::Acquire) != n {
                    std::hint::spin_loop();
                }
                // So that the two sides meet at every offset.
                (0..n % 100).for_each(|_| std::hint::spin_loop());
                page.store(n, Ordering::Relaxed);
                log.mark_dirty(0, 8);
                done.store(n, Ordering::Release);
            }
        });
        for n in 1..=ROUNDS {
            let mut source = log.source(PageIndex(0));
            round.store(n, Ordering::Release);
            source.start().unwrap();
            let read = page.load(Ordering::Relaxed);
            while done.load(Ordering::Acquire) != n {
                std::thread::yield_now();
            }
            lost.fetch_add(u64::from(read != n && !log.dirty_at(0)), Ordering::Relaxed);
            source.stop();
        }
    });
    assert_eq!(lost.into_inner(), 0);
}

#[cfg(feature = "vm-memory-0-16")]
#[test]
fn writes_through_guest_memory_of_vm_memory_0_16_are_drained() {
    use vm_memory_0_16::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
    let memory: GuestMemoryMmap<RegionLog> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(1 << 20), 1 << 20)]).unwrap();
    let region = memory.iter().next().unwrap();
    let first = crate::GuestAddress(region.start_addr().0).page();
    let mut source = MmapRegion::bitmap(region).source(first);
    memory.write_obj(1_u64, GuestAddress(1 << 20)).unwrap();
    source.start().unwrap();
    memory.write_obj(1_u64, GuestAddress((1 << 20) + 0x2ffe)).unwrap();
    let mut dirty = PageSet::new(PageIndex(512));
    source.drain_into(&mut dirty);
    let runs: Vec<_> = dirty.runs().map(|run| (run.first.0, run.pages)).collect();
    assert_eq!(runs, [(256 + 2, 2)]);
}

#[cfg(all(feature = "vm-memory-0-17", feature = "vm-memory-0-18"))]
mod with_vm_memory {
    use vm_memory_0_18::bitmap::{Bitmap, NewBitmap};
    use vm_memory_0_18::{
        Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
    };

    use super::*;

    /// After vm-memory's own `test_bitmap`.
    fn test_bitmap<B: Bitmap>(bitmap: &B) {
        let slice = bitmap.slice_at(0x4000);
        let all = |b: &dyn Fn(usize) -> bool, len: usize, dirty: bool| (0..len).all(|at| b(at) == dirty);
        assert!(all(&|at| bitmap.dirty_at(at), 0x8000, false));
        assert!(all(&|at| slice.dirty_at(at), 0x1000, false));
        bitmap.mark_dirty(0x4000, 0x1000);
        assert!(all(&|at| bitmap.dirty_at(0x4000 + at), 0x1000, true));
        assert!(all(&|at| slice.dirty_at(at), 0x1000, true));
        assert!(!bitmap.dirty_at(0x3fff) && !bitmap.dirty_at(0x5000));
        slice.slice_at(0x2000).mark_dirty(0, 1);
        assert!(bitmap.dirty_at(0x6000));
    }

    fn implements_0_17<B: vm_memory_0_17::bitmap::NewBitmap>() {}

    #[test]
    fn a_region_log_is_a_bitmap_of_vm_memory_0_17_and_0_18() {
        implements_0_17::<RegionLog>();
        let log = RegionLog::with_len(0x8000);
        log.source(PageIndex(0)).start().unwrap();
        test_bitmap(&log);
        log.source(PageIndex(0)).start().unwrap();
        test_bitmap(&log.slice_at(0));
    }

    #[test]
    fn writes_through_guest_memory_are_drained_with_their_guest_pages() {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
        let memory: GuestMemoryMmap<RegionLog> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let mut sources: Vec<RegionSource> = memory
            .iter()
            .map(|region| {
                let first = crate::GuestAddress(region.start_addr().0).page();
                MmapRegion::bitmap(region).source(first)
            })
            .collect();
        memory.write_obj(1_u64, GuestAddress(0)).unwrap();
        sources.iter_mut().for_each(|source| source.start().unwrap());
        memory.write_obj(1_u64, GuestAddress(0x1_2ffe)).unwrap();
        memory.write_slice(&[1; 4097], GuestAddress((1 << 32) + 0x5000)).unwrap();
        let mut dirty = PageSet::new(PageIndex((1 << 20) + 256));
        sources.iter_mut().for_each(|source| source.drain_into(&mut dirty));
        let runs: Vec<_> = dirty.runs().map(|run| (run.first.0, run.pages)).collect();
        assert_eq!(runs, [(0x12, 2), ((1 << 20) + 5, 2)]);
    }
}
