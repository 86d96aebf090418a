//! A digest of all RAM, so that `verify` can compare both sides while the VM stands still.
//!
//! The digest is the sum, modulo 2¹²⁸, over all pages that are not zero, of XXH3-128 of the page's bytes, seeded
//! with its page index. A sum does not depend on the order or on who adds up which part, so any number of threads
//! gives the same result; the seed makes two pages that changed places differ. Never-populated pages are not read,
//! and equal zero pages by definition: the destination may have either where the source has the other.
//!
//! It finds faults, not forgers: XXH3 is no cryptographic hash.
#![expect(
    unsafe_code,
    reason = "guest memory is read through raw pointers, as no Rust reference to it may exist"
)]

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::populated::populated;
use super::read::{copy_page, is_zero};
use crate::layout::{GuestMemory, HostRun, PAGE_SIZE, PageIndex, PageRun};
use crate::vm::Paused;

/// Pages that a thread takes on at a time: large enough to cost nothing, small enough to share out evenly.
pub(super) const CHUNK_PAGES: usize = 1024;

/// The digest of a guest's RAM. Equal on both sides: every page has the same content.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct RamDigest(pub u128);

/// What [`ram_digest`] found.
#[derive(Clone, Copy, Debug, Default)]
pub struct DigestedRam {
    /// The digest of all RAM.
    pub digest: RamDigest,
    /// Pages that are not all zero; the same on both sides if the digests are.
    pub nonzero_pages: u64,
    /// Pages that were read, that is the populated ones. Not the same on both sides: only one of them may have
    /// populated a page of zeroes.
    pub read_pages: u64,
}

/// Digests all RAM on all cores. The proof of the pause is asked for because a digest of a running guest means
/// nothing; device threads of the VMM must stand still as well.
pub fn ram_digest(memory: &GuestMemory, _: &Paused) -> DigestedRam {
    on_threads(memory, thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))
}

fn on_threads(memory: &GuestMemory, threads: NonZeroUsize) -> DigestedRam {
    let populated = populated(memory).pages;
    let chunks: Vec<PageRun> = populated.runs().flat_map(in_chunks).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut mine = DigestedRam::default();
        // Relaxed: the counter only deals out numbers; starting and joining the threads orders the rest.
        while let Some(run) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            // What is populated is RAM, so there is no error: `populated` looks at nothing else.
            memory.host_runs(*run).into_iter().flatten().for_each(|run| mine.add_run(run));
        }
        mine
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.get().min(chunks.len())).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others.into_iter().fold(mine, |mut sum, other| {
            sum.add(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            sum
        })
    })
}

/// Cuts a run where [`CHUNK_PAGES`] of it are full.
pub(super) fn in_chunks(run: PageRun) -> impl Iterator<Item = PageRun> {
    (run.first.0..run.end().0).step_by(CHUNK_PAGES).map(move |first| PageRun {
        first: PageIndex(first),
        pages: (CHUNK_PAGES as u64).min(run.end().0 - first),
    })
}

impl DigestedRam {
    fn add(&mut self, other: Self) {
        self.digest.0 = self.digest.0.wrapping_add(other.digest.0);
        self.nonzero_pages += other.nonzero_pages;
        self.read_pages += other.read_pages;
    }

    fn add_run(&mut self, run: HostRun) {
        for (_, hash) in page_hashes(&run) {
            self.read_pages += 1;
            self.nonzero_pages += u64::from(hash != 0);
            self.digest.0 = self.digest.0.wrapping_add(hash);
        }
    }
}

/// The hashes of a run's pages, in order: 0 for a page of zeroes. The guest may write them meanwhile; then a hash is of
/// some mixture of old and new bytes, and the page is dirty.
pub(super) fn page_hashes(run: &HostRun) -> impl Iterator<Item = (PageIndex, u128)> + '_ {
    let pages = (run.run.first.0..run.run.end().0).zip((0..).step_by(PAGE_SIZE));
    let mut copy = [0; PAGE_SIZE];
    pages.map(move |(page, offset)| {
        let host = run.host.wrapping_add(offset);
        // SAFETY: the run comes from `host_runs`: it lies in a region, mapped readable by the contract of
        // `GuestMemory::new`, and the page in the run.
        let hash = unsafe {
            if is_zero(host) {
                0
            } else {
                copy_page(host, &mut copy);
                xxh3_128_with_seed(&copy, page)
            }
        };
        (PageIndex(page), hash)
    })
}

impl fmt::Display for RamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamDigest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::SlotId;
    use crate::testing::{AnonymousRam, Backing};

    const PAGES: u64 = 4096;

    /// Two regions with a hole between them.
    fn ram() -> AnonymousRam {
        let run = |first| PageRun { first: PageIndex(first), pages: PAGES };
        let slots = [(SlotId(0), run(0)), (SlotId(1), run(SECOND))];
        AnonymousRam::with_slots(&slots, Backing::SmallPages).unwrap()
    }

    /// Where the second region begins.
    const SECOND: u64 = 1 << 20;

    fn digest(ram: &AnonymousRam, threads: usize) -> DigestedRam {
        on_threads(ram.memory(), NonZeroUsize::new(threads).unwrap())
    }

    #[test]
    fn the_digest_is_the_same_on_any_number_of_threads() {
        let ram = ram();
        for page in (0..PAGES).step_by(3).flat_map(|page| [page, SECOND + page]) {
            ram.write(PageIndex(page), page);
        }
        let one = digest(&ram, 1);
        assert_ne!(one.digest, RamDigest::default());
        for threads in [2, 3, 17] {
            assert_eq!(digest(&ram, threads).digest, one.digest);
        }
    }

    #[test]
    fn a_page_of_zeroes_equals_one_that_was_never_touched_and_only_the_first_is_read() {
        let (zeroes, untouched) = (ram(), ram());
        zeroes.write(PageIndex(5), 0);
        let (zeroes, untouched) = (digest(&zeroes, 2), digest(&untouched, 2));
        assert_eq!(zeroes.digest, untouched.digest);
        assert_eq!((zeroes.read_pages, zeroes.nonzero_pages), (1, 0));
        assert_eq!((untouched.read_pages, untouched.nonzero_pages), (0, 0));
    }

    #[test]
    fn any_changed_byte_and_any_moved_page_changes_the_digest() {
        let ram = ram();
        let (low, high) = (PageIndex(7), PageIndex(SECOND + 9));
        ram.write(low, 1);
        ram.write(high, 2);
        let before = digest(&ram, 2);
        assert_eq!(before.nonzero_pages, 2);
        let last_word = ram.words(low).last().unwrap();
        last_word.store(1 << 63, Ordering::Relaxed);
        assert_ne!(digest(&ram, 2).digest, before.digest);
        last_word.store(0, Ordering::Relaxed);
        assert_eq!(digest(&ram, 2).digest, before.digest);
        ram.write(low, 2);
        ram.write(high, 1);
        assert_ne!(digest(&ram, 2).digest, before.digest, "two pages changed places");
    }

    #[test]
    fn a_digest_prints_as_32_hexadecimal_digits() {
        assert_eq!(RamDigest(0xab).to_string(), format!("{:0>32}", "ab"));
    }
}
