//! One connection while it lives: frames are prepared while the kernel sends the one before, acknowledgements come
//! back, and a connection on which nothing moves is given up.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::Connected;
use super::link::Link;
use super::method::{Choice, Method};
use crate::layout::{HostRun, PAGE_SIZE, PageRun};
use crate::transport::TransportError;
use crate::transport::counters::ChannelCounters;
use crate::transport::deal::{Unacknowledged, Work};
use crate::transport::frame::Pages;
use crate::transport::send::Shared;
use crate::transport::uring::{Completion, LOOK_UP, SLOTS, SendMethod, SendOutcome, SendRing};
use crate::wire::FRAME_DATA_PAGES_MAX;
use crate::wire::data::{
    Acknowledgement, DataError, Frame, FrameHeader, FrameKind, FrameRun, WireRun, write_frame,
};

/// A send that the kernel has no memory for is tried again this often, a millisecond apart.
const RETRIES_MAX: u32 = 2000;
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// When a round waits for nothing but one channel, and that one has had a frame under way for this long, the
/// others take over what it has.
const STRAGGLER: Duration = Duration::from_secs(1);

/// How long an idle channel sleeps before it looks whether its connection still stands.
const IDLE: Duration = Duration::from_millis(50);

/// A frame that was sent and not acknowledged.
struct InFlight {
    sequence: u64,
    since: Instant,
    bytes: u64,
    content: Content,
}

enum Content {
    Pages { runs: Vec<PageRun>, data_pages: u64, zero_pages: u64 },
    Retirement(u32),
}

/// The frame that the kernel is being given.
struct Current {
    choice: Choice,
    payload_bytes: u64,
    cpu: Duration,
    retries: u32,
}

/// A frame that waits for the one before it.
struct Prepared {
    frame: Frame,
    content: Content,
}

