//! What a command that holds VMs says of them: an object each for programs, and a line for people.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use ringferry::destination::DestinationReport;
use serde::{Deserialize, Serialize};

use crate::guest::Examined;
use crate::migrate::Decision;
use crate::output::Output;

/// Something that happened to a VM. `vm_id` is its name, empty if it has none.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Told {
    /// A source may connect.
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// A source's VM is not taken; another may be.
    Refused {
        /// Which.
        vm_id: String,
        /// Why.
        why: String,
    },
    /// The VM runs here.
    Received(DestinationReport),
    /// It was stopped for good, and checked.
    Checked {
        /// Which.
        vm_id: String,
        /// What was found.
        #[serde(flatten)]
        found: Examined,
    },
    /// Nobody knows whether the destination runs the VM.
    Unconfirmed {
        /// Which.
        vm_id: String,
        /// `HOST:PORT` of the destination.
        destination: String,
        /// Why, and what can be done.
        message: String,
    },
    /// The offload process that migrated the VM has ended.
    Offloaded {
        /// Which.
        vm_id: String,
        /// Whether the destination runs the VM; if not, it runs on here.
        moved: bool,
        /// Why not.
        why: String,
    },
    /// Somebody has decided it.
    Resolved {
        /// Which.
        vm_id: String,
        /// How.
        decision: Decision,
    },
}

impl Told {
    /// Says it.
    ///
    /// # Errors
    ///
    /// As [`Output::write`].
    pub fn tell(&self, output: Output) -> io::Result<()> {
        if output.json() { output.object(self) } else { output.line(self) }
    }

    fn vm_id(&self) -> &str {
        match self {
            Self::Listening { .. } => "",
            Self::Received(report) => &report.vm_id,
            Self::Refused { vm_id, .. }
            | Self::Checked { vm_id, .. }
            | Self::Unconfirmed { vm_id, .. }
            | Self::Offloaded { vm_id, .. }
            | Self::Resolved { vm_id, .. } => vm_id,
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.vm_id().is_empty() {
            write!(f, "{}: ", self.vm_id())?;
        }
        match self {
            Self::Listening { address } => write!(f, "waiting for a VM on {address}"),
            Self::Refused { why, .. } => write!(f, "the VM is refused: {why}"),
            Self::Received(report) => {
                let digest = if report.ram_digest_match == Some(true) { ", RAM digests equal" } else { "" };
                write!(f, "the VM runs here: {} pages received{digest}", report.pages_received)
            }
            Self::Checked { found, .. } => found.fmt(f),
            Self::Unconfirmed { message, .. } => f.write_str(message),
            Self::Offloaded { moved: true, .. } => f.write_str("the guest has moved away"),
            Self::Offloaded { why, .. } => write!(f, "the guest runs on here: {why}"),
            Self::Resolved { decision, .. } => decision.fmt(f),
        }
    }
}
