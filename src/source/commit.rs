//! The last phase: `Commit` leaves, and from then on only the destination's word counts.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::error::SourceError;
use super::link::{Link, refusal};
use super::migration::Migration;
use super::report::{SourceReport, millis};
use super::stop_and_copy::Prepared;
use crate::track::DirtySource;
use crate::transport::control::Wait;
use crate::vm::{Paused, Vm};
use crate::wire::control::Message;

/// The VM is not this side's any more.
#[derive(Debug)]
pub(super) enum HandedOver {
    /// The destination runs it.
    Confirmed,
    /// Nobody knows whether the destination runs it.
    Unconfirmed(Paused, SourceError),
}

/// Hands the VM over. A `Commit` that could not be written whole cannot be read by the destination either: that
/// failure still leaves the VM here.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    prepared: Prepared,
    migration: &mut Migration<'_, V, D>,
    link: &Link,
) -> Result<HandedOver, SourceError> {
    let progress = migration.progress.clone();
    let wait = prepared.standstill.wait(progress.parameters().cancel_flag());
    // A destination that has had enough has said so by now, or ended.
    let may_leave = wait.check("Commit to leave").and_then(|()| link.control.poll("Commit to leave"));
    match may_leave {
        Ok(None) => {}
        Ok(Some(message)) => {
            return Err(prepared.standstill.undo(migration, link, refusal(message, "nothing")));
        }
        Err(error) => return Err(prepared.standstill.undo(migration, link, error.into())),
    }
    if let Err(source) = migration.vm.hand_over() {
        let error = SourceError::Vm { action: "hand the VM over", source };
        return Err(prepared.standstill.undo(migration, link, error));
    }
    if let Err(error) = link.control.send(&Message::Commit, wait) {
        return Err(prepared.standstill.undo(migration, link, error.into()));
    }
    // From here on a wish to cancel comes too late.
    let never = AtomicBool::new(false);
    let wait = Wait { deadline: Instant::now() + migration.options.confirm_timeout, cancel: &never };
    let cause = match link.control.receive("Running", wait) {
        Ok(Message::Running) => {
            confirmed(&prepared, migration);
            return Ok(HandedOver::Confirmed);
        }
        // A definite no: the VM is this side's again.
        Ok(refused @ Message::Abort(..)) => {
            return Err(prepared.standstill.undo(migration, link, refusal(refused, "Running")));
        }
        Ok(other) => refusal(other, "Running"),
        Err(error) => error.into(),
    };
    Ok(HandedOver::Unconfirmed(prepared.standstill.paused, cause))
}

/// The VM is gone from here.
fn confirmed<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    prepared: &Prepared,
    migration: &mut Migration<'_, V, D>,
) {
    let report = &mut migration.report;
    report.handover_ms = millis(prepared.copied_at.elapsed());
    report.downtime_ms = millis(prepared.standstill.since.elapsed());
    report.total_ms = millis(migration.started.elapsed());
    report.downtime_limit_kept = report.downtime_ms <= report.downtime_limit_ms;
    if !report.downtime_limit_kept {
        tracing::warn!(
            downtime_ms = report.downtime_ms,
            limit_ms = report.downtime_limit_ms,
            "the guest stood still for longer than the downtime limit"
        );
    }
    migration.stop_tracking();
}

/// How a migration that was handed over ended.
#[derive(Debug)]
#[must_use = "an unconfirmed migration leaves the VM paused until somebody decides"]
pub enum Outcome<'a, V: ?Sized, D: ?Sized> {
    /// The destination runs the VM.
    HandedOver(Box<SourceReport>),
    /// Nobody knows whether the destination runs it.
    Unconfirmed(Unconfirmed<'a, V, D>),
}

impl<'a, V: ?Sized, D: ?Sized> Outcome<'a, V, D> {
    /// The report, or the undecided end.
    ///
    /// # Errors
    ///
    /// [`Unconfirmed`].
    pub fn confirmed(self) -> Result<SourceReport, Unconfirmed<'a, V, D>> {
        match self {
            Self::HandedOver(report) => Ok(*report),
            Self::Unconfirmed(unconfirmed) => Err(unconfirmed),
        }
    }
}

/// The VM was handed over, and the destination never said that it runs. It may run there: it stays paused here, its RAM
/// and tracking as they were, until somebody has looked and takes one of the two ways out.
#[must_use = "the VM stays paused until it is kept or released"]
pub struct Unconfirmed<'a, V: ?Sized, D: ?Sized> {
    /// Boxed: everything that a migration is, beside a result of a few words.
    migration: Box<Migration<'a, V, D>>,
    paused: Paused,
    cause: Box<SourceError>,
}

impl<'a, V: Vm + ?Sized, D: DirtySource + ?Sized> Unconfirmed<'a, V, D> {
    pub(super) fn new(migration: Migration<'a, V, D>, paused: Paused, cause: SourceError) -> Self {
        Self { migration: Box::new(migration), paused, cause: Box::new(cause) }
    }

    /// The VM certainly does not run at the destination, and never will: it runs on here. Everything that was harvested
    /// is dirty again, and tracking is off.
    ///
    /// # Errors
    ///
    /// [`SourceError::Vm`] if the VMM cannot resume it, and the VM as it was: still paused, still to be decided on.
    pub fn keep(mut self) -> Result<(), (Self, Box<SourceError>)> {
        match self.migration.vm.resume(self.paused) {
            Ok(()) => {
                self.migration.tracker.give_back(&self.migration.taken);
                self.migration.stop_tracking();
                Ok(())
            }
            Err(source) => {
                // `Vm::resume` leaves the VM paused when it fails.
                self.paused = Paused::declare_every_vcpu_is_outside_kvm_run();
                Err((self, Box::new(SourceError::Vm { action: "resume the VM that it keeps", source })))
            }
        }
    }

    /// The VM runs at the destination: it is not this side's any more. Tracking is off, and RAM may be freed.
    pub fn release(mut self) -> SourceReport {
        self.migration.stop_tracking();
        self.migration.report
    }
}

impl<V: ?Sized, D: ?Sized> Unconfirmed<'_, V, D> {
    /// Why no confirmation came.
    pub fn cause(&self) -> &SourceError {
        &self.cause
    }
}

impl<V: ?Sized, D: ?Sized> fmt::Debug for Unconfirmed<'_, V, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unconfirmed").field("cause", &self.cause).finish_non_exhaustive()
    }
}

impl<V: ?Sized, D: ?Sized> fmt::Display for Unconfirmed<'_, V, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the VM was handed over but the destination did not confirm that it runs ({}); it stays paused here: find \
             out whether it runs there, then keep it here or release it",
            self.cause
        )
    }
}
