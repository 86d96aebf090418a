//! What a guest does, and what its host is like: the description of both.

use std::time::Duration;

use crate::PAGE_SIZE;
use crate::converge::units::{Pages, sane};

/// In which order a writer goes through its working set.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum Order {
    /// Page by page, and from the start again.
    #[default]
    Cyclic,
    /// Every page as likely as any other, each time.
    Random,
    /// A share of the writes goes to the first pages of the set, the others to the rest of it.
    HotCold {
        /// The share of the set that is hot, 0 to 1.
        hot: f64,
        /// The share of the writes that goes there, 0 to 1.
        writes: f64,
    },
}

/// A phase that comes and goes: it writes for `lasts` of every `every`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Burst {
    /// From the beginning of one burst to that of the next.
    pub every: Duration,
    /// How long each lasts.
    pub lasts: Duration,
}

/// What a vCPU does for a while.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Phase {
    /// Since the migration's start; a later phase has a working set of its own.
    pub from: Duration,
    /// Pages of the working set.
    pub pages: Pages,
    /// Page writes per second, free writes included; infinite: as fast as it can.
    pub writes_per_s: f64,
    /// Their order.
    pub order: Order,
    /// Where the working set begins; `None`: behind all others that say nothing, as long as there is RAM. Working sets
    /// may overlap.
    pub first_page: Option<Pages>,
    /// If it does not write all of the time.
    pub burst: Option<Burst>,
}

impl Phase {
    /// Whether it writes at `at` seconds.
    pub(super) fn writes(&self, at: f64) -> bool {
        let since = at - self.from.as_secs_f64();
        let in_burst = |burst: Burst| {
            let every = burst.every.as_secs_f64();
            every <= 0.0 || since.rem_euclid(every) < burst.lasts.as_secs_f64()
        };
        self.writes_per_s > 0.0 && since >= 0.0 && self.burst.is_none_or(in_burst)
    }
}

/// A vCPU, or another writer of the guest's memory: what it does, in the order in which it does it. Without a phase it
/// writes nothing.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Writer {
    /// By their start.
    pub phases: Vec<Phase>,
}

impl Writer {
    /// One phase for ever: `bytes` of working set at `bytes_per_s`, cyclic.
    pub fn steady(bytes: u64, bytes_per_s: f64) -> Self {
        let pages = Pages(bytes / PAGE_SIZE as u64);
        let writes_per_s = bytes_per_s / PAGE_SIZE as f64;
        Self { phases: vec![Phase { pages, writes_per_s, ..Phase::default() }] }
    }

    /// The same, in another order.
    pub fn in_order(mut self, order: Order) -> Self {
        self.phases.iter_mut().for_each(|phase| phase.order = order);
        self
    }

    /// The same, in bursts.
    pub fn in_bursts(mut self, burst: Burst) -> Self {
        self.phases.iter_mut().for_each(|phase| phase.burst = Some(burst));
        self
    }

    pub(super) fn phase(&self, at: f64) -> Option<(usize, &Phase)> {
        let started = |(_, phase): &(usize, &Phase)| phase.from.as_secs_f64() <= at;
        self.phases.iter().enumerate().take_while(started).last()
    }
}

/// When the migration learns what a device wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Seen {
    /// When its log is drained, at the end of a round.
    AtHarvests,
    /// At every look, as the tracker drains the logs of external writers.
    #[default]
    AtLooks,
}

/// A guest.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Guest {
    /// All of its RAM.
    pub ram: Pages,
    /// Populated pages that are not zero: what the first round has to send. They are the first of the RAM, and working
    /// sets begin with them.
    pub populated: Pages,
    /// One per vCPU.
    pub writers: Vec<Writer>,
    /// Those that write its memory and are no vCPUs (vhost, DMA): no gate stops them before the guest stands still.
    pub devices: Vec<Writer>,
    /// When it is known what those wrote.
    pub devices_seen: Seen,
}

