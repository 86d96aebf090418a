//! One connection while it lives: frames are prepared while the kernel sends the one before, acknowledgements come
//! back, and a connection on which nothing moves is given up.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::connect::Connected;
use super::link::Link;
use super::method::{Choice, Method};
use crate::layout::{PAGE_SIZE, PageRun};
use crate::page::Encoder;
use crate::transport::counters::ChannelCounters;
use crate::transport::error::TransportError;
use crate::transport::pacing::Ticket;
use crate::transport::scheduler::{StateChunk, Unacknowledged, Work};
use crate::transport::session::Session;
use crate::transport::uring::{Completion, POLL_INTERVAL, SLOTS, SendMethod, SendOutcome, SendRing};
use crate::wire::FRAME_DATA_PAGES_MAX;
use crate::wire::data::{Acknowledgement, DataError, Frame, FrameKind, payload_checksum, write_frame};

/// A send that the kernel has no memory for is tried again this often, a millisecond apart.
const RETRIES_MAX: u32 = 2000;
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// When a round waits for nothing but one channel, and that one has had a frame under way for this long, the others
/// may send copies of what it has.
const STRAGGLER: Duration = Duration::from_secs(1);
/// The same while the guest stands still, or four round trips where those are longer.
const STRAGGLER_AT_STANDSTILL: Duration = Duration::from_millis(50);
/// Copies of what still moves are worth it if the others carry this many times as much as the channel itself does.
const COPIES_PAY_FROM: f64 = 2.0;

/// How long an idle channel sleeps before it polls whether its connection still stands.
const IDLE: Duration = Duration::from_millis(50);

/// A frame that was sent and not acknowledged.
struct InFlight {
    sequence: u64,
    since: Instant,
    bytes: u64,
    content: Content,
    /// The burst that it belongs to, by which a link is measured that the limit holds back.
    burst: Option<Ticket>,
}

enum Content {
    Pages {
        runs: Vec<PageRun>,
        content_pages: u64,
        zero_pages: u64,
    },
    /// Second copies of another channel's pages, which count as that one's.
    Copies {
        runs: Vec<PageRun>,
        pages: u64,
    },
    State(StateChunk),
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
    burst: Option<Ticket>,
}

