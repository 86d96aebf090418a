//! The test guest as the host sees it: its mailbox, read and changed while it runs.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use ringferry::track::DirtyTracker;
use ringferry::{GuestAddress, GuestMemory, PageRun};

use crate::machine::HostMachine;
use crate::workload::Machine;
use crate::workload::command_line::Work;
use crate::workload::mailbox::{
    Control, GuestState, Header, MAGIC, MAILBOX_ADDRESS, MAILBOX_END, MAX_ERROR_BYTES, Stats, VERSION,
    VcpuState, control_address, header_field, stats_address,
};
use crate::workload::setup::{Plan, load_work, store_work};

/// What is wrong with a guest's mailbox, or with what was asked of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// RAM does not reach to the mailbox.
    #[error(
        "the guest's RAM has no mailbox at {MAILBOX_ADDRESS:#x}..{MAILBOX_END:#x}; give it 8 MiB or more"
    )]
    NoRoom,
    /// The guest has not come so far, or it is another guest.
    #[error(
        "there is no test guest of version {VERSION} running in this RAM (state: {0}); boot its image first"
    )]
    NotRunning(&'static str),
    /// It did not come so far in time.
    #[error("the test guest was not at work after {limit_ms} ms: {found}")]
    Timeout {
        /// How long it had.
        limit_ms: u64,
        /// How far it came.
        found: String,
    },
    /// The guest gave up.
    #[error("the test guest failed: {0}")]
    Failed(String),
    /// No such vCPU.
    #[error("the test guest has no vCPU {vcpu}; it has {vcpus}")]
    NoVcpu {
        /// The one asked for.
        vcpu: usize,
        /// How many there are.
        vcpus: usize,
    },
    /// The work cannot be done.
    #[error("vCPU {vcpu} cannot have a working set of {wanted} pages: 1 to {share} are its share")]
    WorkingSet {
        /// The vCPU.
        vcpu: usize,
        /// Pages asked for.
        wanted: u64,
        /// Pages it has.
        share: u64,
    },
}

/// A vCPU's counts at one moment. Each is read by itself while the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStats {
    /// How far it is.
    pub state: VcpuState,
    /// Pages written.
    pub page_writes: u64,
    /// Pages read.
    pub page_reads: u64,
    /// Compute steps.
    pub compute_steps: u64,
    /// Times that as many steps were done as the working set has pages.
    pub passes: u64,
    /// The longest time that it did not run though it wanted to, by its own clock, since
    /// [`Guest::restart_longest_gap`]; the pause of a switchover not included.
    pub longest_gap: Duration,
    /// The same for the pause of the last switchover, once the guest has run after it.
    pub pause_gap: Option<Duration>,
    /// Whether the last [`Guest::set_work`] has taken effect.
    pub work_applied: bool,
}

impl VcpuStats {
    /// Page writes, reads and compute steps: what is called progress, whatever the pattern.
    pub fn steps(&self) -> u64 {
        self.page_writes + self.page_reads + self.compute_steps
    }
}

/// The test guest in some RAM, whether of a VM or of host threads.
#[derive(Debug)]
pub struct Guest {
    machine: HostMachine,
    tracker: Option<DirtyTracker>,
}

impl Guest {
    /// The guest in `memory`, whose mappings must outlive the value. `tracker` is told of each mailbox page that
    /// the value writes: no dirty ring sees those.
    ///
    /// # Errors
    ///
    /// [`GuestError::NoRoom`].
    pub fn new(memory: &GuestMemory, tracker: Option<&DirtyTracker>) -> Result<Self, GuestError> {
        let first = GuestAddress(MAILBOX_ADDRESS).page();
        let mailbox = PageRun { first, pages: GuestAddress(MAILBOX_END).page().0 - first.0 };
        memory.host_runs(mailbox).map(drop).map_err(|_| GuestError::NoRoom)?;
        Ok(Self { machine: HostMachine::new(memory), tracker: tracker.cloned() })
    }

    /// What the guest does, and where.
    ///
    /// # Errors
    ///
    /// [`GuestError::NotRunning`], [`GuestError::Failed`].
    pub fn plan(&self) -> Result<Plan, GuestError> {
        if let Some(plan) = Plan::read(&self.machine) {
            return Ok(plan);
        }
        let get = |offset| self.machine.load(header_field(offset));
        if get(offset_of!(Header, magic)) != MAGIC {
            return Err(GuestError::NotRunning("no mailbox"));
        }
        if get(offset_of!(Header, version)) != VERSION {
            return Err(GuestError::NotRunning("a mailbox of another version"));
        }
        match GuestState::from_word(get(offset_of!(Header, state))) {
            Some(GuestState::Failed) => Err(GuestError::Failed(self.failure())),
            _ => Err(GuestError::NotRunning("a mailbox that makes no sense")),
        }
    }

