//! io_uring, as one thread uses it for one connection: the only code of the transport that hands memory to the
//! kernel.
//!
//! On a [`Ring`](ring::Ring) stand [`SendRing`], which sends frames out of guest RAM, and [`ReceiveRing`], which reads
//! into it. Both own every header, iovec and message that the kernel reads, give none of it out while an operation on
//! it is in flight, and are safe to use.
#![expect(unsafe_code, reason = "submission entries carry pointers to our memory and to guest RAM")]

mod probe;
mod receive;
mod registration;
mod ring;
mod send;
mod wake;

pub use self::probe::UringSupport;
pub(super) use self::receive::{ReceiveRing, Received};
pub(super) use self::registration::{RegisteredBuffers, Registration, SharedRegistration};
pub(super) use self::ring::POLL_INTERVAL;
pub(super) use self::send::{Completion, SLOTS, SendMethod, SendOutcome, SendRing};
pub(super) use self::wake::Wake;
