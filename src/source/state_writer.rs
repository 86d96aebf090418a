//! The state of devices and of the machine as it leaves: cut into records and chunks, no more under way than the
//! destination takes.

use std::io::{self, Write};
use std::time::Duration;

use super::error::SourceError;
use super::link::{Link, refusal};
use crate::progress::Progress;
use crate::transport::control::Wait;
use crate::vm::VmError;
use crate::wire::STATE_WINDOW_BYTES;
use crate::wire::state::{RECORD_BYTES_MAX, RecordKind, record};

/// How often a writer that has to wait looks whether the destination has taken more.
const ROOM_POLL: Duration = Duration::from_micros(500);

/// Writes device state into the stream. What is written may be on its way at once; [`finish`](Self::finish) sends the
/// rest.
pub(super) struct StateWriter<'l> {
    link: &'l mut Link,
    progress: &'l Progress,
    wait: Wait<'l>,
    buffer: Vec<u8>,
    /// Why the stream stopped, which an [`io::Error`] cannot carry through the VMM.
    failure: Option<SourceError>,
}

impl<'l> StateWriter<'l> {
    pub fn new(link: &'l mut Link, progress: &'l Progress, wait: Wait<'l>) -> Self {
        Self { link, progress, wait, buffer: Vec::new(), failure: None }
    }

    /// The VMM has written its devices' state, or failed to.
    pub fn finish(mut self, saved: Result<(), VmError>) -> Result<(), SourceError> {
        let saved =
            saved.map_err(|source| SourceError::Vm { action: "save the state of its devices", source });
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => saved.and_then(|()| self.send_buffered(RecordKind::Device)),
        }
    }

    /// Sends the state of the machine.
    pub fn machine(mut self, state: &[u8]) -> Result<(), SourceError> {
        for piece in state.chunks(RECORD_BYTES_MAX) {
            self.buffer.extend_from_slice(piece);
            self.send_buffered(RecordKind::Machine)?;
        }
        Ok(())
    }

    /// What was sent of the state of the machine is void.
    pub fn void(mut self) -> Result<(), SourceError> {
        // A record has content.
        self.buffer.push(0);
        self.send_buffered(RecordKind::Void)
    }

    fn send_buffered(&mut self, kind: RecordKind) -> Result<(), SourceError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.wait.check("the end of device state")?;
        let record = record(kind, &self.buffer);
        self.buffer.clear();
        let bytes = record.len() as u64;
        self.wait_for_room(bytes)?;
        self.link.sender.send_state(self.link.state_bytes, record)?;
        self.link.state_bytes += bytes;
        self.progress.update(|status| status.state_bytes = self.link.state_bytes);
        Ok(())
    }

    fn wait_for_room(&self, bytes: u64) -> Result<(), SourceError> {
        loop {
            let under_way = self.link.state_under_way()?;
            if under_way + bytes <= STATE_WINDOW_BYTES {
                return Ok(());
            }
            self.wait.check("room for device state")?;
            if let Some(message) = self.link.control.poll("StateTaken")? {
                return Err(refusal(message, "StateTaken"));
            }
            std::thread::sleep(ROOM_POLL);
        }
    }
}

impl Write for StateWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(RECORD_BYTES_MAX - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == RECORD_BYTES_MAX
            && let Err(failure) = self.send_buffered(RecordKind::Device)
        {
            let error = io::Error::other(failure.to_string());
            self.failure = Some(failure);
            return Err(error);
        }
        Ok(taken)
    }

    /// Nothing has to be flushed: the rest goes with the end of the state.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
