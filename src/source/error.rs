//! Why a migration did not complete, and what that means for the VM.

use crate::track::TrackError;
use crate::transport::TransportError;
use crate::transport::control::ControlError;
use crate::vm::{Paused, VmError};

/// Why a migration did not complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The control connection failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The destination will not take this VM.
    #[error("the destination refused the VM: {0}")]
    Refused(String),
    /// The destination gave up.
    #[error("the destination ended the migration: {0}")]
    Aborted(String),
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
    /// The two RAM digests differ.
    #[error("RAM at the destination differs (digest {ours:032x} here, {theirs:032x} there): not handed over")]
    DigestMismatch {
        /// Digest here.
        ours: u128,
        /// Digest there.
        theirs: u128,
    },
    /// A limit that the user set says that it has taken long enough.
    #[error("given up: the timeout of the migration has passed; the VM runs on here")]
    GaveUp,
    /// The user asked to stop.
    #[error("cancelled; the VM runs on here")]
    Cancelled,
    /// The VM was handed over, and the destination never said that it runs. It may run there: the VM stays
    /// paused here with its RAM kept, until an operator has looked and either drops it or resumes it.
    #[error(
        "the VM was handed over but the destination did not confirm that it runs ({cause}); it stays paused here: \
         find out whether it runs there, then end one of the two"
    )]
    Unconfirmed {
        /// Hand this to [`Vm::resume`](crate::vm::Vm::resume) only if the destination certainly does not run the VM.
        paused: Paused,
        /// Why no confirmation came.
        cause: Box<SourceError>,
    },
}
