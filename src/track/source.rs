//! What a migration asks of dirty tracking, whichever backend it is.

use super::error::TrackError;
use super::redirtied::Redirtied;
use super::throttle::VcpuThrottle;
use crate::page_set::PageSet;
use crate::vm::{Paused, Settled};

/// What was dirtied since the last harvest, observed without disturbing the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Observed {
    /// Pages by who dirtied them.
    ///
    /// A page counts once for the vCPU that dirtied it first. With [`observe`](DirtySource::observe), which only counts,
    /// it may count again before the next harvest: if KVM emulates guest instructions, if a ring was recycled early, or
    /// if the host took the page from the guest for a moment (huge pages, compaction, NUMA balancing). With
    /// [`observe_into`](DirtySource::observe_into) it does not, unless two vCPUs named it and a ring of theirs was
    /// recycled early. After [`take_slot_bitmap`](super::Session::take_slot_bitmap), pages of other slots that were
    /// taken from the rings meanwhile are divided among the vCPUs as before.
    PerVcpu {
        /// By vCPU, in the order in which the vCPUs were attached.
        vcpus: Vec<u64>,
        /// Those that none of them dirtied first: device threads, other processes, DMA, as far as their logs were read by now; and
        /// those of vCPUs that were detached since the last harvest.
        others: u64,
    },
    /// Pages, whoever dirtied them.
    Total(u64),
    /// This backend cannot observe without protecting the pages again.
    Unobservable,
}

impl Observed {
    /// Pages that vCPUs dirtied and nobody else.
    pub fn per_vcpu(vcpus: Vec<u64>) -> Self {
        Self::PerVcpu { vcpus, others: 0 }
    }
}

/// One place that dirty pages come from. Anybody may implement it, for a hypervisor of another kind; a migration then asks
/// it instead of a [`Session`](super::Session).
///
/// ```
/// use ringferry::track::{DirtySource, Observed, TrackError};
/// use ringferry::{PageIndex, PageSet, vm::Settled};
///
/// /// A hypervisor that is asked which pages were written, and write-protects them in the same step.
/// trait Hypervisor: Send {
///     fn set_logging(&mut self, on: bool);
///     fn take_dirty(&mut self) -> Vec<u64>;
/// }
///
/// struct Source<H> {
///     hypervisor: H,
///     given_back: Vec<PageIndex>,
/// }
///
/// impl<H: Hypervisor> DirtySource for Source<H> {
///     fn backend(&self) -> &'static str {
///         "mine"
///     }
///     fn start(&mut self) -> Result<(), TrackError> {
///         self.hypervisor.set_logging(true);
///         Ok(())
///     }
///     fn observe(&mut self) -> Result<Observed, TrackError> {
///         Ok(Observed::Unobservable)
///     }
///     fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
///         dirty.extend(self.hypervisor.take_dirty().into_iter().map(PageIndex));
///         dirty.extend(self.given_back.drain(..));
///         Ok(())
///     }
///     fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
///         self.harvest(dirty)
///     }
///     fn give_back(&mut self, pages: &PageSet) {
///         self.given_back.extend(pages.runs().flat_map(|run| run.first.0..run.end().0).map(PageIndex));
///     }
///     fn stop(&mut self) -> Result<(), TrackError> {
///         self.hypervisor.set_logging(false);
///         Ok(())
///     }
/// }
/// # struct Fake(Vec<u64>);
/// # impl Hypervisor for Fake {
/// #     fn set_logging(&mut self, _: bool) {}
/// #     fn take_dirty(&mut self) -> Vec<u64> { std::mem::take(&mut self.0) }
/// # }
/// # let mut source = Source { hypervisor: Fake(vec![3, 4]), given_back: Vec::new() };
/// # let mut dirty = PageSet::new(PageIndex(10));
/// # source.start().unwrap();
/// # source.harvest(&mut dirty).unwrap();
/// # source.give_back(&dirty);
/// # dirty.clear();
/// # source.harvest(&mut dirty).unwrap();
/// # assert_eq!(dirty.len(), 2);
/// ```
///
/// It is for one user at a time: so its methods take `&mut self`, although a
/// [`Session`](super::Session) can do without.
pub trait DirtySource: Send {
    /// The name that reports show: `ring`, `bitmap`, `pagemap`.
    fn backend(&self) -> &'static str;

    /// The vCPUs whose gates a throttle may close, in the order of [`Observed::PerVcpu`]; empty where there are
    /// none. Each knows its [`index`](VcpuThrottle::index) in the VMM.
    fn vcpus(&self) -> Vec<VcpuThrottle> {
        Vec::new()
    }

    /// How many pages of each vCPU an observation, or a harvest while the guest runs, may not see yet: on a host with PML the
    /// processor keeps up to 512 until the vCPU next leaves the guest.
    fn unseen_per_vcpu(&self) -> u64 {
        0
    }

    /// Begins tracking: what is dirtied from here on will be harvested.
    ///
    /// # Errors
    ///
    /// [`TrackError::AlreadyTracking`] when started twice, or what the kernel refused. Tracking is then as before.
    fn start(&mut self) -> Result<(), TrackError>;

    /// What was dirtied since the last harvest. The pages stay writable, the guest feels nothing; only a ring that
    /// would be full before the next observation is recycled, here instead of on its vCPU's thread.
    ///
    /// What was observed is counted and not named, because it is not protected: its content must not be read yet.
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

    /// [`observe`](Self::observe), and adds to `redirtied` the pages dirtied since the last harvest that no earlier call
    /// reported; sooner or later all, where the backend knows them. None of them can be read from there.
    ///
    /// ```compile_fail,E0599
    /// # fn f(source: &mut dyn ringferry::DirtySource, redirtied: &mut ringferry::Redirtied) {
    /// source.observe_into(redirtied).unwrap();
    /// for run in redirtied.runs() {} // their content may change without a trace
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for `observe`.
    fn observe_into(&mut self, redirtied: &mut Redirtied) -> Result<Observed, TrackError> {
        let _ = redirtied;
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

    /// [`harvest`](Self::harvest) of what is write-protected or cheap to protect; `behind` gets the pages that stay dirty and
    /// unprotected, because a guest wrote more of them than its ring has entries. They feel no tracking until
    /// [`protect`](Self::protect) hands them out, or a later harvest does.
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    fn harvest_protected(&mut self, dirty: &mut PageSet, behind: &mut Redirtied) -> Result<(), TrackError> {
        let _ = behind;
        self.harvest(dirty)
    }

    /// Takes up to `pages` pages out of `behind`, the highest first, write-protects them and adds them to `dirty`. A page that
    /// is not unprotected any more is not added: it comes with the next harvest, if it is dirty.
    ///
    /// # Errors
    ///
    /// [`TrackError::NotTracking`], [`TrackError::SetTooSmall`]. When the kernel refuses, no page is added, and the next
    /// harvest hands out all of memory.
    fn protect(&mut self, behind: &mut Redirtied, pages: u64, dirty: &mut PageSet) -> Result<(), TrackError> {
        let _ = (pages, dirty);
        behind.clear();
        Ok(())
    }

    /// [`harvest`](Self::harvest) when the guest stands still, which then needs no protection. Once the guest runs on, nobody
    /// may read any more what was handed out; the pages that are unprotected come again with the next harvest, the others
    /// have to be [given back](Self::give_back) if they were not read.
    ///
    /// # Errors
    ///
    /// As for `harvest`.
    fn harvest_paused(&mut self, paused: &Paused, dirty: &mut PageSet) -> Result<(), TrackError> {
        let _ = paused;
        self.harvest(dirty)
    }

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
