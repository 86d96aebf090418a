//! Loads and attaches the eBPF programs, and reads what they counted. Owns the maps; knows no rates.
//!
//! `preflight` comes before it, `session` after.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Mutex;

use libbpf_rs::{
    Iter, Link, MapCore, MapFlags, MapHandle, Object, ObjectBuilder, OpenObject, PrintLevel, set_print,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::counts::RingMaps;
use crate::kernel_types::KernelTypes;
use crate::layout::{
    RegionCounts, RegionKey, RingCounts, Settings, TOTAL_DROPPED_ENDED_PUSHES, TOTAL_DROPPED_FULL_EXITS,
    TOTAL_DROPPED_PUSHES, TOTAL_DROPPED_REGION_PUSHES, TOTAL_USERSPACE_EXITS_31,
    ThreadCounts as CpuThreadCounts,
};
use crate::preflight::{Sources, check_kernel, check_rights};
use crate::ring_index::RingIndices;
use crate::{Error, Inventory, VcpuCounts, usize_of};

const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/profile.bpf.o"));

/// What one per-CPU map may take, over all CPUs: 4096 vCPUs on 100 CPUs.
const MAP_BYTES_MAX: u64 = 32 << 20;
const VCPUS_MIN: u64 = 256;
const VCPUS_MAX: u64 = 4096;
/// Regions with pushes between two looks: 2 MiB each, so 32 GiB of memory that is being written.
const REGIONS_MAX: u32 = 16384;

/// What to count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Count VMs of this process only.
    pub only_pid: Option<u32>,
    /// How pushes are counted.
    pub counting: Counting,
    /// Load at most these of the optional programs; what the kernel lacks is left out in any case.
    pub sources: Option<Sources>,
    /// vCPUs that can be counted at a time. By default as many as fit 32 MiB, at least 256 and at most 4096.
    pub vcpus_max: Option<u32>,
}

/// How pushes to the dirty rings are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    /// Each one, where it happens: exact for every vCPU, whenever it ends, and independent of the ring's own indices.
    #[default]
    EveryPush,
    /// The same, and per region of guest memory, with a bit for each page.
    EveryPushAndRegions,
    /// By the rings' indices, when somebody looks: nothing runs at a push. Exact for a vCPU that is there to be looked at, if
    /// that is done before it pushes 2^31 times. Of one that ends, what it pushed after the last look, full ring and
    /// recycling is not seen. An overflow is seen at the exit that follows it: not if the ring is emptied before.
    Indices,
}

impl Counting {
    /// The program that is attached to the push.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::EveryPush => Some("ring_push"),
            Self::EveryPushAndRegions => Some("ring_push_regions"),
            Self::Indices => None,
        }
    }
}

/// The programs, attached: they count until this is dropped.
#[derive(Debug)]
pub struct Profiler {
    // Held for their drop, and dropped first: nothing counts into maps that are being taken down.
    _links: Vec<Link>,
    bitmap_links: Vec<Link>,
    inventory: Link,
    object: Object,
    maps: RingMaps,
    indices: Option<RingIndices>,
    threads: MapHandle,
    regions: MapHandle,
    totals: MapHandle,
    watched: BTreeSet<u32>,
    sources: Sources,
}

/// What was counted for one vCPU thread of a VM that logs into bitmaps, since it was given to
/// [`Profiler::watch_threads`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadCounts {
    /// 4 KiB entries that were written with the writable bit.
    pub spte_writable: u64,
    /// Entries that a fast page fault made writable.
    pub fast_fault_writable: u64,
    /// Full page-modification logs, 512 entries each.
    pub pml_full: u64,
}

/// What concerns no vCPU in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pushes that could not be counted, because [`Options::vcpus_max`] vCPUs were being counted already, or too many
    /// vCPUs ended between two looks.
    pub dropped_pushes: u64,
    /// Exits because a ring was nearly full that could not be counted for the same reason, and with them what overflowed.
    pub dropped_ring_full_exits: u64,
    /// Pushes that are missing from the regions, because too many regions were written between two looks.
    pub dropped_region_pushes: u64,
    /// Exits that reached user space with reason 31, of all vCPUs.
    pub userspace_exits_31: u64,
}

impl Profiler {
    /// Attaches to every VM of the host.
    ///
    /// # Errors
    ///
    /// Missing rights, a kernel without the type information, tracepoints or fields that the programs need, or what
    /// the kernel's verifier said.
    pub fn attach() -> Result<Self, Error> {
        Self::attach_with(&Options::default())
    }

