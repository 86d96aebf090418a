//! The third phase: the guest stands still, and everything that is left goes to the destination.
//!
//! The order is that in which nothing is lost: devices are quiesced, their state and the machine's is saved, and only
//! then comes the last harvest, because saving state writes guest memory. What was dirty before leaves meanwhile.
//!
//! Every wait of this phase ends with one budget. When it is spent, or anything fails, the guest runs here again before
//! anything else is done.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use super::error::SourceError;
use super::link::{Link, refusal};
use super::migration::Migration;
use super::report::millis;
use super::standstill::Standstill;
use super::state_writer::StateWriter;
use crate::page_set::PageSet;
use crate::progress::RoundReport;
use crate::track::DirtySource;
use crate::transport::RoundSent;
use crate::transport::control::{ControlError, Wait};
use crate::vm::{Moment, Vm};
use crate::wire::control::Message;

/// The destination could run the VM; the guest stands still here.
#[derive(Debug)]
pub(super) struct Prepared {
    pub standstill: Standstill,
    /// When the last page and the last piece of state were in place there.
    pub copied_at: Instant,
}

/// Brings the destination to where it could run the VM.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    mut standstill: Standstill,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Prepared, SourceError> {
    // Unwind safety: what a panic leaves half done is given up with the migration.
    let brought = catch_unwind(AssertUnwindSafe(|| bring_over(&mut standstill, migration, link)));
    match brought {
        Ok(Ok(copied_at)) => Ok(Prepared { standstill, copied_at }),
        Ok(Err(error)) => Err(standstill.undo(migration, link, error)),
        Err(panic) => {
            // A panic in the VMM's code is no reason to leave its guest standing.
            let _ = standstill.undo(migration, link, SourceError::Cancelled);
            resume_unwind(panic)
        }
    }
}

fn bring_over<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: &mut Standstill,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Instant, SourceError> {
    let progress = migration.progress.clone();
    let wait = standstill.wait(progress.parameters().cancel_flag());
    let _nothing_holds_bytes_back = link.sender.last_phase();
    if let Some(pages) = standstill.round_pages.take() {
        let sent = in_place(link, wait)?;
        migration.round_sent(
            &sent,
            pages,
            RoundReport { pages_dirtied: standstill.left.len(), ..Default::default() },
        );
    }
    let (number, pages) = (migration.next_round(), standstill.left.len());
    link.sender.begin_round(number, std::mem::take(&mut standstill.left))?;

    let rest = save_state(standstill, migration, link, wait)?;
    if let Some(verification) = &mut migration.verification {
        verification.harvested(&rest);
        verification.settle();
    }
    let sent = in_place(link, wait)?;
    migration.round_sent(&sent, pages, RoundReport { pages_dirtied: rest.len(), ..Default::default() });
    if !rest.is_empty() {
        let (number, pages) = (migration.next_round(), rest.len());
        link.sender.begin_round(number, rest)?;
        let sent = in_place(link, wait)?;
        migration.round_sent(&sent, pages, RoundReport::default());
    }
    let copied_at = Instant::now();
    migration.report.channel_reports = super::report::channel_reports(&link.sender.counters());
    prepare(migration, link, wait)?;
    Ok(copied_at)
}

/// Devices stand still, state is saved; then comes what was written until then.
fn save_state<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: &Standstill,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
    wait: Wait<'_>,
) -> Result<PageSet, SourceError> {
    let begun = Instant::now();
    let failed = |action| move |source| SourceError::Vm { action, source };
    let quiesced = migration.vm.quiesce(&standstill.paused).map_err(failed("stop its devices"))?;
    let mut writer = StateWriter::new(link, &migration.progress, wait);
    let saved = migration.vm.save_device_state(Moment::Stopped(&quiesced), &mut writer);
    writer.finish(saved)?;
    let saved = migration.vm.save_state(&quiesced);
    let machine = saved.map_err(failed("save the vCPU and device state"))?;
    let settled = quiesced.state_is_saved();
    let mut rest = PageSet::new(migration.memory.end());
    migration.tracker.harvest_final(&settled, &mut rest)?;
    migration.options.send.discards.take_into(&mut rest, migration.memory);
    migration.taken.union(&rest);
    migration.report.save_state_ms = millis(begun.elapsed());
    StateWriter::new(link, &migration.progress, wait).machine(&machine)?;
    migration.report.state_bytes = link.state_bytes;
    Ok(rest)
}

/// Waits until every page of the round is in place at the destination.
fn in_place(link: &mut Link, wait: Wait<'_>) -> Result<RoundSent, SourceError> {
    loop {
        let poll = wait.next_poll().saturating_duration_since(Instant::now());
        if let Some(sent) = link.sender.wait_round(poll)? {
            return Ok(sent);
        }
        wait.check("the last pages to be in place")?;
        if let Some(message) = link.control.poll("Prepared")? {
            return Err(refusal(message, "Prepared"));
        }
    }
}

/// Everything has been sent: the destination verifies, restores and takes what can fail.
fn prepare<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
    link: &Link,
    wait: Wait<'_>,
) -> Result<(), SourceError> {
    let verifying = Instant::now();
    let ours = match &migration.verification {
        None => 0,
        Some(verification) => match verification.digest(wait.deadline, wait.cancel) {
            Some(digest) => digest.0,
            None => {
                wait.check("the digest of RAM")?;
                return Err(ControlError::Timeout { expected: "the digest of RAM" }.into());
            }
        },
    };
    let state_bytes = link.state_bytes;
    link.control.send(&Message::Prepare { ram_digest: ours, state_bytes }, wait)?;
    match link.answer("Prepared", wait)? {
        Message::Prepared { ram_digest: theirs } if theirs == ours => {}
        Message::Prepared { ram_digest: theirs } => return Err(SourceError::DigestMismatch { ours, theirs }),
        other => return Err(refusal(other, "Prepared")),
    }
    if migration.verification.is_some() {
        migration.report.verify_ms = millis(verifying.elapsed());
    }
    Ok(())
}
