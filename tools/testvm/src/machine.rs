//! The host's side of a [`Machine`]: guest RAM through this process's mappings, and the host's clock.
//!
//! With it, the host reads and writes the mailbox of a guest, and a host thread can be a vCPU of the workload.
#![expect(unsafe_code, reason = "guest RAM is memory shared with a running guest, reachable only by pointer")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringferry::{GuestAddress, GuestMemory, Region};

use crate::workload::Machine;

/// Guest RAM as a host thread sees it. What lies outside RAM reads as all ones and takes no writes, as on a PC.
#[derive(Debug)]
pub struct HostMachine {
    memory: GuestMemory,
    /// Index of the region that was used last.
    region: Cell<usize>,
    /// The clock: what it showed, and when.
    ticks: u64,
    since: Instant,
}

impl HostMachine {
    /// Frequency of [`Machine::ticks`] on every `HostMachine`: nanoseconds.
    pub const TICKS_KHZ: u64 = 1_000_000;

    /// A machine on `memory`, whose clock starts now. The mappings must live as long as the machine, as
    /// [`GuestMemory::new`] demands.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), region: Cell::new(0), ticks: 0, since: Instant::now() }
    }

    /// Sets the clock.
    pub fn set_ticks(&mut self, ticks: u64) {
        (self.ticks, self.since) = (ticks, Instant::now());
    }

    /// The RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn word(&self, address: u64) -> Option<&AtomicU64> {
        let page = GuestAddress(address).page();
        let inside = |region: &Region| region.pages.first <= page && page < region.pages.end();
        let regions = self.memory.regions();
        if !inside(&regions[self.region.get()]) {
            self.region.set(regions.iter().position(inside)?);
        }
        let region = &regions[self.region.get()];
        let offset = usize::try_from(address - region.pages.first.address().0).ok()?;
        let at: *mut u64 = region.host.wrapping_add(offset).cast();
        // SAFETY:
        // * the page is the region's, which is mapped as `GuestMemory::new` demands, and an aligned word does not
        //   cross a page;
        // * all accesses of this process to guest RAM are atomic.
        at.is_aligned().then(|| unsafe { AtomicU64::from_ptr(at) })
    }
}

impl Machine for HostMachine {
    fn load(&self, address: u64) -> u64 {
        // Acquire and release, as x86 orders all loads and stores: what one side publishes last is seen last.
        self.word(address).map_or(u64::MAX, |word| word.load(Ordering::Acquire))
    }

    fn store(&mut self, address: u64, value: u64) {
        if let Some(word) = self.word(address) {
            word.store(value, Ordering::Release);
        }
    }

    /// Not one instruction: a host thread is stopped between two turns only, where nobody can tell.
    fn store_pair(&mut self, address: u64, first: u64, second: u64) {
        self.store(address, first);
        self.store(address + 8, second);
    }

    fn swap(&mut self, address: u64, value: u64) -> u64 {
        self.word(address).map_or(u64::MAX, |word| word.swap(value, Ordering::AcqRel))
    }

    fn ticks(&self) -> u64 {
        self.ticks.saturating_add(u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn wait(&mut self, microseconds: u32) {
        std::thread::sleep(Duration::from_micros(microseconds.into()));
    }

    fn relax(&self) {
        std::hint::spin_loop();
    }
}
