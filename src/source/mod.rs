//! The outgoing side: the life of a migration, from the handshake to the word that the destination runs.
//!
//! [`Source::run`] reads as the phases of DESIGN's handing over: connect, start tracking, precopy rounds, stop
//! and copy, prepare, commit. Before `Commit` has left, every failure puts the harvested pages back into the
//! dirty set and lets the VM run on here. After it, the source never resumes by itself: see
//! [`SourceError::Unconfirmed`].

mod error;
mod report;
mod slice;
mod steering;

use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

pub use error::SourceError;
pub use report::{ChannelReport, LossReport, SourceReport};

use self::slice::ShortSlice;
use self::steering::{Steering, switchover_overhead};
use crate::converge::{Action, LastCheck, Why};
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun};
use crate::page::populated;
use crate::page::ram_digest;
use crate::page_set::PageSet;
use crate::progress::{Event, Phase, Progress, RoundReport};
use crate::track::{DirtySource, Observed};
use crate::transport::control::{ControlConnection, ControlError};
use crate::transport::{ChannelSpec, MigrationToken, RoundSent, SendOptions, Sender, Totals};
use crate::vm::{Paused, Quiesced, Vm};
use crate::wire::control::{Hello, Message, PROTOCOL, Token};

/// While the guest stands still there is only a wish to cancel to look for.
const LOOK_AT_REST: Duration = Duration::from_millis(1);

/// What the user chooses for one migration. What may change while it runs is in
/// [`Parameters`](crate::progress::Parameters).
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// `HOST:PORT` of the destination's control connection.
    pub destination: String,
    /// Data connections to open, if `channel_specs` is empty: all to the destination's address.
    pub channels: u32,
    /// Data connections bound to addresses and devices of their own.
    pub channel_specs: Vec<ChannelSpec>,
    /// Compare RAM digests before the handing over.
    pub verify: bool,
    /// Zero-copy, and how.
    pub send: SendOptions,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// Longest wait for any single answer of the destination.
    pub answer_timeout: Duration,
}

impl Default for SourceOptions {
    /// Two data connections, verified, 30 s for any answer; the destination is to be filled in.
    fn default() -> Self {
        Self {
            destination: String::new(),
            channels: 2,
            channel_specs: Vec::new(),
            verify: true,
            send: SendOptions::default(),
            vcpus: 1,
            answer_timeout: Duration::from_secs(30),
        }
    }
}

/// One migration of one VM.
#[derive(Debug)]
pub struct Source<'a, V: ?Sized, D: ?Sized> {
    vm: &'a mut V,
    tracker: &'a mut D,
    memory: &'a GuestMemory,
    options: SourceOptions,
    progress: Progress,
    report: SourceReport,
    started: Instant,
    /// Pages harvested since tracking began: what a failure gives back.
    taken: PageSet,
    /// Set while the guest stands still.
    standstill: Option<Standstill>,
}

/// The guest stands still.
#[derive(Debug)]
struct Standstill {
    paused: Paused,
    since: Instant,
}

impl<'a, V: Vm + ?Sized, D: DirtySource + ?Sized> Source<'a, V, D> {
    /// Prepares a migration; [`run`](Self::run) does it.
    pub fn new(
        vm: &'a mut V,
        tracker: &'a mut D,
        memory: &'a GuestMemory,
        options: SourceOptions,
        progress: Progress,
    ) -> Self {
        Self {
            taken: PageSet::new(memory.end()),
            report: SourceReport::default(),
            started: Instant::now(),
            standstill: None,
            vm,
            tracker,
            memory,
            options,
            progress,
        }
    }

    /// Migrates the VM. Returns when the destination runs it, or when it has failed and the VM runs on here.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; the VM runs on here after each of them but [`SourceError::Unconfirmed`], and a failure
    /// of the VMM to resume.
    pub fn run(mut self) -> Result<SourceReport, SourceError> {
        self.started = Instant::now();
        let result = self.attempt().map_err(|error| match error {
            SourceError::Control(ControlError::Cancelled { .. }) => SourceError::Cancelled,
            error => error,
        });
        let phase = if result.is_ok() { Phase::Completed } else { Phase::Failed };
        let error = result.as_ref().err().map(ToString::to_string);
        self.progress
            .publish(Event::Ended { completed: result.is_ok(), error }, |status| status.phase = phase);
        result?;
        Ok(self.report)
    }

