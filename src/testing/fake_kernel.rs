//! A kernel in memory: slots, rings and protection as KVM has them, and its bad days on demand.
//!
//! It follows `virt/kvm/dirty_ring.c` of Linux 6.18 step by step, the batch that an interrupted reset counts and
//! forgets included. What it simulates on top: guests that write, natively or emulated, a CPU that buffers its
//! entries (PML), TLBs that let a vCPU write what is protected until they are flushed, and a second thread that resets.

mod ring;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::KVM_EXIT_UNKNOWN;

pub use self::ring::UnnamedEntries;
use self::ring::{ADDRESS_SPACES, FakeRing};
use super::{AnonymousRam, Backing};
use crate::kvm::ring::{DirtyRing, EMPTY, Entry, RESET};
use crate::kvm::{Granule, Kernel, KvmError, Protection, ResetCount, RingSize, UnmapError};
use crate::layout::{GuestMemory, PageIndex, PageRun, Region, SlotId};
use crate::page_set::PageSet;

/// The next reset stops after so many entries, as if a signal had come: the batch at hand is forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interruption {
    /// Entries counted before the signal is noticed.
    pub after_entries: u32,
}

/// A guest writes while the next reset runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteDuringReset {
    /// Which vCPU.
    pub vcpu: usize,
    /// Which slot.
    pub slot: SlotId,
    /// Which page of it.
    pub offset: u64,
    /// After the reset has protected what it will, or before.
    pub after: bool,
    /// Natively: once. Or so many times from there on, by KVM's emulator, which overruns a ring.
    pub emulated: Option<u64>,
}

/// A kernel in memory. Clones are the same kernel.
#[derive(Clone)]
pub struct FakeKernel {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    /// By vCPU; none where the VM has a bitmap instead.
    rings: Vec<FakeRing>,
    slots: BTreeMap<u32, FakeSlot>,
    /// By vCPU: the pages, by slot and offset, that its TLB holds as writable.
    tlbs: Vec<BTreeSet<(u32, u64)>>,
    /// Another thread resets just before the tracker does.
    foreign_comes_first: bool,
    /// Slots whose logging it refuses to switch on.
    refused: BTreeSet<u32>,
    fails_next_reset: bool,
    interruptions: VecDeque<Interruption>,
    /// How many pages it can take from a guest at once at least, if it can at all.
    granule: Option<Granule>,
    unnamed: UnnamedEntries,
    /// How long it takes to switch the logging of a slot.
    logging_takes: Duration,
    /// Writes that guests do while the next reset runs.
    writes_during_reset: Vec<WriteDuringReset>,
    /// Those of them that were done.
    written_during_reset: Vec<(SlotId, u64)>,
}

