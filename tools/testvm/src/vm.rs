//! The test VM: built from a [`Config`], started, paused, moved.
#![expect(unsafe_code, reason = "KVM takes guest RAM by host address")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_SREGS2, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use parking_lot::Mutex;
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, TrackError};
use ringferry::vm::{Moment, VmError};
use ringferry::{GuestAddress, GuestMemory, PageSet, Paused, Quiesced, Vm};

use crate::config::{Boot, Config, Tracking};
use crate::device::{Device, StreamCheck};
use crate::error::{TestVmError, kvm_error};
use crate::memory::Ram;
use crate::run_control::{RunControl, VcpuStatus, Wanted};
use crate::state::{self, Shape, SkippedMsr};
use crate::vcpu::{self, Serial, Vcpu, VcpuCounters};
use crate::{boot, cpuid};

/// Where KVM keeps its task state segment on Intel hosts without unrestricted guests: three pages that are no RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What the test VMM stands on.
const REQUIRED: [(Cap, &str, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest RAM"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers, and vCPUs that wait for INIT and SIPI"),
    (Cap::Pit2, "KVM_CAP_PIT2", "the timer of a PC"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "the identity of vCPUs"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "kicking a vCPU without a race"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "saving vCPUs"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "saving vector registers"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "saving vector registers"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "saving debug registers"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "saving the VM's clock"),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Never ran.
    Built,
    Running,
    Paused,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Built => "not started yet",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// How often a migration has asked a VM for what a VMM need not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VmCalls {
    /// [`Vm::quiesce`].
    pub quiesced: u64,
    /// [`Vm::prepare`].
    pub prepared: u64,
    /// [`Vm::release`].
    pub released: u64,
}

/// A VM on this host's KVM: vCPUs with a thread each, RAM, the interrupt controllers and the timer of a PC.
#[derive(Debug)]
pub struct TestVm {
    // The order is that of dropping: threads are joined by `Drop`, then vCPUs, the VM, and last its RAM.
    threads: Vec<JoinHandle<()>>,
    vcpus: Vec<Arc<Vcpu>>,
    /// A second descriptor of each vCPU, for whoever follows its ring from another process.
    vcpu_fds: Vec<OwnedFd>,
    vm: VmFd,
    ram: Ram,
    tracker: Option<DirtyTracker>,
    control: Arc<RunControl>,
    serial: Arc<Mutex<Serial>>,
    shape: Shape,
    skipped_msrs: Vec<SkippedMsr>,
    tsc_khz: u32,
    boots: bool,
    device: Option<Device>,
    /// What came for the device of this VM before its registers.
    stream: StreamCheck,
    calls: VmCalls,
    phase: Phase,
}

