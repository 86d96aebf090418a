//! Counts become rates: one [`Look`] at all VMs per interval, and a [`Summary`] at the end.
//!
//! Owns the choice of the source for each VM, and what is remembered between two looks. `profiler`, `regions` and
//! `sampling` come before it; what prints a look comes after.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use crate::{
    Counting, Error, Estimate, Inventory, Options, PageSampler, Profiler, RingId, Totals, Vcpu, VcpuCounts,
    Vm, VmId, WorkingSet, vm_name,
};

/// Entries of a page-modification log (`PML_LOG_NR_ENTRIES` of the kernel's VMX code).
const PML_ENTRIES: u64 = 512;

/// vCPUs of ended VMs that the summary keeps; more are added up in one line.
const ENDED_MAX: usize = 1024;

/// Where the dirty rate of a VM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Entries that the kernel pushed to the dirty ring: exact.
    DirtyRingPush,
    /// Page-table entries that became writable while a bitmap logs: a page counts again after each clearing.
    SpteFastFault,
    /// Full page-modification logs, and entries that became writable: lags by up to 512 pages per vCPU.
    PmlFull,
    /// Pages read twice: an estimate, per VM.
    PageSampling,
    /// Nothing is logged: the kernel does not know.
    Unobservable,
}

impl Source {
    /// Its name in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::DirtyRingPush => "dirty_ring_push",
            Self::SpteFastFault => "spte_fast_fault",
            Self::PmlFull => "pml_full",
            Self::PageSampling => "page_sampling",
            Self::Unobservable => "unobservable",
        }
    }
}

/// What a session looks at.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionOptions {
    /// The VMs of this process only.
    pub pid: Option<u32>,
    /// Also which regions are written, and the unique working set.
    pub regions: bool,
    /// Count each push where it happens, rather than read the rings' indices; always so with `regions`.
    pub every_push: bool,
    /// Estimate the rate of VMs that log nothing by sampling their pages.
    pub sample: bool,
}

/// The dirty ring of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Entries pushed and not recycled, at the end of the interval.
    pub used: u32,
    /// Its size in entries.
    pub size: u32,
    /// The most entries that were in use at a time since the session began.
    pub high_water: u32,
}

/// One vCPU during one interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Identity of the vCPU.
    pub id: RingId,
    /// Identity of its VM.
    pub vm_id: VmId,
    /// The process that runs it.
    pub pid: u32,
    /// What the operator calls the VM.
    pub vm: String,
    /// The vCPU's number.
    pub vcpu: u32,
    /// The thread that ran it last; `None` before its first run and after its end.
    pub tid: Option<u32>,
    /// Where the numbers come from.
    pub source: Source,
    /// Pages that became dirty during the interval; `None` if that is unobservable.
    pub dirty_pages: Option<u64>,
    /// The same per second.
    pub dirty_pages_per_s: Option<f64>,
    /// Mean rate since this vCPU could first be observed.
    pub average_pages_per_s: Option<f64>,
    /// Its part of the dirty pages of its VM, 0 to 1; `None` if there were none.
    pub share: Option<f64>,
    /// `None` if the VM has no rings.
    pub ring: Option<Ring>,
    /// Exits because the ring was nearly full, during the interval.
    pub ring_full_exits: u64,
    /// Recyclings of the ring during the interval.
    pub resets: u64,
    /// How often the ring began to be overwritten during the interval.
    pub overflows: u64,
    /// The same since the session began.
    pub overflows_so_far: u64,
    /// Entries lost that way during the interval.
    pub overwritten: u64,
    /// The VM is gone: these are its last counts.
    pub ended: bool,
}

/// What concerns a VM as a whole during one interval.
#[derive(Clone, Debug)]
pub struct VmLook {
    /// The VM as the kernel holds it.
    pub vm: Vm,
    /// What the operator calls it.
    pub name: String,
    /// Where its rate comes from.
    pub source: Source,
    /// What it wrote, with [`SessionOptions::regions`].
    pub working_set: Option<WorkingSet>,
    /// What sampling says, with [`SessionOptions::sample`] and for VMs that log nothing; or why it could not.
    pub estimate: Option<Result<Estimate, String>>,
}

