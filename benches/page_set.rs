//! What a page costs in a [`PageSet`]: dense as a ring delivers it, and spread over guests of 1 GiB and 256 GiB.
//!
//! `cargo bench -p ringferry --bench page_set`; criterion prints pages per second, and `thrpt` of 1 Gelem/s is
//! 1 ns per page.
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ringferry::{AtomicPageSet, PageIndex, PageRun, PageSet};

const DENSE_PAGES: u64 = 60_000;
const SPARSE_PAGES: u64 = 4_000;
const GIB_PAGES: u64 = 1 << 18;

/// Pages spread evenly over the guest, in an order that no prefetcher knows.
fn sparse(end: u64) -> Vec<PageIndex> {
    (0..SPARSE_PAGES).map(|i| PageIndex(i * 2_654_435_761 % SPARSE_PAGES * (end / SPARSE_PAGES))).collect()
}

fn dense(c: &mut Criterion) {
    let mut group = c.benchmark_group("dense");
    group.throughput(Throughput::Elements(DENSE_PAGES));
    let mut set = PageSet::new(PageIndex(GIB_PAGES));
    group.bench_function("insert, clear", |b| {
        b.iter(|| {
            for page in 0..DENSE_PAGES {
                set.insert(black_box(PageIndex(page)));
            }
            set.clear();
        });
    });
    group.bench_function("extend, clear", |b| {
        b.iter(|| {
            set.extend((0..DENSE_PAGES).map(|page| black_box(PageIndex(page))));
            set.clear();
        });
    });
    let shared = AtomicPageSet::new(PageIndex(GIB_PAGES));
    group.bench_function("shared insert, drain", |b| {
        b.iter(|| {
            for page in 0..DENSE_PAGES {
                shared.insert(black_box(PageIndex(page)));
            }
            shared.drain_into(&mut set);
        });
    });
    let run = PageRun { first: PageIndex(77), pages: DENSE_PAGES };
    group.bench_function("insert_run, clear", |b| {
        b.iter(|| {
            set.insert_run(black_box(run));
            set.clear();
        });
    });
    // Every second page: as many runs as there can be.
    set.extend((0..2 * DENSE_PAGES).step_by(2).map(PageIndex));
    group.bench_function("runs of every second page", |b| {
        b.iter(|| set.runs().map(|r| r.first.0).sum::<u64>())
    });
    group.finish();
}

fn spread(c: &mut Criterion) {
    for gib in [1, 256] {
        let end = PageIndex(gib * GIB_PAGES);
        let pages = sparse(end.0);
        let mut group = c.benchmark_group(format!("sparse in {gib} GiB"));
        group.throughput(Throughput::Elements(SPARSE_PAGES));
        let mut set = PageSet::new(end);
        group.bench_function("insert, clear", |b| {
            b.iter(|| {
                set.extend(pages.iter().copied());
                set.clear();
            });
        });
        set.extend(pages.iter().copied());
        group.bench_function("runs", |b| b.iter(|| set.runs().map(|r| r.first.0).sum::<u64>()));
        let mut other = PageSet::new(end);
        group.bench_function("union, clear", |b| {
            b.iter(|| {
                other.union(&set);
                other.clear();
            });
        });
        let shared = AtomicPageSet::new(end);
        group.bench_function("shared insert, drain", |b| {
            b.iter(|| {
                for page in &pages {
                    shared.insert(*page);
                }
                shared.drain_into(&mut other);
                other.clear();
            });
        });
        let all = PageRun { first: PageIndex(0), pages: end.0 };
        group.bench_function("words_in", |b| {
            b.iter_batched(|| (), |()| set.words_in(all), BatchSize::PerIteration);
        });
        group.finish();
    }
}

criterion_group!(benches, dense, spread);
criterion_main!(benches);
