//! The way to the destination: its control connection and its data connections, which outlive every phase.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::SourceError;
use crate::progress::Parameters;
use crate::transport::Sender;
use crate::transport::control::{ControlConnection, Wait};
use crate::wire::control::Message;

/// While the guest runs, the destination is asked this often whether it is alive.
const PING_EVERY: Duration = Duration::from_millis(100);
/// Before the guest is stopped, the destination must have answered a ping that is no older than this, or than two round
/// trips where those are longer.
const ALIVE_WITHIN: Duration = Duration::from_millis(250);
/// How long the destination is told about a failure at most: the guest runs here already.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// The way to the destination.
#[derive(Debug)]
pub(super) struct Link {
    pub control: ControlConnection,
    pub sender: Sender,
    /// Bytes of the state stream that were given to the data connections.
    pub state_bytes: u64,
    /// Whether the destination forgets the state of a machine that runs on after all.
    pub may_call_off: bool,
    asked: Instant,
}

impl Link {
    pub fn new(control: ControlConnection, sender: Sender, may_call_off: bool) -> Self {
        let counters = sender.counters();
        control.watch_elsewhere(move || counters.bytes_acknowledged());
        Self { control, sender, state_bytes: 0, may_call_off, asked: Instant::now() }
    }

    /// To be called all the time while the guest runs: notices a destination that gives up or is gone, and keeps a fresh
    /// sign of life at hand.
    pub fn watch_peer(&mut self, parameters: &Parameters) -> Result<(), SourceError> {
        if let Some(message) = self.control.poll("a sign of life")? {
            return Err(refusal(message, "no message"));
        }
        if self.asked.elapsed() >= PING_EVERY {
            self.asked = Instant::now();
            self.control
                .ping(Wait { deadline: self.asked + PING_EVERY, cancel: parameters.cancel_flag() })?;
        }
        Ok(())
    }

    /// Whether the destination has answered a recent ping on the very connection that `Commit` is going to take: before
    /// that the guest is not stopped.
    pub fn is_alive(&self) -> bool {
        let recent = ALIVE_WITHIN.max(self.round_trip() * 2 + PING_EVERY);
        Instant::now().checked_sub(recent).is_none_or(|since| self.control.answered_since(since))
    }

    /// The shortest round trip that was seen, of a ping or a frame; nothing before the first answer. Either is too long by what
    /// busy threads of both hosts add, and a frame also by the time that it takes.
    pub fn round_trip(&self) -> Duration {
        let seen = [self.control.round_trip(), self.sender.counters().round_trip()];
        seen.into_iter().flatten().min().unwrap_or_default()
    }

    /// Bytes of state that are on their way. The destination's word for what it has taken is believed as far as it can
    /// be true; it may overtake the acknowledgements of the data connections.
    pub fn state_under_way(&self) -> Result<u64, SourceError> {
        let taken = self.control.state_taken();
        let not_taken = self.state_bytes.checked_sub(taken).ok_or(SourceError::Unexpected {
            expected: "StateTaken of what was sent",
            got: "StateTaken of more",
        })?;
        Ok(not_taken.max(self.sender.state_under_way()))
    }

    /// The destination's next message, unless it ends the migration.
    pub fn answer(&self, expected: &'static str, wait: Wait<'_>) -> Result<Message, SourceError> {
        match self.control.receive(expected, wait)? {
            message @ (Message::Refuse(..) | Message::Abort(..)) => Err(refusal(message, expected)),
            message => Ok(message),
        }
    }

    /// A destination that ended the migration has said why, before its connections broke.
    pub fn explained_by_peer(&self, error: SourceError) -> SourceError {
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