/// Everything seen during one interval.
#[derive(Clone, Debug)]
pub struct Look {
    /// Time since the session began.
    pub time: Duration,
    /// Length of the interval.
    pub interval: Duration,
    /// Per vCPU, in the order of process, VM and number.
    pub rows: Vec<Row>,
    /// Per VM, in the same order.
    pub vms: Vec<VmLook>,
    /// Of the whole session.
    pub totals: Totals,
}

/// One vCPU over the whole session.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its last row, with the counts of the session in place of those of the interval.
    pub row: Row,
    /// The thread that created its VM, by thread id.
    pub creator_tid: u32,
    /// How long it could be observed.
    pub observed: Duration,
    /// The highest rate of one interval.
    pub most_pages_per_s: f64,
}

/// What is remembered of a vCPU between two looks.
#[derive(Debug)]
struct Track {
    summary: Summary,
    /// Counts of the ring at the last look.
    ring_before: Option<VcpuCounts>,
    /// Pages counted for the thread at the last look, if it was watched.
    thread_before: Option<u64>,
}

/// A profiler, and what it said before.
#[derive(Debug)]
pub struct Session {
    profiler: Profiler,
    options: SessionOptions,
    started: Instant,
    looked: Instant,
    names: HashMap<VmId, String>,
    samplers: HashMap<VmId, PageSampler>,
    tracks: HashMap<RingId, Track>,
    ended: Vec<Summary>,
    ended_left_out: u64,
    has_pml: bool,
}

impl Session {
    /// Attaches the profiler: from here on everything counts.
    ///
    /// # Errors
    ///
    /// As [`Profiler::attach`].
    pub fn start(options: SessionOptions) -> Result<Self, Error> {
        let counting = match options {
            SessionOptions { regions: true, .. } => Counting::EveryPushAndRegions,
            SessionOptions { every_push: true, .. } => Counting::EveryPush,
            _ => Counting::Indices,
        };
        let profiler = Options { only_pid: options.pid, counting, ..Options::default() };
        let profiler = Profiler::attach_with(&profiler)?;
        let now = Instant::now();
        let mut session = Self {
            profiler,
            options,
            started: now,
            looked: now,
            names: HashMap::new(),
            samplers: HashMap::new(),
            tracks: HashMap::new(),
            ended: Vec::new(),
            ended_left_out: 0,
            has_pml: has_pml(),
        };
        session.prepare()?;
        Ok(session)
    }

    /// Watches what the first look is to tell about: threads of bitmap VMs, pages of those that log nothing.
    fn prepare(&mut self) -> Result<(), Error> {
        let inventory = self.profiler.inventory()?;
        let mut threads = BTreeSet::new();
        for vm in &inventory.vms {
            let source = self.source_of(vm, &HashMap::new());
            if matches!(source, Source::SpteFastFault | Source::PmlFull) {
                threads.extend(vm.vcpus.iter().filter_map(|vcpu| vcpu.tid));
            }
            // What goes wrong here goes wrong again at the first look, and is told then.
            self.estimate(vm, source);
        }
        self.profiler.watch_threads(&threads)
    }

    /// The profiler, for what a look does not tell.
    pub fn profiler(&self) -> &Profiler {
        &self.profiler
    }

    /// Between two looks that are far apart: less is lost of vCPUs that end meanwhile, and no index goes round unseen.
    ///
    /// # Errors
    ///
    /// As [`Session::look`].
    pub fn keep_up(&mut self) -> Result<(), Error> {
        self.profiler.counts().map(drop)
    }

