//! What a migration did, as the source measured it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::progress::{GaveWay, Prediction, RoundReport};
use crate::transport::{ChannelSnapshot, SendCounters, Totals};

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
    /// The downtime limit that was in force when the guest was stopped.
    pub downtime_limit_ms: f64,
    /// The wish below it, if there was one.
    #[serde(default)]
    pub downtime_target_ms: Option<f64>,
    /// Whether the downtime was within the limit.
    pub downtime_limit_kept: bool,
    /// Why it had to give way, if it had: the guest was not called back although it was going to stand still for longer.
    #[serde(default)]
    pub downtime_limit_gave_way: Option<GaveWay>,
    /// The times that the guest was stopped and ran on, because it would have stood still for too long.
    #[serde(default)]
    pub switchovers_called_off: u32,
    /// Of the downtime: until devices stood still and state was saved.
    pub save_state_ms: f64,
    /// Of the downtime: from the last page's being in place there to the word that the destination runs.
    pub handover_ms: f64,
    /// Bytes of device and machine state.
    pub state_bytes: u64,
    /// Every round; the last ones were sent while the guest stood still.
    pub rounds: Vec<RoundReport>,
    /// What was sent, over all rounds.
    #[serde(flatten)]
    pub totals: Totals,
    /// What each data connection did.
    pub channel_reports: Vec<ChannelReport>,
    /// Whether the RAM digests of both sides are equal, and an audit after the handing over found every page as it was
    /// digested; `None` if they were not compared.
    pub ram_digest_match: Option<bool>,
    /// Whether that audit came to its end: somebody may have cancelled it.
    pub audited: bool,
    /// Pages whose last change tracking missed, by that audit: lost writes.
    pub untracked_pages: u64,
}

/// One channel's part in a migration.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ChannelReport {
    /// The channel, as a user writes it.
    pub channel: String,
    /// What it sent.
    #[serde(flatten)]
    pub totals: Totals,
    /// Bytes of guest RAM registered with the kernel.
    pub registered_bytes: u64,
    /// Why a better way of sending was given up.
    pub fallback: Option<String>,
    /// Bytes per second that its link was measured to carry.
    pub bytes_per_s: f64,
    /// One standard error of it.
    pub uncertainty_bytes_per_s: f64,
    /// The times that its connection died.
    pub losses: Vec<LossReport>,
}

/// A data connection that died.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LossReport {
    /// When, after the data connections were made.
    pub at_ms: f64,
    /// The round that was being sent.
    pub round: u32,
    /// Pages that were under way and were sent again by others.
    pub pages_sent_again: u64,
    /// Why.
    pub reason: String,
}

/// Times in reports are in milliseconds.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What the channels did so far.
pub(super) fn channel_reports(counters: &SendCounters) -> Vec<ChannelReport> {
    let losses = counters.losses();
    let report = |channel: ChannelSnapshot| ChannelReport {
        channel: channel.channel.to_string(),
        totals: channel.totals,
        registered_bytes: channel.sending.registered_bytes,
        fallback: channel.sending.fallback,
        bytes_per_s: channel.bandwidth.bytes_per_s,
        uncertainty_bytes_per_s: channel.bandwidth.uncertainty_bytes_per_s,
        losses: losses
            .iter()
            .filter(|loss| loss.index == channel.index)
            .map(|loss| LossReport {
                at_ms: millis(loss.at),
                round: loss.round,
                pages_sent_again: loss.pages_returned,
                reason: loss.reason.clone(),
            })
            .collect(),
    };
    counters.channels().into_iter().map(report).collect()
}