struct FakeSlot {
    logging: bool,
    pages: u64,
    /// Those that the guest can write without an exit, once they were protected for the first time.
    writable: PageSet,
    was_ever_protected: bool,
    bitmap: Vec<u64>,
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl Inner {
    /// Pages that were protected since the last flush are so for every vCPU from now on.
    fn flush_tlbs(&mut self) {
        self.tlbs.iter_mut().for_each(BTreeSet::clear);
    }

    fn write(&mut self, vcpu: usize, slot: SlotId, offset: u64, emulated: bool) {
        let Some(page) = self.slots.get_mut(&slot.0) else { return };
        if self.tlbs.len() <= vcpu {
            self.tlbs.resize_with(vcpu + 1, BTreeSet::new);
        }
        if !self.tlbs[vcpu].insert((slot.0, offset)) && !emulated {
            // No walk of the page tables, whatever they say by now.
            return;
        }
        let was_writable = !page.writable.insert(PageIndex(offset)) || !page.was_ever_protected;
        if !page.logging || (was_writable && !emulated) {
            return;
        }
        let Some(ring) = self.rings.get_mut(vcpu) else {
            page.bitmap[index(offset / 64)] |= 1 << (offset % 64);
            return;
        };
        if ring.cpu_log_entries == 0 || emulated {
            ring.push(slot, offset);
        } else {
            ring.cpu_log.push((slot, offset));
            if ring.cpu_log.len() == ring.cpu_log_entries {
                ring.flush_cpu_log();
            }
        }
    }

    /// `kvm_reset_dirty_gfn`.
    fn protect(&mut self, slot: u32, offset: u64, mask: u64) {
        let Some(slot) = self.slots.get_mut(&slot) else { return };
        let last = offset + u64::from(63 - mask.leading_zeros());
        if last < slot.pages {
            for bit in (0..64).filter(|bit| mask >> bit & 1 != 0) {
                slot.writable.remove(PageIndex(offset + bit));
            }
        }
    }

    /// `kvm_dirty_ring_reset`; true if a signal was pending.
    fn reset_ring(&mut self, at: usize, count: &mut u32, interruption: Option<Interruption>) -> bool {
        let (mut slot, mut offset, mut mask) = (0, 0, 0_u64);
        loop {
            if interruption.is_some_and(|signal| *count >= signal.after_entries) {
                return true;
            }
            let ring = &mut self.rings[at];
            let entry = ring.entry(ring.reset_index);
            if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                break;
            }
            let (mut next_slot, next_offset) =
                (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            if next_slot >> 16 >= ADDRESS_SPACES {
                match self.unnamed {
                    UnnamedEntries::Freed => {}
                    UnnamedEntries::Protected => next_slot = ring.pushed(ring.reset_index),
                    UnnamedEntries::Kept | UnnamedEntries::Refused => break,
                }
            }
            entry.flags.store(EMPTY, Ordering::Release);
            ring.reset_index = ring.reset_index.wrapping_add(1);
            *count += 1;
            if mask != 0 {
                let delta = next_offset.wrapping_sub(offset).cast_signed();
                if next_slot == slot && (0..64).contains(&delta) {
                    mask |= 1 << delta;
                    continue;
                }
                if next_slot == slot && (-63..0).contains(&delta) && mask << -delta >> -delta == mask {
                    offset = next_offset;
                    mask = mask << -delta | 1;
                    continue;
                }
                self.protect(slot, offset, mask);
            }
            (slot, offset, mask) = (next_slot, next_offset, 1);
        }
        if mask != 0 {
            self.protect(slot, offset, mask);
        }
        false
    }

    /// `kvm_vm_ioctl_reset_dirty_pages`, up to its flush: that comes after the lock is gone.
    fn reset(&mut self) -> ResetCount {
        let (after, before): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.writes_during_reset).into_iter().partition(|write| write.after);
        self.write_all(&before);
        let interruption = self.interruptions.pop_front();
        let mut count = ResetCount { entries: 0, slept: false };
        for at in 0..self.rings.len() {
            count.slept = self.reset_ring(at, &mut count.entries, interruption);
            if count.slept {
                break;
            }
        }
        self.write_all(&after);
        count
    }

    fn write_all(&mut self, writes: &[WriteDuringReset]) {
        for &WriteDuringReset { vcpu, slot, offset, emulated, .. } in writes {
            let full = self.rings.get(vcpu).is_some_and(|ring| ring.used() >= ring.soft_limit);
            let Some(pages) = self.slots.get(&slot.0).map(|slot| slot.pages) else {
                continue;
            };
            if full {
                continue;
            }
            for i in 0..emulated.unwrap_or(1) {
                let offset = (offset + i) % pages;
                self.write(vcpu, slot, offset, emulated.is_some());
                self.written_during_reset.push((slot, offset));
            }
        }
    }
}