    /// What happened since the last look.
    ///
    /// # Errors
    ///
    /// If a map or the inventory cannot be read.
    pub fn look(&mut self) -> Result<Look, Error> {
        let (all, inventory) = self.profiler.counts_and_inventory()?;
        let now = Instant::now();
        let interval = now - self.looked;
        self.looked = now;

        self.name(&inventory);
        let mut sets = match self.options.regions {
            true => WorkingSet::per_vm(self.profiler.take_regions()?, &inventory),
            false => HashMap::new(),
        };
        let mut rows = Vec::new();
        let (gone, live): (Vec<_>, Vec<_>) = all.into_iter().partition(|counts| counts.ended);
        self.profiler.forget(&gone)?;
        // Before the live ones, which may have taken their place.
        for counts in &gone {
            self.end_by_counts(counts, interval, &mut rows);
        }
        let counts: HashMap<RingId, VcpuCounts> =
            live.into_iter().map(|counts| (counts.ring, counts)).collect();
        let mut vms = Vec::new();
        let mut threads = BTreeSet::new();
        for vm in &inventory.vms {
            let source = self.source_of(vm, &counts);
            let name = self.names.get(&vm.id).cloned().unwrap_or_default();
            for vcpu in &vm.vcpus {
                let row = self.row(vm, vcpu, source, &name, counts.get(&vcpu.ring), interval)?;
                rows.push(row);
                if matches!(source, Source::SpteFastFault | Source::PmlFull) {
                    threads.extend(vcpu.tid);
                }
            }
            let estimate = self.estimate(vm, source);
            let working_set = (self.options.regions && source == Source::DirtyRingPush)
                .then(|| sets.remove(&vm.id))
                .flatten();
            vms.push(VmLook { vm: vm.clone(), name, source, working_set, estimate });
        }
        self.profiler.watch_threads(&threads)?;
        self.end_those_without_counts(&inventory, interval, &mut rows);
        set_shares(&mut rows);
        let totals = self.profiler.totals()?;
        Ok(Look { time: now - self.started, interval, rows, vms, totals })
    }

    /// Every vCPU that was seen, ended ones first; and how many ended ones are left out because there were too many.
    pub fn summary(&self) -> (Vec<Summary>, u64) {
        let mut running: Vec<Summary> = self.tracks.values().map(|track| track.summary.clone()).collect();
        running.sort_by_key(|summary| (summary.row.pid, summary.row.vm_id, summary.row.vcpu));
        (self.ended.iter().cloned().chain(running).collect(), self.ended_left_out)
    }

    fn name(&mut self, inventory: &Inventory) {
        for vm in &inventory.vms {
            self.names.entry(vm.id).or_insert_with(|| {
                let name = vm_name(vm.pid).unwrap_or_else(|| "?".to_owned());
                match vm.fd {
                    // One process, several VMs: its command line names them all.
                    Some(fd) if inventory.of_process(vm.pid).count() > 1 => format!("{name}/fd{fd}"),
                    _ => name,
                }
            });
        }
        let alive: HashSet<VmId> = inventory.vms.iter().map(|vm| vm.id).collect();
        self.names.retain(|id, _| alive.contains(id));
        self.samplers.retain(|id, _| alive.contains(id));
    }

    fn source_of(&self, vm: &Vm, counts: &HashMap<RingId, VcpuCounts>) -> Source {
        let pushed = |vcpu: &Vcpu| {
            let now = counts.get(&vcpu.ring).map_or(0, |counts| counts.pushes);
            let before = self.tracks.get(&vcpu.ring).and_then(|track| track.ring_before);
            now > before.map_or(0, |counts| counts.pushes)
        };
        let loaded = self.profiler.sources();
        if vm.has_rings() {
            // Whatever the slots say now: pushes happened.
            if vm.logs() || vm.vcpus.iter().any(pushed) {
                Source::DirtyRingPush
            } else {
                Source::Unobservable
            }
        } else if !vm.logs() {
            Source::Unobservable
        } else if self.has_pml && loaded.pml_full {
            Source::PmlFull
        } else if loaded.set_spte || loaded.fast_fault {
            Source::SpteFastFault
        } else {
            Source::Unobservable
        }
    }

