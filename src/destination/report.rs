//! What arrived.

use serde::{Deserialize, Serialize};

/// The figures of a VM that was taken over.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DestinationReport {
    /// The VM's name among those of its owner; may be empty.
    #[serde(default)]
    pub vm_id: String,
    /// Pages whose contents arrived; those sent twice count twice.
    pub pages_received: u64,
    /// Pages that arrived as "zero".
    pub zero_pages: u64,
    /// Bytes on the data connections.
    pub bytes_received: u64,
    /// Pages of this side's RAM that were not zero before anything arrived, and were cleared.
    pub cleared_pages: u64,
    /// Bytes of device and machine state.
    pub state_bytes: u64,
    /// From the acceptance to the first vCPU running here.
    pub total_ms: f64,
    /// From the word that everything was sent to the first vCPU running here.
    pub take_over_ms: f64,
    /// Whether RAM digests are equal; `None` if they were not compared.
    pub ram_digest_match: Option<bool>,
}