impl TestVm {
    /// Builds the VM; nothing runs yet.
    ///
    /// # Errors
    ///
    /// [`TestVmError`]: what is missing on this host, or wrong with the configuration or the image.
    pub fn new(mut config: Config) -> Result<Self, TestVmError> {
        config.check()?;
        let kvm = open_kvm()?;
        let vm = kvm.create_vm().map_err(|e| {
            kvm_error("KVM_CREATE_VM", e, "another hypervisor may hold this CPU's virtualization")
        })?;
        check_capabilities(&kvm, &vm, &config)?;
        let shape = Shape::new(&kvm, &vm)?;
        let tracker = enable_tracking(&vm, config.tracking)?;
        let ram = Ram::new(&config, tracker.clone())?;
        let boots = match &config.boot {
            Boot::Image { image, append } => Some(boot::load(&ram, image, append)?),
            Boot::Destination => None,
        };
        set_slots(&vm, ram.memory())?;
        if let Some(tracker) = &tracker {
            tracker.add_memory(ram.memory())?;
        }
        create_chips(&vm)?;

        let device =
            config.device.map(|device| Device::new(device, ram.memory(), tracker.clone())).transpose()?;
        let serial = Arc::new(Mutex::new(Serial::new(config.console.take())));
        let control = Arc::new(RunControl::new(config.vcpus));
        let mut vcpus = Vec::with_capacity(config.vcpus);
        let mut vcpu_fds = Vec::with_capacity(config.vcpus);
        let mut tsc_khz = 0;
        for index in 0..config.vcpus {
            let fd = create_vcpu(&kvm, &vm, index, &config)?;
            tsc_khz = fd.get_tsc_khz().unwrap_or(0);
            if let (0, Some(entry)) = (index, boots) {
                boot::enter(&fd, entry)?;
            }
            let tracked = tracker.as_ref().map(|tracker| tracker.attach_vcpu(index, &fd)).transpose()?;
            let throttle = tracker.as_ref().and_then(|tracker| tracker.vcpu(index));
            // SAFETY: the vCPU's descriptor is open as long as `fd` lives, which is beyond this statement.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
            let second = borrowed.try_clone_to_owned();
            vcpu_fds.push(second.map_err(|error| TestVmError::Kvm {
                call: "duplicating a vCPU's descriptor",
                error,
                hint: "the limit on open files (ulimit -n) may be reached",
            })?);
            vcpus.push(Arc::new(Vcpu::new(index, fd, tracked, throttle)?));
        }
        let mut built = Self {
            threads: Vec::with_capacity(config.vcpus),
            vcpus,
            vcpu_fds,
            vm,
            ram,
            tracker,
            control,
            serial,
            shape,
            skipped_msrs: Vec::new(),
            tsc_khz,
            boots: boots.is_some(),
            device,
            stream: StreamCheck::default(),
            calls: VmCalls::default(),
            phase: Phase::Built,
        };
        for vcpu in &built.vcpus {
            let thread = vcpu::spawn(vcpu.clone(), built.control.clone(), built.serial.clone(), &config)?;
            built.threads.push(thread);
        }
        Ok(built)
    }

    /// Starts the image.
    ///
    /// # Errors
    ///
    /// The VM has been started already, or it is a destination, which `restore_state` and `resume` set going.
    pub fn start(&mut self) -> Result<(), TestVmError> {
        match (self.phase, self.boots) {
            (Phase::Built, true) => {
                self.run();
                Ok(())
            }
            (Phase::Built, false) => Err(TestVmError::WrongPhase {
                tried: "starting the VM",
                found: "a destination without image",
            }),
            (phase, _) => Err(TestVmError::WrongPhase { tried: "starting the VM", found: phase.name() }),
        }
    }

    fn run(&mut self) {
        self.phase = Phase::Running;
        self.control.want(Wanted::Run);
        if let Some(device) = &mut self.device {
            device.run();
        }
    }

    /// Guest RAM as this process maps it; a clone keeps it mapped.
    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// The tracker of the guest's writes, if the configuration asks for one; a clone is the same tracker.
    pub fn tracker(&self) -> Option<&DirtyTracker> {
        self.tracker.as_ref()
    }

    /// The file behind each region of guest RAM; `None` where RAM is no memfd.
    pub fn ram_files(&self) -> Option<&[File]> {
        (self.ram.files().len() == self.memory().regions().len()).then(|| self.ram.files())
    }

    /// A descriptor of each vCPU, by index: to map its ring, not to run it.
    pub fn vcpu_fds(&self) -> &[OwnedFd] {
        &self.vcpu_fds
    }

    /// The VM's file descriptor.
    pub fn vm_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, whose borrow the result carries.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    /// How many vCPUs the VM has.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Frequency of the guest's time stamp counter in kHz; 0 if KVM does not say.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// What each vCPU does.
    pub fn status(&self) -> Vec<VcpuStatus> {
        self.control.status()
    }

    /// Waits until some vCPU has exited or failed, or `limit` is over: then `None`.
    pub fn wait_for_end(&self, limit: Duration) -> Option<(usize, VcpuStatus)> {
        let ended = |s: &VcpuStatus| matches!(s, VcpuStatus::Exited { .. } | VcpuStatus::Failed(_));
        self.control.wait_for(limit, ended)
    }