    /// Attaches as `options` say.
    ///
    /// # Errors
    ///
    /// As [`Profiler::attach`].
    pub fn attach_with(options: &Options) -> Result<Self, Error> {
        check_rights()?;
        let sources = check_kernel(&KernelTypes::of_running_kernel()?)?;
        let sources = sources.and(options.sources);
        let object = with_messages("load the eBPF programs", || load(options, sources))?;
        let map = |name: &str| {
            let found = object.maps().find(|map| map.name().to_string_lossy().ends_with(name));
            let missing = || Error::Object { what: format!("map {name}") };
            MapHandle::try_from(&found.ok_or_else(missing)?).map_err(Error::bpf("open a map"))
        };
        let (threads, regions, totals) = (map("threads")?, map("regions")?, map("totals")?);
        let maps = RingMaps {
            tallies: map("tallies")?,
            rings: map("rings")?,
            marks: map("marks")?,
            ended_rings: map("ended")?,
            ended: Vec::new(),
        };
        let attach = |name: &'static str| {
            with_messages("attach to a tracepoint", || {
                let program = object.progs_mut().find(|program| program.name() == name);
                program
                    .ok_or_else(|| Error::Object { what: format!("program {name}") })?
                    .attach()
                    .map_err(Error::bpf("attach to a tracepoint"))
            })
        };
        let inventory = attach("inventory")?;
        let events =
            ["ring_reset", "ring_full", "userspace_exit"].into_iter().chain(options.counting.program());
        let links = events.map(attach).collect::<Result<_, _>>()?;
        let mut profiler = Self {
            _links: links,
            bitmap_links: Vec::new(),
            inventory,
            maps,
            indices: None,
            threads,
            regions,
            totals,
            watched: BTreeSet::new(),
            sources,
            object,
        };
        if options.counting == Counting::Indices {
            profiler.indices = Some(RingIndices::begin(&profiler.inventory()?));
            profiler.counts()?;
        }
        Ok(profiler)
    }

    /// The optional programs that were loaded.
    pub fn sources(&self) -> Sources {
        self.sources
    }

    /// What the kernel pushed, per vCPU that pushed, recycled or filled its ring since the attach: also those that are
    /// gone, until [`Profiler::forget`].
    ///
    /// Exact for vCPUs that are out of `KVM_RUN`; a running one may push while this reads.
    ///
    /// # Errors
    ///
    /// If a map or the inventory cannot be read.
    pub fn counts(&mut self) -> Result<Vec<VcpuCounts>, Error> {
        self.counts_and_inventory().map(|(counts, _)| counts)
    }

    /// [`Profiler::counts`], and the [`Profiler::inventory`] that says which of them are of vCPUs that are gone.
    ///
    /// # Errors
    ///
    /// As those two.
    pub fn counts_and_inventory(&mut self) -> Result<(Vec<VcpuCounts>, Inventory), Error> {
        let counts = self.maps.counts()?;
        // In this order: who has counts and is not in the inventory any more is gone for good.
        let inventory = self.inventory()?;
        let counts = match &mut self.indices {
            None => self.maps.with_ends(counts, &inventory),
            Some(indices) => {
                let gone = indices.look(&inventory);
                self.maps.by_index(counts, &gone, indices, &inventory)?
            }
        };
        Ok((counts, inventory))
    }

    /// Drops the counts of vCPUs that are gone, so that others can be counted in their place. One that is created in the
    /// memory of such a vCPU at this very moment may lose its first pushes.
    ///
    /// # Errors
    ///
    /// If the map cannot be written.
    pub fn forget<'a>(&mut self, gone: impl IntoIterator<Item = &'a VcpuCounts>) -> Result<(), Error> {
        gone.into_iter().try_for_each(|counts| self.maps.forget(counts))
    }

    /// The VMs, vCPUs and memory slots of the host, or of the one process that was asked for.
    ///
    /// # Errors
    ///
    /// If the iterator cannot be read.
    pub fn inventory(&self) -> Result<Inventory, Error> {
        let mut records = Vec::new();
        let mut iterator = Iter::new(&self.inventory).map_err(Error::bpf("look for VMs"))?;
        let doing = || "look for VMs".to_owned();
        iterator.read_to_end(&mut records).map_err(|error| Error::Read { doing: doing(), error })?;
        Ok(Inventory::from_records(&records))
    }

    /// Counts for these vCPU threads, by thread id, what tells of dirty pages in a VM that logs into bitmaps.
    ///
    /// The tracepoints concerned fire for every VM's page faults, so they are attached only while there is such a
    /// thread. A thread that was watched already keeps its counts.
    ///
    /// # Errors
    ///
    /// If a map cannot be written or a program not be attached.
    pub fn watch_threads(&mut self, tids: &BTreeSet<u32>) -> Result<(), Error> {
        for tid in self.watched.difference(tids) {
            // A thread that is not in the map is not watched, whatever the error.
            drop(self.threads.delete(tid.as_bytes()));
        }
        let none = vec![CpuThreadCounts::default().as_bytes().to_vec(); cpus()?];
        let mut watched: BTreeSet<u32> = self.watched.intersection(tids).copied().collect();
        for tid in tids.difference(&self.watched).take(usize_of(self.threads.max_entries()) - watched.len()) {
            self.threads
                .update_percpu(tid.as_bytes(), &none, MapFlags::ANY)
                .map_err(Error::bpf("watch a vCPU thread"))?;
            watched.insert(*tid);
        }
        self.watched = watched;
        if self.watched.is_empty() {
            self.bitmap_links.clear();
        } else if self.bitmap_links.is_empty() {
            self.bitmap_links = with_messages("attach to a tracepoint", || {
                let wanted = self.sources.programs();
                let programs =
                    self.object.progs_mut().filter(|program| wanted.contains(&program.name().to_str()));
                programs
                    .map(|program| program.attach().map_err(Error::bpf("attach to a tracepoint")))
                    .collect()
            })?;
        }
        Ok(())
    }

    /// The counts of a watched thread; `None` if it is not watched.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn thread_counts(&self, tid: u32) -> Result<Option<ThreadCounts>, Error> {
        let doing = "read the counts of a thread";
        let cpus = self.threads.lookup_percpu(tid.as_bytes(), MapFlags::ANY).map_err(Error::bpf(doing))?;
        Ok(cpus.map(|cpus| {
            let mut sum = ThreadCounts::default();
            for cpu in cpus.iter().filter_map(|bytes| CpuThreadCounts::read_from_bytes(bytes).ok()) {
                sum.spte_writable += cpu.spte_writable;
                sum.fast_fault_writable += cpu.fast_fault_writable;
                sum.pml_full += cpu.pml_full;
            }
            sum
        }))
    }

    /// Takes the regions that were written since the last call, with [`Counting::EveryPushAndRegions`].
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub(crate) fn take_regions(&self) -> Result<Vec<(RegionKey, RegionCounts)>, Error> {
        let mut taken = Vec::new();
        let batch = self.regions.lookup_and_delete_batch(1024, MapFlags::ANY, MapFlags::ANY);
        let batch = batch.map_err(Error::bpf("take the regions"))?;
        for (key, counts) in batch.take(usize_of(REGIONS_MAX) * 2) {
            if let (Ok(key), Ok(counts)) =
                (RegionKey::read_from_bytes(&key), RegionCounts::read_from_bytes(&counts))
            {
                taken.push((key, counts));
            }
        }
        Ok(taken)
    }

    /// What concerns no vCPU in particular.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn totals(&self) -> Result<Totals, Error> {
        let total = |index: u32| {
            let cpus = self.totals.lookup_percpu(index.as_bytes(), MapFlags::ANY);
            let cpus = cpus.map_err(Error::bpf("read the totals"))?.unwrap_or_default();
            Ok(cpus.iter().filter_map(|bytes| u64::read_from_bytes(bytes).ok()).sum::<u64>())
        };
        Ok(Totals {
            dropped_pushes: total(TOTAL_DROPPED_PUSHES)? + total(TOTAL_DROPPED_ENDED_PUSHES)?,
            dropped_ring_full_exits: total(TOTAL_DROPPED_FULL_EXITS)?,
            dropped_region_pushes: total(TOTAL_DROPPED_REGION_PUSHES)?,
            userspace_exits_31: total(TOTAL_USERSPACE_EXITS_31)?,
        })
    }

    /// Bytes of keys and values that the maps hold at most, over all CPUs; fixed when they are made.
    ///
    /// # Errors
    ///
    /// If the number of CPUs is unknown.
    pub fn map_bytes(&self) -> Result<u64, Error> {
        let (maps, cpus) = (&self.maps, u64::try_from(cpus()?).unwrap_or(u64::MAX));
        Ok([
            &maps.tallies,
            &maps.rings,
            &maps.marks,
            &maps.ended_rings,
            &self.threads,
            &self.regions,
            &self.totals,
        ]
        .into_iter()
        .map(|map| {
            let copies = if map.map_type().is_percpu() { cpus } else { 1 };
            let entry = u64::from(map.key_size()) + u64::from(map.value_size()) * copies;
            entry * u64::from(map.max_entries())
        })
        .sum())
    }
}

