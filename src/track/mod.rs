//! Which pages are dirty, and who dirtied them.
//!
//! [`DirtyTracker`] is what a VMM links, for all of a VM's life; its vCPU threads hold a [`VcpuHandle`] each. What a
//! migration asks is the trait [`DirtySource`], which the tracker implements on KVM's dirty rings or on its bitmap.
//!
//! The one rule of this module: a page is handed out only after it was write-protected again, so that whoever
//! reads it then misses no later write. `rings` and `bitmap` say how each backend keeps it.

mod bitmap;
pub mod external;
mod figures;
mod gate;
mod pagemap;
mod pending;
mod rings;
mod seen;
mod slots;
#[cfg(test)]
mod tests;
mod tracker;
mod vcpu;

use std::fmt;

pub use self::external::ExternalSource;
pub use self::figures::{Figures, VcpuFigures};
pub use self::gate::{BeforeRun, Gate};
pub use self::pagemap::{PagemapError, PagemapTracker};
pub use self::seen::SeenDirty;
pub use self::tracker::{DirtyTracker, ExternalId};
pub use self::vcpu::{KVM_EXIT_DIRTY_RING_FULL, VcpuHandle};
use crate::kvm::KvmError;
use crate::layout::{PageIndex, SlotId};
use crate::page_set::PageSet;
use crate::vm::{Settled, VmError};

/// Why tracking failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrackError {
    /// KVM refused.
    Kvm(KvmError),
    /// The memory of ordinary threads cannot be tracked.
    Pagemap(PagemapError),
    /// Tracking was started twice; the first start stands.
    AlreadyTracking,
    /// Something was asked that only a started tracker can answer.
    NotTracking,
    /// A slot was added that the tracker has already.
    SlotKnown(SlotId),
    /// A slot was named that the tracker does not have.
    SlotUnknown(SlotId),
    /// A vCPU was attached under an index that is taken.
    VcpuKnown(usize),
    /// The caller's set ends before guest RAM does; nothing was harvested.
    SetTooSmall {
        /// Where the set ends.
        capacity: PageIndex,
        /// Where guest RAM ends.
        needed: PageIndex,
    },
    /// A source of dirty pages outside KVM cannot log.
    External {
        /// Which: [`ExternalSource::name`].
        name: &'static str,
        /// Why.
        source: VmError,
    },
    /// The ring of this vCPU overflowed and could not be brought in step with KVM again. The vCPU will exit with
    /// "ring full" for ever: stop tracking and stop the vCPU.
    RingLost(usize),
}

impl fmt::Display for TrackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm(error) => error.fmt(f),
            Self::Pagemap(error) => error.fmt(f),
            Self::AlreadyTracking => {
                write!(
                    f,
                    "dirty tracking is on already: another migration or snapshot uses it; stop that first"
                )
            }
            Self::NotTracking => write!(f, "dirty tracking is off: call `start` first"),
            Self::SlotKnown(slot) => write!(f, "{slot:?} is tracked already: remove it before it is reused"),
            Self::SlotUnknown(slot) => write!(f, "{slot:?} is not tracked: add its memory first"),
            Self::VcpuKnown(index) => write!(f, "a vCPU with index {index} is attached already"),
            Self::SetTooSmall { capacity, needed } => write!(
                f,
                "the page set ends at {}, guest RAM at {}: create it with `GuestMemory::end`",
                capacity.address(),
                needed.address()
            ),
            Self::External { name, source } => {
                write!(
                    f,
                    "the writes of {name} cannot be logged: {source}; without its log, pages would be lost"
                )
            }
            Self::RingLost(vcpu) => write!(
                f,
                "the dirty ring of vCPU {vcpu} overflowed and is out of step with KVM: stop tracking and restart \
                 the VM, no page was reported clean"
            ),
        }
    }
}

impl std::error::Error for TrackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Kvm(error) => Some(error),
            Self::Pagemap(error) => Some(error),
            Self::External { source, .. } => Some(&**source),
            _ => None,
        }
    }
}

impl From<PagemapError> for TrackError {
    fn from(error: PagemapError) -> Self {
        Self::Pagemap(error)
    }
}

impl From<KvmError> for TrackError {
    fn from(error: KvmError) -> Self {
        Self::Kvm(error)
    }
}