    fn attempt(&mut self) -> Result<(), SourceError> {
        let (mut control, mut sender) = self.connect()?;
        let populated = self.start_tracking()?;
        let committed = self
            .precopy(&mut sender, populated)
            .and_then(|remaining| self.stop_and_copy(&mut control, sender, remaining))
            .and_then(|()| self.commit(&mut control));
        match committed {
            Ok(()) => self.handed_over(&mut control),
            Err(error) => Err(self.undo(&mut control, error)),
        }
    }

    /// Before `Commit` everything can be undone: the guest runs on, and what was harvested is dirty again.
    fn undo(&mut self, control: &mut ControlConnection, error: SourceError) -> SourceError {
        let mut error = match error {
            _ if self.progress.parameters().is_cancelled() => SourceError::Cancelled,
            // Data connections that break may be a destination that has ended: then it said why.
            SourceError::Transport(broken) if control.is_readable() => match self.answer(control, "Abort") {
                Err(SourceError::Aborted(why)) => SourceError::Aborted(why),
                _ => SourceError::Transport(broken),
            },
            error => error,
        };
        if let Some(Standstill { paused, .. }) = self.standstill.take()
            && let Err(source) = self.vm.resume(paused)
        {
            error = SourceError::Vm { action: "resume after a failed switchover", source };
        }
        self.tracker.give_back(&self.taken);
        self.stop_tracking();
        if !matches!(error, SourceError::Aborted(_)) {
            // The connection may be what failed: then the destination notices by itself.
            let _ = control.send(&Message::Abort(error.to_string()), self.options.answer_timeout);
        }
        error
    }

    fn connect(&mut self) -> Result<(ControlConnection, Sender), SourceError> {
        let timeout = self.options.answer_timeout;
        let mut control = ControlConnection::connect(&self.options.destination, timeout)?;
        let token = random_token()?;
        let specs = std::mem::take(&mut self.options.channel_specs);
        let channels = if specs.is_empty() { self.options.channels } else { as_u32(specs.len()) };
        let hello = Hello {
            protocol: PROTOCOL,
            token,
            page_bytes: as_u32(PAGE_SIZE),
            vcpus: self.options.vcpus,
            channels,
            verify: self.options.verify,
            ram: self.memory.regions().iter().map(|region| region.pages).collect::<Vec<PageRun>>(),
        };
        control.send(&Message::Hello(hello), timeout)?;
        let data_port = match self.answer(&mut control, "Accept")? {
            Message::Accept { data_port, .. } => data_port,
            other => return Err(unexpected("Accept", &other)),
        };
        let specs = if specs.is_empty() {
            let mut remote =
                control.peer_addr().map_err(|source| ControlError::Receive { expected: "Accept", source })?;
            remote.set_port(data_port);
            vec![ChannelSpec::to(remote); channels as usize]
        } else {
            specs
        };
        let options = SendOptions {
            max_bandwidth: self.progress.parameters().max_bandwidth().clone(),
            ..self.options.send.clone()
        };
        let sender = Sender::connect(
            &specs,
            MigrationToken(token),
            self.memory.clone(),
            options,
            self.progress.parameters().cancel_flag(),
        )?;
        self.report.channels = channels;
        self.report.memory_bytes = self.memory.pages() * PAGE_SIZE as u64;
        self.tracker.backend().clone_into(&mut self.report.backend);
        Ok((control, sender))
    }

    /// Switches tracking on, and finds the pages that the first round has to send: those that exist. A page
    /// that is populated later is written by someone, and so dirty.
    fn start_tracking(&mut self) -> Result<PageSet, SourceError> {
        self.tracker.start()?;
        let populated = populated(self.memory).pages;
        let (ram_pages, populated_pages) = (self.memory.pages(), populated.len());
        self.progress.publish(Event::Started { ram_pages, populated_pages }, |status| {
            status.phase = Phase::Precopy;
            status.ram_pages = ram_pages;
        });
        Ok(populated)
    }

