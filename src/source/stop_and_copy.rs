//! The third phase: the guest stands still, and everything that is left goes to the destination.
//!
//! The order is that in which nothing is lost: devices are quiesced, their state and the machine's is saved, and only
//! then comes the last harvest, because saving state writes guest memory. What was dirty before leaves meanwhile.
//!
//! A guard looks at the pages as they arrive, and calls the switchover off when they are going to take too long; then the guest
//! runs on and so do the rounds. It ends with `Prepare`: from then on the destination restores what cannot be taken back, and
//! little is left to be sent.
//!
//! Every wait of this phase ends with one budget. When it is spent, or anything fails, the guest runs here again before
//! anything else is done.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use super::error::SourceError;
use super::link::{Link, refusal};
use super::migration::Migration;
use super::precopy::UnderWay;
use super::report::millis;
use super::standstill::Standstill;
use super::state_writer::StateWriter;
use super::steering::Steering;
use crate::converge::guard::TooLong;
use crate::page_set::PageSet;
use crate::progress::{GaveWay, RoundReport};
use crate::track::DirtySource;
use crate::transport::RoundSent;
use crate::transport::control::{ControlError, Wait};
use crate::vm::{Moment, Vm};
use crate::wire::control::Message;

/// The destination is told for so long that the state is void.
const VOID_TIMEOUT: Duration = Duration::from_secs(5);

/// The destination could run the VM; the guest stands still here.
#[derive(Debug)]
pub(super) struct Prepared {
    pub standstill: Standstill,
    /// When the last page and the last piece of state were in place there.
    pub copied_at: Instant,
}

/// How a standstill ended without a failure.
#[derive(Debug)]
pub(super) enum Ended {
    Prepared(Box<Prepared>),
    /// It was going to last too long: the guest runs, `under_way` is still being sent, and `given_back` pages were harvested
    /// since the stop.
    CalledOff {
        under_way: UnderWay,
        given_back: u64,
    },
}

/// What a standstill comes to.
enum Brought {
    Over(Instant),
    /// The guard says so; the round that is being sent began with so many pages.
    TooLong(TooLong, u64),
}

/// Brings the destination to where it could run the VM, or lets the guest run on.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    mut standstill: Standstill,
    steering: &mut Steering,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Ended, SourceError> {
    let state_bytes_before = link.state_bytes;
    // Unwind safety: what a panic leaves half done is given up with the migration.
    let brought = catch_unwind(AssertUnwindSafe(|| bring_over(&mut standstill, steering, migration, link)));
    match brought {
        Ok(Ok(Brought::Over(copied_at))) => Ok(Ended::Prepared(Box::new(Prepared { standstill, copied_at }))),
        Ok(Ok(Brought::TooLong(too_long, pages_to_send))) => {
            let state_left = link.state_bytes > state_bytes_before;
            steering.called_off(too_long.pages_left, too_long.pages_fit);
            call_off(standstill, pages_to_send, state_left, migration, link)
        }
        Ok(Err(error)) => Err(standstill.undo(migration, link, error)),
        Err(panic) => {
            // A panic in the VMM's code is no reason to leave its guest standing.
            let _ = standstill.undo(migration, link, SourceError::Cancelled);
            resume_unwind(panic)
        }
    }
}

/// Lets the guest run on. What the channels have is still being sent: some of it is read while the guest writes it, and comes
/// again, because it is dirty.
fn call_off<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: Standstill,
    pages_to_send: u64,
    state_left: bool,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Ended, SourceError> {
    let Standstill { paused, since, left, unprotected, .. } = standstill;
    let stood_still = since.elapsed();
    if let Err(source) = migration.vm.resume(paused) {
        let error = SourceError::Vm { action: "resume a guest that was to stand still for too long", source };
        return Err(migration.give_up(link, error));
    }
    tracing::info!(?stood_still, "the switchover was called off: the guest runs on");
    migration.report.switchovers_called_off += 1;
    let mut carried = link.sender.recall();
    carried.union(&left);
    carried.subtract(&unprotected);
    migration.tracker.give_back(&unprotected);
    if state_left {
        let progress = migration.progress.clone();
        let cancel = progress.parameters().cancel_flag();
        let wait = Wait { deadline: Instant::now() + VOID_TIMEOUT, cancel };
        let void = StateWriter::new(link, &progress, wait).void();
        void.map_err(|error| migration.give_up(link, error))?;
    }
    Ok(Ended::CalledOff { under_way: UnderWay { pages_to_send, carried }, given_back: unprotected.len() })
}