    fn row(
        &mut self,
        vm: &Vm,
        vcpu: &Vcpu,
        source: Source,
        name: &str,
        counts: Option<&VcpuCounts>,
        interval: Duration,
    ) -> Result<Row, Error> {
        let thread_pages = match (source, vcpu.tid) {
            (Source::SpteFastFault | Source::PmlFull, Some(tid)) => {
                self.profiler.thread_counts(tid)?.map(|counts| {
                    counts.spte_writable + counts.fast_fault_writable + counts.pml_full * PML_ENTRIES
                })
            }
            _ => None,
        };
        let ring = (vcpu.ring_entries > 0).then(|| Ring {
            used: vcpu.ring_used,
            size: vcpu.ring_entries,
            high_water: counts.map_or(0, |counts| counts.high_water_entries).max(vcpu.ring_used),
        });
        let row = Row {
            id: vcpu.ring,
            vm_id: vm.id,
            pid: vm.pid,
            vm: name.to_owned(),
            vcpu: vcpu.vcpu,
            tid: vcpu.tid,
            source,
            dirty_pages: None,
            dirty_pages_per_s: None,
            average_pages_per_s: None,
            share: None,
            ring,
            ring_full_exits: 0,
            resets: 0,
            overflows: 0,
            overflows_so_far: 0,
            overwritten: 0,
            ended: false,
        };
        let track = self.tracks.entry(vcpu.ring).or_insert_with(|| Track::new(row.clone(), vm.creator_tid));
        // A ring that took the place of another one starts from nothing.
        if track.summary.row.vm_id != vm.id || track.summary.row.vcpu != vcpu.vcpu {
            *track = Track::new(row.clone(), vm.creator_tid);
        }
        Ok(track.advance(row, counts, thread_pages, interval))
    }

    fn estimate(&mut self, vm: &Vm, source: Source) -> Option<Result<Estimate, String>> {
        if !self.options.sample || source != Source::Unobservable {
            self.samplers.remove(&vm.id);
            return None;
        }
        if let Some(sampler) = self.samplers.get_mut(&vm.id) {
            return Some(sampler.look(vm).map_err(|error| error.to_string()));
        }
        match PageSampler::start(vm) {
            Ok(sampler) => {
                self.samplers.insert(vm.id, sampler);
                None
            }
            Err(error) => Some(Err(error.to_string())),
        }
    }

    fn end_by_counts(&mut self, counts: &VcpuCounts, interval: Duration, rows: &mut Vec<Row>) {
        let track = self.tracks.remove(&counts.ring).unwrap_or_else(|| {
            // It came and went between two looks: only its counts are left.
            let name = vm_name(counts.pid).unwrap_or_else(|| "?".to_owned());
            Track::new(Row::of_counts(counts, name), counts.creator_tid)
        });
        self.end(track, Some(counts), interval, rows);
    }

    fn end_those_without_counts(&mut self, inventory: &Inventory, interval: Duration, rows: &mut Vec<Row>) {
        let alive: HashSet<RingId> =
            inventory.vms.iter().flat_map(|vm| &vm.vcpus).map(|vcpu| vcpu.ring).collect();
        let gone: Vec<RingId> = self.tracks.keys().filter(|ring| !alive.contains(ring)).copied().collect();
        for track in gone.into_iter().filter_map(|ring| self.tracks.remove(&ring)).collect::<Vec<_>>() {
            self.end(track, None, interval, rows);
        }
    }

    fn end(
        &mut self,
        mut track: Track,
        counts: Option<&VcpuCounts>,
        interval: Duration,
        rows: &mut Vec<Row>,
    ) {
        let mut row = track.summary.row.clone();
        (row.tid, row.ended) = (None, true);
        rows.push(track.advance(row, counts, None, interval));
        if self.ended.len() < ENDED_MAX {
            self.ended.push(track.summary);
        } else {
            self.ended_left_out += 1;
        }
    }
}

impl Row {
    fn of_counts(counts: &VcpuCounts, vm: String) -> Self {
        Self {
            id: counts.ring,
            vm_id: counts.vm,
            pid: counts.pid,
            vm,
            vcpu: counts.vcpu,
            tid: None,
            source: Source::DirtyRingPush,
            dirty_pages: None,
            dirty_pages_per_s: None,
            average_pages_per_s: None,
            share: None,
            ring: None,
            ring_full_exits: 0,
            resets: 0,
            overflows: 0,
            overflows_so_far: 0,
            overwritten: 0,
            ended: true,
        }
    }
}