    fn stop_tracking(&mut self) {
        if let Err(error) = self.tracker.stop() {
            tracing::warn!(%error, "tracking could not be stopped");
        }
    }

    /// Sends rounds while the guest runs, until the controller says that it is time. Returns with the guest
    /// standing still, and with what is left to send.
    fn precopy(&mut self, sender: &mut Sender, populated: PageSet) -> Result<PageSet, SourceError> {
        let _looks_in_time = ShortSlice::for_this_thread();
        let verified_pages = if self.options.verify { populated.len() } else { 0 };
        let overhead = switchover_overhead(verified_pages);
        let vcpus = self.tracker.vcpus();
        let mut steering = Steering::new(self.memory, &self.progress, self.started, overhead, vcpus);
        let mut to_send = populated;
        // What was dirtied while the populated pages were looked for says nothing about how fast the guest dirties.
        self.harvest(&mut to_send)?;
        let counters = sender.counters();
        let remaining = loop {
            steering.round_started(self.next_round(), to_send.len(), counters.totals());
            let mut dirty = self.round(sender, &mut steering, to_send)?;
            let observed = self.tracker.observe()?;
            if self.standstill.is_none() {
                self.harvest(&mut dirty)?;
            }
            if let Some(round) = self.report.rounds.last_mut() {
                round.pages_dirtied = dirty.len();
                if let (Observed::PerVcpu(pages), None) = (&observed, &self.standstill) {
                    round.vcpu_pages_dirtied.clone_from(pages);
                }
            }
            self.publish_round();
            let action = match self.standstill {
                Some(_) => None,
                None => Some(steering.round_ended(&observed, dirty.len(), counters.totals())),
            };
            if self.report.rounds.len() == 1 {
                self.report.prediction_after_round_1 = steering.prediction();
            }
            match action {
                // Stopped in the middle of the round.
                None => break dirty,
                Some(Action::Continue) => {}
                Some(Action::GiveUp(_)) => return Err(SourceError::GaveUp),
                Some(Action::SwitchOver(why)) => {
                    self.stop_guest(&mut steering, &mut dirty)?;
                    if self.stays_stopped(&mut steering, why, dirty.len())? {
                        break dirty;
                    }
                }
            }
            to_send = dirty;
        };
        self.report.predicted_downtime_ms = steering.prediction().map(|prediction| prediction.downtime_ms);
        let pages_left = remaining.len();
        self.progress.publish(Event::Switchover { pages_left }, |status| status.phase = Phase::Switchover);
        Ok(remaining)
    }

    /// Sends one round while the guest runs and is observed. The controller may want the guest stopped in the
    /// middle of it: then the rest of the round goes out while it stands still. Returns the pages that were
    /// harvested on the way: none, if the guest was not stopped.
    fn round(
        &mut self,
        sender: &mut Sender,
        steering: &mut Steering,
        pages: PageSet,
    ) -> Result<PageSet, SourceError> {
        let (pages_to_send, number) = (pages.len(), self.next_round());
        let mut dirty = PageSet::new(self.memory.end());
        let sending = sender.handle();
        let before = sending.totals();
        let sent = send_round(sender, number, pages, steering.next_look(), || {
            if self.progress.parameters().is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            if self.standstill.is_some() {
                return Ok(LOOK_AT_REST);
            }
            match steering.look(self.tracker, self.vm, &sending)? {
                Action::Continue => Ok(steering.next_look()),
                Action::GiveUp(_) => Err(SourceError::GaveUp),
                Action::SwitchOver(why) => {
                    self.stop_guest(steering, &mut dirty)?;
                    sending.strike_off(|undealt| undealt.subtract(&dirty));
                    let done = sending.totals().since(before);
                    let done = done.pages_sent + done.zero_pages + done.pages_struck_off;
                    let unsent = pages_to_send.saturating_sub(done);
                    self.stays_stopped(steering, why, unsent + dirty.len())?;
                    Ok(LOOK_AT_REST)
                }
            }
        })?;
        self.count_round(&sent, pages_to_send);
        Ok(dirty)
    }

