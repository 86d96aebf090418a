//! One vCPU's dirty ring, and the reason why the vCPU left the guest: the only memory that we share with KVM.
//!
//! An entry goes 00 -(KVM: a page was dirtied)-> DIRTY -(we: taken)-> RESET -(KVM: page protected)-> 00. Both
//! sides keep their positions to themselves and only the flags tell how far the other is: KVM pushes at its dirty
//! index and resets at its reset index, we take at `fetch`.
//!
//! This file owns the positions and the memory orderings. It does not know pages, and it cannot make KVM reset
//! anything: `track` does, for all rings at once, and then says so here with [`DirtyRing::confirm`].
#![expect(unsafe_code, reason = "the ring is memory that KVM writes at any time")]

mod left;
#[cfg(feature = "offload")]
mod lent;
mod unnamed;

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
#[cfg(any(test, feature = "testing"))]
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL, kvm_coalesced_mmio,
    kvm_coalesced_mmio_ring, kvm_dirty_gfn, kvm_run,
};
use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{KvmError, RingSize, sys};
use crate::layout::{PAGE_SIZE, SlotId};

/// KVM has nothing to say about the entry, and may fill it.
pub(crate) const EMPTY: u32 = 0;
/// KVM filled the entry (`KVM_DIRTY_GFN_F_DIRTY`).
pub(crate) const DIRTY: u32 = 1;
/// We took the entry, and ask KVM to protect the page again (`KVM_DIRTY_GFN_F_RESET`).
pub(crate) const RESET: u32 = 2;

/// What KVM's reset does with the page of an entry that is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Recycle {
    /// It protects the page, and the next write to it makes an entry.
    Protecting,
    /// Nothing: the page stays writable, and no write to it makes an entry.
    Leaving,
}

/// Page frames that one batch of KVM's reset covers at most: the bits of a long.
const BATCH_PAGES: u64 = 64;

/// `struct kvm_dirty_gfn`, of atomics: KVM writes it while we read. Slot and offset are ordered by the flags.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Entry {
    pub(crate) flags: AtomicU32,
    pub(crate) slot: AtomicU32,
    pub(crate) offset: AtomicU64,
}

const _: () = {
    assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
    assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());
    assert!(offset_of!(Entry, flags) == offset_of!(kvm_dirty_gfn, flags));
    assert!(offset_of!(Entry, slot) == offset_of!(kvm_dirty_gfn, slot));
    assert!(offset_of!(Entry, offset) == offset_of!(kvm_dirty_gfn, offset));
    // See `check_same_vm`.
    let used = size_of::<kvm_coalesced_mmio_ring>();
    assert!((PAGE_SIZE - used) % size_of::<kvm_coalesced_mmio>() >= size_of::<AtomicUsize>());
};

/// What keeps the entries where they are.
enum Backing {
    Vcpu {
        _ring: MmapRaw,
        run: MmapRaw,
    },
    #[cfg(any(test, feature = "testing"))]
    Memory {
        _entries: Arc<[Entry]>,
        exit_reason: Arc<AtomicU32>,
    },
}

/// The entries of one ring.
struct RingMemory {
    first: NonNull<Entry>,
    size: RingSize,
    backing: Backing,
}

// SAFETY:
// * The entries are atomics and stay mapped for as long as `backing` lives, whichever thread that is in.
unsafe impl Send for RingMemory {}

/// Which VM's vCPUs are taken: the address of something that lives as long as the VM is tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VmMark(pub(crate) usize);

/// `len` bytes of a vCPU from page `first` on. Populated: a fault for every 256 entries would cost more than taking them.
fn map_pages(vcpu: &impl AsRawFd, first: u32, len: usize) -> io::Result<MmapRaw> {
    let offset = u64::from(first) * PAGE_SIZE as u64;
    let map = MmapOptions::new().offset(offset).len(len).populate().map_raw(vcpu)?;
    // A mapping proves nothing: where there is nothing behind it, access would be SIGBUS. Populating says EFAULT instead.
    match map.advise(Advice::PopulateWrite) {
        // Before Linux 5.14, which cannot say.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(map),
        populated => populated.map(|()| map),
    }
}