/// One connection while it lives.
pub(super) struct Connection<'a> {
    session: &'a Session,
    counters: &'a ChannelCounters,
    number: u32,
    stream: Arc<TcpStream>,
    ring: SendRing,
    method: Method,
    link: Link,
    /// Of the last frame prepared, until it is loaded into the ring.
    encoder: Encoder,
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
    acknowledged_any: bool,
    last_progress: Instant,
    /// Whether others send copies of what is under way here.
    copied: bool,
    /// Since when all of those have arrived.
    copies_arrived: Option<Instant>,
    superseded: bool,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        session: &'a Session,
        counters: &'a ChannelCounters,
        connected: Connected,
    ) -> Result<Self, TransportError> {
        let Connected { stream, number } = connected;
        let ring = SendRing::new(Arc::clone(&stream), &session.memory)?;
        session.options.max_bandwidth.wake_on_change(ring.wake());
        Ok(Self {
            session,
            counters,
            number,
            ring,
            stream,
            method: Method::new(
                session.options.zero_copy,
                session.options.register_memory,
                session.discards_before(),
            ),
            link: Link::default(),
            encoder: Encoder::default(),
            prepared: None,
            current: None,
            in_flight: VecDeque::with_capacity(SLOTS),
            in_flight_bytes: 0,
            in_flight_pages: 0,
            sequence: 0,
            full: false,
            paced: false,
            acknowledgement: Vec::with_capacity(Acknowledgement::BYTES),
            acknowledged_any: false,
            last_progress: Instant::now(),
            copied: false,
            copies_arrived: None,
            superseded: false,
        })
    }

    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken { peer: self.counters.spec.to_string(), source }
    }

    fn malformed(&self, source: DataError) -> TransportError {
        TransportError::Malformed { peer: self.counters.spec.to_string(), source }
    }

    /// Sends what the scheduler has until the sender ends (`Ok`) or the connection does.
    pub(super) fn serve(&mut self) -> Result<(), TransportError> {
        loop {
            if self.session.is_ending() {
                if self.in_flight.is_empty() && self.prepared.is_none() {
                    self.ring.finish();
                }
                return Ok(());
            }
            self.ring.receive().map_err(|error| self.broken(error))?;
            self.ring.await_wake().map_err(|error| self.broken(error))?;
            self.work_off()?;
            let now = Instant::now();
            self.poll(now)?;
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
                self.method.heed_discards(&self.ring, self.session);
                self.wait(Duration::ZERO)?;
                self.session.scheduler.wait_for_work(IDLE);
            } else {
                self.wait(nap.unwrap_or(POLL_INTERVAL))?;
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
                Completion::Woken => {}
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
        let (mut pages, mut copies) = (0, 0);
        while self.in_flight.front().is_some_and(|frame| frame.sequence <= sequence)
            && let Some(frame) = self.in_flight.pop_front()
        {
            self.acknowledged_any = true;
            self.in_flight_bytes -= frame.bytes;
            self.link.acknowledged_after(frame.since.elapsed());
            if let Some(ticket) = frame.burst {
                self.session.options.max_bandwidth.arrived(Instant::now(), ticket, frame.bytes);
            }
            match frame.content {
                Content::Pages { content_pages, zero_pages, .. } => {
                    self.arrived(content_pages, zero_pages);
                    pages += content_pages + zero_pages;
                }
                Content::Copies { pages, .. } => copies += pages,
                Content::State(chunk) => self.session.scheduler.state_arrived(&chunk),
                Content::Retirement(_) => self.session.scheduler.retired(),
            }
        }
        self.in_flight_pages -= pages;
        if std::mem::take(&mut self.full) {
            self.link.emptied_to(self.in_flight_bytes, self.frame_pages() * PAGE_SIZE as u64);
        }
        self.last_progress = Instant::now();
        // Before the round may end, so that the thread that awaits its end finds the estimate of all of it.
        let sampled = if self.in_flight.is_empty() { self.sample(self.last_progress) } else { Ok(()) };
        self.session.scheduler.acknowledged(pages, copies);
        if self.in_flight_pages == 0 && std::mem::take(&mut self.copied) {
            self.copies_arrived = None;
            self.session.scheduler.end_copies(self.number);
        }
        sampled
    }

    fn arrived(&self, content_pages: u64, zero_pages: u64) {
        self.counters.pages_sent.add(content_pages);
        self.counters.zero_pages.add(zero_pages);
    }

    /// Asks the kernel, some fifty times a second, what arrived; gives up a connection on which nothing does, and one
    /// that nothing depends on while it holds up everything.
    fn poll(&mut self, now: Instant) -> Result<(), TransportError> {
        if !self.is_busy() || !self.link.is_due(now) {
            return Ok(());
        }
        self.sample(now)?;
        let Some(oldest) = self.in_flight.front() else { return Ok(()) };
        let (still, waiting) =
            (now.saturating_duration_since(self.last_progress), now.saturating_duration_since(oldest.since));
        if still > self.session.options.stall_timeout {
            let what = format!("channel {}, waiting for the destination to take bytes", self.counters.spec);
            return Err(TransportError::TimedOut { what, after: still });
        }
        let scheduler = &self.session.scheduler;
        if self.copied {
            if !scheduler.have_copies_arrived(self.number, self.in_flight_pages) {
                return Ok(());
            }
            let arrived = *self.copies_arrived.get_or_insert(now);
            // While the guest runs, a channel has as much time again as its pages took on the other way: one that
            // starves beside others on a thin link comes back, and is not killed over and over.
            let grace = arrived.saturating_duration_since(oldest.since);
            if self.session.is_last_phase() || now.saturating_duration_since(arrived) > grace {
                self.superseded = true;
                let what = format!("channel {}, for which all others wait: a frame", self.counters.spec);
                return Err(TransportError::TimedOut { what, after: waiting });
            }
        } else if waiting > self.straggles_after()
            && (still > self.straggles_after() || self.others_are_faster())
        {
            let runs = self.in_flight.iter().map(|frame| &frame.content);
            let runs = runs.chain(self.prepared.iter().map(|prepared| &prepared.content));
            let runs = runs.filter_map(|content| match content {
                Content::Pages { runs, .. } => Some(runs),
                _ => None,
            });
            self.copied = scheduler.begin_copies(self.number, self.in_flight_pages, runs.flatten().copied());
        }
        Ok(())
    }

    /// How long a round waits for one channel alone before the others send copies.
    fn straggles_after(&self) -> Duration {
        if self.session.is_last_phase() {
            STRAGGLER_AT_STANDSTILL.max(self.link.round_trip() * 4)
        } else {
            STRAGGLER
        }
    }

    /// Whether the other channels carry so much more that copies of what is under way here would arrive well before it.
    fn others_are_faster(&self) -> bool {
        let others = self.session.counters.bandwidth_beside(self.counters);
        // Links that never had enough to do to be measured have time now.
        others.samples == 0 || others.bytes_per_s >= COPIES_PAY_FROM * self.link.bandwidth().bytes_per_s
    }

    /// Whether time counts: something is under way, or about to be, or would be if the limit allowed it.
    fn is_busy(&self) -> bool {
        self.paced || self.prepared.is_some() || !self.in_flight.is_empty()
    }

    fn sample(&mut self, now: Instant) -> Result<(), TransportError> {
        let busy = self.is_busy();
        let arrived = self.link.sample(&self.stream, now, busy).map_err(|error| self.broken(error))?;
        if arrived > 0 {
            self.counters.bytes_acknowledged.add(arrived);
            self.last_progress = now;
        }
        if let Some(reason) = self.link.make_room(&self.stream).map_err(|error| self.broken(error))? {
            self.method.fall_back(reason);
        }
        *self.counters.bandwidth.lock() = self.link.bandwidth();
        let round_trip_us = u64::try_from(self.link.frame_time().as_micros()).unwrap_or(u64::MAX);
        // Relaxed: a figure of its own.
        self.counters.round_trip_us.store(round_trip_us, Ordering::Relaxed);
        *self.counters.sending.lock() = self.method.sending(self.window_bytes());
        Ok(())
    }

    fn window_bytes(&self) -> u64 {
        self.link.window_bytes(self.session.options.max_bandwidth.pace())
    }

    fn frame_pages(&self) -> u64 {
        let options = &self.session.options;
        match options.frame_pages_max {
            0 => self.link.frame_pages(options.max_bandwidth.pace()),
            pages => u64::from(pages.min(FRAME_DATA_PAGES_MAX)),
        }
    }

    /// Prepares the next frame if there is room and work for one. When the limit says wait, for how long; zero
    /// duration is never returned.
    fn prepare(&mut self, now: Instant) -> Result<Option<Duration>, TransportError> {
        // While others send copies, nothing is added to what is late.
        if self.prepared.is_some() || self.copied {
            return Ok(None);
        }
        self.full = self.in_flight.len() >= SLOTS || self.in_flight_bytes >= self.window_bytes();
        if self.full {
            return Ok(None);
        }
        let Session { scheduler, options, memory, .. } = self.session;
        if let Err(wait) = options.max_bandwidth.ask(now) {
            self.paced = scheduler.has_work();
            return Ok(self.paced.then_some(wait));
        }
        self.paced = false;
        let (mut runs, sequence) = (Vec::new(), self.sequence + 1);
        let (frame, content) = match scheduler.take(self.number, self.frame_pages(), &mut runs) {
            Work::Nothing => return Ok(None),
            Work::Retire(connection) => {
                self.encoder.encode_bytes(&[]);
                let frame = Frame::new(FrameKind::Retire, sequence, scheduler.round(), connection.into());
                (frame, Content::Retirement(connection))
            }
            Work::State(chunk) => {
                self.encoder.encode_bytes(&chunk.bytes);
                let frame = Frame {
                    payload_checksum: payload_checksum(&chunk.bytes),
                    ..Frame::new(FrameKind::State, sequence, scheduler.round(), chunk.offset)
                };
                (frame, Content::State(chunk))
            }
            Work::Pages { round, copies } => {
                if let Err(source) = self.encoder.encode(memory, &runs) {
                    let peer = "the set of pages to send".to_owned();
                    scheduler.fail(TransportError::Layout { peer, source });
                    return Ok(None);
                }
                let (content_pages, zero_pages) = (self.encoder.content_pages(), self.encoder.zero_pages());
                let frame = Frame::new(FrameKind::Pages, sequence, round, self.link.held_bytes().into());
                let content = if copies {
                    Content::Copies { runs, pages: content_pages + zero_pages }
                } else {
                    self.in_flight_pages += content_pages + zero_pages;
                    Content::Pages { runs, content_pages, zero_pages }
                };
                (frame, content)
            }
        };
        let frame = Frame {
            run_count: u32::try_from(self.encoder.runs().len()).unwrap_or(u32::MAX),
            payload_bytes: u32::try_from(self.encoder.payload_bytes()).unwrap_or(u32::MAX),
            ..frame
        };
        self.sequence = sequence;
        let burst = options.max_bandwidth.take(now, frame.bytes());
        self.prepared = Some(Prepared { frame, content, burst });
        Ok(None)
    }

    /// Gives a prepared frame to the kernel.
    fn send(&mut self, prepared: Prepared, now: Instant) -> Result<(), TransportError> {
        let Prepared { frame, content, burst } = prepared;
        self.encoder.load_into(|runs, pieces, staged| {
            self.ring.load(pieces, staged, |header| write_frame(header, &frame, runs));
        });
        let choice = self.method.choose(&self.encoder, &self.ring, self.session);
        self.current = Some(Current {
            choice,
            payload_bytes: frame.payload_bytes.into(),
            cpu: Duration::ZERO,
            retries: 0,
        });
        if self.in_flight.is_empty() {
            self.last_progress = now;
        }
        let bytes = frame.bytes();
        self.in_flight_bytes += bytes;
        self.in_flight.push_back(InFlight { sequence: frame.sequence, since: now, bytes, content, burst });
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
                self.session.scheduler.fail(source);
                Err(self.broken(error))
            }
            SendOutcome::Failed(error) => Err(self.broken(error)),
        }
    }

    /// Whether the destination has acknowledged anything on this connection.
    pub(super) fn carried_anything(&self) -> bool {
        self.acknowledged_any
    }

    /// What was under way, now that the connection is gone.
    pub(super) fn unacknowledged(&mut self) -> Unacknowledged {
        let mut back = Unacknowledged { superseded: self.superseded, ..Unacknowledged::default() };
        let prepared = self.prepared.take().map(|prepared| prepared.content);
        let in_flight: Vec<_> = self.in_flight.drain(..).map(|frame| frame.content).chain(prepared).collect();
        for content in in_flight {
            match content {
                Content::Pages { mut runs, content_pages, zero_pages } => {
                    // The copies that arrived instead of these count nowhere else.
                    if self.superseded {
                        self.arrived(content_pages, zero_pages);
                    }
                    back.runs.append(&mut runs);
                }
                Content::Copies { mut runs, .. } => back.copies.append(&mut runs),
                Content::State(chunk) => back.state.push(chunk),
                Content::Retirement(connection) => back.retiring.push(connection),
            }
        }
        back
    }
}

/// CPU time of this thread.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