    fn next_round(&self) -> u32 {
        as_u32(self.report.rounds.len() + 1)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), SourceError> {
        let mut harvested = PageSet::new(self.memory.end());
        self.tracker.harvest(&mut harvested)?;
        self.taken.union(&harvested);
        dirty.union(&harvested);
        Ok(())
    }

    /// Stops the guest and adds all that is dirty to `dirty`.
    fn stop_guest(&mut self, steering: &mut Steering, dirty: &mut PageSet) -> Result<(), SourceError> {
        let since = Instant::now();
        let paused = self.vm.pause().map_err(|source| SourceError::Vm { action: "pause", source })?;
        // Not before: who was held back would use the time until the pause.
        steering.open_gates();
        self.report.pause_ms = millis(since.elapsed());
        let standstill = self.standstill.insert(Standstill { paused, since });
        let mut last = PageSet::new(self.memory.end());
        self.tracker.harvest_final(&standstill.paused.declare_nothing_else_writes(), &mut last)?;
        self.taken.union(&last);
        dirty.union(&last);
        Ok(())
    }

    /// The last check, now that what is left is known exactly. If it is too much the guest runs on.
    fn stays_stopped(&mut self, steering: &mut Steering, why: Why, left: u64) -> Result<bool, SourceError> {
        if steering.last_check(why, left) == LastCheck::GoOn {
            return Ok(true);
        }
        if let Some(Standstill { paused, .. }) = self.standstill.take() {
            let resumed = self.vm.resume(paused);
            resumed.map_err(|source| SourceError::Vm {
                action: "resume a guest that dirtied too much",
                source,
            })?;
        }
        Ok(false)
    }

    fn count_round(&mut self, sent: &RoundSent, pages_to_send: u64) {
        let Totals {
            pages_sent,
            zero_pages,
            pages_struck_off,
            bytes_sent,
            zero_copy_sends,
            copied_sends,
            ..
        } = sent.totals;
        self.report.pages_sent += pages_sent;
        self.report.zero_pages += zero_pages;
        self.report.bytes_sent += bytes_sent;
        self.report.zero_copy_sends += zero_copy_sends;
        self.report.copied_sends += copied_sends;
        self.report.rounds.push(RoundReport {
            round: sent.round,
            pages_to_send,
            pages_sent,
            zero_pages,
            pages_struck_off,
            bytes_sent,
            duration_ms: millis(sent.duration),
            pages_dirtied: 0,
            vcpu_pages_dirtied: Vec::new(),
        });
    }

    fn publish_round(&self) {
        let Some(round) = self.report.rounds.last() else { return };
        let bytes_sent = self.report.bytes_sent;
        self.progress.publish(Event::RoundEnded(round.clone()), |status| {
            status.round_pages_done = status.round_pages;
            status.bytes_sent = bytes_sent;
        });
    }