fn bring_over<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: &mut Standstill,
    steering: &mut Steering,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<Brought, SourceError> {
    let progress = migration.progress.clone();
    let wait = standstill.wait(progress.parameters().cancel_flag());
    let _nothing_holds_bytes_back = link.sender.last_phase();
    if let Some(pages) = standstill.round_pages.take() {
        let more = standstill.left.len();
        let sent = match in_place(standstill, more, steering, migration, link)? {
            InPlace::All(sent) => sent,
            InPlace::TooLong(too_long) => return Ok(Brought::TooLong(too_long, pages)),
        };
        migration.round_sent(&sent, pages, RoundReport { pages_dirtied: more, ..Default::default() });
    }
    let (number, pages) = (migration.next_round(), standstill.left.len());
    let left = std::mem::replace(&mut standstill.left, PageSet::new(migration.memory.end()));
    link.sender.begin_round(number, left)?;

    let rest = save_state(standstill, migration, link, wait)?;
    if let Some(verification) = &mut migration.verification {
        verification.harvested(&rest);
        verification.settle();
    }
    let sent = match in_place(standstill, rest.len(), steering, migration, link)? {
        InPlace::All(sent) => sent,
        InPlace::TooLong(too_long) => return Ok(Brought::TooLong(too_long, pages)),
    };
    migration.round_sent(&sent, pages, RoundReport { pages_dirtied: rest.len(), ..Default::default() });
    if !rest.is_empty() {
        let (number, pages) = (migration.next_round(), rest.len());
        link.sender.begin_round(number, rest)?;
        let sent = match in_place(standstill, 0, steering, migration, link)? {
            InPlace::All(sent) => sent,
            InPlace::TooLong(too_long) => return Ok(Brought::TooLong(too_long, pages)),
        };
        migration.round_sent(&sent, pages, RoundReport::default());
    }
    let copied_at = Instant::now();
    migration.report.channel_reports = super::report::channel_reports(&link.sender.counters());
    prepare(migration, link, wait)?;
    Ok(Brought::Over(copied_at))
}

/// Devices stand still, state is saved; then comes what was written until then.
fn save_state<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: &mut Standstill,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
    wait: Wait<'_>,
) -> Result<PageSet, SourceError> {
    let (begun, state_bytes_before) = (Instant::now(), link.state_bytes);
    let failed = |action| move |source| SourceError::Vm { action, source };
    let quiesced = migration.vm.quiesce(&standstill.paused).map_err(failed("stop its devices"))?;
    let mut writer = StateWriter::new(link, &migration.progress, wait);
    let saved = migration.vm.save_device_state(Moment::Stopped(&quiesced), &mut writer);
    writer.finish(saved)?;
    let device_state_left = link.state_bytes > state_bytes_before;
    let saved = migration.vm.save_state(&quiesced);
    let machine = saved.map_err(failed("save the vCPU and device state"))?;
    let settled = quiesced.state_is_saved();
    let mut rest = PageSet::new(migration.memory.end());
    migration.tracker.harvest_final(&settled, &mut rest)?;
    migration.options.send.discards.take_into(&mut rest, migration.memory);
    migration.taken.union(&rest);
    standstill.unprotected.union(&rest);
    if device_state_left {
        // The destination's devices have it, and nothing takes it back.
        standstill.held = standstill.held.or(Some(GaveWay::DeviceStateLeft));
    }
    migration.report.save_state_ms = millis(begun.elapsed());
    StateWriter::new(link, &migration.progress, wait).machine(&machine)?;
    migration.report.state_bytes = link.state_bytes;
    Ok(rest)
}

/// How a wait for the end of a round went.
enum InPlace {
    All(RoundSent),
    TooLong(TooLong),
}

/// Waits until every page of the round is in place at the destination, `more` pages to follow it, or until the guard says that
/// this is going to take too long.
fn in_place<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    standstill: &mut Standstill,
    more: u64,
    steering: &mut Steering,
    migration: &mut Migration<'_, V, D>,
    link: &mut Link,
) -> Result<InPlace, SourceError> {
    let progress = migration.progress.clone();
    let wait = standstill.wait(progress.parameters().cancel_flag());
    loop {
        let poll = wait.next_poll().saturating_duration_since(Instant::now());
        if let Some(sent) = link.sender.wait_round(poll.min(standstill.guard.look_every()))? {
            return Ok(InPlace::All(sent));
        }
        wait.check("the last pages to be in place")?;
        if let Some(message) = link.control.poll("Prepared")? {
            return Err(refusal(message, "Prepared"));
        }
        steering.link_seen(&link.sender.handle());
        let too_long = standstill.guard.look(standstill.since.elapsed(), link.sender.pages_left() + more);
        match (too_long, standstill.held) {
            (None, _) => {}
            (Some(too_long), None) => return Ok(InPlace::TooLong(too_long)),
            (Some(too_long), Some(why)) => {
                migration.limit_gave_way(why, steering.downtime_limit(), too_long.expected);
            }
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