impl RingMemory {
    fn map(vcpu: &impl AsRawFd, size: RingSize) -> io::Result<Self> {
        let ring = map_pages(vcpu, KVM_DIRTY_LOG_PAGE_OFFSET, size.bytes())?;
        let run = map_pages(vcpu, 0, PAGE_SIZE)?;
        let first = NonNull::new(ring.as_mut_ptr().cast::<Entry>())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { first, size, backing: Backing::Vcpu { _ring: ring, run } })
    }

    /// Why the vCPU left the guest the last time.
    fn exit_reason(&self) -> u32 {
        match &self.backing {
            Backing::Vcpu { run, .. } => {
                let at = run.as_mut_ptr().wrapping_add(offset_of!(kvm_run, exit_reason));
                // SAFETY:
                // * The field is in the first page of `kvm_run`, which is mapped as long as `run` lives, and aligned.
                // * KVM writes it and the VMM reads it; atomic access races with neither.
                unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Relaxed)
            }
            #[cfg(any(test, feature = "testing"))]
            Backing::Memory { exit_reason, .. } => exit_reason.load(Ordering::Relaxed),
        }
    }

    fn entry(&self, position: u32) -> &Entry {
        let i = position & (self.size.entries() - 1);
        // SAFETY:
        // * `i` is below the number of entries, which is a power of two, and both kinds of backing hold that many.
        // * The memory lives as long as `self`, is aligned (a page, or an `Arc<[Entry]>`), and is initialised: KVM
        //   zeroes it, and every bit pattern is an entry.
        // * All access is atomic, KVM's included, so that a shared reference is right although it writes.
        unsafe { self.first.add(i as usize).as_ref() }
    }
}

/// Whether the vCPU belongs to the VM whose first vCPU was marked.
///
/// No call tells a vCPU's VM. But the vCPUs of a VM, and they only, share the page of coalesced MMIO. KVM divides it into a
/// header of 8 bytes and as many entries of 24 as fit, which leaves 8 bytes at its end that nobody uses.
fn check_same_vm(vcpu: &impl AsRawFd, mark: VmMark, is_first: bool) -> Result<(), KvmError> {
    let page = map_pages(vcpu, KVM_COALESCED_MMIO_PAGE_OFFSET, PAGE_SIZE).map_err(KvmError::Map)?;
    let at = page.as_mut_ptr().wrapping_add(PAGE_SIZE - size_of::<AtomicUsize>());
    // SAFETY:
    // * The last 8 bytes of a page that is mapped as long as `page` lives, aligned, and zeroed by KVM.
    // * All access is atomic.
    let shared = unsafe { AtomicUsize::from_ptr(at.cast()) };
    if is_first {
        // What is there already is some other VM's, unless this is another try.
        let _ = shared.compare_exchange(0, mark.0, Ordering::Relaxed, Ordering::Relaxed);
    }
    if shared.load(Ordering::Relaxed) == mark.0 { Ok(()) } else { Err(KvmError::VcpuOfOtherVm) }
}

/// Our end of one vCPU's ring. Positions count entries since the ring began, modulo 2³², and the ring's size
/// divides that, so that they wrap as the kernel's do.
pub(crate) struct DirtyRing {
    memory: RingMemory,
    /// The next entry to take.
    fetch: u32,
    /// The first entry that KVM may not have reset yet; `fetch` when all have been.
    reset: u32,
    /// The first entry, `fetch` or later, that was not dirty at the last scan.
    scanned: u32,
    /// The next entry that `report` gives; between `fetch` and `scanned`.
    reported: u32,
    left_suspect: bool,
    /// Among the entries that KVM may not have reset yet are some that name no slot.
    unnamed: bool,
    /// Hears of each new `fetch`, if the ring is another process's.
    #[cfg(feature = "offload")]
    published: Option<lent::Publish>,
}

impl DirtyRing {
    /// Maps the ring of a vCPU that was created after the rings were enabled with this size, at the position at which it was left.
    pub(crate) fn map(
        vcpu: &impl AsRawFd,
        size: RingSize,
        mark: VmMark,
        is_first: bool,
    ) -> Result<Self, KvmError> {
        if !sys::is_vcpu(vcpu.as_raw_fd()) {
            return Err(KvmError::NotVcpu);
        }
        let memory = RingMemory::map(vcpu, size).map_err(KvmError::Map)?;
        check_same_vm(vcpu, mark, is_first)?;
        let left = memory.left();
        Ok(Self { left_suspect: left.suspect, ..Self::new(memory, left.position) })
    }

