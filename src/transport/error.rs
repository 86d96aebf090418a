//! What can go wrong on the way, said so that a user knows what to do about it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::layout::LayoutError;
use crate::transport::channel_spec::ChannelSpec;
use crate::wire::data::{DataError, Verdict};

/// Why pages did not move.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// No connection to the destination.
    #[error("cannot connect channel {channel}: {source}{}", connect_advice(source))]
    Connect {
        /// The channel.
        channel: ChannelSpec,
        /// What the kernel said.
        source: io::Error,
    },
    /// The destination does not want the connection.
    #[error("channel {channel} was refused: {verdict}")]
    Refused {
        /// The channel.
        channel: ChannelSpec,
        /// Its answer.
        verdict: Verdict,
    },
    /// The destination's listening address cannot be had.
    #[error("cannot listen on {address} for data: {source}; is the port in use, the address this host's?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The channels of a migration are too few or too many.
    #[error("{found} channels asked for, between 1 and {limit} are possible")]
    ChannelCount {
        /// How many were asked for.
        found: usize,
        /// How many there may be.
        limit: u16,
    },
    /// io_uring does not do what the transport needs.
    #[error("io_uring: {what}: {source}; {}", ring_advice(source))]
    Ring {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread of the transport could not be started, or died.
    #[error("thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The peer sent what no peer of ours sends; the connection is closed.
    #[error("{peer} sent something impossible: {source}")]
    Malformed {
        /// The peer.
        peer: String,
        /// What was wrong with it.
        source: DataError,
    },
    /// A page that is not in the guest's RAM as this side knows it.
    #[error("{peer}: {source}; do both sides have the same memory layout?")]
    Layout {
        /// Who named the page.
        peer: String,
        /// The page.
        source: LayoutError,
    },
    /// The peer closed the connection, or the network lost it.
    #[error("the connection to {peer} broke: {source}")]
    Broken {
        /// The peer.
        peer: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing moved for longer than is allowed.
    #[error("{what}: nothing for {after:?}")]
    TimedOut {
        /// What was awaited.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// The listener already receives a migration of this name.
    #[error("a migration with this token is being received already")]
    TokenInUse,
    /// Pages came after guest RAM was complete.
    #[error("{peer} sent pages after guest RAM was declared complete")]
    Sealed {
        /// The peer.
        peer: String,
    },
    /// A round was begun before the one ahead of it had ended, or after it had failed.
    #[error("round {round} cannot begin: round {unfinished} has not ended")]
    RoundUnfinished {
        /// The round that was to begin.
        round: u32,
        /// The one that has not ended.
        unfinished: u32,
    },
    /// The end of a round was awaited, and none had begun.
    #[error("no round is being sent: begin one before its end is awaited")]
    NoRound,
    /// A chunk of device state that fits no frame.
    #[error(
        "a chunk of {bytes} bytes of device state cannot be sent, only 1 to {limit}: cut the state smaller"
    )]
    StateChunk {
        /// Its length.
        bytes: usize,
        /// The longest possible.
        limit: u32,
    },
    /// More device state than may be on its way.
    #[error("device state at {offset} cannot be sent yet: {limit} bytes before it have not arrived")]
    StateWindow {
        /// Where the chunk begins.
        offset: u64,
        /// How much may be on its way.
        limit: u64,
    },
    /// Every channel is gone.
    #[error("no channel is left: {}", losses.join("; "))]
    NoChannelLeft {
        /// What happened to each.
        losses: Vec<String>,
    },
    /// The migration was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl TransportError {
    /// Whether another connection of the channel is bound to end in the same way.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Refused { verdict, .. } => *verdict != Verdict::Busy,
            // What this host does not allow now, it will not allow in a second.
            Self::Cancelled | Self::Ring { .. } => true,
            _ => false,
        }
    }
}

fn ring_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "a ring's memory counts against RLIMIT_MEMLOCK, with all rings and locked memory of this user: raise it \
             (ulimit -l) or give CAP_IPC_LOCK"
        }
        Some(libc::EPERM | libc::EACCES) => {
            "it is not allowed: set kernel.io_uring_disabled=0, or let seccomp pass io_uring_setup"
        }
        Some(libc::EMFILE | libc::ENFILE) => "too many files are open: raise RLIMIT_NOFILE (ulimit -n)",
        _ => "needed is Linux 6.1 with io_uring",
    }
}

fn connect_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => " (nobody listens there: start the destination first, check the port)",
        Some(libc::EADDRNOTAVAIL) => " (the local address is not one of this host's)",
        Some(libc::ENODEV) => " (there is no such network device)",
        Some(libc::EPERM) => " (binding to a device needs CAP_NET_RAW)",
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => " (no route: check the local address and the device)",
        _ => "",
    }
}
