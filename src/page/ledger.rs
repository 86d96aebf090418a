//! The digest of RAM while RAM still changes: a page is hashed when its content is believed to be final, and again if
//! that was wrong.
//!
//! The sum over all pages is the digest that [`ram_digest`](super::ram_digest) gives, so that two sides that came to it by
//! different ways can compare it. When the guest stands still only the pages of the last rounds are left to be hashed,
//! so that verification costs the pause little.
//!
//! What is hashed is what tracking says; a page whose change was never seen keeps its old hash. [`RamLedger::audit`]
//! finds such pages afterwards, while the RAM is still there.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::digest::{CHUNK_PAGES, RamDigest, in_chunks, page_hashes};
use super::populated::populated;
use crate::layout::{GuestMemory, PageIndex, PageRun};
use crate::page_set::PageSet;

/// How often a wait for the digest looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(10);

/// Hashes of the pages of one chunk of guest-physical space; 0 for a page of zeroes and one that was never hashed.
type Chunk = Box<[u128; CHUNK_PAGES]>;

#[derive(Debug, Default)]
struct Hashes {
    chunks: HashMap<u64, Chunk>,
    sum: u128,
}

impl Hashes {
    fn set(&mut self, page: PageIndex, hash: u128) {
        let chunk = page.0 / CHUNK_PAGES as u64;
        let entry = match self.chunks.get_mut(&chunk) {
            Some(chunk) => &mut chunk[index(page)],
            None if hash == 0 => return,
            None => &mut self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK_PAGES]))[index(page)],
        };
        self.sum = self.sum.wrapping_sub(*entry).wrapping_add(hash);
        *entry = hash;
    }

    fn get(&self, page: PageIndex) -> u128 {
        self.chunks.get(&(page.0 / CHUNK_PAGES as u64)).map_or(0, |chunk| chunk[index(page)])
    }
}

fn index(page: PageIndex) -> usize {
    usize::try_from(page.0 % CHUNK_PAGES as u64).unwrap_or(0)
}

/// What an audit found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Audit {
    /// Pages whose content is not what was hashed last: a write was not tracked.
    pub differing_pages: u64,
    /// The first of them.
    pub first: Option<PageIndex>,
}

/// Digests RAM on a thread of its own, page by page.
#[derive(Debug)]
pub struct RamLedger {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    memory: GuestMemory,
    state: Mutex<State>,
    changed: Condvar,
    hashes: Mutex<Hashes>,
    stopping: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Pages whose content is believed to be final and is not hashed yet.
    settled: PageSet,
    /// Whether the thread hashes a run that is no longer in `settled`.
    busy: bool,
}

impl RamLedger {
    /// A ledger of `memory` in which every page counts as zero.
    ///
    /// # Errors
    ///
    /// Of the kernel, if there is no thread to be had.
    pub fn new(memory: &GuestMemory) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            memory: memory.clone(),
            state: Mutex::new(State { settled: PageSet::new(memory.end()), busy: false }),
            changed: Condvar::new(),
            hashes: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("ringferry-verify".to_owned())
            .spawn(move || of_thread.hash_what_settles())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The content of `pages` is believed to be final: they are hashed soon. They must be write-protected where a guest
    /// runs, so that a later change is seen.
    pub fn settled(&self, pages: &PageSet) {
        if !pages.is_empty() {
            self.shared.state.lock().settled.union(pages);
            self.shared.changed.notify_all();
        }
    }

    /// The content of `pages` changes after all: if they wait to be hashed, they need not be for now.
    pub fn unsettled(&self, pages: &PageSet) {
        self.shared.state.lock().settled.subtract(pages);
    }

    /// Pages that wait to be hashed.
    pub fn waiting_pages(&self) -> u64 {
        self.shared.state.lock().settled.len()
    }

    /// Waits until everything that settled is hashed, and gives the digest of all RAM; `None` if `cancel` was raised or
    /// `deadline` passed before.
    pub fn digest(&self, deadline: Instant, cancel: &AtomicBool) -> Option<RamDigest> {
        let mut state = self.shared.state.lock();
        while state.busy || !state.settled.is_empty() {
            let now = Instant::now();
            // Relaxed: a flag without data, looked at again at the next poll.
            if cancel.load(Ordering::Relaxed) || now >= deadline {
                return None;
            }
            self.shared.changed.wait_until(&mut state, deadline.min(now + CANCEL_POLL));
        }
        drop(state);
        Some(RamDigest(self.shared.hashes.lock().sum))
    }

    /// Compares every populated page but those of `without` with its hash, once there is a [`digest`](Self::digest)
    /// and while nobody writes RAM; `None` if `cancel` was raised meanwhile.
    pub fn audit(&self, without: &PageSet, cancel: &AtomicBool) -> Option<Audit> {
        let mut pages = populated(&self.shared.memory).pages;
        pages.subtract(without);
        let mut audit = Audit::default();
        let hashes = self.shared.hashes.lock();
        for run in pages.runs().flat_map(in_chunks) {
            // Relaxed: a flag without data, looked at again after the next chunk.
            if cancel.load(Ordering::Relaxed) {
                return None;
            }
            for piece in self.shared.memory.host_runs(run).into_iter().flatten() {
                for (page, hash) in page_hashes(&piece) {
                    if hash != hashes.get(page) {
                        audit.differing_pages += 1;
                        audit.first.get_or_insert(page);
                    }
                }
            }
        }
        Some(audit)
    }
}