    /// Exits of vCPU `index`, counted since the VM was built.
    pub fn counters(&self, index: usize) -> Option<VcpuCounters> {
        self.vcpus.get(index).map(|vcpu| vcpu.counters())
    }

    /// KVM's own counters of vCPU `index` by their kernel names; empty if there is no such vCPU. May be asked while it
    /// runs. `insn_emulation` stands still while the guest runs natively.
    ///
    /// # Errors
    ///
    /// [`TestVmError::Stats`].
    pub fn kernel_counters(&self, index: usize) -> Result<BTreeMap<String, u64>, TestVmError> {
        self.vcpus.get(index).map_or_else(|| Ok(BTreeMap::new()), |vcpu| vcpu.stats.read())
    }

    /// The last 64 KiB that the guest wrote to its serial port.
    pub fn console(&self) -> String {
        self.serial.lock().kept()
    }

    /// Copies guest RAM; aligned words are read whole. The guest may be running.
    ///
    /// # Errors
    ///
    /// [`TestVmError::NotRam`].
    pub fn read_ram(&self, address: GuestAddress, bytes: &mut [u8]) -> Result<(), TestVmError> {
        self.ram.read(address, bytes)
    }

    /// Writes guest RAM; aligned words are written whole. The tracker is told.
    ///
    /// # Errors
    ///
    /// [`TestVmError::NotRam`]; nothing is written then.
    pub fn write_ram(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), TestVmError> {
        self.ram.write(address, bytes)
    }

    /// MSRs that the last save could not read, or the last restore not set.
    pub fn skipped_msrs(&self) -> &[SkippedMsr] {
        &self.skipped_msrs
    }

    /// How many writes the device has made; none without one.
    pub fn device_writes(&self) -> Option<u64> {
        self.device.as_ref().map(Device::written)
    }

    /// What a migration has asked of the VM.
    pub fn calls(&self) -> VmCalls {
        self.calls
    }

    fn save(&mut self) -> Result<Vec<u8>, TestVmError> {
        if self.phase == Phase::Running {
            return Err(TestVmError::WrongPhase { tried: "saving state", found: self.phase.name() });
        }
        for (vcpu, status) in self.control.status().into_iter().enumerate() {
            match status {
                VcpuStatus::Failed(error) => return Err(TestVmError::Vcpu { vcpu, error }),
                VcpuStatus::Exited { .. } => {
                    return Err(TestVmError::WrongPhase {
                        tried: "saving state",
                        found: "ended by its guest",
                    });
                }
                VcpuStatus::Running | VcpuStatus::Paused => {}
            }
        }
        let mut skipped = Vec::new();
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for vcpu in &self.vcpus {
            vcpus.push(state::save_vcpu(&vcpu.fd.lock(), vcpu.index, &self.shape, &mut skipped)?);
        }
        let vm = state::save_vm(&self.vm, &self.shape)?;
        let at_work =
            TestVmError::WrongPhase { tried: "saving state", found: "paused, but its device works on" };
        let device = match &self.device {
            Some(device) => Some(device.save().ok_or(at_work)?),
            None => None,
        };
        self.note_skipped("read", skipped);
        Ok(state::write(self.tsc_khz, &vcpus, &vm, device.as_ref()))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), TestVmError> {
        if self.phase != Phase::Built {
            return Err(TestVmError::WrongPhase { tried: "restoring state", found: self.phase.name() });
        }
        let saved = state::read(bytes, self.vcpus.len())?;
        let mut skipped = Vec::new();
        for (vcpu, parts) in self.vcpus.iter().zip(&saved.vcpus) {
            let fd = vcpu.fd.lock();
            state::match_tsc(&fd, saved.tsc_khz, self.tsc_khz)?;
            state::restore_vcpu(&fd, vcpu.index, &self.shape, parts, &mut skipped)?;
        }
        state::restore_vm(&self.vm, &self.shape, &saved.vm)?;
        self.device = match saved.device {
            Some(registers) => {
                let (memory, tracker) = (self.ram.memory(), self.tracker.clone());
                Some(Device::restored(*registers, &self.stream, memory, tracker)?)
            }
            None => {
                self.stream.is_empty()?;
                None
            }
        };
        self.tsc_khz = saved.tsc_khz;
        self.note_skipped("set", skipped);
        self.phase = Phase::Paused;
        Ok(())
    }

