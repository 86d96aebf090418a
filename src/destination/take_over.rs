//! The last phase: `Commit` arrives and the VM runs here, or the source hears that it does not and never will.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::DestinationError;
use super::incoming::Incoming;
use super::options::DestinationOptions;
use super::prepare::Prepared;
use super::report::DestinationReport;
use crate::transport::control::Wait;
use crate::vm::Vm;
use crate::wire::control::Message;

/// How long the source is told that the VM runs here.
const TELL_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits for `Commit` and runs the VM. A `Commit` that has come is obeyed even if somebody cancels at that moment.
pub(super) fn run(
    prepared: Prepared,
    incoming: &Incoming,
    vm: &mut dyn Vm,
    options: &DestinationOptions,
    cancel: &AtomicBool,
) -> Result<DestinationReport, DestinationError> {
    let Prepared { paused, mut report, arrived_at } = prepared;
    let wait = Wait { deadline: Instant::now() + options.commit, cancel };
    match incoming.control.receive("Commit", wait) {
        Ok(Message::Commit) => {}
        Ok(other) => return Err(DestinationError::of_message(other, "Commit")),
        Err(error) => return Err(error.into()),
    }
    // The caller tells the source if this fails: it lets the VM run there again.
    vm.resume(paused).map_err(|source| DestinationError::Vm { action: "resume", source })?;
    report.take_over_ms = arrived_at.elapsed().as_secs_f64() * 1e3;
    let never = AtomicBool::new(false);
    let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel: &never };
    if let Err(error) = incoming.control.send(&Message::Running, wait) {
        tracing::warn!(%error, "the VM runs here, but the source could not be told");
    }
    Ok(report)
}
