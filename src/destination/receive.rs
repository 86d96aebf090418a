//! The second phase: pages and device state arrive while the guest runs at the source.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::error::DestinationError;
use super::incoming::Incoming;
use super::options::DestinationOptions;
use super::verification::Verification;
use crate::layout::GuestMemory;
use crate::transport::Receiver;
use crate::transport::control::{ControlConnection, ControlError, Wait};
use crate::vm::Vm;
use crate::wire::STATE_WINDOW_BYTES;
use crate::wire::control::Message;
use crate::wire::state::{RecordKind, StateReader};

/// How long the source is told how much state was taken. One that does not read for so long is frozen, which the
/// control connection notices sooner or later anyway.
const TELL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the source's next word is awaited before everything else is looked after, as long as nothing but pages
/// comes.
const IDLE: Duration = Duration::from_millis(20);
/// The same while device state comes, which waits for us.
const BUSY: Duration = Duration::from_micros(200);

/// A migration that arrives.
#[derive(Debug)]
pub(super) struct Receiving {
    pub receiver: Receiver,
    pub state: IncomingState,
    /// If the source asked for it.
    pub verification: Option<Verification>,
    /// Bytes that have arrived, and since when no more did.
    progress: u64,
    since: Instant,
    /// How long that may be.
    silence: Duration,
}

/// The state stream at its end: device state goes to the VMM as it comes, the machine's is kept until RAM is complete.
#[derive(Debug)]
pub(super) struct IncomingState {
    reader: StateReader,
    pub machine: Vec<u8>,
    machine_bytes_max: usize,
    /// Bytes of the stream that were taken, and that the source knows of.
    pub taken: u64,
    told: u64,
}

impl IncomingState {
    /// Takes what has come; whether anything had.
    pub fn take(
        &mut self,
        receiver: &Receiver,
        control: &ControlConnection,
        vm: &mut dyn Vm,
        wait: Wait<'_>,
    ) -> Result<bool, DestinationError> {
        let before = self.taken;
        while let Some(chunk) = receiver.next_state(Duration::ZERO) {
            let Self { reader, machine, machine_bytes_max, .. } = self;
            reader.read(&chunk, |kind, piece| match kind {
                RecordKind::Device => vm
                    .load_device_state(piece)
                    .map_err(|source| DestinationError::Vm { action: "load the state of a device", source }),
                RecordKind::Machine if machine.len() + piece.len() > *machine_bytes_max => {
                    Err(DestinationError::StateTooLong { limit: *machine_bytes_max })
                }
                RecordKind::Machine => {
                    machine.extend_from_slice(piece);
                    Ok(())
                }
                RecordKind::Void => {
                    machine.clear();
                    Ok(())
                }
            })?;
            self.taken += chunk.len() as u64;
            // The source may have a window under way beyond what it knows that we have taken.
            if self.taken - self.told >= STATE_WINDOW_BYTES / 8 {
                self.told = self.taken;
                control.send(&Message::StateTaken(self.taken), wait)?;
            }
        }
        Ok(self.taken != before)
    }

    /// The stream has ended.
    pub fn finish(&self) -> Result<(), DestinationError> {
        Ok(self.reader.finish()?)
    }
}

/// Everything has been sent, says the source.
#[derive(Debug)]
pub(super) struct Arrived {
    /// Digest of the source's RAM.
    pub ram_digest: u128,
    /// Length of the state stream.
    pub state_bytes: u64,
    /// When the source said so.
    pub at: Instant,
}

impl Receiving {
    pub fn new(
        receiver: Receiver,
        memory: &GuestMemory,
        verify: bool,
        options: &DestinationOptions,
    ) -> Result<Self, DestinationError> {
        let verification = verify.then(|| Verification::new(memory)).transpose();
        Ok(Self {
            receiver,
            state: IncomingState {
                reader: StateReader::default(),
                machine: Vec::new(),
                machine_bytes_max: options.machine_state_bytes_max,
                taken: 0,
                told: 0,
            },
            verification: verification.map_err(DestinationError::Verification)?,
            progress: 0,
            since: Instant::now(),
            silence: options.silence,
        })
    }

    /// Looks after what arrives; whether state came.
    fn follow(
        &mut self,
        incoming: &Incoming,
        vm: &mut dyn Vm,
        wait: Wait<'_>,
    ) -> Result<bool, DestinationError> {
        let received = self.receiver.received();
        let progress = received.bytes + received.state_bytes;
        if progress != self.progress {
            (self.progress, self.since) = (progress, Instant::now());
        } else if self.since.elapsed() > self.silence {
            return Err(ControlError::Timeout { expected: "pages" }.into());
        }
        if let Some(verification) = &mut self.verification {
            verification.follow(self.receiver.arrived());
        }
        self.state.take(&self.receiver, &incoming.control, vm, wait)
    }
}

/// Receives until the source says that everything has been sent. A source that is gone or frozen is noticed by the
/// control connection.
pub(super) fn run(
    receiving: &mut Receiving,
    incoming: &Incoming,
    vm: &mut dyn Vm,
    cancel: &AtomicBool,
) -> Result<Arrived, DestinationError> {
    let mut nap = IDLE;
    loop {
        let wait = Wait { deadline: Instant::now() + nap, cancel };
        match incoming.control.receive("Prepare", wait) {
            Ok(Message::Prepare { ram_digest, state_bytes }) => {
                return Ok(Arrived { ram_digest, state_bytes, at: Instant::now() });
            }
            Ok(other) => return Err(DestinationError::of_message(other, "Prepare")),
            Err(ControlError::Timeout { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Relaxed: a flag without data, read again at the next turn.
        if cancel.load(Ordering::Relaxed) {
            return Err(DestinationError::Cancelled);
        }
        let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel };
        nap = if receiving.follow(incoming, vm, wait)? { BUSY } else { IDLE };
    }
}