/// What was dirtied since the last harvest, seen without disturbing the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Observed {
    /// Pages by the vCPU that dirtied them, in the order in which the vCPUs were attached.
    ///
    /// A page counts once for the vCPU that dirtied it first. With [`observe`](DirtySource::observe), which only counts,
    /// it may count again before the next harvest: if KVM emulates guest instructions, if a ring was recycled early, or
    /// if the host took the page from the guest for a moment (huge pages, compaction, NUMA balancing). With
    /// [`observe_into`](DirtySource::observe_into) it does not, unless two vCPUs named it and a ring of theirs was
    /// recycled early.
    PerVcpu(Vec<u64>),
    /// Pages, whoever dirtied them.
    Total(u64),
    /// This backend cannot look without protecting the pages again.
    Unobservable,
}

/// One place that dirty pages come from.
pub trait DirtySource: Send {
    /// The name that reports show: `ring`, `bitmap`, `pagemap`.
    fn backend(&self) -> &'static str;

    /// Handles of the vCPUs whose gates a throttle may close; empty where there are none.
    fn vcpus(&self) -> Vec<VcpuHandle> {
        Vec::new()
    }

    /// Begins tracking: what is dirtied from here on will be harvested.
    ///
    /// # Errors
    ///
    /// [`TrackError::AlreadyTracking`] when started twice, or what the kernel refused. Tracking is then as before.
    fn start(&mut self) -> Result<(), TrackError>;

    /// What was dirtied since the last harvest. The pages stay writable, the guest feels nothing; only a ring that
    /// would be full before the next look is recycled, here instead of on its vCPU's thread.
    ///
    /// What was seen is counted and not told, because it is not protected: its content must not be read yet.
    ///
    /// ```compile_fail,E0308
    /// # fn f(source: &mut dyn ringferry::DirtySource) -> Result<ringferry::PageSet, ringferry::TrackError> {
    /// source.observe() // which pages? Those of the next harvest.
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], or what the kernel refused.
    fn observe(&mut self) -> Result<Observed, TrackError>;

    /// [`observe`](Self::observe), and adds to `seen` the pages dirtied since the last harvest that no earlier call
    /// told of; sooner or later all, where the backend can tell. None of them can be read from there.
    ///
    /// ```compile_fail,E0599
    /// # fn f(source: &mut dyn ringferry::DirtySource, seen: &mut ringferry::SeenDirty) {
    /// source.observe_into(seen).unwrap();
    /// for run in seen.runs() {} // their content may change without a trace
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for `observe`.
    fn observe_into(&mut self, seen: &mut SeenDirty) -> Result<Observed, TrackError> {
        let _ = seen;
        self.observe()
    }

    /// Adds to `dirty` all pages dirtied since the last harvest, each write-protected again by the time this
    /// returns, so that their content may be read.
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], [`TrackError::SetTooSmall`], or what the kernel refused; `dirty` is then as
    /// before, and nothing is lost: the next harvest hands it out.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// [`harvest`](Self::harvest) when nothing writes guest memory any more, neither a vCPU nor a device nor the saving of
    /// state: the last and complete view. Rings come first, then the logs of other writers, and a bitmap beside the rings
    /// (arm64, which logs there what no vCPU wrote) last.
    ///
    /// That vCPUs stand still is not enough:
    ///
    /// ```compile_fail,E0308
    /// # fn f(vm: &mut dyn ringferry::Vm, source: &mut dyn ringferry::DirtySource, dirty: &mut ringferry::PageSet) {
    /// let paused = vm.pause().unwrap();
    /// source.harvest_final(&paused, dirty).unwrap(); // saving state would write more
    /// # }
    /// ```
    ///
    /// And the proof is gone once the VM runs again:
    ///
    /// ```compile_fail,E0505
    /// # fn f(vm: &mut dyn ringferry::Vm, source: &mut dyn ringferry::DirtySource, dirty: &mut ringferry::PageSet) {
    /// let paused = vm.pause().unwrap();
    /// let settled = paused.declare_nothing_else_writes();
    /// vm.resume(paused).unwrap();
    /// source.harvest_final(&settled, dirty).unwrap();
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    fn harvest_final(&mut self, settled: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// Marks pages dirty again that were harvested and never arrived. They come with the next harvest, also after
    /// a stop and a new start.
    fn give_back(&mut self, pages: &PageSet);

    /// Ends tracking. Pages dirtied and not harvested are forgotten; pages given back are not.
    ///
    /// # Errors
    ///
    /// The first thing that the kernel refused; tracking is off all the same.
    fn stop(&mut self) -> Result<(), TrackError>;
}
