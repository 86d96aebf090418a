//! What a test VM is to be: vCPUs, RAM, what it boots, how its writes are tracked.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use crate::device::DeviceConfig;
use crate::error::TestVmError;
use crate::workload::mailbox::MAX_VCPUS;

/// Most regions that guest RAM can be cut into.
pub const MAX_REGIONS: usize = 64;
/// Least RAM: the first MiB of a PC, and one for an image.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

/// A test VM to be built.
#[derive(Debug)]
pub struct Config {
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: usize,
    /// RAM in bytes, a multiple of 4 KiB (of 2 MiB with reserved huge pages). What does not fit below 3 GiB
    /// continues at 4 GiB, as on a PC.
    pub memory_bytes: u64,
    /// Into how many regions, each with its own mapping and memory slot, RAM is cut at the least. The hole
    /// below 4 GiB makes one cut more.
    pub regions: usize,
    /// What is behind RAM.
    pub backing: Backing,
    /// Whether RAM lies in huge pages.
    pub huge_pages: HugePages,
    /// What runs in it.
    pub boot: Boot,
    /// How guest writes are tracked.
    pub tracking: Tracking,
    /// Whether CPUID shows kvmclock. The built-in guest then has KVM write the time into a page of its own
    /// ([`KVMCLOCK_ADDRESS`](crate::KVMCLOCK_ADDRESS)), so that restoring its state writes guest RAM. A destination
    /// takes CPUID from the state.
    pub kvmclock: bool,
    /// The device that writes guest RAM and has state, if there is to be one.
    pub device: Option<DeviceConfig>,
    /// Whether each vCPU's thread is kept on a CPU of its own, as far as there are enough.
    pub pin_vcpus: bool,
    /// How the gate of a vCPU closes that is held back.
    pub gates: Gates,
    /// Where the guest's serial port goes, besides [`TestVm::console`](crate::TestVm::console).
    pub console: Option<Console>,
}

impl Default for Config {
    /// One vCPU, 64 MiB of anonymous memory in one region, nothing to boot, no tracking, no kvmclock, no device.
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_bytes: 64 << 20,
            regions: 1,
            backing: Backing::Anonymous,
            huge_pages: HugePages::None,
            boot: Boot::Destination,
            tracking: Tracking::None,
            kvmclock: false,
            device: None,
            pin_vcpus: false,
            gates: Gates::Kicked,
            console: None,
        }
    }
}

impl Config {
    /// Says what of it is not possible, before anything is built.
    ///
    /// # Errors
    ///
    /// [`TestVmError::Config`]: what was asked for, and what would be possible.
    pub fn check(&self) -> Result<(), TestVmError> {
        let refuse = |what: String, limit: String| Err(TestVmError::Config { what, limit });
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return refuse(format!("{} vCPUs", self.vcpus), format!("1 to {MAX_VCPUS} are possible"));
        }
        if self.regions == 0 || self.regions > MAX_REGIONS {
            return refuse(format!("{} regions", self.regions), format!("1 to {MAX_REGIONS} are possible"));
        }
        let unit = self.page_bytes();
        let least = MIN_MEMORY_BYTES.max(unit * self.regions as u64);
        let most = 1 << 44;
        if self.memory_bytes < least || self.memory_bytes > most || !self.memory_bytes.is_multiple_of(unit) {
            return refuse(
                format!("{} bytes of RAM in {} regions", self.memory_bytes, self.regions),
                format!("a multiple of {unit} from {least} to {most} is possible"),
            );
        }
        Ok(())
    }

    /// The unit in which RAM can be cut.
    pub(crate) fn page_bytes(&self) -> u64 {
        match self.huge_pages {
            HugePages::Reserved => 2 << 20,
            HugePages::None | HugePages::Transparent => 4096,
        }
    }
}

/// What is behind guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, mapped shared: another process could map it too.
    Memfd,
}

/// Whether guest RAM lies in huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HugePages {
    /// As the host is set up.
    None,
    /// `MADV_HUGEPAGE`: huge where the kernel finds some.
    Transparent,
    /// From the pool of reserved 2 MiB pages (`vm.nr_hugepages`).
    Reserved,
}

/// What the VM does when it starts.
#[derive(Clone, Debug)]
pub enum Boot {
    /// Boots an image, with a command line.
    Image {
        /// The image.
        image: Image,
        /// Its command line, behind the image's name, as QEMU's `-append`.
        append: String,
    },
    /// Nothing: RAM is left untouched, and the VM waits for `restore_state`.
    Destination,
}

/// A multiboot-1 image.
#[derive(Clone, Debug)]
pub enum Image {
    /// A file.
    File(PathBuf),
    /// Bytes in memory, and the name that the guest finds as the first word of its command line.
    Bytes {
        /// The name.
        name: &'static str,
        /// The image.
        bytes: &'static [u8],
    },
}

/// How guest writes are tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracking {
    /// Not at all.
    None,
    /// A dirty ring of so many entries per vCPU.
    Ring {
        /// Entries of each ring: a power of two.
        entries: u32,
    },
    /// The dirty bitmap of each slot.
    Bitmap,
}

/// How the gate of a vCPU closes that is held back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gates {
    /// When whoever throttles kicks the vCPU.
    Kicked,
    /// When the vCPU's own timer says so, and when it is kicked.
    Timed,
    /// The same, but not in the midst of the guest's kernel.
    ByMode,
}

/// Where the bytes go that the guest writes to its serial port.
pub struct Console(pub Box<dyn Write + Send>);

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}