/// Where the working sets are, by writer and phase: their first pages and how many.
pub(super) type Places = Vec<Vec<(usize, usize)>>;

/// Places all working sets, those of vCPUs and then those of devices.
pub(super) fn places(guest: &Guest) -> (Places, Places) {
    let ram = in_memory(guest.ram);
    let mut next = 0;
    let mut place = |phase: &Phase| {
        let pages = in_memory(phase.pages).min(ram);
        let first = match phase.first_page {
            Some(first) => in_memory(first).min(ram - pages),
            None => {
                if next + pages > ram {
                    next = 0;
                }
                next += pages;
                next - pages
            }
        };
        (first, pages)
    };
    let mut of = |writers: &[Writer]| -> Places {
        writers.iter().map(|writer| writer.phases.iter().map(&mut place).collect()).collect()
    };
    let vcpus = of(&guest.writers);
    (vcpus, of(&guest.devices))
}

/// A number of pages that can be held in memory; more are cut off.
pub(super) fn in_memory(pages: Pages) -> usize {
    usize::try_from(pages.0).unwrap_or(usize::MAX)
}

/// In which order a round's pages are sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SendOrder {
    /// By address.
    #[default]
    Ascending,
    /// By address, from the top.
    FromTheTop,
    /// Those that were dirtied last come first.
    YoungFirst,
    /// Those that were dirtied first come first.
    OldFirst,
}

/// The hosts: what control costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Machine {
    /// Shortest time between two observations, and the step of the simulation; the controller may ask for more.
    pub sample_interval: Duration,
    /// From closing a gate to its vCPU standing behind it, and from stopping the guest to its last write.
    pub kick: Duration,
    /// What the first write to a clean page costs.
    pub fault: Duration,
    /// What a write to a page costs that is dirty already.
    pub write: Duration,
    /// Entries of a vCPU's ring, after which it is recycled and its pages are left unprotected.
    pub ring_entries: u32,
    /// So many pages may be dirty and not yet in the ring: 512 on hosts with PML, until the vCPU's next exit.
    pub held_back: u32,
    /// Harvest and system calls between two rounds.
    pub round_overhead: Duration,
    /// Pause, device state and handing over: the downtime besides sending and round trips.
    pub switchover: Duration,
    /// Round trips of the link from the pause to the word that the destination runs.
    pub switchover_round_trips: u32,
    /// The sender's order.
    pub order: SendOrder,
}

impl Default for Machine {
    /// As measured on a nested KVM with two CPUs that are both busy: 0.25 ms from a kick to the exit, 6.6 µs per fault; with a
    /// ring of 65536 entries. The round trips are those that `source` counts.
    fn default() -> Self {
        Self {
            sample_interval: Duration::from_micros(100),
            kick: Duration::from_micros(250),
            fault: Duration::from_nanos(6600),
            write: Duration::from_nanos(25),
            ring_entries: 65_536 - 64,
            held_back: 0,
            round_overhead: Duration::from_millis(2),
            switchover: Duration::from_millis(20),
            switchover_round_trips: 5,
            order: SendOrder::Ascending,
        }
    }
}

impl Machine {
    /// What a write takes that is paced at `writes_per_s`: to a clean page, to a dirty one; and what of it its writer would
    /// not have felt without a migration.
    pub(super) fn costs(&self, writes_per_s: f64, faults: bool) -> Costs {
        let pace = sane(1.0 / writes_per_s);
        let dirty = pace.max(self.write.as_secs_f64()).max(1e-9);
        let clean = if faults { dirty.max(self.fault.as_secs_f64()) } else { dirty };
        Costs { clean, dirty }
    }
}

/// What a write takes, in seconds: its pace or its cost, whichever is longer, as a paced writer hides its faults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs {
    /// To a page that was clean.
    pub clean: f64,
    /// To any other.
    pub dirty: f64,
}