impl Sources {
    fn and(self, wanted: Option<Sources>) -> Self {
        let wanted = wanted.unwrap_or(self);
        Self {
            set_spte: self.set_spte && wanted.set_spte,
            fast_fault: self.fast_fault && wanted.fast_fault,
            pml_full: self.pml_full && wanted.pml_full,
        }
    }

    fn programs(self) -> Vec<Option<&'static str>> {
        let programs =
            [(self.set_spte, "set_spte"), (self.fast_fault, "fast_fault"), (self.pml_full, "pml_full")];
        programs.into_iter().filter(|&(loaded, _)| loaded).map(|(_, name)| Some(name)).collect()
    }
}

fn load(options: &Options, sources: Sources) -> Result<Object, Error> {
    let mut object =
        ObjectBuilder::default().open_memory(OBJECT).map_err(Error::bpf("open the eBPF object"))?;
    set_up_maps(&mut object, options)?;
    for mut program in object.progs_mut() {
        let name = program.name().to_str();
        let optional = ["set_spte", "fast_fault", "pml_full", "ring_push", "ring_push_regions"].map(Some);
        let wanted =
            sources.programs().contains(&name) || (name.is_some() && name == options.counting.program());
        program.set_autoload(!optional.contains(&name) || wanted);
    }
    object.load().map_err(Error::bpf("load the eBPF programs"))
}

