//! What the eBPF programs counted per ring, read from their maps. Owns those maps; `profiler` owns the programs.
//!
//! Two ways to know the pushes: the program at each push keeps them here, per CPU; or `ring_index` reads them off the
//! rings, and only rare events are kept here. The places that a push touches are few on purpose: each CPU has a tally of
//! the ring that it pushed to last, and adds it to the ring's counts when it turns to another ring.

use std::collections::HashMap;

use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle};
use zerocopy::{FromBytes, IntoBytes};

use crate::layout::{EndedRing, Mark, RingCounts, Tally};
use crate::ring_index::{Pushed, RingIndices};
use crate::{Error, Inventory, RingId, Vcpu, Vm, VmId, usize_of};

/// How often a ring's counts are read until no CPU was just adding to them. A VM that does not run settles after as many
/// reads as CPUs had it last; one that runs is told a moment later else.
const READS_MAX: u32 = 8;

/// What was counted for one vCPU since [`Profiler::attach`](crate::Profiler::attach).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuCounts {
    /// The vCPU's ring: its identity while the VM lives.
    pub ring: RingId,
    /// Its VM.
    pub vm: VmId,
    /// The process that runs it.
    pub pid: u32,
    /// The thread that created the VM, by thread id: tells VMs of one process apart, if each has its own thread.
    pub creator_tid: u32,
    /// The number that the vCPU was created with.
    pub vcpu: u32,
    /// Entries that the kernel pushed.
    pub pushes: u64,
    /// Entries that were pushed over entries not yet recycled: so many are lost.
    pub overwritten: u64,
    /// How often the ring began to be overwritten.
    pub overflows: u64,
    /// Exits to user space because the ring was nearly full.
    pub ring_full_exits: u64,
    /// `KVM_RESET_DIRTY_RINGS` that visited the ring.
    pub resets: u64,
    /// The most entries that were in use at a time.
    pub high_water_entries: u32,
    /// The vCPU is gone.
    pub ended: bool,
}

/// The maps that are keyed by rings, and what was taken from them already.
#[derive(Debug)]
pub(crate) struct RingMaps {
    pub tallies: MapHandle,
    pub rings: MapHandle,
    pub marks: MapHandle,
    pub ended_rings: MapHandle,
    /// vCPUs that are gone and not yet forgotten.
    pub ended: Vec<VcpuCounts>,
}

impl RingMaps {
    /// What the program at each push counted, of vCPUs that exist and others.
    pub(crate) fn counts(&mut self) -> Result<Vec<VcpuCounts>, Error> {
        self.take_ended()?;
        let before = self.ended.len();
        let mut all = self.live_counts()?;
        self.take_ended()?;
        // What ended meanwhile may be among the live ones: not told twice. If it was its successor, the next look tells.
        all.retain(|live| !self.ended[before..].iter().any(|ended| ended.ring == live.ring));
        Ok(all)
    }

    /// The same, with those marked that are not in `inventory`, and those added that were taken out of the map.
    pub(crate) fn with_ends(&self, mut counts: Vec<VcpuCounts>, inventory: &Inventory) -> Vec<VcpuCounts> {
        for counts in &mut counts {
            counts.ended = !counts.is_of_someone_in(inventory);
        }
        self.with_ended(counts)
    }

    fn with_ended(&self, mut counts: Vec<VcpuCounts>) -> Vec<VcpuCounts> {
        counts.extend_from_slice(&self.ended);
        counts.sort_by_key(|counts| (counts.pid, counts.vm, counts.vcpu, counts.ring));
        counts
    }

