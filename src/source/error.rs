//! Why a migration did not complete. The VM runs on at the source after each of these.

use std::time::Duration;

use crate::track::TrackError;
use crate::transport::TransportError;
use crate::transport::control::ControlError;
use crate::vm::VmError;
use crate::wire::reason::Reason;
use crate::wire::state::StateFormatError;

/// Why a migration did not complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The control connection failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The destination will not take this VM.
    #[error("the destination refused the VM: {text}")]
    Refused {
        /// Why, for programs.
        reason: Reason,
        /// Why, in the destination's words.
        text: String,
    },
    /// The destination gave up.
    #[error("the destination ended the migration: {text}")]
    Aborted {
        /// Why, for programs.
        reason: Reason,
        /// Why, in the destination's words.
        text: String,
    },
    /// The two releases have too little in common.
    #[error("{what} is needed and the destination lacks it: use releases that both have it")]
    Incompatible {
        /// The version or the feature.
        what: String,
    },
    /// The peer said something that its phase does not allow.
    #[error("expected {expected} from the destination, got {got}")]
    Unexpected {
        /// What the phase allows.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
    /// The data connections failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Dirty tracking failed.
    #[error("dirty tracking failed: {0}")]
    Track(#[from] TrackError),
    /// The VMM could not do its part.
    #[error("the VMM could not {action}: {source}")]
    Vm {
        /// What it was asked.
        action: &'static str,
        /// Its own error.
        source: VmError,
    },
    /// The state of the VM is larger than the stream can carry.
    #[error(transparent)]
    State(#[from] StateFormatError),
    /// RAM could not be digested.
    #[error("RAM cannot be verified: {0}")]
    Verification(std::io::Error),
    /// The two RAM digests differ.
    #[error("RAM at the destination differs (digest {ours:032x} here, {theirs:032x} there): not handed over")]
    DigestMismatch {
        /// Digest here.
        ours: u128,
        /// Digest there.
        theirs: u128,
    },
    /// The guest stood still for as long as it may.
    #[error(
        "the guest stood still for {} s, which is all that it may, while waiting for {waiting_for}: it runs on here",
        budget.as_secs_f32()
    )]
    StandstillOver {
        /// How long that is.
        budget: Duration,
        /// What did not come.
        waiting_for: &'static str,
    },
    /// A limit that the user set says that it has taken long enough.
    #[error("given up: the timeout of the migration has passed; the VM runs on here")]
    GaveUp,
    /// The user asked to stop.
    #[error("cancelled; the VM runs on here")]
    Cancelled,
}

impl SourceError {
    /// For programs, on the wire and in reports.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused { reason, .. } | Self::Aborted { reason, .. } => *reason,
            Self::Incompatible { .. } => Reason::Feature,
            Self::Unexpected { .. } | Self::Control(_) | Self::State(_) => Reason::Protocol,
            Self::Transport(_) => Reason::Transport,
            Self::Track(_) | Self::Vm { .. } => Reason::Vmm,
            Self::Verification(_) | Self::DigestMismatch { .. } => Reason::Verification,
            Self::StandstillOver { .. } => Reason::TimedOut,
            Self::GaveUp => Reason::GaveUp,
            Self::Cancelled => Reason::Cancelled,
        }
    }
}