impl FakeKernel {
    /// A kernel without slots and vCPUs.
    pub fn new() -> Self {
        let inner = Inner {
            rings: Vec::new(),
            slots: BTreeMap::new(),
            tlbs: Vec::new(),
            foreign_comes_first: false,
            refused: BTreeSet::new(),
            fails_next_reset: false,
            interruptions: VecDeque::new(),
            granule: None,
            unnamed: UnnamedEntries::Freed,
            logging_takes: Duration::ZERO,
            writes_during_reset: Vec::new(),
            written_during_reset: Vec::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a slot. Its memory is address space only.
    ///
    /// # Panics
    ///
    /// When the address space is used up.
    pub fn create_slot(&self, slot: SlotId, pages: PageRun) -> GuestMemory {
        let ram = AnonymousRam::with_slots(&[(slot, pages)], Backing::SmallPages);
        let memory = ram.expect("address space for a fake slot").memory().clone();
        self.create_slots(&memory);
        memory
    }

    /// Creates the slots of memory that there is already.
    pub fn create_slots(&self, memory: &GuestMemory) {
        for region in memory.regions() {
            let count = index(region.pages.pages);
            let words = vec![0; count.div_ceil(64)];
            let fake = FakeSlot {
                logging: false,
                pages: region.pages.pages,
                writable: PageSet::new(PageIndex(region.pages.pages)),
                was_ever_protected: false,
                bitmap: words,
            };
            self.lock().slots.insert(region.slot.0, fake);
        }
    }

    /// What it does from now on with ring entries that name no slot.
    pub fn treats_unnamed_entries(&self, unnamed: UnnamedEntries) {
        self.lock().unnamed = unnamed;
    }

    /// From now on it takes so long to switch the logging of a slot, as it does if the slot is large.
    pub fn logging_takes(&self, time: Duration) {
        self.lock().logging_takes = time;
    }

    /// From now on pages can be taken from guests, so many at once at least; with `None`, none any more.
    pub fn can_take_pages(&self, granule: Option<NonZeroU64>) {
        self.lock().granule = granule;
    }

    /// Deletes a slot.
    pub fn delete_slot(&self, slot: SlotId) {
        let inner = &mut *self.lock();
        inner.slots.remove(&slot.0);
        inner.flush_tlbs();
    }

    /// The ring of a vCPU once more, as another process maps it.
    #[cfg(all(test, feature = "offload"))]
    pub(crate) fn ring_again(&self, vcpu: usize, size: RingSize, position: u32) -> DirtyRing {
        let inner = self.lock();
        let ring = &inner.rings[vcpu];
        DirtyRing::over(Arc::clone(&ring.entries), Arc::clone(&ring.exit_reason), size, position)
    }

    /// Flags so many dirty entries from `position` on for reset, as a process does that dies before it has said so.
    #[cfg(all(test, feature = "offload"))]
    pub(crate) fn flag(&self, vcpu: usize, position: u32, entries: u32) {
        let inner = self.lock();
        let from = (0..entries).map(|at| inner.rings[vcpu].entry(position.wrapping_add(at)));
        for entry in from.take_while(|entry| entry.flags.load(Ordering::Acquire) == crate::kvm::ring::DIRTY) {
            entry.flags.store(RESET, Ordering::Release);
        }
    }

    /// Creates a vCPU whose ring begins at `position` and whose CPU buffers up to `cpu_log_entries` entries (PML: 512,
    /// none: 0).
    pub(crate) fn create_vcpu(&self, size: RingSize, position: u32, cpu_log_entries: usize) -> DirtyRing {
        let entries: Arc<[Entry]> = (0..size.entries()).map(|_| Entry::default()).collect();
        let exit_reason = Arc::new(AtomicU32::new(KVM_EXIT_UNKNOWN));
        let soft_limit = size.entries() - 64 - u32::try_from(cpu_log_entries).unwrap_or(0);
        let (entries_again, reason_again) = (Arc::clone(&entries), Arc::clone(&exit_reason));
        let ring = FakeRing::new(entries_again, reason_again, position, soft_limit, cpu_log_entries);
        self.lock().rings.push(ring);
        DirtyRing::over(entries, exit_reason, size, position)
    }

    /// vCPU `vcpu` writes a page natively: an entry if the page was protected. False, and nothing written, if the vCPU
    /// must exit first because its ring is full.
    pub fn write(&self, vcpu: usize, slot: SlotId, offset: u64) -> bool {
        let inner = &mut *self.lock();
        if inner.rings.get_mut(vcpu).is_some_and(|ring| !ring.enters_guest()) {
            return false;
        }
        inner.write(vcpu, slot, offset, false);
        true
    }

    /// KVM emulates writes of vCPU `vcpu`: each makes an entry, and nothing looks whether the ring is full. False, and
    /// nothing written, if it was when the emulation began.
    pub fn emulate_writes(&self, vcpu: usize, slot: SlotId, offsets: impl IntoIterator<Item = u64>) -> bool {
        let inner = &mut *self.lock();
        if inner.rings.get_mut(vcpu).is_some_and(|ring| !ring.enters_guest()) {
            return false;
        }
        for offset in offsets {
            inner.write(vcpu, slot, offset, true);
        }
        true
    }

    /// The kernel itself writes a page, with no vCPU at hand: only a bitmap knows, if there is one.
    pub fn write_without_vcpu(&self, slot: SlotId, offset: u64) {
        if let Some(slot) = self.lock().slots.get_mut(&slot.0).filter(|slot| slot.logging) {
            slot.bitmap[index(offset / 64)] |= 1 << (offset % 64);
        }
    }

    /// vCPU `vcpu` leaves the guest, and KVM pushes what the CPU has logged.
    pub fn exit(&self, vcpu: usize) {
        if let Some(ring) = self.lock().rings.get_mut(vcpu) {
            ring.flush_cpu_log();
        }
    }

    /// One of the coming resets is interrupted.
    pub fn interrupt_a_reset(&self, interruption: Interruption) {
        self.lock().interruptions.push_back(interruption);
    }

    /// A guest writes while the next reset runs, if its ring is not full then.
    pub fn write_during_reset(&self, write: WriteDuringReset) {
        self.lock().writes_during_reset.push(write);
    }

    /// The vCPUs that were to write during the next reset will not.
    pub fn cancel_writes_during_reset(&self) {
        self.lock().writes_during_reset.clear();
    }

    /// The writes that were done during resets since the last call.
    pub fn take_written_during_reset(&self) -> Vec<(SlotId, u64)> {
        std::mem::take(&mut self.lock().written_during_reset)
    }

    /// Another thread of the VMM resets the entries that the tracker has flagged, just before the tracker asks for it. Its flush
    /// of the TLBs, which comes after KVM's lock is free again, is still to come: [`foreign_flush`](Self::foreign_flush).
    pub fn foreign_reset_before_the_next(&self) {
        self.lock().foreign_comes_first = true;
    }

    /// The flush of a reset, or of anything else that protected pages.
    pub fn foreign_flush(&self) {
        self.lock().flush_tlbs();
    }

    /// The logging of a slot cannot be switched on: a slot that is gone and one that is not what the tracker was told are refused
    /// by other means.
    pub fn refuse_to_log(&self, slot: SlotId) {
        self.lock().refused.insert(slot.0);
    }

    /// The next reset of the rings is refused.
    pub fn fail_the_next_reset(&self) {
        self.lock().fails_next_reset = true;
    }

    /// Whether writes to a slot are logged.
    pub fn is_logging(&self, slot: SlotId) -> bool {
        self.lock().slots.get(&slot.0).is_some_and(|slot| slot.logging)
    }

    /// Entries in a vCPU's ring by the kernel's own count.
    pub fn ring_used(&self, vcpu: usize) -> u32 {
        self.lock().rings.get(vcpu).map_or(0, FakeRing::used)
    }
}

fn refusal(name: &'static str) -> KvmError {
    KvmError::Ioctl { name, source: std::io::Error::from_raw_os_error(libc::ENOMEM) }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeKernel")
    }
}

impl Kernel for FakeKernel {
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError> {
        let inner = &mut *self.lock();
        if std::mem::take(&mut inner.fails_next_reset) {
            return Err(refusal("KVM_RESET_DIRTY_RINGS"));
        }
        if std::mem::take(&mut inner.foreign_comes_first) {
            inner.reset();
        }
        let count = inner.reset();
        if count.entries > 0 {
            inner.flush_tlbs();
        }
        if inner.unnamed == UnnamedEntries::Refused && inner.rings.iter().any(FakeRing::waits_at_unnamed) {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(KvmError::Ioctl { name: "KVM_RESET_DIRTY_RINGS", source });
        }
        Ok(count)
    }

    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError> {
        let takes = self.lock().logging_takes;
        if !takes.is_zero() {
            std::thread::sleep(takes);
        }
        let inner = &mut *self.lock();
        let slot = inner.slots.get_mut(&region.slot.0).ok_or(KvmError::SlotGone(region.slot))?;
        if enabled && inner.refused.contains(&region.slot.0) {
            return Err(refusal("KVM_SET_USER_MEMORY_REGION"));
        }
        if enabled && !slot.logging {
            slot.writable.clear();
            slot.was_ever_protected = true;
            slot.bitmap.fill(0);
        }
        slot.logging = enabled;
        inner.flush_tlbs();
        Ok(())
    }