    /// What the indices say of those that run and those that are gone, with the events that were counted for them.
    pub(crate) fn by_index(
        &mut self,
        counts: Vec<VcpuCounts>,
        gone: &[(RingId, Pushed)],
        indices: &RingIndices,
        inventory: &Inventory,
    ) -> Result<Vec<VcpuCounts>, Error> {
        let mut events: HashMap<RingId, VcpuCounts> =
            counts.into_iter().map(|counts| (counts.ring, counts)).collect();
        for &(ring, pushed) in gone {
            // If another vCPU has got its memory, the mark may be of that one.
            let mark = if indices.is_running(ring) { None } else { self.mark(ring)? };
            let last = mark.map_or(pushed, |mark| pushed.and_up_to(mark.dirty_index));
            let events = events.remove(&ring).filter(|events| events.is_of(&last));
            self.ended.push(VcpuCounts { ended: true, ..VcpuCounts::by_index(ring, &last, events.as_ref()) });
            self.delete(ring)?;
        }
        let mut all = Vec::new();
        for (ring, pushed) in indices.running() {
            let found = events.remove(&ring);
            let events = found.filter(|events| events.is_of(&pushed));
            all.push(VcpuCounts::by_index(ring, &pushed, events.as_ref()));
            if events.is_none() {
                if found.is_some() {
                    self.delete(ring)?;
                }
                self.expect(ring, &pushed, inventory)?;
            }
        }
        // They came and went since the last look: all that is known is what their last event saw.
        for (ring, counts) in events {
            let pushes = self.mark(ring)?.map_or(0, |mark| u64::from(mark.dirty_index));
            self.ended.push(VcpuCounts { pushes, ended: true, ..counts });
            self.delete(ring)?;
        }
        Ok(self.with_ended(all))
    }

    /// Makes the entries of a ring before its first event, which is then judged by the indices of now.
    fn expect(&self, ring: RingId, pushed: &Pushed, inventory: &Inventory) -> Result<(), Error> {
        let mut vcpus = inventory.vms.iter().flat_map(|vm| &vm.vcpus);
        let Some(vcpu) = vcpus.find(|vcpu| vcpu.ring == ring) else { return Ok(()) };
        let mut cpus = vec![RingCounts::default().as_bytes().to_vec(); crate::profiler::cpus()?];
        if let Some(first) = cpus.first_mut() {
            *first = identity(pushed).as_bytes().to_vec();
        }
        let mark = Mark {
            dirty_index: vcpu.dirty_index,
            reset_index: vcpu.dirty_index.wrapping_sub(vcpu.ring_used),
        };
        let key = ring.0.as_bytes();
        // No room: its events are not counted, its pushes are. Or its first event came just now, and made them.
        let made = self.marks.update(key, mark.as_bytes(), MapFlags::NO_EXIST);
        let _ = made.and_then(|()| self.rings.update_percpu(key, &cpus, MapFlags::NO_EXIST));
        Ok(())
    }

    fn mark(&self, ring: RingId) -> Result<Option<Mark>, Error> {
        let mark =
            self.marks.lookup(ring.0.as_bytes(), MapFlags::ANY).map_err(Error::bpf("read the counts"))?;
        Ok(mark.and_then(|bytes| Mark::read_from_bytes(&bytes).ok()))
    }

    fn live_counts(&self) -> Result<Vec<VcpuCounts>, Error> {
        let mut all = Vec::new();
        // Keys of a map that changes meanwhile may start again from the first.
        for key in self.rings.keys().take(usize_of(self.rings.max_entries()) * 2) {
            let Ok(ring) = u64::read_from_bytes(&key) else { continue };
            all.extend(self.ring_counts(ring)?);
        }
        all.sort_by_key(|counts| counts.ring);
        all.dedup_by_key(|counts| counts.ring);
        Ok(all)
    }

    /// The counts of one ring: what the CPUs have added to them, and what they have not yet.
    fn ring_counts(&self, ring: u64) -> Result<Option<VcpuCounts>, Error> {
        let doing = "read the counts";
        let mut latest = None;
        for _ in 0..READS_MAX {
            let before = self.tallies()?;
            let found =
                self.rings.lookup_percpu(ring.as_bytes(), MapFlags::ANY).map_err(Error::bpf(doing))?;
            let Some(cpus) = found else { return Ok(None) };
            let after = self.tallies()?;
            latest = sum_ring(ring, &cpus, &after);
            // A CPU that turned to another ring meanwhile may have added its tally after we read what it adds to.
            let moved = before.iter().zip(&after).any(|(before, after)| {
                let concerned = before.ring == ring || after.ring == ring;
                let settled =
                    after.sequence % 2 == 0 && (before.ring != ring || before.sequence == after.sequence);
                concerned && !settled
            });
            if !moved {
                break;
            }
        }
        Ok(latest)
    }

    fn tallies(&self) -> Result<Vec<Tally>, Error> {
        let found = self.tallies.lookup_percpu(0_u32.as_bytes(), MapFlags::ANY);
        let cpus = found.map_err(Error::bpf("read the counts"))?.unwrap_or_default();
        Ok(cpus.iter().filter_map(|bytes| Tally::read_from_bytes(bytes).ok()).collect())
    }

