//! A simulated VM for machines without /dev/kvm: the guest's workload in host threads, over RAM like a VM's.
//!
//! It is no VM, and whoever shows its figures says so: its writes take no KVM and no second page table. It does
//! the same work as the guest of a [`TestVm`](crate::TestVm), with the same mailbox, counts and proof, and moves the
//! same way. Its dirty pages come from [`PagemapTracker`], which knows no vCPUs, so nobody can throttle it.
//!
//! A thread stops between two turns of the workload, where all that it knows is in RAM but the time by its own
//! clock. So its state is that clock, and it goes on at the destination with the pause on it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringferry::track::{PagemapTracker, TrackError};
use ringferry::vm::VmError;
use ringferry::{GuestMemory, Paused, Quiesced, Vm};

use crate::config::{Boot, Config, Image};
use crate::error::{TestVmError, VcpuError};
use crate::guest::{Guest, GuestError};
use crate::machine::HostMachine;
use crate::memory::Ram;
use crate::pin;
use crate::run_control::{RunControl, VcpuStatus, Wanted};
use crate::state::StateError;
use crate::workload::Machine;
use crate::workload::command_line;
use crate::workload::ranges::Extents;
use crate::workload::setup::{self, Plan};
use crate::workload::vcpu::Vcpu;

/// The longest pause that the vCPUs' clocks count: beyond, the hosts' clocks of the day disagree.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

const STATE_MAGIC: u64 = u64::from_le_bytes(*b"RFThread");
const STATE_VERSION: u64 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Built,
    Running,
    Paused,
}

/// Threads that do a guest's work. Simulated: no KVM is involved.
#[derive(Debug)]
pub struct ThreadVm {
    ram: Ram,
    vcpus: usize,
    pin_vcpus: bool,
    workload: Option<command_line::Config>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    phase: Phase,
}

#[derive(Debug)]
struct Shared {
    control: RunControl,
    /// Read after every turn; the run control, which is slower, only when it is set.
    stop: AtomicBool,
    /// What each vCPU's clock showed when it stopped, in nanoseconds.
    stopped_at_ns: Vec<AtomicU64>,
}

impl ThreadVm {
    /// Maps RAM as `config` says; nothing runs yet. Of an image to boot only the command line is used, and
    /// `tracking` (see [`track`](Self::track)) and `kvmclock` are not.
    ///
    /// # Errors
    ///
    /// [`TestVmError`]: what is wrong with the configuration, or that there is not the memory.
    pub fn new(config: Config) -> Result<Self, TestVmError> {
        config.check()?;
        let vcpus = config.vcpus;
        if config.device.is_some() {
            let limit = "only a VM of KVM has one".to_owned();
            return Err(TestVmError::Config { what: "a device".to_owned(), limit });
        }
        let workload = match &config.boot {
            Boot::Destination => None,
            Boot::Image { image: Image::File(file), .. } => {
                let what = format!("threads that run {}", file.display());
                return Err(TestVmError::Config {
                    what,
                    limit: "without KVM only the built-in guest runs".into(),
                });
            }
            Boot::Image { append, image: Image::Bytes { name, .. } } => {
                let line = format!("{name} {append}");
                let parsed = command_line::Config::parse(&line);
                let parsed = parsed.map_err(|error| TestVmError::Workload(error.to_string()))?;
                if let Some(wanted) = parsed.vcpus.filter(|wanted| *wanted != vcpus) {
                    let limit = format!("the VM has {vcpus}");
                    return Err(TestVmError::Config { what: format!("{wanted} vCPUs at work"), limit });
                }
                Some(parsed)
            }
        };
        let ram = Ram::new(&config, None)?;
        // That there is room for a mailbox.
        Guest::new(ram.memory(), None)?;
        let shared = Arc::new(Shared {
            control: RunControl::new(vcpus),
            stop: AtomicBool::new(false),
            stopped_at_ns: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
        });
        Ok(Self {
            ram,
            vcpus,
            pin_vcpus: config.pin_vcpus,
            workload,
            shared,
            threads: Vec::new(),
            phase: Phase::Built,
        })
    }

