//! How the bytes move: dirty pages leave over several TCP connections at once, each with a thread and an
//! io_uring of its own, and arrive straight in the destination's guest RAM.
//!
//! The path of a page: [`Sender::send_round`] puts a round on the table; `deal` gives each `channel` as much
//! as its link drains; `frame` looks for zero pages; `policy` says whether to copy; `uring` sends. At the other
//! end [`Receiver`] checks each frame against the guest's layout before a byte of it lands, reads the pages
//! into place, and acknowledges. When a channel dies, what it had not acknowledged is dealt to the others;
//! `deal` says why no older page overwrites a newer one.
//!
//! Not here: what the control connection says (`wire::control`, `source`, `destination`), and which pages are
//! dirty.

mod bandwidth;
mod channel;
mod channel_spec;
pub mod connection;
pub mod control;
mod counters;
mod deal;
pub(crate) mod dial;
mod endpoint;
mod error;
mod frame;
mod pacing;
mod policy;
mod receive;
mod send;
pub(crate) mod socket;
mod uring;

#[cfg(test)]
mod tests;

use std::fmt;

pub use bandwidth::Bandwidth;
pub use channel_spec::{ChannelSpec, ChannelSpecError};
pub use counters::{ChannelLoss, ChannelSnapshot, SendCounters, Sending, Totals};
pub use endpoint::{Endpoint, EndpointError};
pub use error::TransportError;
pub use pacing::MaxBandwidth;
pub use policy::ZeroCopy;
pub use receive::{DataListener, Received, Receiver};
pub use send::{RoundSent, SendHandle, SendOptions, Sender};
pub use uring::UringSupport;

/// What every data connection of a migration shows at its door: 128 random bits that the source chose and
/// said on the control connection. It keeps other migrations and strays apart; it is no protection against
/// somebody who can read the control connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationToken(pub [u8; 16]);

impl fmt::Debug for MigrationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whole tokens do not belong into logs.
        write!(f, "MigrationToken({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}
