//! Migration in a process beside the VMM: what crosses between the two, and what each of them does.
//!
//! The VMM passes descriptors (guest memory, vCPUs, a page of gates) over a Unix socket. The offload process maps them and
//! runs the same engine as a VMM would: it takes the dirty rings, decides who is slowed down, encodes and sends. It asks the
//! VMM only for what needs the VMM's address space or knowledge: resets, logging, pause, device state.
//!
//! ```text
//! protocol   the messages, and what is believed of them
//! channel    the socket: one packet is one message, with its descriptors, within a time
//! listener   how the two find each other, where no descriptor is inherited
//! client     the VMM's end: lends the VM and serves requests; when the other process dies, the guest runs on
//! arrival    the VMM's end at the destination
//! kernel     the offload process asks for resets and logging
//! serving    what the VMM does for it, in which order, and what is left of a VM when nobody asks any more
//! pages      sets of pages as packets
//! tracking   the VMM takes dirty pages for it, where the rings stay with the VMM
//! line       the offload process asks one question at a time
//! remote_vm  it asks the VMM that owns the VM
//! remote_session  it asks the VMM for dirty pages, where it does not follow the rings
//! vmm        it looks whether the VMM lives, and shows that it does itself
//! mapping    guest memory as the offload process maps it
//! borrowed   the offload process: the VM as it has it
//! ```
//!
//! `kernel-notes/offload.md` has the protocol, who is trusted with what, and what happens when either process dies.

mod arrival;
mod borrowed;
mod channel;
mod client;
mod error;
mod kernel;
mod line;
mod listener;
mod mapping;
mod pages;
mod protocol;
mod remote_session;
mod remote_vm;
mod serving;
#[cfg(test)]
mod tests;
mod tracking;
mod vmm;

pub use self::arrival::{Arrived, receive};
pub use self::borrowed::{ArrivingVm, BorrowedVm, WaitingVmm};
pub use self::client::{Ended, LentVm, RegionFile, Rings, lend};
pub use self::error::OffloadError;
pub use self::listener::{Listener, connect};
pub use self::protocol::{End, Offer};
pub use self::remote_vm::RemoteVm;
pub use self::vmm::Vmm;
