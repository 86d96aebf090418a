//! The guest that the commands run: its options, its start, and what is seen of its progress.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use ringferry::kvm::RingSize;
use ringferry::wire::parts::is_name;
use ringferry_testvm::bulk::BulkConfig;
use ringferry_testvm::device::DeviceConfig;
use ringferry_testvm::workload::command_line::{self, Pattern};
use ringferry_testvm::{
    Boot, Config, Gates, Guest, GuestError, Image, Tracking, VcpuStatus, check, guest_image,
};
use serde::{Deserialize, Serialize};

use crate::interrupt;
use crate::machine::{GuestKind, Machine};
use crate::printable::printable;
use crate::sizes::Size;
use crate::vm_description::VmDescription;

/// How long a guest may take to boot and to write its fill: first touches cost 10 µs a page here.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Lines of the guest's console that an error shows.
const CONSOLE_LINES_MAX: usize = 40;

/// How often a booting guest's vCPUs are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What the VM is like. The destination hears it from the source.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Guest")]
pub struct VmArgs {
    /// Name of the VM, for those who look at the destination: 1 to 64 printable ASCII characters without spaces
    /// [default: none]
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    pub name: Option<String>,

    /// What the guest runs on [default: kvm; for the demo, threads where there is no /dev/kvm]
    #[arg(long, value_enum, value_name = "KIND")]
    pub guest: Option<GuestKind>,

    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub memory: Size,

    /// vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vcpus: u32,

    /// Memory slots that RAM is cut into
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub regions: u32,

    #[command(flatten)]
    pub host: HostArgs,
}

/// How a host holds a VM: each host of a migration may do it in its own way.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Guest")]
pub struct HostArgs {
    /// What is behind RAM [default: anonymous; for one that arrives, as at its source]
    #[arg(long, value_enum, value_name = "KIND")]
    pub backing: Option<BackingArg>,

    /// Whether RAM lies in huge pages [default: none; for one that arrives, as at its source]
    #[arg(long, value_enum, value_name = "KIND")]
    pub huge_pages: Option<HugePagesArg>,

    /// Keep each vCPU on a CPU of its own, as far as there are enough
    #[arg(long)]
    pub pin_vcpus: bool,
}

/// What the guest does and how its writes are tracked.
#[derive(clap::Args, Clone, Debug)]
pub struct GuestArgs {
    #[command(flatten)]
    pub vm: VmArgs,

    /// Non-zero RAM that the guest writes once, outside its working sets
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub fill: Size,

    /// What a vCPU does, once for all or several times: each=WORK or vcpuN=WORK, where WORK is a list, separated by
    /// commas, of pattern:NAME (sequential, random, zipf, hot-cold, read-only, compute-only or idle), ws:SIZE,
    /// bytes:N, pace:N (page writes a second), content:NAME (counter, random, text or zero) and lock:on (every other turn
    /// takes a lock that all vCPUs share, in kernel mode)
    #[arg(long, value_name = "WORK", value_parser = work)]
    pub work: Vec<String>,

    /// Boot this multiboot image instead of the built-in guest (then nothing is known of its progress)
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,

    /// Command line of the image, instead of --fill and --work
    #[arg(long, value_name = "TEXT")]
    pub append: Option<String>,

    /// Let the guest use kvmclock, which KVM keeps in guest RAM
    #[arg(long)]
    pub kvmclock: bool,

    /// Give the VM a device that writes guest RAM, with so much state of its own; a quarter of it leaves in each round
    /// while the guest runs
    #[arg(long, value_name = "SIZE")]
    pub device_state: Option<Size>,

    /// What the device writes in bulk; of scenarios.
    #[arg(skip)]
    pub external: Option<BulkConfig>,

    /// Where dirty pages come from
    #[arg(long, value_enum, value_name = "KIND", default_value_t = BackendArg::Ring)]
    pub backend: BackendArg,