/// One connection while it lives.
pub(super) struct Connection<'a> {
    shared: &'a Shared,
    counters: &'a ChannelCounters,
    stream: Arc<TcpStream>,
    ring: SendRing,
    method: Method,
    link: Link,
    /// Of the last frame prepared, until it is loaded into the ring.
    pages: Pages,
    prepared: Option<Prepared>,
    current: Option<Current>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    in_flight_pages: u64,
    sequence: u64,
    /// Waiting for room in the window.
    full: bool,
    /// Waiting for the limit.
    paced: bool,
    acknowledgement: Vec<u8>,
    last_progress: Instant,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        counters: &'a ChannelCounters,
        connected: Connected,
    ) -> Result<Self, TransportError> {
        let stream = connected.stream;
        let now = Instant::now();
        Ok(Self {
            shared,
            counters,
            ring: SendRing::new(Arc::clone(&stream), &shared.memory)?,
            stream,
            method: Method::new(shared.options.zero_copy, shared.options.register_memory),
            link: Link::default(),
            pages: Pages::default(),
            prepared: None,
            current: None,
            in_flight: VecDeque::with_capacity(SLOTS),
            in_flight_bytes: 0,
            in_flight_pages: 0,
            sequence: 0,
            full: false,
            paced: false,
            acknowledgement: Vec::with_capacity(Acknowledgement::BYTES),
            last_progress: now,
        })
    }

    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken { peer: self.counters.spec.to_string(), source }
    }

    fn malformed(&self, source: DataError) -> TransportError {
        TransportError::Malformed { peer: self.counters.spec.to_string(), source }
    }

    /// Sends what the dealer has until the sender ends (`Ok`) or the connection does.
    pub(super) fn serve(&mut self) -> Result<(), TransportError> {
        loop {
            if self.shared.is_cancelled() || self.shared.dealer.is_stopping() {
                if self.in_flight.is_empty() && self.prepared.is_none() {
                    self.ring.finish();
                }
                return Ok(());
            }
            self.ring.receive().map_err(|error| self.broken(error))?;
            self.work_off()?;
            let now = Instant::now();
            self.look(now)?;
            if self.current.is_none()
                && let Some(prepared) = self.prepared.take()
            {
                self.send(prepared, now)?;
                continue;
            }
            let nap = self.prepare(now)?;
            if self.prepared.is_some() && self.current.is_none() {
                continue;
            }
            if nap.is_none() && self.in_flight.is_empty() {
                // Idle: between two rounds, or all that is left is others' work.
                self.wait(Duration::ZERO)?;
                self.shared.dealer.wait_for_work(IDLE);
            } else {
                self.wait(nap.unwrap_or(LOOK_UP))?;
            }
        }
    }

    /// Submits and waits; the CPU time of that is what the current frame costs.
    fn wait(&mut self, timeout: Duration) -> Result<(), TransportError> {
        let before = thread_cpu_time();
        let result = self.ring.wait(timeout);
        if let Some(current) = &mut self.current {
            current.cpu += thread_cpu_time().saturating_sub(before);
        }
        result.map_err(|error| self.broken(error))
    }

    /// Handles everything that came back.
    fn work_off(&mut self) -> Result<(), TransportError> {
        let mut acknowledged = None;
        while let Some(completion) = self.ring.completion() {
            match completion {
                Completion::Sent(outcome) => self.sent(outcome)?,
                Completion::Notified { copied } => {
                    let counter =
                        if copied { &self.counters.copied_sends } else { &self.counters.zero_copy_sends };
                    counter.add(1);
                    self.method.reported(copied);
                }
                Completion::Received(result) => {
                    let length = result.map_err(|error| self.broken(error))?;
                    acknowledged = self.read_acknowledgements(length)?.or(acknowledged);
                    self.ring.receive().map_err(|error| self.broken(error))?;
                }
            }
        }
        acknowledged.map_or(Ok(()), |sequence| self.acknowledged(sequence))
    }

    /// The newest frame acknowledged by `length` bytes that came in.
    fn read_acknowledgements(&mut self, length: usize) -> Result<Option<u64>, TransportError> {
        if length == 0 {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut newest = None;
        for byte in self.ring.received(length) {
            self.acknowledgement.push(*byte);
            let Ok(whole) = <&[u8; Acknowledgement::BYTES]>::try_from(self.acknowledgement.as_slice()) else {
                continue;
            };
            let read = Acknowledgement::read(whole);
            self.acknowledgement.clear();
            newest = Some(read.map_err(|error| self.malformed(error))?);
        }
        Ok(newest)
    }

    /// The destination has everything up to frame `sequence` in place.
    fn acknowledged(&mut self, sequence: u64) -> Result<(), TransportError> {
        let sent = self.sequence - u64::from(self.current.is_some());
        if sequence > sent {
            return Err(self.malformed(DataError::AcknowledgedUnsent { found: sequence, sent }));
        }
        let mut pages = 0;
        while self.in_flight.front().is_some_and(|frame| frame.sequence <= sequence)
            && let Some(frame) = self.in_flight.pop_front()
        {
            self.in_flight_bytes -= frame.bytes;
            match frame.content {
                Content::Pages { data_pages, zero_pages, .. } => {
                    self.counters.pages_sent.add(data_pages);
                    self.counters.zero_pages.add(zero_pages);
                    pages += data_pages + zero_pages;
                }
                Content::Retirement(_) => self.shared.dealer.retired(),
            }
        }
        self.in_flight_pages -= pages;
        if std::mem::take(&mut self.full) {
            self.link.emptied_to(self.in_flight_bytes, self.frame_pages() * PAGE_SIZE as u64);
        }
        self.last_progress = Instant::now();
        if self.in_flight.is_empty() {
            self.sample(self.last_progress)?;
        }
        self.shared.dealer.acknowledged(pages);
        Ok(())
    }

    /// Asks the kernel, some fifty times a second, what arrived; gives up a connection on which nothing does.
    fn look(&mut self, now: Instant) -> Result<(), TransportError> {
        if !self.is_busy() || !self.link.is_due(now) {
            return Ok(());
        }
        self.sample(now)?;
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let still = now.saturating_duration_since(self.last_progress);
        if still > self.shared.options.stall_timeout {
            let what = format!("channel {}, waiting for the destination to take bytes", self.counters.spec);
            return Err(TransportError::TimedOut { what, after: still });
        }
        if let Some(oldest) = self.in_flight.front()
            && now.saturating_duration_since(oldest.since) > STRAGGLER
            && self.shared.dealer.waits_only_for(self.in_flight_pages)
        {
            let what = format!("channel {}, for which all others wait: a frame", self.counters.spec);
            return Err(TransportError::TimedOut {
                what,
                after: now.saturating_duration_since(oldest.since),
            });
        }
        Ok(())
    }

    /// Whether time counts: something is under way, or about to be, or would be if the limit allowed it.
    fn is_busy(&self) -> bool {
        self.paced || self.prepared.is_some() || !self.in_flight.is_empty()
    }

    fn sample(&mut self, now: Instant) -> Result<(), TransportError> {
        let busy = self.is_busy();
        if self.link.look(&self.stream, now, busy).map_err(|error| self.broken(error))? {
            self.last_progress = now;
        }
        if let Some(reason) = self.link.make_room(&self.stream).map_err(|error| self.broken(error))? {
            self.method.fall_back(reason);
        }
        *self.counters.bandwidth.lock() = self.link.bandwidth();
        *self.counters.sending.lock() = self.method.sending(self.link.window_bytes());
        Ok(())
    }

    fn frame_pages(&self) -> u64 {
        let options = &self.shared.options;
        match options.frame_pages_max {
            0 => self.link.frame_pages(options.max_bandwidth.get().map(std::num::NonZeroU64::get)),
            pages => u64::from(pages.min(FRAME_DATA_PAGES_MAX)),
        }
    }

    /// Prepares the next frame if there is room and work for one. When the limit says wait, for how long; zero
    /// duration is never returned.
    fn prepare(&mut self, now: Instant) -> Result<Option<Duration>, TransportError> {
        if self.prepared.is_some() {
            return Ok(None);
        }
        self.full = self.in_flight.len() >= SLOTS || self.in_flight_bytes >= self.link.window_bytes();
        if self.full {
            return Ok(None);
        }
        if let Err(wait) = self.shared.options.max_bandwidth.ask(now) {
            self.paced = self.shared.dealer.has_work();
            if self.paced {
                self.link.waited_for_tokens();
            }
            return Ok(self.paced.then_some(wait));
        }
        self.paced = false;
        let mut runs = Vec::new();
        let (frame, content) = match self.shared.dealer.take(self.frame_pages(), &mut runs) {
            Work::Nothing => return Ok(None),
            Work::Retire(connection) => {
                let frame = Frame {
                    kind: FrameKind::Retire,
                    sequence: self.sequence + 1,
                    round: self.shared.dealer.round(),
                    argument: connection,
                    run_count: 0,
                    payload_bytes: 0,
                };
                (frame, Content::Retirement(connection))
            }
            Work::Pages { round } => {
                if let Err(source) = self.pages.look_at(&self.shared.memory, &runs) {
                    let peer = "the set of pages to send".to_owned();
                    self.shared.dealer.fail(TransportError::Layout { peer, source });
                    return Ok(None);
                }
                let Pages { data_pages, zero_pages, .. } = self.pages;
                self.in_flight_pages += data_pages + zero_pages;
                (
                    self.pages.frame(self.sequence + 1, round, self.link.held_bytes()),
                    Content::Pages { runs, data_pages, zero_pages },
                )
            }
        };
        self.sequence += 1;
        self.shared.options.max_bandwidth.take(bytes_of(&frame));
        self.prepared = Some(Prepared { frame, content });
        Ok(None)
    }

    /// Gives a prepared frame to the kernel.
    fn send(&mut self, prepared: Prepared, now: Instant) -> Result<(), TransportError> {
        let Prepared { frame, content } = prepared;
        let is_pages = frame.kind == FrameKind::Pages;
        let (runs, payload): (&[FrameRun], &[HostRun]) =
            if is_pages { (&self.pages.runs, &self.pages.payload) } else { (&[], &[]) };
        self.ring.load(payload, |header| write_frame(header, &frame, runs));
        let memory = &self.shared.memory;
        let registered = &self.shared.registered;
        let choice = self.method.choose(payload, &self.ring, memory, registered);
        self.current = Some(Current {
            choice,
            payload_bytes: frame.payload_bytes.into(),
            cpu: Duration::ZERO,
            retries: 0,
        });
        if self.in_flight.is_empty() {
            self.last_progress = now;
        }
        self.in_flight_bytes += bytes_of(&frame);
        self.in_flight.push_back(InFlight {
            sequence: frame.sequence,
            since: now,
            bytes: bytes_of(&frame),
            content,
        });
        if self.link.is_due(now) {
            self.sample(now)?;
        }
        self.submit()
    }

    /// Submits what is left of the current frame.
    fn submit(&mut self) -> Result<(), TransportError> {
        let Some(Current { choice, .. }) = self.current else { return Ok(()) };
        self.ring.send(choice.method).map_err(|error| self.broken(error))?;
        let before = thread_cpu_time();
        self.ring.submit().map_err(|error| self.broken(error))?;
        if let Some(current) = &mut self.current {
            current.cpu += thread_cpu_time().saturating_sub(before);
        }
        Ok(())
    }

    /// A send of the current frame ended.
    fn sent(&mut self, outcome: SendOutcome) -> Result<(), TransportError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        match outcome {
            SendOutcome::Complete => {
                let Current { choice, payload_bytes, cpu, .. } = *current;
                if payload_bytes > 0 {
                    self.method.sent(choice, cpu, payload_bytes);
                    if choice.method == SendMethod::Copy {
                        self.counters.copied_sends.add(1);
                    }
                }
                self.current = None;
                if let Some(frame) = self.in_flight.back() {
                    self.counters.bytes_sent.add(frame.bytes);
                }
                Ok(())
            }
            SendOutcome::Short(error) => {
                current.retries += 1;
                if current.retries > RETRIES_MAX {
                    return Err(self.broken(error.unwrap_or_else(|| io::ErrorKind::WriteZero.into())));
                }
                match error {
                    Some(error) if current.choice.method != SendMethod::Copy => {
                        // Whatever zero-copy lacks here (memory that may be pinned, a socket that can), copying
                        // does not need it.
                        current.choice.method = SendMethod::Copy;
                        self.method.refused(&error);
                    }
                    Some(error) if error.raw_os_error() != Some(libc::EINTR) => {
                        std::thread::sleep(RETRY_DELAY)
                    }
                    _ => {}
                }
                self.submit()
            }
            SendOutcome::Failed(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                let source =
                    self.broken(io::Error::other("guest RAM is not readable where the layout says so"));
                self.shared.dealer.fail(source);
                Err(self.broken(error))
            }
            SendOutcome::Failed(error) => Err(self.broken(error)),
        }
    }

    /// What must be sent again now that the connection is gone.
    pub(super) fn unacknowledged(&mut self) -> Unacknowledged {
        let mut back = Unacknowledged::default();
        let prepared = self.prepared.take().map(|prepared| prepared.content);
        for content in self.in_flight.drain(..).map(|frame| frame.content).chain(prepared) {
            match content {
                Content::Pages { mut runs, .. } => back.runs.append(&mut runs),
                Content::Retirement(connection) => back.retiring.push(connection),
            }
        }
        back
    }
}

fn bytes_of(frame: &Frame) -> u64 {
    FrameHeader::BYTES as u64
        + u64::from(frame.run_count) * WireRun::BYTES as u64
        + u64::from(frame.payload_bytes)
}

/// CPU time of this thread.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