    fn get_dirty_log(&self, slot: SlotId, _: u64, words: &mut [u64]) -> Result<(), KvmError> {
        let inner = self.lock();
        let slot = inner.slots.get(&slot.0).ok_or(KvmError::SlotGone(slot))?;
        words.copy_from_slice(&slot.bitmap);
        Ok(())
    }

    fn clear_dirty_log(&self, slot: SlotId, pages: u64, words: &[u64]) -> Result<(), KvmError> {
        let inner = &mut *self.lock();
        let slot = inner.slots.get_mut(&slot.0).ok_or(KvmError::SlotGone(slot))?;
        for offset in (0..pages).filter(|offset| words[index(offset / 64)] >> (offset % 64) & 1 != 0) {
            slot.bitmap[index(offset / 64)] &= !(1 << (offset % 64));
            slot.writable.remove(PageIndex(offset));
        }
        inner.flush_tlbs();
        Ok(())
    }

    fn can_protect(&self, region: &Region) -> Result<Granule, UnmapError> {
        let inner = self.lock();
        let refused = || UnmapError::NotProtectable(Arc::new(io::Error::from_raw_os_error(libc::EINVAL)));
        inner.slots.get(&region.slot.0).ok_or_else(refused)?;
        inner.granule.ok_or_else(refused)
    }

