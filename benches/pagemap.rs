//! What tracking by `pagemap` costs: a harvest, and the first write to a protected page.
//!
//! `cargo bench -p ringferry --bench pagemap`. A harvest walks the page tables, so it costs what is populated, half a
//! GiB here; an observation costs as much as a harvest of nothing.
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]
#![expect(unsafe_code, reason = "guest memory is a mapping given by address")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memmap2::{Advice, MmapOptions, MmapRaw};
use ringferry::track::PagemapTracker;
use ringferry::{DirtySource, GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId};

const PAGES: usize = (512 << 20) / PAGE_SIZE;

fn pagemap(c: &mut Criterion) {
    let map: MmapRaw = MmapOptions::new().len(PAGES * PAGE_SIZE).map_anon().expect("anonymous memory").into();
    map.advise(Advice::NoHugePage).expect("madvise");
    let pages = PageRun { first: PageIndex(0), pages: PAGES as u64 };
    let region = Region { slot: SlotId(0), pages, host: map.as_mut_ptr() };
    // SAFETY: the mapping lives until the end of this function, and is used through raw pointers only.
    let memory = unsafe { GuestMemory::new(vec![region]) }.expect("one region");
    let write = |step: usize| {
        for page in (0..PAGES).step_by(step) {
            // SAFETY: inside the mapping, aligned.
            unsafe { map.as_mut_ptr().add(page * PAGE_SIZE).cast::<u64>().write_volatile(1) };
        }
    };
    write(1);
    let mut tracker = PagemapTracker::new(memory.clone()).expect("userfaultfd");
    tracker.start().expect("memory that can be protected");
    let mut dirty = PageSet::new(memory.end());

    let mut group = c.benchmark_group("pagemap, 512 MiB");
    group.sample_size(10);
    group.bench_function("harvest, nothing dirty", |b| {
        b.iter(|| tracker.harvest(&mut dirty).expect("tracking"))
    });
    for (name, step) in [("every 64th", 64), ("all", 1)] {
        let count = PAGES / step;
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("harvest, {name} page dirty"), |b| {
            b.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    write(step);
                    dirty.clear();
                    let began = Instant::now();
                    tracker.harvest(&mut dirty).expect("tracking");
                    spent += began.elapsed();
                    assert_eq!(dirty.len(), count as u64);
                }
                spent
            });
        });
        group.bench_function(format!("writing {name} protected page"), |b| {
            b.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    tracker.harvest(&mut dirty).expect("tracking");
                    let began = Instant::now();
                    write(step);
                    spent += began.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(benches, pagemap);
criterion_main!(benches);
