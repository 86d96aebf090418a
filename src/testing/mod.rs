//! What tests and benches stand on, ours and those of crates that build on us (feature `testing`).
//!
//! [`AnonymousRam`] is guest RAM without a guest; [`FakeKernel`] is KVM's dirty tracking without KVM.

mod anonymous_ram;
mod fake_kernel;

pub use self::anonymous_ram::{AnonymousRam, Backing};
pub use self::fake_kernel::{FakeKernel, Interruption, UnnamedEntries, WriteDuringReset};