    /// Starts the workload.
    ///
    /// # Errors
    ///
    /// The VM has been started already or is a destination; or the working sets do not fit into RAM.
    pub fn start(&mut self) -> Result<(), TestVmError> {
        let Some(workload) = self.workload.take() else {
            return Err(wrong_phase("starting the VM", self.phase));
        };
        let mut machine = HostMachine::new(self.memory());
        let mut pool = Extents::default();
        for region in self.memory().regions() {
            pool.add_bytes(region.pages.first.address().0, region.pages.end().address().0);
        }
        let plan = Plan::new(pool, self.vcpus, HostMachine::TICKS_KHZ, &workload)
            .map_err(|error| TestVmError::Workload(error.to_string()))?;
        setup::clear(&mut machine);
        plan.publish(&mut machine, &workload);
        self.spawn(|_, _| ())?;
        self.run();
        Ok(())
    }

    /// A thread for each vCPU of the guest in RAM, waiting. `prepare` is given each vCPU before.
    fn spawn(&mut self, prepare: impl Fn(usize, &mut Vcpu<HostMachine>)) -> Result<(), TestVmError> {
        for index in 0..self.vcpus {
            let attached = Vcpu::attach(HostMachine::new(self.memory()), index);
            let mut vcpu = attached.ok_or(GuestError::NotRunning("a mailbox that makes no sense"))?;
            prepare(index, &mut vcpu);
            let shared = self.shared.clone();
            let pinned = self.pin_vcpus;
            let body = move || {
                if pinned {
                    pin::to_cpu(index);
                }
                let ended = catch_unwind(AssertUnwindSafe(|| shared.work(index, vcpu)));
                let failed = VcpuStatus::Failed(VcpuError::Panicked);
                shared.control.ended(index, ended.map_or(failed, |()| VcpuStatus::Paused));
            };
            let thread = Builder::new().name(format!("vcpu{index}")).spawn(body);
            self.threads.push(thread.map_err(|error| TestVmError::Thread { vcpu: index, error })?);
        }
        Ok(())
    }

    fn run(&mut self) {
        self.phase = Phase::Running;
        // Before `want`, whose lock orders the two.
        self.shared.stop.store(false, Ordering::Relaxed);
        self.shared.control.want(Wanted::Run);
    }

    /// RAM as this process maps it; a clone keeps it mapped.
    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// A tracker of all writes to RAM, those of the host to the mailbox included. One at a time can be started.
    ///
    /// # Errors
    ///
    /// What the kernel, or the process's rights, lack.
    pub fn track(&self) -> Result<PagemapTracker, TestVmError> {
        Ok(PagemapTracker::new(self.memory().clone()).map_err(TrackError::from)?)
    }

    /// How many vCPUs the VM has.
    pub fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// What each vCPU does.
    pub fn status(&self) -> Vec<VcpuStatus> {
        self.shared.control.status()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), TestVmError> {
        if self.phase != Phase::Built || self.workload.is_some() {
            return Err(wrong_phase("restoring state", self.phase));
        }
        let (paused_for_ns, clocks_ns) = read_state(state, self.vcpus)?;
        self.spawn(|index, vcpu| {
            // The vCPU last looked at its clock when it stopped.
            vcpu.machine().set_ticks(clocks_ns[index]);
            vcpu.forget_time();
            vcpu.machine().set_ticks(clocks_ns[index].saturating_add(paused_for_ns));
        })?;
        self.phase = Phase::Paused;
        Ok(())
    }
}