    /// Entries of each vCPU's dirty ring, a power of two
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = ring_entries)]
    pub ring_entries: u32,

    /// How a vCPU's gate closes: an option of benches only
    #[arg(skip)]
    pub gates: GatesArg,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum GatesArg {
    /// When the thread that steers kicks the vCPU
    #[default]
    Kicked,
    /// When the vCPU's own timer says so, too
    Timed,
    /// The same, but not in the midst of the guest's kernel
    ByMode,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackingArg {
    #[default]
    Anonymous,
    Memfd,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePagesArg {
    #[default]
    None,
    Transparent,
    Reserved,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendArg {
    Ring,
    Bitmap,
}

/// The guest would say the same, but only after it has booted.
fn work(text: &str) -> Result<String, String> {
    let line = format!("guest {text}");
    command_line::Config::parse(&line).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn ring_entries(text: &str) -> Result<u32> {
    Ok(RingSize::from_entries(text.parse()?)?.entries())
}

fn vm_name(text: &str) -> Result<String, String> {
    match is_name(text) {
        true => Ok(text.to_owned()),
        false => Err("write 1 to 64 printable ASCII characters without spaces, such as web-7".to_owned()),
    }
}

/// The test device with this much state.
fn device(state: Size) -> DeviceConfig {
    DeviceConfig { state_bytes: state.bytes, round_bytes: state.bytes / 4, ..DeviceConfig::default() }
}

impl VmArgs {
    /// What the guest runs on.
    pub fn kind(&self) -> GuestKind {
        self.guest.unwrap_or(GuestKind::Kvm)
    }
}

impl GuestArgs {
    fn device(&self) -> Option<DeviceConfig> {
        let with_state = self.device_state.map(device);
        let bulk = self.external;
        bulk.map(|_| DeviceConfig { bulk, ..with_state.unwrap_or_default() }).or(with_state)
    }

    /// Boots the guest. Returns when it is at work, its fill written.
    pub fn boot(&self) -> Result<Host> {
        let image = match &self.image {
            Some(file) => Image::File(file.clone()),
            None => guest_image(),
        };
        let append = self.append.clone().unwrap_or_else(|| {
            let words = self.work.iter().map(|work| format!(" {work}"));
            format!("vcpus={} fill={}{}", self.vm.vcpus, self.fill.bytes, words.collect::<String>())
        });
        let tracking = match self.backend {
            BackendArg::Ring => Tracking::Ring { entries: self.ring_entries },
            BackendArg::Bitmap => Tracking::Bitmap,
        };
        let description = VmDescription::of(&self.vm);
        let config = Config {
            boot: Boot::Image { image, append },
            tracking,
            kvmclock: self.kvmclock,
            device: self.device(),
            gates: match self.gates {
                GatesArg::Kicked => Gates::Kicked,
                GatesArg::Timed => Gates::Timed,
                GatesArg::ByMode => Gates::ByMode,
            },
            ..description.config(&self.vm.host)
        };
        let mut vm = Machine::new(self.vm.kind(), config)?;
        vm.start()?;
        let name = self.vm.name.clone().unwrap_or_default();
        let mut host = Host { name, description, guest: None, vm };
        if self.image.is_none() {
            let guest = Guest::new(host.vm.memory(), host.vm.kvm_tracker())?;
            host.wait_until_working(&guest)?;
            host.guest = Some(guest);
        }
        Ok(host)
    }
}

/// A running VM, and what is known of its guest if that is ours.
#[derive(Debug)]
pub struct Host {
    /// Its name; empty if it has none.
    pub name: String,
    /// What a destination has to build.
    pub description: VmDescription,
    pub vm: Machine,
    pub guest: Option<Guest>,
}

/// How far each vCPU's workload is, at one moment.
#[derive(Clone, Debug)]
pub struct Marks {
    at: Instant,
    steps: Vec<u64>,
}

impl Host {
    fn wait_until_working(&self, guest: &Guest) -> Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            match guest.wait_until_working(LOOK_EVERY) {
                Ok(()) => return Ok(()),
                Err(GuestError::Timeout { .. }) if Instant::now() < deadline => {
                    interrupt::check()?;
                    self.check_vcpus()?;
                }
                // It says why itself.
                Err(error @ GuestError::Failed(_)) => return Err(error.into()),
                Err(error) => {
                    return Err(anyhow!("the guest said:\n{}", self.console()).context(error));
                }
            }
        }
    }

    /// Waits until each vCPU has been through its working set once: first touches are a hundred times slower than
    /// what comes after, and say nothing about the guest's rate.
    pub fn wait_until_warm(&self) -> Result<()> {
        let Some(guest) = &self.guest else { return Ok(()) };
        let deadline = Instant::now() + BOOT_LIMIT;
        for vcpu in 0..self.vm.vcpus() {
            let touches =
                matches!(guest.work(vcpu)?.pattern, Pattern::ReadOnly) || guest.work(vcpu)?.pattern.writes();
            while touches && guest.stats(vcpu)?.passes == 0 && Instant::now() < deadline {
                interrupt::check()?;
                self.check_vcpus()?;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// What the guest said last, line by line.
    fn console(&self) -> String {
        let console = self.vm.console();
        let lines: Vec<String> = console.lines().map(printable).collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES_MAX)..].join("\n")
    }

    /// An error if a vCPU has ended.
    pub fn check_vcpus(&self) -> Result<()> {
        for (index, status) in self.vm.status().into_iter().enumerate() {
            match status {
                VcpuStatus::Failed(error) => {
                    return Err(error).with_context(|| format!("vCPU {index} failed"));
                }
                VcpuStatus::Exited { code } => {
                    bail!("the guest ended itself with code {code}; it said:\n{}", self.console())
                }
                VcpuStatus::Running | VcpuStatus::Paused => {}
            }
        }
        Ok(())
    }

    /// How far each vCPU is; `None` for a guest that is not ours.
    pub fn marks(&self) -> Result<Option<Marks>> {
        let Some(guest) = &self.guest else { return Ok(None) };
        let steps: Result<Vec<u64>, GuestError> =
            (0..self.vm.vcpus()).map(|vcpu| Ok(guest.stats(vcpu)?.steps())).collect();
        Ok(Some(Marks { at: Instant::now(), steps: steps? }))
    }

    /// [`marks`](Self::marks) for those who only watch: a guest that has spoiled its own counters is kept all the same.
    pub fn seen(&self) -> Option<Marks> {
        self.marks().unwrap_or_else(|error| {
            tracing::warn!("the guest's progress cannot be read: {error:#}");
            None
        })
    }

    /// Stops the guest for good and proves its writes. `begin` is where its rate is counted from.
    pub fn examine(&mut self, begin: Option<Marks>) -> Result<Examined> {
        let end = self.seen();
        let _paused = self.vm.as_vm().pause().map_err(|error| anyhow!(error))?;
        let Some(guest) = &self.guest else { return Ok(Examined::default()) };
        let checked = check::check(self.vm.memory());
        let felt = |vcpu| guest.stats(vcpu).ok()?.pause_gap.map(|gap| gap.as_secs_f64() * 1e3);
        Ok(Examined {
            guest_consistent: Some(checked.is_ok()),
            inconsistency: checked.err().map(|error| error.to_string()),
            progress_after_per_s: begin
                .zip(end)
                .map_or_else(Vec::new, |(begin, end)| end.per_s_since(&begin)),
            pause_felt_ms: (0..self.vm.vcpus()).map(felt).collect(),
        })
    }
}

impl Marks {
    /// Steps of each vCPU since `earlier`.
    pub fn steps_since(&self, earlier: &Self) -> Vec<u64> {
        self.steps.iter().zip(&earlier.steps).map(|(now, then)| now.saturating_sub(*then)).collect()
    }

    /// Steps per second of each vCPU since `earlier`.
    pub fn per_s_since(&self, earlier: &Self) -> Vec<f64> {
        let seconds = (self.at - earlier.at).as_secs_f64().max(1e-9);
        self.steps_since(earlier).into_iter().map(|steps| steps as f64 / seconds).collect()
    }
}

/// What a guest looked like when it was stopped for good.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Examined {
    /// Whether every write of the guest's is where its own counters say.
    pub guest_consistent: Option<bool>,
    /// What is wrong, if not.
    pub inconsistency: Option<String>,
    /// Steps per second of each vCPU, where it was watched.
    pub progress_after_per_s: Vec<f64>,
    /// The pause of a migration as each vCPU felt it by its own clock.
    pub pause_felt_ms: Vec<Option<f64>>,
}

impl Examined {
    /// An error if the guest lost writes.
    pub fn verdict(&self) -> Result<()> {
        if self.guest_consistent == Some(false) {
            bail!("the guest is not consistent");
        }
        Ok(())
    }
}

impl fmt::Display for Examined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.guest_consistent {
            Some(true) => write!(f, "the guest found every write of its own"),
            Some(false) => {
                write!(f, "THE GUEST LOST WRITES: {}", self.inconsistency.as_deref().unwrap_or(""))
            }
            None => write!(f, "a foreign guest: nothing is known of its writes"),
        }
    }
}
