//! Why two processes that share a VM's migration could not go on.

use std::io;
use std::time::Duration;

use crate::layout::{LayoutError, SlotId};
use crate::track::TrackError;
use crate::vm::VmError;

/// Why a VMM and its offload process could not go on. What became of the VM is told by who returns it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// The other process closed the connection, or died.
    #[error("the {peer} has ended (while {waiting_for} was awaited): its own messages say why")]
    Gone {
        /// Which process it was.
        peer: &'static str,
        /// What should have come.
        waiting_for: &'static str,
    },
    /// The other process said nothing for too long.
    #[error(
        "the {peer} said nothing for {} s while {waiting_for} was awaited: it is stopped, or too busy",
        waited.as_secs_f32()
    )]
    Silent {
        /// Which process it was.
        peer: &'static str,
        /// What should have come.
        waiting_for: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// The socket failed.
    #[error("{action} the {peer} failed: {source}")]
    Socket {
        /// Which process is at the other end.
        peer: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// What came is no message.
    #[error("the {peer} sent bytes that are no message ({what}): use the same version of both programs")]
    Malformed {
        /// Which process it was.
        peer: &'static str,
        /// What is wrong with them.
        what: &'static str,
    },
    /// A message came that its place does not allow.
    #[error("expected {expected} from the {peer}, got {got}")]
    Unexpected {
        /// Which process it was.
        peer: &'static str,
        /// What its place allows.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
    /// The two releases have no version in common.
    #[error(
        "the {peer} speaks offload protocol {oldest} to {newest}, this program {ours}: use the same release"
    )]
    Version {
        /// Which process it is.
        peer: &'static str,
        /// Its oldest.
        oldest: u16,
        /// Its newest.
        newest: u16,
        /// Ours.
        ours: u16,
    },
    /// The other process would not do it.
    #[error("the {peer} could not {action}: {text}")]
    Refused {
        /// Which process it was.
        peer: &'static str,
        /// What it was asked.
        action: &'static str,
        /// Why, in its words; printable.
        text: String,
    },
    /// A region of guest memory that the VMM passed cannot be mapped here.
    #[error(
        "guest memory of {slot:?} cannot be mapped: {source} (it must be a memfd that is as long as the slot)"
    )]
    Map {
        /// Whose memory.
        slot: SlotId,
        /// What the kernel said.
        source: io::Error,
    },
    /// The page of gates cannot be shared.
    #[error("the page of gates cannot be mapped: {0}")]
    Page(io::Error),
    /// The regions are no guest's RAM.
    #[error("the VMM's memory makes no guest: {0}")]
    Layout(#[from] LayoutError),
    /// What the VMM lends is not what its tracker knows.
    #[error(
        "{0:?} is tracked, and no file of it was given: pass a memfd for each slot, or leave the slot untracked"
    )]
    NoFile(SlotId),
    /// As above, for a vCPU.
    #[error("vCPU {0} is tracked, and no descriptor of it was given")]
    NoVcpu(usize),
    /// More than the protocol carries.
    #[error("{what} is too long for the offload protocol ({bytes} bytes, {bytes_max} at most)")]
    TooLong {
        /// What.
        what: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        bytes_max: usize,
    },
    /// Tracking failed.
    #[error("dirty tracking cannot be lent: {0}")]
    Track(#[from] TrackError),
    /// The VMM could not do its part.
    #[error("the VMM could not {action}: {source}")]
    Vm {
        /// What it was asked.
        action: &'static str,
        /// Its own error.
        source: VmError,
    },
    /// A thread could not be started.
    #[error("no thread for the requests of the offload process: {0}")]
    Thread(io::Error),
    /// Somebody asked this side to stop.
    #[error("cancelled")]
    Cancelled,
}
