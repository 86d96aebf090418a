//! What a migration did, as the source measured it.

use serde::{Deserialize, Serialize};

use crate::progress::{Prediction, RoundReport};

/// The figures of a completed migration. Times in milliseconds, by the source's monotonic clock.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct SourceReport {
    /// Where dirty pages came from: `ring`, `bitmap`, `pagemap`.
    pub backend: String,
    /// Data connections used.
    pub channels: u32,
    /// Guest RAM, never-populated pages included.
    pub memory_bytes: u64,
    /// From the first byte of the handshake to the word that the destination runs.
    pub total_ms: f64,
    /// From the moment before the first vCPU was asked to stop, to the word that the destination runs: an upper
    /// bound by one message's way back. Includes `verify_ms`.
    pub downtime_ms: f64,
    /// Of the downtime: comparing RAM digests. 0 without verification.
    pub verify_ms: f64,
    /// Of the downtime: until every vCPU was outside `KVM_RUN`.
    pub pause_ms: f64,
    /// What was expected when the first round had ended.
    pub prediction_after_round_1: Option<Prediction>,
    /// The downtime expected just before the guest was stopped.
    pub predicted_downtime_ms: Option<f64>,
    /// Every round; the last was sent while the guest stood still.
    pub rounds: Vec<RoundReport>,
    /// Pages whose contents were sent, over all rounds.
    pub pages_sent: u64,
    /// Pages sent as "zero", over all rounds.
    pub zero_pages: u64,
    /// Bytes on the data connections.
    pub bytes_sent: u64,
    /// Sends that the kernel reported as zero-copied.
    pub zero_copy_sends: u64,
    /// Sends that were copied, by our choice or by the kernel's.
    pub copied_sends: u64,
    /// Whether the RAM digests of both sides are equal; `None` if they were not compared.
    pub ram_digest_match: Option<bool>,
}
