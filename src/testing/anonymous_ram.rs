//! Guest RAM without a guest: fresh memory of this process, whose words anybody may read and write.
#![expect(unsafe_code, reason = "guest RAM is a mapping given by address")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::layout::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use crate::os::file::memfd;
use crate::page_set::PageSet;

/// Words of a page.
const PAGE_WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// What is behind the RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private anonymous memory in pages of 4 KiB, so that a page is populated when it is touched and not before.
    SmallPages,
    /// The same in huge pages, where the kernel finds some.
    HugePages,
    /// A memfd, mapped shared.
    Memfd,
}

/// Guest RAM of this process: zeroes, populated by touching. It is mapped as long as the value or a clone of its
/// memory lives.
#[derive(Debug)]
pub struct AnonymousRam {
    memory: GuestMemory,
}

impl AnonymousRam {
    /// `pages` of RAM from guest page 0 on, in one region, in pages of 4 KiB.
    ///
    /// # Errors
    ///
    /// As [`with_slots`](Self::with_slots).
    pub fn new(pages: u64) -> io::Result<Self> {
        let run = PageRun { first: PageIndex(0), pages };
        Self::with_slots(&[(SlotId(0), run)], Backing::SmallPages)
    }

    /// RAM with a region, and a mapping, for each slot.
    ///
    /// # Errors
    ///
    /// The kernel's: there is not the address space. Or the slots are no [`GuestMemory`].
    pub fn with_slots(slots: &[(SlotId, PageRun)], backing: Backing) -> io::Result<Self> {
        let mut regions = Vec::with_capacity(slots.len());
        let mut mappings = Vec::with_capacity(slots.len());
        for (slot, pages) in slots {
            let mapping = map(pages.pages, backing)?;
            regions.push(Region::new(*slot, *pages, mapping.as_mut_ptr()));
            mappings.push(mapping);
        }
        // SAFETY:
        // * Each region is one mapping of its length, readable and writable, kept by the value and its clones.
        // * No reference to its bytes is ever made but as atomics.
        let memory = unsafe { GuestMemory::new(regions) }.map_err(io::Error::other)?;
        Ok(Self { memory: memory.kept_by(Arc::new(mappings)) })
    }

    /// The RAM as the rest of this crate takes it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// All of its pages.
    pub fn pages(&self) -> PageSet {
        let mut pages = PageSet::new(self.memory.end());
        self.memory.regions().iter().for_each(|region| pages.insert_run(region.pages));
        pages
    }

    /// The words of a page, in order.
    ///
    /// # Panics
    ///
    /// When the page is not RAM.
    pub fn words(&self, page: PageIndex) -> &[AtomicU64; PAGE_WORDS] {
        let mut runs = self.memory.host_runs(PageRun { first: page, pages: 1 }).expect("a page of the RAM");
        let host = runs.next().expect("the run has a page").host;
        // SAFETY:
        // * A page of one of the mappings, which `memory` keeps, aligned to its size.
        // * Nobody in this process makes references to it but as atomics; the kernel may read and write it.
        unsafe { &*host.cast() }
    }

    /// The first word of a page.
    ///
    /// # Panics
    ///
    /// When the page is not RAM.
    pub fn read(&self, page: PageIndex) -> u64 {
        self.words(page)[0].load(Ordering::Relaxed)
    }

    /// Writes the first word of a page, and so populates and dirties it.
    ///
    /// # Panics
    ///
    /// When the page is not RAM.
    pub fn write(&self, page: PageIndex, word: u64) {
        self.words(page)[0].store(word, Ordering::Relaxed);
    }

    /// Gives pages back to the host, as behind a balloon: they read as zeroes until somebody writes them.
    ///
    /// # Errors
    ///
    /// The kernel's.
    ///
    /// # Panics
    ///
    /// When a page is not RAM.
    pub fn discard(&self, run: PageRun) -> io::Result<()> {
        for part in self.memory.host_runs(run).expect("pages of the RAM") {
            let (host, length) = (part.host.cast(), part.len_bytes());
            // SAFETY: one of the mappings, which `memory` keeps; what discards its content is as any other write of it.
            let discard = |advice| unsafe { libc::madvise(host, length, advice) } == 0;
            // The first is for files, and is refused for private memory; the second leaves files as they are.
            if !discard(libc::MADV_REMOVE) && !discard(libc::MADV_DONTNEED) {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Writes every page whole, each word with one that no other place and no other generation has.
    pub fn fill(&self, generation: u16) {
        for page in self.pages().runs().flat_map(|run| run.first.0..run.end().0) {
            for (index, word) in (0..).zip(self.words(PageIndex(page))) {
                word.store((page << 9 | index) << 16 | u64::from(generation), Ordering::Relaxed);
            }
        }
    }

    /// Whether the other has the same pages, and the same bytes in them.
    pub fn is_equal(&self, other: &Self) -> bool {
        let (mine, theirs) = (self.pages(), other.pages());
        let is_equal = |page| {
            let mut pairs = self.words(page).iter().zip(other.words(page));
            pairs.all(|(one, other)| one.load(Ordering::Relaxed) == other.load(Ordering::Relaxed))
        };
        mine.runs().eq(theirs.runs())
            && mine.runs().flat_map(|run| run.first.0..run.end().0).map(PageIndex).all(is_equal)
    }
}

fn map(pages: u64, backing: Backing) -> io::Result<MmapRaw> {
    let too_long = |_| io::Error::from(io::ErrorKind::OutOfMemory);
    let bytes = usize::try_from(pages).map_err(too_long)?.saturating_mul(PAGE_SIZE);
    let mut options = MmapOptions::new();
    options.len(bytes).no_reserve_swap();
    let anonymous = |advice| {
        let mapping = MmapRaw::from(options.map_anon()?);
        // A kernel without huge pages refuses both; then all pages are small.
        let _ = mapping.advise(advice);
        Ok(mapping)
    };
    match backing {
        Backing::SmallPages => anonymous(Advice::NoHugePage),
        Backing::HugePages => anonymous(Advice::HugePage),
        Backing::Memfd => {
            let file = memfd(c"ringferry-testing")?;
            file.set_len(bytes as u64)?;
            options.map_raw(&file)
        }
    }
}
