//! The connection on which the offload process asks its VMM, one question and its answer at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::channel::{Channel, VMM};
use super::error::OffloadError;
use super::protocol::Message;

/// How long the VMM may take to answer, and between two parts of an answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The connection, for all that asks on it.
#[derive(Clone, Debug)]
pub(super) struct SharedLine(Arc<Mutex<Line>>);

impl SharedLine {
    pub(super) fn new(channel: Channel) -> Self {
        Self(Arc::new(Mutex::new(Line(Some(channel)))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Line> {
        // A panic elsewhere leaves at worst an answer unread, which the next question finds out of place.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection, until it fails: a late answer would be taken for that of the next question.
#[derive(Debug)]
pub(super) struct Line(Option<Channel>);

impl Line {
    /// Asks, and gives each part of the answer but the last to `take`; returns the last.
    pub(super) fn ask(
        &mut self,
        request: &Message,
        action: &'static str,
        take: &mut dyn FnMut(&mut Channel, Message) -> Result<(), OffloadError>,
    ) -> Result<Message, OffloadError> {
        self.tell(request)?;
        self.hear(action, take)
    }

    /// Sends a message that is not answered.
    pub(super) fn tell(&mut self, message: &Message) -> Result<(), OffloadError> {
        self.with(|channel| channel.send(message, &[], ANSWER_LIMIT))
    }

    /// Gives each part of an answer but the last to `take`; returns the last.
    pub(super) fn hear(
        &mut self,
        action: &'static str,
        take: &mut dyn FnMut(&mut Channel, Message) -> Result<(), OffloadError>,
    ) -> Result<Message, OffloadError> {
        self.with(|channel| {
            loop {
                match channel.receive(action, ANSWER_LIMIT)?.0 {
                    part @ (Message::Piece { .. }
                    | Message::Runs { more: true, .. }
                    | Message::Vcpus(_)
                    | Message::Figures(_)) => take(channel, part)?,
                    answer => return Ok(answer),
                }
            }
        })
    }

    fn with<T>(
        &mut self,
        act: impl FnOnce(&mut Channel) -> Result<T, OffloadError>,
    ) -> Result<T, OffloadError> {
        let gone = OffloadError::Gone { peer: VMM, waiting_for: "an earlier answer" };
        let acted = act(self.0.as_mut().ok_or(gone)?);
        if acted.is_err() {
            self.0 = None;
        }
        acted
    }

    /// Asks what is answered by `Done`.
    pub(super) fn done(&mut self, request: &Message, action: &'static str) -> Result<(), OffloadError> {
        let answer =
            self.ask(request, action, &mut |channel, part| Err(channel.unexpected("Done", &part)))?;
        self.is_done(answer, action)
    }

    /// Whether an answer is `Done`.
    pub(super) fn is_done(&mut self, answer: Message, action: &'static str) -> Result<(), OffloadError> {
        match answer {
            Message::Done => Ok(()),
            other => Err(self.not("Done", other, action)),
        }
    }

    /// The error of an answer that is none of those `expected`: the VMM's, or that of a VMM that is out of step.
    pub(super) fn not(
        &mut self,
        expected: &'static str,
        answer: Message,
        action: &'static str,
    ) -> OffloadError {
        match answer {
            Message::Failed { text } => OffloadError::Refused { peer: VMM, action, text },
            other => {
                self.0 = None;
                OffloadError::Unexpected { peer: VMM, expected, got: other.name() }
            }
        }
    }
}