    fn failure(&self) -> String {
        let word = |index| self.machine.load(header_field(offset_of!(Header, error) + index * 8));
        let bytes: Vec<u8> = (0..MAX_ERROR_BYTES / 8).flat_map(|index| word(index).to_le_bytes()).collect();
        let length = usize::try_from(self.machine.load(header_field(offset_of!(Header, error_bytes))));
        let length = length.map_or(MAX_ERROR_BYTES, |length| length.min(MAX_ERROR_BYTES));
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// Waits until every vCPU has written its fill and is at work.
    ///
    /// # Errors
    ///
    /// [`GuestError::Failed`] as soon as the guest says so, [`GuestError::Timeout`] after `limit`.
    pub fn wait_until_working(&self, limit: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + limit;
        loop {
            let found = match self.plan() {
                Ok(plan) => {
                    let states: Vec<_> = (0..plan.vcpus).map(|vcpu| self.state_of(vcpu)).collect();
                    if states.iter().all(|state| *state == VcpuState::Working) {
                        return Ok(());
                    }
                    format!("{states:?}")
                }
                Err(error @ GuestError::Failed(_)) => return Err(error),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                return Err(GuestError::Timeout { limit_ms, found });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many vCPUs are at work.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan).
    pub fn vcpus(&self) -> Result<usize, GuestError> {
        Ok(self.plan()?.vcpus)
    }

    /// The counts of vCPU `vcpu` now.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan), or [`GuestError::NoVcpu`].
    pub fn stats(&self, vcpu: usize) -> Result<VcpuStats, GuestError> {
        let plan = self.plan_with(vcpu)?;
        let get = |offset| self.machine.load(stats_address(vcpu) + offset as u64);
        let control = |offset| self.machine.load(control_address(vcpu) + offset as u64);
        let time = |ticks: u64| {
            let ns = u128::from(ticks) * 1_000_000 / u128::from(plan.tsc_khz);
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        };
        let resumed = get(offset_of!(Stats, resume_epoch));
        let longest = get(offset_of!(Stats, longest_gap_ticks));
        // Until the guest has seen the new epoch, what it has is the old epoch's.
        let current = get(offset_of!(Stats, gap_epoch)) == control(offset_of!(Control, gap_epoch));
        Ok(VcpuStats {
            state: self.state_of(vcpu),
            page_writes: get(offset_of!(Stats, writes)),
            page_reads: get(offset_of!(Stats, reads)),
            compute_steps: get(offset_of!(Stats, compute_steps)),
            passes: get(offset_of!(Stats, passes)),
            longest_gap: if current { time(longest) } else { Duration::ZERO },
            pause_gap: (resumed != 0 && resumed == control(offset_of!(Control, resume_epoch)))
                .then(|| time(get(offset_of!(Stats, pause_gap_ticks)))),
            work_applied: get(offset_of!(Stats, sequence)) == control(offset_of!(Control, sequence)),
        })
    }

    /// The work that vCPU `vcpu` was last given.
    ///
    /// # Errors
    ///
    /// As [`stats`](Self::stats).
    pub fn work(&self, vcpu: usize) -> Result<Work, GuestError> {
        self.plan_with(vcpu)?;
        load_work(&self.machine, vcpu).ok_or(GuestError::NotRunning("a control page that makes no sense"))
    }

    /// Gives vCPU `vcpu` other work; it begins within [`WAIT_MAX_US`](crate::workload::mailbox::WAIT_MAX_US)
    /// of its running time.
    ///
    /// # Errors
    ///
    /// As [`stats`](Self::stats), or [`GuestError::WorkingSet`].
    pub fn set_work(&mut self, vcpu: usize, work: &Work) -> Result<(), GuestError> {
        let share = self.plan_with(vcpu)?.shares[vcpu].pages;
        let wanted = work.working_set_pages;
        if wanted == 0 || wanted > share {
            return Err(GuestError::WorkingSet { vcpu, wanted, share });
        }
        let sequence_at = control_address(vcpu) + offset_of!(Control, sequence) as u64;
        // Even, should another writer have died halfway.
        let sequence = self.machine.load(sequence_at) & !1;
        self.machine.store(sequence_at, sequence + 1);
        store_work(&mut self.machine, vcpu, work);
        self.machine.store(sequence_at, sequence.wrapping_add(2));
        self.tell(vcpu);
        Ok(())
    }

    /// The pause that the VM is in, or is about to enter, is a switchover: each vCPU counts its gap apart, in
    /// [`VcpuStats::pause_gap`]. To be called while the VM is paused.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan).
    pub fn count_pause_apart(&mut self) -> Result<(), GuestError> {
        self.raise(offset_of!(Control, resume_epoch))
    }

    /// Begins a new measurement of the longest gap on every vCPU.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan).
    pub fn restart_longest_gap(&mut self) -> Result<(), GuestError> {
        self.raise(offset_of!(Control, gap_epoch))
    }

    fn raise(&mut self, offset: usize) -> Result<(), GuestError> {
        for vcpu in 0..self.plan()?.vcpus {
            let at = control_address(vcpu) + offset as u64;
            let next = self.machine.load(at).wrapping_add(1);
            self.machine.store(at, next);
            self.tell(vcpu);
        }
        Ok(())
    }

    fn plan_with(&self, vcpu: usize) -> Result<Plan, GuestError> {
        let plan = self.plan()?;
        if vcpu < plan.vcpus { Ok(plan) } else { Err(GuestError::NoVcpu { vcpu, vcpus: plan.vcpus }) }
    }

    fn state_of(&self, vcpu: usize) -> VcpuState {
        let word = self.machine.load(stats_address(vcpu) + offset_of!(Stats, state) as u64);
        VcpuState::from_word(word).unwrap_or(VcpuState::Absent)
    }

    /// The control page of `vcpu` has been written.
    fn tell(&self, vcpu: usize) {
        if let Some(tracker) = &self.tracker {
            tracker.mark_dirty(PageRun { first: GuestAddress(control_address(vcpu)).page(), pages: 1 });
        }
    }
}