impl Track {
    fn new(row: Row, creator_tid: u32) -> Self {
        let summary = Summary { row, creator_tid, observed: Duration::ZERO, most_pages_per_s: 0.0 };
        // A ring counts from the attach on: what it counted before its first look belongs to that look.
        Self { summary, ring_before: None, thread_before: None }
    }

    /// Fills in what the counts say about the interval, and adds it to the summary.
    fn advance(
        &mut self,
        mut row: Row,
        counts: Option<&VcpuCounts>,
        thread_pages: Option<u64>,
        interval: Duration,
    ) -> Row {
        let mut pushed = 0;
        if let Some(counts) = counts {
            let before = |field: fn(&VcpuCounts) -> u64| self.ring_before.as_ref().map_or(0, field);
            pushed = counts.pushes.saturating_sub(before(|c| c.pushes));
            row.ring_full_exits = counts.ring_full_exits.saturating_sub(before(|c| c.ring_full_exits));
            row.resets = counts.resets.saturating_sub(before(|c| c.resets));
            row.overflows = counts.overflows.saturating_sub(before(|c| c.overflows));
            row.overwritten = counts.overwritten.saturating_sub(before(|c| c.overwritten));
            // Read while a CPU was adding to them, counts may miss what they had before.
            let pushes = counts.pushes.max(before(|c| c.pushes));
            self.ring_before = Some(VcpuCounts { pushes, ..*counts });
        }
        // A thread is watched from the end of a look on, and counts from 0.
        let of_thread = thread_pages.map(|pages| pages.saturating_sub(self.thread_before.unwrap_or(0)));
        self.thread_before = thread_pages;
        row.dirty_pages = match row.source {
            Source::DirtyRingPush => Some(pushed),
            Source::SpteFastFault | Source::PmlFull => of_thread,
            Source::PageSampling | Source::Unobservable => None,
        };
        let total = &mut self.summary.row;
        if let Some(pages) = row.dirty_pages {
            let rate = per_second(pages, interval);
            row.dirty_pages_per_s = Some(rate);
            self.summary.observed += interval;
            self.summary.most_pages_per_s = self.summary.most_pages_per_s.max(rate);
        }
        let all = total.dirty_pages.unwrap_or(0) + row.dirty_pages.unwrap_or(0);
        if !self.summary.observed.is_zero() {
            row.average_pages_per_s = Some(per_second(all, self.summary.observed));
        }
        let high_water = total.ring.map_or(0, |ring| ring.high_water);
        let ring = row.ring.map(|ring| Ring { high_water: ring.high_water.max(high_water), ..ring });
        row.overflows_so_far = total.overflows + row.overflows;
        // What was counted keeps the name of its source when nothing is logged any more.
        let source = match (row.source, total.dirty_pages) {
            (Source::Unobservable, Some(_)) => total.source,
            (source, _) => source,
        };
        *total = Row {
            source,
            dirty_pages: row.dirty_pages.map(|_| all).or(total.dirty_pages),
            dirty_pages_per_s: None,
            ring: ring.or(total.ring),
            ring_full_exits: total.ring_full_exits + row.ring_full_exits,
            resets: total.resets + row.resets,
            overflows: row.overflows_so_far,
            overwritten: total.overwritten + row.overwritten,
            ..row.clone()
        };
        row
    }
}

fn set_shares(rows: &mut [Row]) {
    let mut of_vm: HashMap<VmId, u64> = HashMap::new();
    for row in rows.iter() {
        *of_vm.entry(row.vm_id).or_default() += row.dirty_pages.unwrap_or(0);
    }
    for row in rows {
        let all = of_vm.get(&row.vm_id).copied().unwrap_or(0);
        row.share = row.dirty_pages.filter(|_| all > 0).map(|pages| pages as f64 / all as f64);
    }
}

fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Whether the processor logs pages that become dirty (Intel's page-modification logging) and KVM uses it.
fn has_pml() -> bool {
    fs::read_to_string("/sys/module/kvm_intel/parameters/pml").is_ok_and(|value| value.starts_with('Y'))
}
