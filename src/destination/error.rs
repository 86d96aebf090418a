//! Why nothing was received. The VM stays with the source after each of these.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::transport::TransportError;
use crate::transport::control::ControlError;
use crate::vm::VmError;
use crate::wire::control::Message;
use crate::wire::reason::Reason;
use crate::wire::state::StateFormatError;

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; is the port in use, and the address this host's?")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// No source in the time that there was.
    #[error("nobody connected to {address} within {} s: let the source send to this address", waited.as_secs_f32())]
    NobodyCame {
        /// Where we waited.
        address: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// A non-loopback address without the user's word that the network is trusted.
    #[error(
        "{0} can be reached from other machines, and this connection is neither encrypted nor authenticated: \
         listen on a loopback address (and tunnel), or say --insecure on a network that you trust"
    )]
    Exposed(SocketAddr),
    /// The control connection failed.
    #[error(transparent)]
    Control(ControlError),
    /// The data connections failed.
    #[error(transparent)]
    Transport(TransportError),
    /// The peer said something that its phase does not allow.
    #[error("expected {expected} from the source, got {got}")]
    Unexpected {
        /// What the phase allows.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
    /// This side will not take the VM.
    #[error("refused the migration: {text}")]
    Refused {
        /// Why, for programs.
        reason: Reason,
        /// Why, for people.
        text: String,
    },
    /// The source gave up; the VM runs there.
    #[error("the source ended the migration: {text}")]
    Aborted {
        /// Why, for programs.
        reason: Reason,
        /// Why, in the source's words.
        text: String,
    },
    /// The state of the VM is malformed.
    #[error("the source sent {0}")]
    State(#[from] StateFormatError),
    /// The state of the machine is longer than this side is willing to hold.
    #[error(
        "the machine's state is longer than {limit} bytes: raise the limit, or let the VMM send it in pieces"
    )]
    StateTooLong {
        /// The limit.
        limit: usize,
    },
    /// RAM cannot be digested.
    #[error("RAM cannot be verified: {0}")]
    Verification(io::Error),
    /// RAM differs from the source's: nothing was taken over.
    #[error("RAM differs from the source's (digest {ours:032x} here, {theirs:032x} there): not taken over")]
    DigestMismatch {
        /// Digest here.
        ours: u128,
        /// Digest at the source.
        theirs: u128,
    },
    /// The VMM could not restore or resume.
    #[error("the VMM could not {action}: {source}")]
    Vm {
        /// What it was asked.
        action: &'static str,
        /// Its own error.
        source: VmError,
    },
    /// Somebody asked this side to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<ControlError> for DestinationError {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Cancelled { .. } => Self::Cancelled,
            error => Self::Control(error),
        }
    }
}

impl From<TransportError> for DestinationError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Cancelled => Self::Cancelled,
            error => Self::Transport(error),
        }
    }
}

impl DestinationError {
    /// A message that ends the migration, or comes when it must not.
    pub(super) fn of_message(message: Message, expected: &'static str) -> Self {
        match message {
            Message::Abort(reason, text) => Self::Aborted { reason, text },
            other => Self::Unexpected { expected, got: other.name() },
        }
    }

    /// For programs, on the wire and in reports.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused { reason, .. } | Self::Aborted { reason, .. } => *reason,
            Self::Listen { .. } | Self::Transport(_) | Self::Exposed(_) => Reason::Transport,
            Self::NobodyCame { .. } => Reason::TimedOut,
            Self::Control(_) | Self::Unexpected { .. } | Self::State(_) => Reason::Protocol,
            Self::Verification(_) | Self::DigestMismatch { .. } => Reason::Verification,
            Self::Vm { .. } | Self::StateTooLong { .. } => Reason::Vmm,
            Self::Cancelled => Reason::Cancelled,
        }
    }
}