    fn note_skipped(&mut self, what: &str, skipped: Vec<SkippedMsr>) {
        for SkippedMsr { vcpu, index, value } in &skipped {
            tracing::warn!(vcpu, "MSR {index:#x} could not be {what} (value {value:x?}): it does not move");
        }
        self.skipped_msrs = skipped;
    }

    fn call_all_out(&self) {
        for vcpu in &self.vcpus {
            vcpu.call_out();
        }
    }
}

impl Vm for TestVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        if self.phase != Phase::Running {
            let found = self.phase.name();
            return Err(TestVmError::WrongPhase { tried: "pausing the VM", found }.into());
        }
        self.control.want(Wanted::Pause);
        self.call_all_out();
        if let Err(error) = self.control.wait_until_none_runs() {
            self.control.want(Wanted::Run);
            return Err(error.into());
        }
        self.phase = Phase::Paused;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        if self.phase != Phase::Paused {
            let found = self.phase.name();
            return Err(TestVmError::WrongPhase { tried: "resuming the VM", found }.into());
        }
        self.run();
        Ok(())
    }

    /// See `state` for what is in it. What could not be read is in [`TestVm::skipped_msrs`] afterwards.
    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        Ok(self.save()?)
    }

    /// For a VM that was built and has not run yet. What could not be set is in [`TestVm::skipped_msrs`] afterwards.
    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.restore(state)?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        if let Some(device) = &self.device {
            device.quiesce();
        }
        self.calls.quiesced += 1;
        Ok(Quiesced::declare_no_device_writes(paused))
    }

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        if let Some(device) = &mut self.device {
            device.stream(matches!(moment, Moment::Stopped(_)), out)?;
        }
        Ok(())
    }

    fn device_state_bytes_left(&mut self) -> u64 {
        self.device.as_ref().map_or(0, Device::left)
    }

    /// For a VM that was built and has not run yet.
    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        if self.phase != Phase::Built {
            let found = self.phase.name();
            return Err(TestVmError::WrongPhase { tried: "loading device state", found }.into());
        }
        Ok(self.stream.take(piece)?)
    }

    /// None; but this is how the VM learns that a migration begins.
    fn discarded_pages(&mut self, _: &mut PageSet) {
        if let Some(device) = &mut self.device {
            device.begin_stream();
        }
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        self.calls.prepared += 1;
        Ok(())
    }

    /// What came for the device is forgotten: another migration may follow.
    fn release(&mut self) {
        self.calls.released += 1;
        self.stream = StreamCheck::default();
    }

    fn kick(&self, index: usize) {
        if let Some(vcpu) = self.vcpus.get(index) {
            vcpu.kick();
        }
    }
}

impl Drop for TestVm {
    /// Ends every vCPU's thread and joins it; whatever the guest was doing is over.
    fn drop(&mut self) {
        self.control.want(Wanted::End);
        self.call_all_out();
        for thread in self.threads.drain(..) {
            // The thread catches its own panics and reports them as the vCPU's status.
            let _ = thread.join();
        }
    }
}

impl AsFd for TestVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm_fd()
    }
}

fn open_kvm() -> Result<Kvm, TestVmError> {
    Kvm::new().map_err(|error| match error.errno() {
        // ENXIO and ENODEV: there is a device node, and no module behind it.
        libc::ENOENT | libc::ENXIO | libc::ENODEV => TestVmError::NoKvm,
        libc::EACCES | libc::EPERM => TestVmError::KvmPermission,
        _ => kvm_error("opening /dev/kvm", error, "see whether the kernel's log says more"),
    })
}

