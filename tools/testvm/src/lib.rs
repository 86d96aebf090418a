//! A minimal real VMM and its guest: what tests, benches and the command line of Ringferry migrate.
//!
//! [`TestVm`] is built from a [`Config`]: `memory` maps RAM, `boot` loads a `multiboot` image into it, `cpuid`
//! says what its CPUs are, [`device`] writes RAM beside them. Each vCPU has a thread (`vcpu`) that runs until another
//! thread wants something else (`run_control`) and kicks it (`kick`).
//!
//! [`bare`] has a guest that dirties exactly the pages it is told to.
//!
//! [`links`] are wires between network namespaces, for what has to cross one; a [`relay`] is one without privileges, whose
//! rate changes.
//!
//! [`ThreadVm`] does the same work in host threads, where there is no KVM.

pub mod bare;
mod boot;
pub mod bulk;
pub mod check;
mod config;
mod cpuid;
pub mod device;
mod error;
mod exit;
mod guest;
mod image;
mod kick;
pub mod links;
mod machine;
mod memory;
mod multiboot;
mod pin;
pub mod relay;
mod run_control;
mod skip;
mod state;
mod stats;
mod thread_vm;
mod vcpu;
mod vm;
pub mod workload;

pub use boot::MAX_COMMAND_LINE;
pub use config::{
    Backing, Boot, Config, Console, Gates, HugePages, Image, MAX_REGIONS, MIN_MEMORY_BYTES, Tracking,
};
pub use error::{TestVmError, VcpuError};
pub use guest::{Guest, GuestError, VcpuStats};
pub use image::{IMAGE, guest_image};
pub use machine::HostMachine;
pub use memory::{HOLE_END, HOLE_START, pc_layout};
pub use multiboot::ImageError;
pub use run_control::VcpuStatus;
pub use skip::skip;
pub use state::{STATE_VERSION, SkippedMsr, StateError};
pub use thread_vm::ThreadVm;
pub use vcpu::VcpuCounters;
pub use vm::{TestVm, VmCalls};
pub use workload::mailbox::{EXIT_PORT, IDLE_PORT, KVMCLOCK_ADDRESS, MAX_VCPUS};