    fn take_ended(&mut self) -> Result<(), Error> {
        for _ in 0..self.ended_rings.max_entries() {
            let taken = self.ended_rings.lookup_and_delete(&[]).map_err(Error::bpf("read the counts"))?;
            let Some(bytes) = taken else { break };
            let Ok(ended) = EndedRing::read_from_bytes(&bytes) else { continue };
            let counts = VcpuCounts::of(RingId(ended.ring), &ended.counts);
            self.ended.push(VcpuCounts { ended: true, ..counts });
        }
        Ok(())
    }

    /// See [`Profiler::forget`](crate::Profiler::forget).
    pub(crate) fn forget(&mut self, gone: &VcpuCounts) -> Result<(), Error> {
        match self.ended.iter().position(|ended| ended == gone) {
            Some(index) => {
                self.ended.swap_remove(index);
                Ok(())
            }
            None => self.delete(gone.ring),
        }
    }

    fn delete(&self, ring: RingId) -> Result<(), Error> {
        for map in [&self.rings, &self.marks] {
            match map.delete(ring.0.as_bytes()) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::bpf("drop the counts of a vCPU")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The per-CPU copies of one ring's counts, and the tallies that belong to them, added up.
fn sum_ring(ring: u64, cpus: &[Vec<u8>], tallies: &[Tally]) -> Option<VcpuCounts> {
    let cpus: Vec<RingCounts> =
        cpus.iter().filter_map(|bytes| RingCounts::read_from_bytes(bytes).ok()).collect();
    let mut sum = *cpus.iter().find(|cpu| cpu.kvm != 0)?;
    (sum.pushes, sum.overwritten, sum.overflows, sum.full_exits, sum.resets) = (0, 0, 0, 0, 0);
    for cpu in &cpus {
        sum.pushes += cpu.pushes;
        sum.overwritten += cpu.overwritten;
        sum.overflows += cpu.overflows;
        sum.full_exits += cpu.full_exits;
        sum.resets += cpu.resets;
        sum.high_water = sum.high_water.max(cpu.high_water);
    }
    for tally in tallies.iter().filter(|tally| tally.ring == ring) {
        sum.pushes += tally.pushes;
        sum.overwritten += tally.overwritten;
        sum.overflows += tally.overflows;
        sum.high_water = sum.high_water.max(tally.high_water);
    }
    Some(VcpuCounts::of(RingId(ring), &sum))
}

/// Counts of nothing, of that vCPU.
fn identity(pushed: &Pushed) -> RingCounts {
    RingCounts {
        kvm: pushed.vm.0,
        tgid: pushed.pid,
        creator: pushed.creator_tid,
        vcpu: pushed.vcpu,
        ..RingCounts::default()
    }
}

impl VcpuCounts {
    fn of(ring: RingId, sum: &RingCounts) -> Self {
        Self {
            ring,
            vm: VmId(sum.kvm),
            pid: sum.tgid,
            creator_tid: sum.creator,
            vcpu: sum.vcpu,
            pushes: sum.pushes,
            overwritten: sum.overwritten,
            overflows: sum.overflows,
            ring_full_exits: sum.full_exits,
            resets: sum.resets,
            high_water_entries: sum.high_water,
            ended: false,
        }
    }

    /// Whether the vCPU exists, rather than one that was given its memory. A ring without any push has no counts: they
    /// are its predecessor's.
    fn is_of_someone_in(&self, inventory: &Inventory) -> bool {
        let is_it = |vm: &Vm, vcpu: &Vcpu| {
            let vcpu_is = (vcpu.ring, vm.id, vcpu.vcpu, vm.creator_tid, vcpu.dirty_index != 0);
            vcpu_is == (self.ring, self.vm, self.vcpu, self.creator_tid, true)
        };
        inventory.vms.iter().any(|vm| vm.vcpus.iter().any(|vcpu| is_it(vm, vcpu)))
    }

    fn is_of(&self, pushed: &Pushed) -> bool {
        (self.vm, self.pid, self.creator_tid, self.vcpu)
            == (pushed.vm, pushed.pid, pushed.creator_tid, pushed.vcpu)
    }

    fn by_index(ring: RingId, pushed: &Pushed, events: Option<&Self>) -> Self {
        Self { pushes: pushed.pushes, ..events.copied().unwrap_or_else(|| Self::of(ring, &identity(pushed))) }
    }
}
