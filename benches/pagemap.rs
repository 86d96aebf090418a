//! What tracking by `pagemap` costs: a harvest, and the first write to a protected page.
//!
//! `cargo bench -p ringferry --bench pagemap`. A harvest walks the page tables, so it costs what is populated, half a
//! GiB here; an observation costs as much as a harvest of nothing.
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringferry::testing::AnonymousRam;
use ringferry::track::PagemapTracker;
use ringferry::{DirtySource, PAGE_SIZE, PageIndex, PageSet};

const PAGES: usize = (512 << 20) / PAGE_SIZE;

fn pagemap(c: &mut Criterion) {
    let ram = AnonymousRam::new(PAGES as u64).expect("anonymous memory");
    let write = |step: usize| {
        (0..PAGES as u64).step_by(step).for_each(|page| ram.write(PageIndex(page), 1));
    };
    write(1);
    let mut tracker = PagemapTracker::new(ram.memory().clone()).expect("userfaultfd");
    tracker.start().expect("memory that can be protected");
    let mut dirty = PageSet::new(ram.memory().end());

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
