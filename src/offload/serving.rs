//! The VMM's end serves what the offload process asks of the VM, in the order that loses nothing, and gets the guest going
//! again when that process is gone.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::channel::{Channel, OFFLOAD_PROCESS};
use super::error::OffloadError;
use super::pages::{READ_LIMIT, send_runs};
use super::protocol::{End, Message, PIECE_BYTES_MAX};
use super::tracking::{Stillness, Tracking};
use crate::layout::PageIndex;
use crate::os::sched::ShortSlice;
use crate::page_set::PageSet;
use crate::track::{LentPage, signs_of_life};
use crate::vm::{Moment, Paused, Quiesced, Vm, VmError};

/// The longest state of the machine that is restored: what a destination holds, and as much again.
const MACHINE_STATE_BYTES_MAX: usize = 128 << 20;

/// How often the wait for a request looks at everything else.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// An offload process that shows no sign of life for so long is frozen. It shows one ten times a second.
const SILENCE: Duration = Duration::from_secs(5);
/// The same while the guest stands still: no longer than a standstill may last by default.
const SILENCE_AT_STANDSTILL: Duration = Duration::from_secs(1);

/// A VM that is being asked about.
pub(super) struct Serving<'v> {
    channel: Channel,
    vm: &'v mut dyn Vm,
    /// What the offload process has of the tracker, if it does not follow the rings.
    tracking: Option<Tracking<'v>>,
    /// Where guest memory ends.
    end: PageIndex,
    standing: Standing,
    machine: Vec<u8>,
    /// What the VM had taken is given back already.
    released: bool,
}

/// What the guest does.
enum Standing {
    Runs,
    Paused(Paused),
    Quiesced(Paused),
    /// It may run at the destination.
    HandedOver(Paused),
    /// Its destination is here, and it has not run yet.
    Arriving,
    /// Its state is restored.
    Restored(Paused),
    /// A request is being answered.
    Changing,
}

/// Whose the VM is when nobody asks about it any more.
pub(super) enum Left {
    /// It runs here, and nowhere else.
    RunsHere,
    /// It stands still here, and may run at the destination.
    MayRunThere(Paused),
    /// It has not run here, and must not.
    NeverRan,
}

impl<'v> Serving<'v> {
    /// The VM of a source, which runs.
    pub(super) fn of_source(
        channel: Channel,
        vm: &'v mut dyn Vm,
        end: PageIndex,
        tracking: Option<Tracking<'v>>,
    ) -> Self {
        let standing = Standing::Runs;
        Self { channel, vm, tracking, end, standing, machine: Vec::new(), released: false }
    }

    /// The VM of a destination, which is built and has not run.
    pub(super) fn of_destination(channel: Channel, vm: &'v mut dyn Vm, end: PageIndex) -> Self {
        let standing = Standing::Arriving;
        Self { channel, vm, tracking: None, end, standing, machine: Vec::new(), released: false }
    }

    /// Serves requests until the migration has ended. `page` is where the offload process shows that it lives; `cancel` ends
    /// it from here, unless the VM is handed over.
    pub(super) fn serve(
        &mut self,
        page: &LentPage,
        cancel: &AtomicBool,
    ) -> Result<(End, String), OffloadError> {
        // A guest stands still while its migration waits for some of the answers.
        let _soon = ShortSlice::for_this_thread();
        let mut life = Life::default();
        loop {
            match self.channel.receive_within("a request", POLL)? {
                Some((message, _)) => {
                    if let Some(end) = self.answer(message)? {
                        return Ok(end);
                    }
                }
                None => life.check(signs_of_life(page), self.stands_still())?,
            }
            // Relaxed: a flag without data, read again at the next turn.
            if cancel.load(Ordering::Relaxed) && !self.is_handed_over() {
                return Err(OffloadError::Cancelled);
            }
        }
    }

    pub(super) fn is_handed_over(&self) -> bool {
        matches!(self.standing, Standing::HandedOver(_))
    }

    /// Whether the guest stands still at its source, and runs nowhere else.
    fn stands_still(&self) -> bool {
        matches!(self.standing, Standing::Paused(_) | Standing::Quiesced(_))
    }

