//! Page sampling against the exact count of the dirty ring, of the same guest in the same interval.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::collections::BTreeSet;

use common::bare::{DATA, Privilege, Work};
use common::{Guest, my_counts, profiler};
use ringferry::PageIndex;
use ringferry_bpf::{Options, PageSampler, Profiler, Vm};

/// Pages of the guest's data slots.
const PAGES: u64 = 16384;
const INTERVALS: u64 = 20;

/// A generator of numbers that are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn sequential(interval: u64, _: &mut Numbers) -> Vec<u64> {
    (0..1500).map(|i| (interval * 1500 + i) % PAGES).collect()
}

fn random(_: u64, numbers: &mut Numbers) -> Vec<u64> {
    (0..6000).map(|_| numbers.next() % PAGES).collect()
}

/// Rank r with a probability in proportion to 1/r, ranks scattered over the memory.
fn zipf(_: u64, numbers: &mut Numbers) -> Vec<u64> {
    let harmonic: f64 = (1..=PAGES).map(|rank| 1.0 / rank as f64).sum();
    let mut sums = Vec::new();
    let mut sum = 0.0;
    for rank in 1..=PAGES {
        sum += 1.0 / rank as f64 / harmonic;
        sums.push(sum);
    }
    (0..20_000)
        .map(|_| {
            let share = numbers.share();
            let rank = sums.partition_point(|&sum| sum < share) as u64;
            rank * 7919 % PAGES
        })
        .collect()
}

fn my_vm(profiler: &Profiler) -> Vm {
    let me = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
    profiler.inventory().unwrap().vms.into_iter().find(|vm| vm.creator_tid == me).unwrap()
}

/// Intervals in which the exact count lies within the stated error.
fn within(name: &str, pattern: fn(u64, &mut Numbers) -> Vec<u64>) -> Option<u64> {
    let mut profiler = profiler(Options::default())?;
    let mut guest = Guest::new(Some(65536), Privilege::User)?;
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    guest.session.start().unwrap();
    guest.write(0, PAGES, 1);
    guest.harvest();
    let vm = my_vm(&profiler);
    let mut sampler = PageSampler::start(&vm).unwrap();
    let mut before = my_counts(&mut profiler)[0].pushes;
    let mut good = 0;
    for interval in 0..INTERVALS {
        let list = pattern(interval, &mut numbers);
        let unique = list.iter().collect::<BTreeSet<_>>().len() as u64;
        let list = list.into_iter().map(|page| PageIndex(DATA.0 + page)).collect();
        guest.work(&Work::List(list), interval + 1000);
        let estimate = sampler.look(&vm).unwrap();
        let after = my_counts(&mut profiler)[0].pushes;
        let exact = after - before;
        assert_eq!(exact, unique, "the ring has each page once");
        guest.harvest();
        before = after;
        assert_eq!(estimate.sampled_pages, 1024);
        let exact = exact as f64;
        good += u64::from((estimate.dirty_pages_low..=estimate.dirty_pages_high).contains(&exact));
        if interval < 3 {
            eprintln!(
                "{name}: exact {exact}, sampled {:.0} ± {:.0} ({:.0} to {:.0})",
                estimate.dirty_pages,
                estimate.error_pages(),
                estimate.dirty_pages_low,
                estimate.dirty_pages_high
            );
        }
    }
    eprintln!("{name}: {good} of {INTERVALS} within the stated error");
    Some(good)
}

#[test]
fn the_exact_count_lies_within_the_stated_error_for_sequential_random_and_zipf_writers() {
    for (name, pattern) in
        [("sequential", sequential as fn(u64, &mut Numbers) -> _), ("random", random), ("zipf", zipf)]
    {
        let Some(good) = within(name, pattern) else { return };
        // 95 % are promised. The sampled pages and the written ones are the same in every run of this test.
        assert!(good >= 18, "{name}: {good} of {INTERVALS}");
    }
}

#[test]
fn what_nobody_writes_is_estimated_as_nothing_and_the_error_is_stated_all_the_same() {
    let Some(profiler) = profiler(Options::default()) else { return };
    let Some(mut guest) = Guest::new(Some(4096), Privilege::User) else { return };
    guest.write(0, 1000, 1);
    let vm = my_vm(&profiler);
    let mut sampler = PageSampler::start(&vm).unwrap();
    let estimate = sampler.look(&vm).unwrap();
    assert_eq!((estimate.dirty_pages, estimate.dirty_pages_low), (0.0, 0.0));
    assert!(estimate.dirty_pages_high > 0.0 && estimate.error_pages() == estimate.dirty_pages_high);

    // A write of the value that is there already changes nothing that a reader could see.
    guest.write(0, 1000, 1);
    let estimate = sampler.look(&vm).unwrap();
    assert_eq!(estimate.dirty_pages, 0.0, "same-value writes are missed, as documented");
}

#[test]
fn a_process_that_is_gone_is_an_error_that_says_so() {
    let Some(profiler) = profiler(Options::default()) else { return };
    let Some(guest) = Guest::new(None, Privilege::User) else { return };
    let vm = Vm { pid: 4_194_303, ..my_vm(&profiler) };
    drop(guest);
    let error = PageSampler::start(&vm).unwrap_err().to_string();
    assert!(error.contains("process 4194303") && error.contains("No such process"), "{error}");
}
