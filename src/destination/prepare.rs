//! The third phase: everything is here. RAM is sealed and verified before state is restored, for restoring writes RAM;
//! then everything is done that can fail.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::DestinationError;
use super::incoming::Incoming;
use super::options::DestinationOptions;
use super::receive::{Arrived, Receiving};
use super::report::DestinationReport;
use crate::transport::control::{ControlError, Wait};
use crate::vm::{Paused, Vm};
use crate::wire::control::Message;

/// The VM could run here now.
#[derive(Debug)]
pub(super) struct Prepared {
    pub paused: Paused,
    pub report: DestinationReport,
    /// When the source had sent everything.
    pub arrived_at: Instant,
}

/// How often the rest of the state is looked for.
const STATE_POLL: Duration = Duration::from_micros(100);

/// Brings the VM to where it could run, and says so.
pub(super) fn run(
    receiving: &mut Receiving,
    arrived: &Arrived,
    incoming: &Incoming,
    vm: &mut dyn Vm,
    options: &DestinationOptions,
    cancel: &AtomicBool,
) -> Result<Prepared, DestinationError> {
    let Arrived { ram_digest: theirs, state_bytes, at } = *arrived;
    let wait = Wait { deadline: at + options.commit, cancel };
    take_the_rest_of_state(receiving, incoming, vm, state_bytes, wait)?;
    let Receiving { receiver, state, verification, .. } = receiving;
    // The source says `Prepare` when every page has been acknowledged; from here on no connection writes RAM.
    receiver.seal(wait.deadline)?;
    let verified = verification.is_some();
    let ours = match verification {
        None => 0,
        Some(verification) => match verification.digest(receiver.arrived(), wait.deadline, cancel) {
            Some(digest) => digest.0,
            None => {
                wait.check("the digest of RAM")?;
                return Err(ControlError::Timeout { expected: "the digest of RAM" }.into());
            }
        },
    };
    if ours != theirs {
        return Err(DestinationError::DigestMismatch { ours, theirs });
    }
    let failed = |action| move |source| DestinationError::Vm { action, source };
    let paused = vm.restore_state(&state.machine).map_err(failed("restore the state"))?;
    vm.prepare().map_err(failed("take what the VM needs here"))?;
    let received = receiver.received();
    let report = DestinationReport {
        vm_id: incoming.vm_id().to_owned(),
        pages_received: received.pages,
        zero_pages: received.zero_pages,
        bytes_received: received.bytes,
        cleared_pages: received.cleared_pages,
        state_bytes,
        ram_digest_match: verified.then_some(true),
        ..DestinationReport::default()
    };
    incoming.control.send(&Message::Prepared { ram_digest: ours }, wait)?;
    Ok(Prepared { paused, report, arrived_at: at })
}

/// The last state may still be on its way when `Prepare` comes, on another connection.
fn take_the_rest_of_state(
    receiving: &mut Receiving,
    incoming: &Incoming,
    vm: &mut dyn Vm,
    state_bytes: u64,
    wait: Wait<'_>,
) -> Result<(), DestinationError> {
    let Receiving { receiver, state, .. } = receiving;
    while state.taken < state_bytes {
        wait.check("the rest of the state")?;
        if !state.take(receiver, &incoming.control, vm, wait)? {
            if let Some(message) = incoming.control.poll("the rest of the state")? {
                return Err(DestinationError::of_message(message, "nothing but state"));
            }
            std::thread::sleep(STATE_POLL);
        }
    }
    state.finish()
}
