//! The log of a writer in another process: a jailed device, a backend of any protocol that has no log of its own.
//!
//! The VMM creates a [`SharedLog`] for the pages that the other process may write and passes its file on, over whatever they
//! speak. The process opens it as a [`SharedLogWriter`] and marks what it has written. Either may end at any time.
//!
//! The file is a memfd that nobody can shrink or grow, of little-endian 64-bit words: 512 words of header (a name with the
//! version, the first page, the number of pages, whether the log is on), then the summary, of which a bit stands for a
//! word of pages, then the words of pages. A writer in another language does what [`SharedLogWriter::mark`] does.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::ExternalSource;
use crate::layout::{PAGE_SIZE, PageIndex, PageRun, RAM_END_MAX};
use crate::os::shared::Shared;
use crate::page_set::PageSet;
use crate::vm::VmError;

/// `RFLOG 1`, and a zero.
const NAME: u64 = u64::from_le_bytes(*b"RFLOG 1\0");
const HEADER_WORDS: usize = PAGE_SIZE / size_of::<u64>();
const WORD_PAGES: u64 = u64::BITS as u64;

/// Where what is in the header.
const AT_NAME: usize = 0;
const AT_FIRST: usize = 1;
const AT_PAGES: usize = 2;
const AT_TRACKING: usize = 3;

/// Where what is in the file, in words.
#[derive(Clone, Copy, Debug)]
struct Shape {
    run: PageRun,
    summary_words: usize,
    page_words: usize,
}

impl Shape {
    fn new(run: PageRun) -> io::Result<Self> {
        let end = run.first.0.checked_add(run.pages);
        if end.is_none_or(|end| end > RAM_END_MAX.0) {
            let text = format!("a log of {} pages from page {} ends beyond 64 TiB", run.pages, run.first.0);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let words = |bits: u64| usize::try_from(bits.div_ceil(WORD_PAGES)).map_err(io::Error::other);
        let page_words = words(run.pages)?;
        Ok(Self { run, summary_words: words(page_words as u64)?, page_words })
    }

    fn words(self) -> usize {
        HEADER_WORDS + self.summary_words + self.page_words
    }
}

/// Both ends' view of the file.
struct Log {
    words: Shared<AtomicU64>,
    shape: Shape,
}

impl Log {
    fn header(&self, at: usize) -> &AtomicU64 {
        &self.words[at]
    }

    fn summary(&self) -> &[AtomicU64] {
        &self.words[HEADER_WORDS..][..self.shape.summary_words]
    }

    fn pages(&self) -> &[AtomicU64] {
        &self.words[HEADER_WORDS + self.shape.summary_words..][..self.shape.page_words]
    }