fn set_up_maps(object: &mut OpenObject, options: &Options) -> Result<(), Error> {
    let settings = Settings {
        only_tgid: options.only_pid.unwrap_or(0),
        by_index: u32::from(options.counting == Counting::Indices),
        cpus: u32::try_from(cpus()?).unwrap_or(u32::MAX),
    };
    let per_vcpu = u64::try_from(cpus()? * size_of::<RingCounts>()).unwrap_or(u64::MAX);
    let vcpus = (MAP_BYTES_MAX / per_vcpu).clamp(VCPUS_MIN, VCPUS_MAX);
    let vcpus = options.vcpus_max.unwrap_or(u32::try_from(vcpus).unwrap_or(u32::MAX)).max(1);
    let regions = if options.counting == Counting::EveryPushAndRegions { REGIONS_MAX } else { 1 };
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let result = match name.as_str() {
            "rings" | "marks" | "threads" => map.set_max_entries(vcpus),
            "regions" => map.set_max_entries(regions),
            _ if name.ends_with(".rodata") => map.set_initial_value(settings.as_bytes()),
            _ => Ok(()),
        };
        result.map_err(Error::bpf("set up a map"))?;
    }
    Ok(())
}

pub(crate) fn cpus() -> Result<usize, Error> {
    libbpf_rs::num_possible_cpus().map_err(Error::bpf("count the CPUs"))
}

/// What libbpf printed while something was done, for the error message. libbpf has one printer per process.
static MESSAGES: Mutex<String> = Mutex::new(String::new());
static PRINTER: Mutex<()> = Mutex::new(());
const MESSAGES_BYTES_MAX: usize = 16 << 10;

fn with_messages<T>(doing: &'static str, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let printer = PRINTER.lock();
    let previous = set_print(Some((PrintLevel::Warn, |_, message| {
        if let Ok(mut messages) = MESSAGES.lock()
            && messages.len() + message.len() < MESSAGES_BYTES_MAX
        {
            messages.push_str(&message);
        }
    })));
    let result = act();
    set_print(previous);
    let messages = MESSAGES.lock().map(|mut messages| std::mem::take(&mut *messages)).unwrap_or_default();
    drop(printer);
    result.map_err(|error| match error {
        Error::Bpf { error, .. } => Error::Bpf { doing, error, messages },
        other => other,
    })
}
