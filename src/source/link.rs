//! The way to the destination: its control connection and its data connections, which outlive every phase.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::SourceError;
use crate::progress::Parameters;
use crate::transport::Sender;
use crate::transport::control::{ControlConnection, ControlError, Wait};
use crate::wire::control::Message;

/// While the guest runs, the destination is asked this often whether it is alive.
const PING_EVERY: Duration = Duration::from_millis(100);
/// Before the guest is stopped, the destination must have answered a ping that is no older than this.
const ALIVE_WITHIN: Duration = Duration::from_millis(250);
/// How long the destination is told about a failure at most: the guest runs here already.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// A wait for the answer to a ping looks this often whether it has come.
const ALIVE_POLL: Duration = Duration::from_micros(200);

/// The way to the destination.
#[derive(Debug)]
pub(super) struct Link {
    pub control: ControlConnection,
    pub sender: Sender,
    /// Bytes of the state stream that were given to the data connections.
    pub state_bytes: u64,
    pub peer_timeout: Duration,
    asked: Instant,
    bytes_seen: u64,
}

impl Link {
    pub fn new(control: ControlConnection, sender: Sender, peer_timeout: Duration) -> Self {
        let asked = Instant::now();
        Self { control, sender, state_bytes: 0, peer_timeout, asked, bytes_seen: 0 }
    }

    /// To be called all the time while the guest runs: notices a destination that gives up or is gone, and keeps a fresh
    /// sign of life at hand.
    pub fn watch_peer(&mut self, parameters: &Parameters) -> Result<(), SourceError> {
        if let Some(message) = self.control.poll("a sign of life")? {
            return Err(refusal(message, "no message"));
        }
        let pages = self.sender.handle().totals();
        let acknowledged = pages.pages_sent + pages.zero_pages;
        if acknowledged != self.bytes_seen {
            self.bytes_seen = acknowledged;
            self.control.heard();
        }
        if self.asked.elapsed() >= PING_EVERY {
            self.asked = Instant::now();
            self.control
                .ping(Wait { deadline: self.asked + self.peer_timeout, cancel: parameters.cancel_flag() })?;
        }
        Ok(())
    }

    /// To be called before the guest is stopped: returns once the destination has answered a recent ping on the very
    /// connection that `Commit` is going to take.
    pub fn confirm_alive(&mut self, parameters: &Parameters) -> Result<(), SourceError> {
        let begun = Instant::now();
        let fresh = begun.checked_sub(ALIVE_WITHIN).unwrap_or(begun);
        while !self.control.answered_since(fresh) {
            if parameters.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            if begun.elapsed() > self.peer_timeout {
                return Err(ControlError::Silent { silent: begun.elapsed() }.into());
            }
            self.watch_peer(parameters)?;
            std::thread::sleep(ALIVE_POLL);
        }
        Ok(())
    }

    /// The destination's next message, which must be one that `accept` takes.
    pub fn answer(&self, expected: &'static str, wait: Wait<'_>) -> Result<Message, SourceError> {
        match self.control.receive(expected, wait)? {
            message @ (Message::Refuse(..) | Message::Abort(..)) => Err(refusal(message, expected)),
            message => Ok(message),
        }
    }

    /// A destination that ended the migration has said why, before its connections broke.
    pub fn cause(&self, error: SourceError) -> SourceError {
        let broken = matches!(error, SourceError::Transport(_) | SourceError::Control(_));
        match self.control.poll("Abort") {
            Ok(Some(message @ Message::Abort(..))) if broken => refusal(message, "Abort"),
            _ => error,
        }
    }
}

/// Tells the destination that the VM stays here. The connection may be what failed; then it notices by itself.
pub(super) fn tell_of_the_end(control: &ControlConnection, error: &SourceError) {
    if matches!(error, SourceError::Aborted { .. } | SourceError::Refused { .. }) {
        return;
    }
    let never = AtomicBool::new(false);
    let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel: &never };
    let _ = control.send(&Message::Abort(error.reason(), error.to_string()), wait);
}

/// The error that a message is which ends the migration, or comes when it must not.
pub(super) fn refusal(message: Message, expected: &'static str) -> SourceError {
    match message {
        Message::Refuse(reason, text) => SourceError::Refused { reason, text },
        Message::Abort(reason, text) => SourceError::Aborted { reason, text },
        other => SourceError::Unexpected { expected, got: other.name() },
    }
}
