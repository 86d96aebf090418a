//! Sets of pages on their way to the offload process, as runs, in as many packets as it takes.

use std::time::Duration;

use super::channel::Channel;
use super::error::OffloadError;
use super::protocol::{Message, RUNS_MAX};
use crate::page_set::PageSet;

/// How long the offload process may take to read a packet. It reads while it waits for an answer; device state waits here for
/// the destination.
pub(super) const READ_LIMIT: Duration = Duration::from_secs(60);

/// Sends pages as parts of an answer that is to come.
pub(super) fn send_parts(channel: &Channel, pages: &PageSet) -> Result<(), OffloadError> {
    let mut runs = pages.runs().peekable();
    while runs.peek().is_some() {
        let some = runs.by_ref().take(RUNS_MAX).collect();
        channel.send(&Message::Runs { more: true, runs: some }, &[], READ_LIMIT)?;
    }
    Ok(())
}

/// Sends a set of pages, in as many messages as it takes.
pub(super) fn send_runs(channel: &Channel, pages: &PageSet) -> Result<(), OffloadError> {
    let mut runs = pages.runs().peekable();
    loop {
        let some = runs.by_ref().take(RUNS_MAX).collect();
        let more = runs.peek().is_some();
        channel.send(&Message::Runs { more, runs: some }, &[], READ_LIMIT)?;
        if !more {
            return Ok(());
        }
    }
}