    /// The guest stands still: sends what is left and its state, and brings the destination to `Prepared`.
    fn stop_and_copy(
        &mut self,
        control: &mut ControlConnection,
        mut sender: Sender,
        remaining: PageSet,
    ) -> Result<(), SourceError> {
        // The final phase uses all there is.
        sender.set_max_bandwidth(None);
        let Some(Standstill { paused, .. }) = &self.standstill else { return Err(SourceError::Cancelled) };
        let state = self
            .vm
            .save_state(&Quiesced::declare_no_device_writes(paused))
            .map_err(|source| SourceError::Vm { action: "save the vCPU and device state", source })?;
        let (memory, parameters) = (self.memory, self.progress.parameters());
        let (number, pages_to_send) = (self.next_round(), remaining.len());
        // Nothing writes RAM any more: our digest is computed while the last pages are on their way.
        let (sent, digest) = thread::scope(|scope| {
            let digest = self.options.verify.then(|| scope.spawn(|| ram_digest(memory, paused).digest.0));
            let sent = send_round(&mut sender, number, remaining, LOOK_AT_REST, || {
                if parameters.is_cancelled() { Err(SourceError::Cancelled) } else { Ok(LOOK_AT_REST) }
            });
            let digest = digest.map_or(Ok(0), thread::ScopedJoinHandle::join);
            (sent, digest.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        self.count_round(&sent?, pages_to_send);
        self.publish_round();
        self.report.channel_reports = report::channel_reports(&sender.counters());
        // Nothing is on its way any more: the connections end here, before the destination ends them.
        drop(sender);
        let timeout = self.options.answer_timeout;
        control.send(&Message::State(state), timeout)?;
        let verifying = Instant::now();
        control.send(&Message::Prepare { ram_digest: digest }, timeout)?;
        match self.answer(control, "Prepared")? {
            Message::Prepared { ram_digest: theirs } if theirs == digest => {}
            Message::Prepared { ram_digest: theirs } => {
                return Err(SourceError::DigestMismatch { ours: digest, theirs });
            }
            other => return Err(unexpected("Prepared", &other)),
        }
        if self.options.verify {
            self.report.verify_ms = millis(verifying.elapsed());
            self.report.ram_digest_match = Some(true);
        }
        Ok(())
    }

    /// A `Commit` that could not be written whole cannot be read by the destination either: that failure still
    /// leaves the VM here. Once it is written, the VM is not ours any more.
    fn commit(&self, control: &mut ControlConnection) -> Result<(), SourceError> {
        if self.progress.parameters().is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        Ok(control.send(&Message::Commit, self.options.answer_timeout)?)
    }

    /// Nobody can cancel any more: only the destination's word or its silence counts.
    fn handed_over(&mut self, control: &mut ControlConnection) -> Result<(), SourceError> {
        let timeout = self.options.answer_timeout;
        let answer = control.receive("Running", timeout, &AtomicBool::new(false));
        let Some(Standstill { paused, since }) = self.standstill.take() else { return Ok(()) };
        let cause = match answer {
            Ok(Message::Running) => {
                self.report.downtime_ms = millis(since.elapsed());
                self.report.total_ms = millis(self.started.elapsed());
                self.stop_tracking();
                return Ok(());
            }
            Ok(other) => unexpected("Running", &other),
            Err(cause) => cause.into(),
        };
        Err(SourceError::Unconfirmed { paused, cause: Box::new(cause) })
    }

    /// The destination's next message, unless it is the end of the migration.
    fn answer(
        &self,
        control: &mut ControlConnection,
        expected: &'static str,
    ) -> Result<Message, SourceError> {
        let cancel = self.progress.parameters().cancel_flag();
        match control.receive(expected, self.options.answer_timeout, cancel)? {
            Message::Refuse(why) => Err(SourceError::Refused(why)),
            Message::Abort(why) => Err(SourceError::Aborted(why)),
            message => Ok(message),
        }
    }
}

/// Sends a round on the channels' threads; meanwhile `look` is called, which says when to call it again. If it fails,
/// the sending is cancelled.
fn send_round(
    sender: &mut Sender,
    round: u32,
    pages: PageSet,
    mut next_look: Duration,
    mut look: impl FnMut() -> Result<Duration, SourceError>,
) -> Result<RoundSent, SourceError> {
    let cancel = sender.handle();
    thread::scope(|scope| {
        let (done, outcome) = mpsc::sync_channel(1);
        scope.spawn(move || done.send(sender.send_round(round, pages)));
        loop {
            match outcome.recv_timeout(next_look) {
                Ok(result) => return Ok(result?),
                // Its thread panicked; the scope passes that on.
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(SourceError::Cancelled),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            match look() {
                Ok(next) => next_look = next,
                Err(error) => {
                    cancel.cancel();
                    return Err(error);
                }
            }
        }
    })
}

fn unexpected(expected: &'static str, got: &Message) -> SourceError {
    SourceError::Unexpected { expected, got: got.name() }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// For lengths and counts that are bounded far below 2³² by construction.
fn as_u32(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A migration's name on its connections.
fn random_token() -> Result<Token, ControlError> {
    let mut token = Token::default();
    getrandom::fill(&mut token).map_err(|error| ControlError::Connect {
        address: "the kernel's random numbers".to_owned(),
        source: error.into(),
    })?;
    Ok(token)
}