fn check_capabilities(kvm: &Kvm, vm: &VmFd, config: &Config) -> Result<(), TestVmError> {
    if i64::from(kvm.get_api_version()) != i64::from(KVM_API_VERSION) {
        return Err(TestVmError::MissingCapability { what: "API version 12", purpose: "everything" });
    }
    for (cap, what, purpose) in REQUIRED {
        if !vm.check_extension(cap) {
            return Err(TestVmError::MissingCapability { what, purpose });
        }
    }
    let limit = |what: String, limit: String| Err(TestVmError::Config { what, limit });
    if config.vcpus > kvm.get_max_vcpus() {
        return limit(
            format!("{} vCPUs", config.vcpus),
            format!("KVM of this host allows {}", kvm.get_max_vcpus()),
        );
    }
    // Numbers that kvm-ioctls has no names for.
    for (number, what, purpose) in [
        (KVM_CAP_SREGS2, "KVM_CAP_SREGS2", "saving control registers"),
        (KVM_CAP_BINARY_STATS_FD, "KVM_CAP_BINARY_STATS_FD", "telling native guests from emulated ones"),
    ] {
        if vm.check_extension_raw(number.into()) <= 0 {
            return Err(TestVmError::MissingCapability { what, purpose });
        }
    }
    // One more: the hole below 4 GiB may cut a region.
    if config.regions + 1 > kvm.get_nr_memslots() {
        return limit(
            format!("{} regions", config.regions),
            format!("KVM of this host has {} slots", kvm.get_nr_memslots()),
        );
    }
    Ok(())
}

/// Before any vCPU is created: each gets its ring then.
fn enable_tracking(vm: &VmFd, tracking: Tracking) -> Result<Option<DirtyTracker>, TestVmError> {
    Ok(match tracking {
        Tracking::None => None,
        Tracking::Ring { entries } => {
            let size = RingSize::from_entries(entries).map_err(TrackError::from)?;
            Some(DirtyTracker::enable(vm, size)?)
        }
        Tracking::Bitmap => Some(DirtyTracker::enable_bitmap(vm)?),
    })
}

/// The interrupt controllers and the timer of a PC; before any vCPU too, so that each gets its local APIC.
fn create_chips(vm: &VmFd) -> Result<(), TestVmError> {
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(|e| kvm_error("KVM_SET_TSS_ADDR", e, "its pages collide with RAM"))?;
    let hint = "this KVM emulates no interrupt controllers";
    vm.create_irq_chip().map_err(|e| kvm_error("KVM_CREATE_IRQCHIP", e, hint))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(|e| kvm_error("KVM_CREATE_PIT2", e, hint))
}

fn create_vcpu(kvm: &Kvm, vm: &VmFd, index: usize, config: &Config) -> Result<VcpuFd, TestVmError> {
    let fd = vm.create_vcpu(index as u64);
    let fd = fd.map_err(|e| kvm_error("KVM_CREATE_VCPU", e, "the host may be short of memory"))?;
    let cpuid = cpuid::for_vcpu(kvm, index, config, fd.get_tsc_khz().unwrap_or(0))?;
    let hint = "this CPU cannot be shown to the guest";
    fd.set_cpuid2(&cpuid).map_err(|e| kvm_error("KVM_SET_CPUID2", e, hint))?;
    Ok(fd)
}

/// Registers every region as a memory slot. Dirty logging is the tracker's to switch on.
fn set_slots(vm: &VmFd, memory: &GuestMemory) -> Result<(), TestVmError> {
    for region in memory.regions() {
        let slot = kvm_userspace_memory_region {
            slot: region.slot.0,
            flags: 0,
            guest_phys_addr: region.pages.first.address().0,
            memory_size: region.len_bytes() as u64,
            userspace_addr: region.host.addr() as u64,
        };
        // SAFETY:
        // * the host range is one mapping of exactly this length, kept by `Ram`, which outlives the VM;
        // * whatever the guest does in it, this process accesses it atomically only.
        let set = unsafe { vm.set_user_memory_region(slot) };
        set.map_err(|e| kvm_error("KVM_SET_USER_MEMORY_REGION", e, "the host may be short of memory"))?;
    }
    Ok(())
}