    /// Answers one message; the end, if it was that.
    fn answer(&mut self, message: Message) -> Result<Option<(End, String)>, OffloadError> {
        let answer = match message {
            Message::StartTracking
            | Message::Observe { .. }
            | Message::Harvest(_)
            | Message::ProtectBehind { .. }
            | Message::GiveBack { .. }
            | Message::StopTracking
            | Message::AskFigures => return self.track(&message).map(|()| None),
            Message::Kick { index } => {
                if let Ok(index) = usize::try_from(index) {
                    self.vm.kick(index);
                }
                return Ok(None);
            }
            Message::MachineState { piece } => {
                if self.machine.len() + piece.len() > MACHINE_STATE_BYTES_MAX {
                    let (what, bytes) = ("the machine's state", self.machine.len() + piece.len());
                    return Err(OffloadError::TooLong { what, bytes, bytes_max: MACHINE_STATE_BYTES_MAX });
                }
                self.machine.extend_from_slice(&piece);
                return Ok(None);
            }
            // Came after the state was written: nobody waits for it.
            Message::Enough => return Ok(None),
            Message::Ended { end, text } => {
                self.say(&Message::Done)?;
                return Ok(Some((end, text)));
            }
            Message::DeviceStateBytesLeft => Message::Bytes(self.vm.device_state_bytes_left()),
            Message::DiscardedPages => {
                let mut discarded = PageSet::new(self.end);
                self.vm.discarded_pages(&mut discarded);
                return send_runs(&self.channel, &discarded).map(|()| None);
            }
            Message::Release => match &self.standing {
                Standing::Arriving | Standing::Restored(_) => {
                    self.release();
                    Message::Done
                }
                _ => out_of_order(),
            },
            Message::SaveDeviceState { running } => said(self.save_device_state(running)),
            Message::SaveState => match self.save_state() {
                Ok(state) => {
                    for piece in state.chunks(PIECE_BYTES_MAX) {
                        self.say(&Message::Piece { bytes: piece.to_vec() })?;
                    }
                    Message::Done
                }
                Err(error) => said(Err(error)),
            },
            Message::LoadDeviceState { piece } => match &self.standing {
                Standing::Arriving => said(self.vm.load_device_state(&piece)),
                _ => out_of_order(),
            },
            Message::Pause
            | Message::Resume
            | Message::Quiesce
            | Message::HandOver
            | Message::RestoreState
            | Message::Prepare => said(self.step(&message)),
            other => return Err(self.channel.unexpected("a request", &other)),
        };
        self.say(&answer)?;
        Ok(None)
    }

    /// Does what is asked of the tracker.
    fn track(&mut self, request: &Message) -> Result<(), OffloadError> {
        let stillness = match &self.standing {
            Standing::Paused(paused) => Stillness::Paused(paused),
            Standing::Quiesced(paused) => Stillness::Quiesced(paused),
            _ => Stillness::None,
        };
        match &mut self.tracking {
            Some(tracking) => tracking.answer(&self.channel, request, stillness),
            None => Err(self.channel.unexpected("a request to a VMM that has lent its rings", request)),
        }
    }

    fn release(&mut self) {
        if !std::mem::replace(&mut self.released, true) {
            self.vm.release();
        }
    }

    fn say(&self, message: &Message) -> Result<(), OffloadError> {
        self.channel.send(message, &[], READ_LIMIT)
    }

    /// Does a step that changes what the guest does.
    fn step(&mut self, request: &Message) -> Result<(), VmError> {
        // A panic in the VMM's code leaves `Changing`, in which nothing is done to the VM any more.
        let before = std::mem::replace(&mut self.standing, Standing::Changing);
        let (now, done) = match (request, before) {
            (Message::Pause, Standing::Runs) => match self.vm.pause() {
                Ok(paused) => (Standing::Paused(paused), Ok(())),
                Err(error) => (Standing::Runs, Err(error)),
            },
            (
                Message::Resume,
                Standing::Paused(paused)
                | Standing::Quiesced(paused)
                | Standing::HandedOver(paused)
                | Standing::Restored(paused),
            ) => match self.vm.resume(paused) {
                Ok(()) => (Standing::Runs, Ok(())),
                // `Vm::resume` leaves the VM paused when it fails.
                Err(error) => (Standing::Paused(Paused::declare_every_vcpu_is_outside_kvm_run()), Err(error)),
            },
            (Message::Quiesce, Standing::Paused(paused)) => match self.vm.quiesce(&paused).map(drop) {
                Ok(()) => (Standing::Quiesced(paused), Ok(())),
                Err(error) => (Standing::Paused(paused), Err(error)),
            },
            (Message::HandOver, Standing::Quiesced(paused)) => match self.vm.hand_over() {
                Ok(()) => (Standing::HandedOver(paused), Ok(())),
                Err(error) => (Standing::Quiesced(paused), Err(error)),
            },
            (Message::RestoreState, Standing::Arriving) => {
                let state = std::mem::take(&mut self.machine);
                match self.vm.restore_state(&state) {
                    Ok(paused) => (Standing::Restored(paused), Ok(())),
                    Err(error) => (Standing::Arriving, Err(error)),
                }
            }
            (Message::Prepare, Standing::Restored(paused)) => {
                let prepared = self.vm.prepare();
                (Standing::Restored(paused), prepared)
            }
            (_, unfit) => (unfit, Err(OUT_OF_ORDER.into())),
        };
        self.standing = now;
        done
    }