impl Shared {
    /// On a vCPU's thread: works until the VM ends.
    fn work(&self, index: usize, mut vcpu: Vcpu<HostMachine>) {
        while self.control.pass(index) {
            // Relaxed: a turn more or less; what belongs to the pause is ordered by the run control's lock.
            while !self.stop.load(Ordering::Relaxed) {
                vcpu.turn();
            }
            self.stopped_at_ns[index].store(vcpu.machine().ticks(), Ordering::Relaxed);
        }
    }

    fn stop(&self, wanted: Wanted) {
        self.stop.store(true, Ordering::Relaxed);
        self.control.want(wanted);
    }
}

impl Vm for ThreadVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        if self.phase != Phase::Running {
            return Err(wrong_phase("pausing the VM", self.phase).into());
        }
        self.shared.stop(Wanted::Pause);
        if let Err(error) = self.shared.control.wait_until_none_runs() {
            self.run();
            return Err(error.into());
        }
        self.phase = Phase::Paused;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        if self.phase != Phase::Paused {
            return Err(wrong_phase("resuming the VM", self.phase).into());
        }
        self.run();
        Ok(())
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        if self.phase != Phase::Paused {
            return Err(wrong_phase("saving state", self.phase).into());
        }
        for (vcpu, status) in self.status().into_iter().enumerate() {
            if let VcpuStatus::Failed(error) = status {
                return Err(TestVmError::Vcpu { vcpu, error }.into());
            }
        }
        let clocks = self.shared.stopped_at_ns.iter().map(|ns| ns.load(Ordering::Relaxed));
        let head = [STATE_MAGIC, STATE_VERSION, self.vcpus as u64, time_of_day_ns()];
        Ok(head.into_iter().chain(clocks).flat_map(u64::to_le_bytes).collect())
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.restore(state)?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    /// There is no KVM whose flag could be set: the tracker protects memory by itself.
    /// Nobody can throttle these vCPUs, and each looks after every turn whether it is to stop.
    fn kick(&self, _: usize) {}
}

impl Drop for ThreadVm {
    /// Ends every thread and joins it.
    fn drop(&mut self) {
        self.shared.stop(Wanted::End);
        for thread in self.threads.drain(..) {
            // The thread catches its own panics and reports them as the vCPU's status.
            let _ = thread.join();
        }
    }
}

/// How long ago the state was saved, and what each vCPU's clock showed when it stopped, in nanoseconds.
fn read_state(state: &[u8], vcpus: usize) -> Result<(u64, Vec<u64>), StateError> {
    let (words, rest) = state.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    let mut next = |within| words.next().ok_or(StateError::Truncated { within, missing: 8 - rest.len() });
    if next("its first word")? != STATE_MAGIC {
        return Err(StateError::NotState);
    }
    let to_u32 = |word: u64| u32::try_from(word).unwrap_or(u32::MAX);
    let version = next("its version")?;
    if version != STATE_VERSION {
        return Err(StateError::Version { found: to_u32(version) });
    }
    let found = next("the number of vCPUs")?;
    if found != vcpus as u64 {
        return Err(StateError::Vcpus { found: to_u32(found), expected: vcpus });
    }
    let saved_at_ns = next("the time of day")?;
    let clocks: Vec<u64> = (0..vcpus).map(|_| next("the clock of a vCPU")).collect::<Result<_, _>>()?;
    let trailing = words.len() * 8 + rest.len();
    if trailing != 0 {
        return Err(StateError::Trailing(trailing));
    }
    let pause_max_ns = u64::try_from(PAUSE_MAX.as_nanos()).unwrap_or(u64::MAX);
    Ok((time_of_day_ns().saturating_sub(saved_at_ns).min(pause_max_ns), clocks))
}

fn time_of_day_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn wrong_phase(tried: &'static str, phase: Phase) -> TestVmError {
    let found = match phase {
        Phase::Built => "not started yet, or a destination without workload",
        Phase::Running => "running",
        Phase::Paused => "paused",
    };
    TestVmError::WrongPhase { tried, found }
}
