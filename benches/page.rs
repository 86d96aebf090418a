//! What it costs to look at guest pages: is it zero, was it ever populated, what does all RAM hash to.
//!
//! `cargo bench -p ringferry --bench page`
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]
#![expect(unsafe_code, reason = "a single page is looked at by address")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringferry::page::{is_zero, populated, ram_digest, zero_pages};
use ringferry::testing::{AnonymousRam, Backing};
use ringferry::{PAGE_SIZE, PageIndex, PageRun, PageSet, Paused, SlotId};

const MIB: usize = 1 << 20;

fn ram(bytes: usize, backing: Backing) -> AnonymousRam {
    let all = PageRun { first: PageIndex(0), pages: (bytes / PAGE_SIZE) as u64 };
    AnonymousRam::with_slots(&[(SlotId(0), all)], backing).expect("memory")
}

/// Writes `word` to the beginning of each page: 0 makes populated pages of zeroes.
fn populate(ram: &AnonymousRam, word: u64) {
    (0..ram.memory().end().0).for_each(|page| ram.write(PageIndex(page), word));
}

fn zero(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero");
    for (name, bytes) in [("in cache", MIB / 2), ("in memory", 512 * MIB)] {
        let ram = ram(bytes, Backing::SmallPages);
        let all = PageRun { first: PageIndex(0), pages: ram.memory().pages() };
        let mut set = PageSet::new(ram.memory().end());
        group.throughput(Throughput::Bytes(bytes as u64));
        for (content, word) in [("zero pages", 0), ("used pages", 1)] {
            populate(&ram, word);
            group.bench_function(format!("{content} {name}"), |b| {
                b.iter(|| {
                    set.clear();
                    zero_pages(ram.memory(), all, &mut set)
                });
            });
        }
    }
    let page = ram(PAGE_SIZE, Backing::SmallPages);
    populate(&page, 0);
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    let host = page.memory().regions()[0].host;
    group.bench_function("one page", |b| {
        // SAFETY: a page of our own.
        b.iter(|| unsafe { is_zero(black_box(host)) })
    });
    group.finish();
}

fn first_look(c: &mut Criterion) {
    let mut group = c.benchmark_group("populated");
    for (name, backing) in [("private", Backing::SmallPages), ("memfd", Backing::Memfd)] {
        let untouched = ram(1434 * MIB, backing);
        group.bench_function(format!("1.4 GiB {name}, never touched"), |b| {
            b.iter(|| populated(untouched.memory()).pages.len());
        });
        let touched = ram(512 * MIB, backing);
        populate(&touched, 1);
        group.bench_function(format!("512 MiB {name}, all touched"), |b| {
            b.iter(|| populated(touched.memory()).pages.len());
        });
    }
    group.finish();
}

fn digest(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    group.sample_size(10);
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    let used = ram(512 * MIB, Backing::SmallPages);
    populate(&used, 1);
    group.throughput(Throughput::Bytes(512 << 20));
    group.bench_function("512 MiB used", |b| b.iter(|| ram_digest(used.memory(), &paused).digest));
    let untouched = ram(1434 * MIB, Backing::SmallPages);
    group.throughput(Throughput::Bytes(1434 << 20));
    group.bench_function("1.4 GiB never touched", |b| {
        b.iter(|| ram_digest(untouched.memory(), &paused).digest)
    });
    group.finish();
}

criterion_group!(benches, zero, first_look, digest);
criterion_main!(benches);
