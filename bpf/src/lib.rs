//! Dirty rates per vCPU, from the kernel itself: the library behind `ringferry-profile`.
//!
//! [`Profiler`] loads the eBPF programs (`src/bpf/profile.bpf.c`) and reads what they count; it is what a test uses to
//! demand that a dirty-ring implementation saw every entry that the kernel pushed:
//!
//! ```no_run
//! let mut profiler = ringferry_bpf::Profiler::attach()?;
//! // … run a VM …
//! for vcpu in profiler.counts()? {
//!     println!("{} vCPU {}: {} pushes", vcpu.pid, vcpu.vcpu, vcpu.pushes);
//! }
//! # Ok::<(), ringferry_bpf::Error>(())
//! ```
//!
//! [`Session`] turns those counts into rates over time, one [`Look`] per interval, and chooses per VM where its rate
//! can come from: `profiler` and `sampling` feed `session`, `session` knows no output. What each kernel event means is
//! in `kernel-notes/tracepoints.md`.

mod counts;
mod error;
mod inventory;
mod kernel_types;
mod layout;
mod names;
mod preflight;
mod profiler;
mod regions;
mod ring_index;
mod sampling;
mod session;

pub use counts::VcpuCounts;
pub use error::Error;
pub use inventory::{Inventory, RingId, Slot, Vcpu, Vm, VmId};
pub use kernel_types::{KernelTypes, MemberKind};
pub use names::vm_name;
pub use preflight::{Sources, check_kernel, check_rights};
pub use profiler::{Counting, Options, Profiler, ThreadCounts, Totals};
pub use regions::{PAGES_PER_REGION, Region, WorkingSet, bars};
pub use sampling::{Estimate, PageSampler};
pub use session::{Look, Ring, Row, Session, SessionOptions, Source, Summary, VmLook};

/// Bytes of a guest page, the unit of KVM's dirty logging on x86_64.
pub const PAGE_BYTES: u64 = 4096;

fn usize_of(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
