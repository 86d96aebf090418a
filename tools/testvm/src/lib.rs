//! A minimal real VMM and its guest: what tests, benches and the command line of Ringferry migrate.
//!
//! [`TestVm`] is built from a [`Config`]: `memory` maps RAM, `boot` loads a `multiboot` image into it, `cpuid`
//! says what its CPUs are. Each vCPU has a thread (`vcpu`) that runs until somebody wants something else (`gate`)
//! and kicks it (`kick`).

mod boot;
mod config;
mod cpuid;
mod error;
mod exit;
mod gate;
mod kick;
mod memory;
mod multiboot;
mod skip;
mod state;
mod stats;
mod vcpu;
mod vm;

pub use boot::MAX_COMMAND_LINE;
pub use config::{
    Backing, Boot, Config, Console, HugePages, Image, MAX_REGIONS, MAX_VCPUS, MIN_MEMORY_BYTES, Tracking,
};
pub use error::{TestVmError, VcpuError};
pub use gate::VcpuStatus;
pub use memory::{HOLE_END, HOLE_START, pc_layout};
pub use multiboot::ImageError;
pub use skip::skip;
pub use state::{STATE_VERSION, SkippedMsr, StateError};
pub use vcpu::{EXIT_PORT, IDLE_PORT, VcpuCounters};
pub use vm::TestVm;