impl Drop for RamLedger {
    fn drop(&mut self) {
        {
            let _waiting = self.shared.state.lock();
            // Relaxed: the lock orders it for a thread that waits, and one that hashes looks again within a chunk.
            self.shared.stopping.store(true, Ordering::Relaxed);
        }
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The ledger's thread.
    fn hash_what_settles(&self) {
        let mut state = self.state.lock();
        loop {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            let next = state.settled.runs().next().and_then(|run| in_chunks(run).next());
            let Some(run) = next else {
                self.changed.wait(&mut state);
                continue;
            };
            state.settled.remove_run(run);
            state.busy = true;
            drop(state);
            self.hash(run);
            state = self.state.lock();
            state.busy = false;
            self.changed.notify_all();
        }
    }

    /// Hashes the pages of a run of at most a chunk.
    fn hash(&self, run: PageRun) {
        for piece in self.memory.host_runs(run).into_iter().flatten() {
            let hashed: Vec<_> = page_hashes(&piece).collect();
            let mut hashes = self.hashes.lock();
            hashed.into_iter().for_each(|(page, hash)| hashes.set(page, hash));
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a test's guest RAM is a mapping of its own")]
mod tests {
    use memmap2::MmapMut;
    use proptest::prelude::*;

    use super::*;
    use crate::layout::{PAGE_SIZE, Region, SlotId};
    use crate::page::ram_digest;
    use crate::vm::Paused;

    const PAGES: usize = 3000;
    static NEVER: AtomicBool = AtomicBool::new(false);

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    struct Ram {
        memory: GuestMemory,
        map: MmapMut,
    }

    impl Ram {
        fn new() -> Self {
            let mut map = MmapMut::map_anon(PAGES * PAGE_SIZE).unwrap();
            let pages = PageRun { first: PageIndex(100), pages: PAGES as u64 };
            let region = Region::new(SlotId(0), pages, map.as_mut_ptr());
            // SAFETY: the mapping lives as long as `memory`, in the same struct; it is written only between hashes.
            let memory = unsafe { GuestMemory::new(vec![region]) }.unwrap();
            Self { memory, map }
        }

        fn write(&mut self, page: usize, value: u8) {
            self.map[page * PAGE_SIZE + 17] = value;
        }

        fn digest(&self) -> RamDigest {
            ram_digest(&self.memory, &Paused::declare_every_vcpu_is_outside_kvm_run()).digest
        }

        fn set(&self, pages: impl IntoIterator<Item = usize>) -> PageSet {
            let mut set = PageSet::new(self.memory.end());
            set.extend(pages.into_iter().map(|page| PageIndex(100 + page as u64)));
            set
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn rounds_of_changes_end_at_the_digest_of_all_ram(
            rounds in prop::collection::vec(prop::collection::vec((0..PAGES, any::<u8>()), 0..60), 1..6)
        ) {
            let mut ram = Ram::new();
            let ledger = RamLedger::new(&ram.memory).unwrap();
            let mut unhashed = ram.set([]);
            for writes in rounds {
                let dirty = ram.set(writes.iter().map(|(page, _)| *page));
                ledger.unsettled(&dirty);
                unhashed.subtract(&dirty);
                ledger.settled(&unhashed);
                writes.iter().for_each(|(page, value)| ram.write(*page, *value));
                unhashed = dirty;
            }
            ledger.settled(&unhashed);
            prop_assert_eq!(ledger.digest(soon(), &NEVER), Some(ram.digest()));
            prop_assert_eq!(ledger.audit(&ram.set([]), &NEVER), Some(Audit::default()));
        }
    }

    #[test]
    fn an_audit_finds_the_page_whose_change_nobody_saw() {
        let mut ram = Ram::new();
        (0..2000).for_each(|page| ram.write(page, 1));
        let ledger = RamLedger::new(&ram.memory).unwrap();
        ledger.settled(&ram.set(0..2000));
        let before = ledger.digest(soon(), &NEVER);
        ram.write(1234, 2);
        assert_eq!(ledger.digest(soon(), &NEVER), before);
        let found = Audit { differing_pages: 1, first: Some(PageIndex(1334)) };
        assert_eq!(ledger.audit(&ram.set([]), &NEVER), Some(found));
        assert_eq!(ledger.audit(&ram.set([1234]), &NEVER), Some(Audit::default()));
    }

    #[test]
    fn a_cancelled_digest_says_so() {
        let mut ram = Ram::new();
        (0..PAGES).for_each(|page| ram.write(page, 1));
        let ledger = RamLedger::new(&ram.memory).unwrap();
        let cancelled = AtomicBool::new(true);
        ledger.settled(&ram.set(0..PAGES));
        assert_eq!(ledger.digest(soon(), &cancelled), None);
        assert_eq!(ledger.audit(&ram.set([]), &cancelled), None);
    }
}