    fn save_device_state(&mut self, running: Option<u64>) -> Result<(), VmError> {
        let Self { vm, channel, standing, .. } = self;
        let mut pieces = Pieces { channel, buffer: Vec::new() };
        match (running, &*standing) {
            (Some(bytes), Standing::Runs) => {
                vm.save_device_state(Moment::Running { bytes }, &mut pieces)?;
            }
            (None, Standing::Quiesced(paused)) => {
                let quiesced = Quiesced::declare_no_device_writes(paused);
                vm.save_device_state(Moment::Stopped(&quiesced), &mut pieces)?;
            }
            _ => return Err(OUT_OF_ORDER.into()),
        }
        Ok(pieces.flush()?)
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        match &self.standing {
            Standing::Quiesced(paused) => self.vm.save_state(&Quiesced::declare_no_device_writes(paused)),
            _ => Err(OUT_OF_ORDER.into()),
        }
    }

    /// Nobody asks any more. A guest that stands still and is nobody else's runs again.
    pub(super) fn leave(mut self) -> (Result<Left, OffloadError>, Channel) {
        let left = match std::mem::replace(&mut self.standing, Standing::Changing) {
            Standing::Runs => Ok(Left::RunsHere),
            Standing::HandedOver(paused) => Ok(Left::MayRunThere(paused)),
            Standing::Arriving | Standing::Restored(_) | Standing::Changing => {
                self.release();
                Ok(Left::NeverRan)
            }
            Standing::Paused(paused) | Standing::Quiesced(paused) => match self.vm.resume(paused) {
                Ok(()) => Ok(Left::RunsHere),
                Err(source) => Err(OffloadError::Vm { action: "resume", source }),
            },
        };
        (left, self.channel)
    }
}

const OUT_OF_ORDER: &str = "it was asked out of order";

fn out_of_order() -> Message {
    Message::Failed { text: OUT_OF_ORDER.to_owned() }
}

fn said(done: Result<(), VmError>) -> Message {
    match done {
        Ok(()) => Message::Done,
        Err(error) => Message::Failed { text: error.to_string() },
    }
}

/// Since when the offload process has shown no sign of life.
#[derive(Debug)]
struct Life {
    seen: u32,
    since: Instant,
}

impl Default for Life {
    fn default() -> Self {
        Self { seen: 0, since: Instant::now() }
    }
}

impl Life {
    /// `signs` so far; an error if there were no new ones for too long.
    fn check(&mut self, signs: u32, stands_still: bool) -> Result<(), OffloadError> {
        let waited = if stands_still { SILENCE_AT_STANDSTILL } else { SILENCE };
        if signs != self.seen {
            *self = Self { seen: signs, since: Instant::now() };
        } else if self.since.elapsed() > waited {
            let waiting_for = "a sign of life";
            return Err(OffloadError::Silent { peer: OFFLOAD_PROCESS, waiting_for, waited });
        }
        Ok(())
    }
}

/// Device state on its way to the offload process, in packets.
struct Pieces<'c> {
    channel: &'c mut Channel,
    buffer: Vec<u8>,
}

impl Pieces<'_> {
    fn send(&mut self) -> io::Result<()> {
        match self.channel.receive_within("Enough", Duration::ZERO).map_err(io::Error::other)? {
            None => {}
            Some((Message::Enough, _)) => return Err(io::Error::other("the migration takes no more state")),
            Some((other, _)) => return Err(io::Error::other(self.channel.unexpected("Enough", &other))),
        }
        let bytes = std::mem::take(&mut self.buffer);
        self.channel.send(&Message::Piece { bytes }, &[], READ_LIMIT).map_err(io::Error::other)
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE_BYTES_MAX - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PIECE_BYTES_MAX {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}