    fn protect(&self, region: &Region, ranges: &[Protection]) -> Result<(), UnmapError> {
        let granule = self.can_protect(region)?.get();
        for Protection { pages, .. } in ranges {
            let first = pages.first.0 - region.pages.first.0;
            assert!(first.is_multiple_of(granule) && pages.pages.is_multiple_of(granule), "whole granules");
            if let Some(slot) = self.lock().slots.get_mut(&region.slot.0) {
                slot.writable.remove_run(PageRun { first: PageIndex(first), pages: pages.pages });
            }
        }
        self.lock().flush_tlbs();
        Ok(())
    }

    fn unseen_per_vcpu(&self) -> u64 {
        self.lock().rings.iter().map(|ring| ring.cpu_log_entries as u64).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::kvm::ring::Recycle;

    /// KVM on one thread, we on another, with nothing between them but the entries. Each entry names a slot that
    /// follows from its offset: an entry read before it was written, or after it was reused, does not match.
    #[test]
    fn entries_cross_between_two_threads_once_in_order_and_whole() {
        const SIZE: u32 = 256;
        let entries = if cfg!(miri) { 2_000 } else { 50_000 };
        let slot_of = |offset: u64| SlotId(u32::try_from(offset % 65_521).unwrap() ^ 0x5555);
        let kernel = FakeKernel::new();
        let position = 100_u32.wrapping_neg();
        let mut ring = kernel.create_vcpu(RingSize::from_entries(SIZE).unwrap(), position, 0);
        let mut kvm = kernel.lock().rings.remove(0);
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let failed = &failed;
            scope.spawn(move || {
                let mut pushed = 0;
                let end = position.wrapping_add(u32::try_from(entries).unwrap());
                while kvm.reset_index != end && !failed.load(Ordering::Relaxed) {
                    if pushed < entries && kvm.used() < SIZE {
                        kvm.push(slot_of(pushed), pushed);
                        pushed += 1;
                    }
                    let entry = kvm.entry(kvm.reset_index);
                    if entry.flags.load(Ordering::Acquire) & RESET != 0 {
                        entry.flags.store(EMPTY, Ordering::Release);
                        kvm.reset_index = kvm.reset_index.wrapping_add(1);
                    }
                }
            });
            let mut next = 0;
            while next < entries && !failed.load(Ordering::Relaxed) {
                let scanned = ring.scan();
                let taken = ring.take(Recycle::Protecting, |slot, offset| {
                    failed.fetch_or((slot, offset) != (slot_of(next), next), Ordering::Relaxed);
                    next += 1;
                });
                // What was scanned can be taken.
                failed.fetch_or(taken < scanned, Ordering::Relaxed);
                let reset = ring.unflagged_prefix();
                if reset.entries > 0 {
                    ring.confirm_prefix(reset.entries);
                }
                thread::yield_now();
            }
        });
        assert!(!failed.into_inner());
    }
}
