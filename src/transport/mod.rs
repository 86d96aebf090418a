//! How the bytes move: dirty pages leave over several TCP connections at once, each with a thread and an
//! io_uring of its own, and arrive straight in the destination's guest RAM.
//!
//! The path of a page: [`Sender::begin_round`] puts a round before the channels; `scheduler` gives each `channel` as
//! much as its link drains; `page::encode` says what the pages become; `policy` says whether to copy; `uring` sends. At
//! the other end [`Receiver`] checks each frame against the guest's layout before a byte of it lands, reads the pages
//! into place, and acknowledges. Device state goes the same way, in chunks, into a queue instead of RAM. When a channel
//! dies, what it had not acknowledged is dealt to the others; `scheduler` says why no older page overwrites a newer one.
//!
//! Not here: what the control connection says (`wire::control`, `source`, `destination`), and which pages are
//! dirty.

mod channel;
mod channel_spec;
pub mod connection;
pub mod control;
mod counters;
pub(crate) mod dial;
mod discards;
mod endpoint;
mod error;
mod options;
mod pacing;
mod policy;
mod receive;
mod scheduler;
mod send;
mod session;
pub(crate) mod socket;
mod token;
mod uring;

#[cfg(test)]
mod tests;

pub use channel_spec::{ChannelSpec, ChannelSpecError};
pub use counters::{ChannelLoss, ChannelSnapshot, SendCounters, Sending, Totals};
pub use discards::Discards;
pub use endpoint::{Endpoint, EndpointError};
pub use error::TransportError;
pub use options::SendOptions;
pub use pacing::MaxBandwidth;
pub use policy::ZeroCopy;
pub use receive::{DataListener, Received, Receiver};
pub use send::{LastPhase, RoundSent, SendHandle, Sender};
pub use socket::STALL_TIMEOUT;
pub use token::MigrationToken;
pub use uring::UringSupport;

pub use crate::converge::bandwidth::Bandwidth;
