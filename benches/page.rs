//! What it costs to look at guest pages: is it zero, was it ever populated, what does all RAM hash to.
//!
//! `cargo bench -p ringferry --bench page`
#![expect(missing_docs, reason = "criterion's macros make a public function without a document")]
#![expect(unsafe_code, reason = "guest memory is a mapping given by address")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memmap2::{Advice, MmapOptions, MmapRaw};
use ringferry::page::{is_zero, populated, ram_digest, zero_pages};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Paused, Region, SlotId};

const MIB: usize = 1 << 20;

/// Guest RAM of the process's own: private anonymous memory, or a shared mapping of memory without a name.
struct Ram {
    map: MmapRaw,
    memory: GuestMemory,
}

impl Ram {
    fn new(bytes: usize, shared: bool) -> Self {
        let map: MmapRaw = if shared {
            let fd = ringferry_memfd(bytes);
            MmapRaw::map_raw(&fd).expect("memfd")
        } else {
            MmapOptions::new().len(bytes).map_anon().expect("anonymous memory").into()
        };
        map.advise(Advice::NoHugePage).expect("madvise");
        let pages = PageRun { first: PageIndex(0), pages: (bytes / PAGE_SIZE) as u64 };
        let region = Region { slot: SlotId(0), pages, host: map.as_mut_ptr() };
        // SAFETY: the mapping lives as long as the value beside it, and is used through raw pointers only.
        let memory = unsafe { GuestMemory::new(vec![region]) }.expect("one region");
        Self { map, memory }
    }

    /// Writes `word` to the beginning of each page: 0 makes populated pages of zeroes.
    fn populate(&self, word: u64) {
        for at in (0..self.map.len()).step_by(PAGE_SIZE) {
            // SAFETY: inside the mapping, aligned.
            unsafe { self.map.as_mut_ptr().add(at).cast::<u64>().write_volatile(word) };
        }
    }
}

fn ringferry_memfd(bytes: usize) -> std::fs::File {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the name is NUL-terminated; the new fd is owned by nobody else.
    let file = std::fs::File::from(unsafe {
        OwnedFd::from_raw_fd(libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC))
    });
    file.set_len(bytes as u64).expect("memfd");
    file
}

fn zero(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero");
    for (name, bytes) in [("in cache", MIB / 2), ("in memory", 512 * MIB)] {
        let ram = Ram::new(bytes, false);
        let all = PageRun { first: PageIndex(0), pages: ram.memory.pages() };
        let mut set = PageSet::new(ram.memory.end());
        group.throughput(Throughput::Bytes(bytes as u64));
        for (content, word) in [("zero pages", 0), ("used pages", 1)] {
            ram.populate(word);
            group.bench_function(format!("{content} {name}"), |b| {
                b.iter(|| {
                    set.clear();
                    zero_pages(&ram.memory, all, &mut set)
                });
            });
        }
    }
    let page = Ram::new(PAGE_SIZE, false);
    page.populate(0);
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    // SAFETY: a page of our own.
    group.bench_function("one page", |b| b.iter(|| unsafe { is_zero(black_box(page.map.as_ptr())) }));
    group.finish();
}

fn first_look(c: &mut Criterion) {
    let mut group = c.benchmark_group("populated");
    for (name, shared) in [("private", false), ("memfd", true)] {
        let untouched = Ram::new(1434 * MIB, shared);
        group.bench_function(format!("1.4 GiB {name}, never touched"), |b| {
            b.iter(|| populated(&untouched.memory).pages.len());
        });
        let touched = Ram::new(512 * MIB, shared);
        touched.populate(1);
        group.bench_function(format!("512 MiB {name}, all touched"), |b| {
            b.iter(|| populated(&touched.memory).pages.len());
        });
    }
    group.finish();
}

fn digest(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    group.sample_size(10);
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    let used = Ram::new(512 * MIB, false);
    used.populate(1);
    group.throughput(Throughput::Bytes(512 << 20));
    group.bench_function("512 MiB used", |b| b.iter(|| ram_digest(&used.memory, &paused).digest));
    let untouched = Ram::new(1434 * MIB, false);
    group.throughput(Throughput::Bytes(1434 << 20));
    group.bench_function("1.4 GiB never touched", |b| {
        b.iter(|| ram_digest(&untouched.memory, &paused).digest)
    });
    group.finish();
}

criterion_group!(benches, zero, first_look, digest);
criterion_main!(benches);
