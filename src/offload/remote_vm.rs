//! The VM as the offload process asks its VMM about it: each question of a migration is a message and its answer.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::error::OffloadError;
use super::line::{ANSWER_LIMIT, SharedLine};
use super::protocol::{End, Message, PIECE_BYTES_MAX};
use crate::page_set::PageSet;
use crate::vm::{Moment, Paused, Quiesced, Vm, VmError};

/// How old an answer about the device state that is left may be: the migration asks each millisecond.
const BYTES_LEFT_VALID: Duration = Duration::from_millis(10);

/// A VM in another process.
#[derive(Debug)]
pub struct RemoteVm {
    line: SharedLine,
    bytes_left: Option<(Instant, u64)>,
}

impl RemoteVm {
    pub(super) fn new(line: SharedLine) -> Self {
        Self { line, bytes_left: None }
    }

    fn done(&self, request: &Message, action: &'static str) -> Result<(), OffloadError> {
        self.line.lock().done(request, action)
    }

    /// Tells the VMM how the migration ended.
    pub(super) fn end(self, end: End, text: &str) -> Result<(), OffloadError> {
        self.done(&Message::Ended { end, text: text.to_owned() }, "end the migration")
    }
}

impl Vm for RemoteVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.done(&Message::Pause, "pause")?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        Ok(self.done(&Message::Resume, "resume")?)
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        let mut state = Vec::new();
        let mut line = self.line.lock();
        let answer = line.ask(&Message::SaveState, "save its state", &mut |channel, part| match part {
            Message::Piece { bytes } => {
                state.extend_from_slice(&bytes);
                Ok(())
            }
            other => Err(channel.unexpected("Piece", &other)),
        })?;
        line.is_done(answer, "save its state")?;
        Ok(state)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        for piece in state.chunks(PIECE_BYTES_MAX) {
            self.line.lock().tell(&Message::MachineState { piece: piece.to_vec() })?;
        }
        self.done(&Message::RestoreState, "restore its state")?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, index: usize) {
        let Ok(index) = u32::try_from(index) else { return };
        if let Err(error) = self.line.lock().tell(&Message::Kick { index }) {
            tracing::debug!(%error, "a vCPU was not kicked");
        }
    }

    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        self.done(&Message::Quiesce, "stop its devices")?;
        Ok(Quiesced::declare_no_device_writes(paused))
    }

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        self.bytes_left = None;
        let running = match moment {
            Moment::Running { bytes } => Some(bytes),
            Moment::Stopped(_) => None,
        };
        let action = "save the state of its devices";
        let mut failure: Option<io::Error> = None;
        let mut line = self.line.lock();
        let answer =
            line.ask(&Message::SaveDeviceState { running }, action, &mut |channel, part| match part {
                // The VMM is told to stop, and what it has sent until then is read and dropped.
                Message::Piece { .. } if failure.is_some() => Ok(()),
                Message::Piece { bytes } => match out.write_all(&bytes) {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        failure = Some(error);
                        channel.send(&Message::Enough, &[], ANSWER_LIMIT)
                    }
                },
                other => Err(channel.unexpected("Piece", &other)),
            })?;
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(line.is_done(answer, action)?),
        }
    }

    fn device_state_bytes_left(&mut self) -> u64 {
        if let Some((asked, bytes)) = self.bytes_left
            && asked.elapsed() < BYTES_LEFT_VALID
        {
            return bytes;
        }
        let action = "say how much device state is left";
        let answer = self.line.lock().ask(&Message::DeviceStateBytesLeft, action, &mut |channel, part| {
            Err(channel.unexpected("Bytes", &part))
        });
        // Whoever asks next finds out that the connection has failed.
        let bytes = if let Ok(Message::Bytes(bytes)) = answer { bytes } else { 0 };
        self.bytes_left = Some((Instant::now(), bytes));
        bytes
    }

    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        for piece in piece.chunks(PIECE_BYTES_MAX) {
            self.done(&Message::LoadDeviceState { piece: piece.to_vec() }, "load the state of a device")?;
        }
        Ok(())
    }

    fn discarded_pages(&mut self, discarded: &mut PageSet) {
        let mut take = |_: &mut Channel, part| {
            if let Message::Runs { runs, .. } = part {
                runs.into_iter().for_each(|run| discarded.insert_run(run));
            }
            Ok(())
        };
        let mut line = self.line.lock();
        match line.ask(&Message::DiscardedPages, "say which pages it has discarded", &mut take) {
            Ok(Message::Runs { runs, .. }) => runs.into_iter().for_each(|run| discarded.insert_run(run)),
            // They are sent, which costs time and no page.
            other => tracing::warn!(?other, "the VMM did not say which pages it has discarded"),
        }
    }

    fn hand_over(&mut self) -> Result<(), VmError> {
        Ok(self.done(&Message::HandOver, "hand over")?)
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        Ok(self.done(&Message::Prepare, "take what the VM needs")?)
    }

    fn release(&mut self) {
        if let Err(error) = self.done(&Message::Release, "give back what the VM needed") {
            tracing::debug!(%error, "the VMM gives back by itself");
        }
    }
}