    /// A ring over memory of our own, at any position: somebody else plays KVM.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn over(
        entries: Arc<[Entry]>,
        exit_reason: Arc<AtomicU32>,
        size: RingSize,
        position: u32,
    ) -> Self {
        assert_eq!(entries.len(), size.entries() as usize);
        let first = NonNull::from(&entries[0]);
        let backing = Backing::Memory { _entries: entries, exit_reason };
        Self::new(RingMemory { first, size, backing }, position)
    }

    fn new(memory: RingMemory, position: u32) -> Self {
        Self {
            memory,
            fetch: position,
            reset: position,
            scanned: position,
            reported: position,
            left_suspect: false,
            unnamed: false,
            #[cfg(feature = "offload")]
            published: None,
        }
    }

    /// Whether the vCPU, outside the guest now, left because this ring was full.
    pub(crate) fn exited_full(&self) -> bool {
        self.memory.exit_reason() == KVM_EXIT_DIRTY_RING_FULL
    }

    pub(crate) fn size(&self) -> RingSize {
        self.memory.size
    }

    /// Takes every dirty entry in order, gives its slot and page offset to `page`, and flags it for reset. Returns
    /// how many. The pages stay writable, and so must not be read, until KVM has reset the entries; with
    /// [`Recycle::Leaving`], longer than that.
    #[inline]
    pub(crate) fn take(&mut self, recycle: Recycle, mut page: impl FnMut(SlotId, u64)) -> u32 {
        let from = self.fetch;
        // Once around at most, counted from what is flagged: an entry is not taken again before it was reset.
        let end = self.reset.wrapping_add(self.size().entries());
        while self.fetch != end {
            let entry = self.memory.entry(self.fetch);
            // Acquire, pairs with the `smp_wmb()` between KVM's writing of slot and offset and of DIRTY: having
            // seen DIRTY, we see them.
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            page(SlotId(entry.slot.load(Ordering::Relaxed)), entry.offset.load(Ordering::Relaxed));
            if recycle == Recycle::Leaving {
                entry.take_name();
            }
            // Release, pairs with the `smp_load_acquire()` of the flags in `kvm_dirty_gfn_harvested()`: once KVM
            // sees RESET and hands the entry out again, our reads above are done, and it sees the slot that we stored.
            entry.flags.store(RESET, Ordering::Release);
            self.fetch = self.fetch.wrapping_add(1);
        }
        self.looked_at();
        let taken = self.fetch.wrapping_sub(from);
        self.unnamed |= recycle == Recycle::Leaving && taken > 0;
        taken
    }

    /// Entries that were taken and may not be reset yet.
    pub(crate) fn unconfirmed(&self) -> u32 {
        self.fetch.wrapping_sub(self.reset)
    }

    /// Every taken entry has been reset: the counts of all rings together said so.
    pub(crate) fn confirm(&mut self) {
        self.reset = self.fetch;
        self.unnamed = false;
    }

    /// Entries that are dirty and not taken. Reads only new ones, the logarithm of their number: KVM fills
    /// entries in order, so that a dirty one has none but dirty ones before it, back to `fetch`. On a weakly
    /// ordered machine too: the `smp_wmb()` of each push stands between all earlier flags and its own, and
    /// the load here acquires.
    pub(crate) fn scan(&mut self) -> u32 {
        // As far as `take` would go.
        let mut left = self.reset.wrapping_add(self.size().entries()).wrapping_sub(self.scanned);
        let is_dirty = |position: u32| self.memory.entry(position).flags.load(Ordering::Acquire) == DIRTY;
        // Double the stride while it lands on dirty entries, then halve it.
        let mut stride = 1;
        while stride <= left && is_dirty(self.scanned.wrapping_add(stride - 1)) {
            self.scanned = self.scanned.wrapping_add(stride);
            left -= stride;
            stride *= 2;
        }
        while stride > 1 {
            stride /= 2;
            if stride <= left && is_dirty(self.scanned.wrapping_add(stride - 1)) {
                self.scanned = self.scanned.wrapping_add(stride);
                left -= stride;
            }
        }
        self.scanned.wrapping_sub(self.fetch)
    }

    /// Gives slot and page offset of each entry that [`scan`](Self::scan) has counted and that was not reported before.
    /// They stay dirty, and the pages writable.
    pub(crate) fn report(&mut self, mut page: impl FnMut(SlotId, u64)) {
        while self.reported != self.scanned {
            let entry = self.memory.entry(self.reported);
            // Acquire, as in `take`.
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            page(SlotId(entry.slot.load(Ordering::Relaxed)), entry.offset.load(Ordering::Relaxed));
            self.reported = self.reported.wrapping_add(1);
        }
    }

    /// How far KVM seems to have come with the taken entries: those at the front that are no longer flagged for
    /// reset. Each was either reset or, if the ring overflowed, overwritten.
    pub(crate) fn unflagged_prefix(&self) -> Prefix {
        let mut prefix = Prefix::default();
        while prefix.entries < self.unconfirmed() {
            match self.flags(self.reset.wrapping_add(prefix.entries)) {
                RESET => break,
                EMPTY => {}
                _ => prefix.dirty_again = true,
            }
            prefix.entries += 1;
        }
        prefix
    }

    /// The first `entries` of the taken entries have been reset.
    pub(crate) fn confirm_prefix(&mut self, entries: u32) {
        self.reset = self.reset.wrapping_add(entries.min(self.unconfirmed()));
    }

    /// Gives slot and page offset of the batch that ends with the first `entries` of the taken entries, as far as it is
    /// among them: what KVM has reset, but may not have protected if it was interrupted there. Perhaps some more. False
    /// if KVM has used one of the entries again, so that nobody knows what it named.
    pub(crate) fn last_batch(&self, entries: u32, mut page: impl FnMut(SlotId, u64)) -> bool {
        let mut last = None;
        for i in (0..entries).rev() {
            let entry = self.memory.entry(self.reset.wrapping_add(i));
            // Slot and offset first, flags last: if KVM has not filled the entry by then, it had not before. Acquire
            // on the first two keeps that order.
            let slot = SlotId(entry.slot.load(Ordering::Acquire));
            let offset = entry.offset.load(Ordering::Acquire);
            if entry.flags.load(Ordering::Relaxed) == DIRTY {
                return false;
            }
            let (last_slot, last_offset) = *last.get_or_insert((slot, offset));
            if slot != last_slot || offset.abs_diff(last_offset) >= BATCH_PAGES {
                break;
            }
            page(slot, offset);
        }
        true
    }

    /// After an overflow: how many empty entries stand before the next dirty one, `None` if none is dirty. KVM
    /// counts them as dirty, but what they said was overwritten.
    pub(crate) fn gap(&self) -> Option<u32> {
        let first_dirty =
            |entries: u32| (0..entries).find(|i| self.flags(self.fetch.wrapping_add(*i)) == DIRTY);
        // KVM may push while we look, and fill an entry that we have passed after one that we find. Having found
        // one, we see all that was pushed before it: the second look tells which was first.
        let found = first_dirty(self.size().entries() - self.unconfirmed())?;
        Some(first_dirty(found).unwrap_or(found))
    }

    /// After an overflow: flags the next `entries`, empty as they are, so that KVM's reset goes past them. This is
    /// outside the documented ABI. KVM protects the pages that they named the last time, which is harmless.
    pub(crate) fn skip(&mut self, entries: u32) {
        for _ in 0..entries.min(self.size().entries() - self.unconfirmed()) {
            let entry = self.memory.entry(self.fetch);
            entry.give_name();
            entry.flags.store(RESET, Ordering::Release);
            self.fetch = self.fetch.wrapping_add(1);
        }
        self.looked_at();
    }

    /// Everything before `fetch` has been looked at.
    fn looked_at(&mut self) {
        (self.scanned, self.reported) = (self.fetch, self.fetch);
        #[cfg(feature = "offload")]
        if let Some(publish) = &self.published {
            publish(self.fetch);
        }
    }

    /// After an overflow, with KVM stuck at a taken entry that it has overwritten: flags these entries again.
    /// Returns how many entries KVM should now reset. Only while the vCPU is outside the guest.
    pub(crate) fn flag_again(&mut self) -> u32 {
        // What is empty was reset, and so was all before it.
        let is_empty = |i: &u32| self.flags(self.reset.wrapping_add(*i)) == EMPTY;
        if let Some(last) = (0..self.unconfirmed()).rev().find(is_empty) {
            self.reset = self.reset.wrapping_add(last + 1);
        }
        for i in 0..self.unconfirmed() {
            self.memory.entry(self.reset.wrapping_add(i)).flags.store(RESET, Ordering::Release);
        }
        self.unconfirmed()
    }

    fn flags(&self, position: u32) -> u32 {
        self.memory.entry(position).flags.load(Ordering::Acquire)
    }
}

/// See [`DirtyRing::unflagged_prefix`].
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Prefix {
    pub(crate) entries: u32,
    /// Some of them are dirty: KVM has used them again, rightly after a reset, wrongly without.
    pub(crate) dirty_again: bool,
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRing")
            .field("size", &self.size())
            .field("fetch", &self.fetch)
            .field("reset", &self.reset)
            .field("scanned", &self.scanned)
            .field("reported", &self.reported)
            .finish_non_exhaustive()
    }
}