    /// Adds bits to a word of pages, and then the word to the summary.
    ///
    /// Why no page is lost: this goes up and [`take`](Self::take) goes down. Here: `or` the word of pages, then look at its
    /// bit in the summary. There: clear the summary, then swap the word. All four are `SeqCst`, so they have one order: either
    /// our look comes before the clearing, and the swap that follows that takes our bits; or it comes after, finds the bit
    /// clear and sets it for the next drain. And whoever takes our bits sees what we wrote before them.
    fn add(&self, word: usize, bits: u64) {
        self.pages()[word].fetch_or(bits.to_le(), Ordering::SeqCst);
        let (at, bit) = (word / 64, (1_u64 << (word % 64)).to_le());
        if self.summary()[at].load(Ordering::SeqCst) & bit == 0 {
            self.summary()[at].fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Takes every word with a page in it: its number and its bits. What the other process has written is at worst wrong bits:
    /// those that stand for no page are left out.
    fn take(&self, mut taken: impl FnMut(usize, u64)) {
        for (at, summary) in self.summary().iter().enumerate() {
            if summary.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut left = u64::from_le(summary.swap(0, Ordering::SeqCst));
            while left != 0 {
                let word = at * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                if let Some(pages) = self.pages().get(word) {
                    taken(word, u64::from_le(pages.swap(0, Ordering::SeqCst)) & self.bits(word, 0, u64::MAX));
                }
            }
        }
    }

    /// The bits of a word that stand for pages from `first` up to `end`, counted from the first of the log.
    fn bits(&self, word: usize, first: u64, end: u64) -> u64 {
        let begins = word as u64 * WORD_PAGES;
        let end = end.min(self.shape.run.pages);
        let below = |page: u64| match page.saturating_sub(begins) {
            bits @ ..WORD_PAGES => (1_u64 << bits) - 1,
            _ => u64::MAX,
        };
        below(end) & !below(first)
    }
}

/// The VMM's end of a log that another process writes: add it to the tracker with
/// [`add_external`](super::super::DirtyTracker::add_external).
///
/// It believes nothing that the other process writes into it but which of its own pages are dirty: a process that lies loses its
/// own marks. So each process that is not trusted with the marks of another gets a log of its own. One that died has marked
/// what it marked; if it may have died between a write and its mark, the VMM marks what it was at
/// ([`mark_dirty`](super::super::DirtyTracker::mark_dirty)).
pub struct SharedLog {
    log: Log,
    file: File,
}

impl SharedLog {
    /// A log of the pages of `run`, off.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for pages beyond 64 TiB; what the kernel refused: memfd, its seals, or the mapping.
    pub fn new(run: PageRun) -> io::Result<Self> {
        let shape = Shape::new(run)?;
        let (words, file) = Shared::create(c"ringferry-log", shape.words())?;
        let log = Log { words, shape };
        for (at, value) in [(AT_FIRST, run.first.0), (AT_PAGES, run.pages), (AT_NAME, NAME)] {
            log.header(at).store(value.to_le(), Ordering::SeqCst);
        }
        Ok(Self { log, file })
    }

    /// The file to pass to the other process, for [`SharedLogWriter::open`].
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl ExternalSource for SharedLog {
    fn name(&self) -> &'static str {
        "shared log"
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.log.take(|_, _| ());
        self.log.header(AT_TRACKING).store(1_u64.to_le(), Ordering::SeqCst);
        // Before anybody reads a page: see `mark`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let first = self.log.shape.run.first.0;
        self.log.take(|word, bits| dirty.union_words(PageIndex(first + word as u64 * WORD_PAGES), &[bits]));
    }

    fn stop(&mut self) {
        // A writer that still sees it on marks a page that nobody will ask for.
        self.log.header(AT_TRACKING).store(0, Ordering::SeqCst);
    }
}

impl fmt::Debug for SharedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedLog({} pages from {})", self.log.shape.run.pages, self.log.shape.run.first.address())
    }
}

/// The writing process's end of a [`SharedLog`]. Any thread may mark, several at once; a mark takes no lock, allocates nothing and
/// makes no system call.
pub struct SharedLogWriter {
    log: Log,
}

impl SharedLogWriter {
    /// Maps the log whose file the VMM has passed on.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a file that is no such log, or that somebody could still shorten; else the kernel's.
    pub fn open(file: impl Into<OwnedFd>) -> io::Result<Self> {
        let file = File::from(file.into());
        let header = Shared::<AtomicU64>::open(&file, HEADER_WORDS)?;
        let read = |at: usize| u64::from_le(header[at].load(Ordering::SeqCst));
        if read(AT_NAME) != NAME {
            let text = "the file is no dirty log of this version: pass the file of a `SharedLog`";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let shape = Shape::new(PageRun { first: PageIndex(read(AT_FIRST)), pages: read(AT_PAGES) })?;
        Ok(Self { log: Log { words: Shared::open(&file, shape.words())?, shape } })
    }

    /// The pages that the log is for.
    pub fn run(&self) -> PageRun {
        self.log.shape.run
    }

    /// The pages of `run` were written: to be called after the write. Pages that the log is not for are left out. A fence and a load
    /// while nobody tracks.
    pub fn mark(&self, run: PageRun) {
        // The caller's write comes before our load, as `start` stores the flag before anybody reads a page: either we see
        // the flag, or the reader sees the write. Both sides need the fence, for a store before a load; between
        // processes it orders what it orders between threads.
        fence(Ordering::SeqCst);
        // Relaxed, because of the fence.
        if self.log.header(AT_TRACKING).load(Ordering::Relaxed) == 0 {
            return;
        }
        let own = self.log.shape.run;
        let first = run.first.0.max(own.first.0).saturating_sub(own.first.0);
        let end = run.first.0.saturating_add(run.pages).saturating_sub(own.first.0).min(own.pages);
        let mut at = first;
        while at < end {
            // In the mapping, as `end` is at most the log's number of pages.
            let Ok(word) = usize::try_from(at / WORD_PAGES) else { return };
            self.log.add(word, self.log.bits(word, first, end));
            at = (at / WORD_PAGES + 1) * WORD_PAGES;
        }
    }
}

impl fmt::Debug for SharedLogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedLogWriter({} pages from {})", self.run().pages, self.run().first.address())
    }
}
