//! One outgoing channel: its thread, its connection, and the connection after that one.
//!
//! The thread prepares a frame while the kernel sends the one before. What it prepares is sized by what its link
//! was measured to carry: frames of a few milliseconds, so that a slow link never sits on much, and no more in
//! flight than the link's bandwidth-delay product needs.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

use super::bandwidth::Estimator;
use super::counters::{ChannelCounters, ChannelLoss};
use super::deal::{Unacknowledged, Work};
use super::frame::Pages;
use super::policy::{self, Policy};
use super::send::Shared;
use super::socket::{self, Buffer};
use super::uring::{
    Completion, LOOK_UP, RegisteredBuffers, Registration, SLOTS, SendMethod, SendOutcome, SendRing,
};
use super::{TransportError, ZeroCopy};
use crate::layout::{HostRun, PAGE_SIZE, PageRun};
use crate::page;
use crate::wire::FRAME_DATA_PAGES_MAX;
use crate::wire::data::{
    Acknowledgement, DataError, DataHello, DataWelcome, Frame, FrameHeader, FrameKind, FrameRun, Verdict,
    WireRun, write_frame,
};

/// A frame holds what the link carries in this time, so that the channels end a round together.
const FRAME_TIME: Duration = Duration::from_millis(2);
const FRAME_PAGES_MIN: u64 = 16;
/// Larger frames do not send faster, and leave the second-level cache between zero scan and copy.
const FRAME_PAGES_MAX: u64 = 256;

/// What may be unacknowledged on a link that nothing is known about yet, and at least.
const WINDOW_BYTES_MIN: u64 = 1 << 20;
const WINDOW_BYTES_MAX: u64 = 128 << 20;
/// Beyond twice the round trip, what covers the destination's own delays.
const WINDOW_SLACK: Duration = Duration::from_millis(30);

/// Beyond twice the round trip, what covers the time until this thread fills the socket's buffer again.
const BUFFER_SLACK: Duration = Duration::from_millis(1);

/// A send that the kernel has no memory for is tried again this often, a millisecond apart.
const RETRIES_MAX: u32 = 2000;
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// Holes up to this size are registered, and with that populated, rather than cut a buffer in two.
const EXTENT_GAP_PAGES: u64 = 64;

/// Pauses between attempts to reconnect.
const RECONNECT_FIRST: Duration = Duration::from_millis(250);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// An attempt may take this long; nothing waits for it, but the end of the sender might.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// When a round waits for nothing but one channel, and that one has had a frame under way for this long, the
/// others take over what it has.
const STRAGGLER: Duration = Duration::from_secs(1);

/// How long an idle channel sleeps before it looks whether its connection still stands.
const IDLE: Duration = Duration::from_millis(50);

/// Guest RAM as the first channel registered it, for the others to take over; or why it could not.
pub(super) type SharedRegistration = Mutex<Option<Result<RegisteredBuffers, String>>>;

/// A connection whose greeting was answered.
pub(super) struct Connected {
    stream: Arc<TcpStream>,
    number: u32,
}

/// Connects channel `index` and shakes hands.
pub(super) fn connect(shared: &Shared, index: usize, timeout: Duration) -> Result<Connected, TransportError> {
    let spec = &shared.counters.channels[index].spec;
    let failed = |source| TransportError::Connect { channel: spec.clone(), source };
    let stream = socket::connect(spec, timeout, shared.options.stall_timeout).map_err(failed)?;
    let deadline = Instant::now() + timeout;
    let number = shared.connection_number();
    let channel = u16::try_from(index).unwrap_or(u16::MAX);
    let hello = DataHello::new(shared.token.0, channel, number);
    socket::write_short(&stream, zerocopy::IntoBytes::as_bytes(&hello), timeout).map_err(failed)?;
    let mut answer = [0; DataWelcome::BYTES];
    socket::read_exact_before(&stream, &mut answer, deadline).map_err(failed)?;
    match DataWelcome::read(&answer) {
        Ok(Verdict::Welcome) => Ok(Connected { stream: Arc::new(stream), number }),
        Ok(verdict) => Err(TransportError::Refused { channel: spec.clone(), verdict }),
        Err(source) => Err(TransportError::Malformed { peer: spec.to_string(), source }),
    }
}

/// The channel's thread: one connection after the other until the sender ends.
pub(super) fn run(shared: &Shared, index: usize, first: Connected) {
    let counters = &shared.counters.channels[index];
    let mut connected = first;
    loop {
        counters.connected.store(true, Ordering::Relaxed);
        let number = connected.number;
        let (end, unacknowledged) = match Connection::new(shared, counters, connected) {
            Ok(mut connection) => {
                let end = connection.serve();
                (end, connection.unacknowledged())
            }
            Err(error) => (Err(error), Unacknowledged::default()),
        };
        counters.connected.store(false, Ordering::Relaxed);
        let Err(error) = end else {
            shared.dealer.lost(number, unacknowledged);
            return;
        };
        let pages_returned = unacknowledged.runs.iter().map(|run| run.pages).sum();
        counters.pages_returned.add(pages_returned);
        tracing::warn!(channel = %counters.spec, pages_returned, %error, "channel lost");
        let loss = ChannelLoss {
            channel: counters.spec.clone(),
            at: shared.begun.elapsed(),
            round: shared.dealer.round(),
            pages_returned,
            reason: error.to_string(),
        };
        shared.counters.lost(loss);
        // Last: it wakes whoever waits for the round, and finds the loss on record.
        shared.dealer.lost(number, unacknowledged);
        match reconnect(shared, index) {
            Some(again) => connected = again,
            None => return,
        }
        counters.reconnects.add(1);
        shared.dealer.joined();
        tracing::info!(channel = %counters.spec, "channel reconnected");
    }
}

fn reconnect(shared: &Shared, index: usize) -> Option<Connected> {
    let mut pause = RECONNECT_FIRST;
    while shared.options.reconnect && !shared.is_cancelled() && shared.dealer.sleep(pause) {
        match connect(shared, index, shared.options.connect_timeout.min(RECONNECT_TIMEOUT)) {
            Ok(connected) => return Some(connected),
            // The destination has decided; asking again will not change its mind.
            Err(TransportError::Refused { .. }) => return None,
            Err(error) => tracing::debug!(index, %error, "cannot reconnect yet"),
        }
        pause = (pause * 2).min(RECONNECT_MAX);
    }
    None
}

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
    class: u8,
    method: SendMethod,
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
struct Connection<'a> {
    shared: &'a Shared,
    counters: &'a ChannelCounters,
    stream: Arc<TcpStream>,
    ring: SendRing,
    registration: Option<Registration>,
    registration_tried: bool,
    policy: Policy,
    estimator: Estimator,
    /// Of the last frame prepared, until it is loaded into the ring.
    pages: Pages,
    prepared: Option<Prepared>,
    current: Option<Current>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    in_flight_pages: u64,
    sequence: u64,
    acknowledgement: Vec<u8>,
    min_rtt: Duration,
    /// What the link holds under way, the largest seen.
    link_bytes: u32,
    bytes_acked: u64,
    last_progress: Instant,
}

impl<'a> Connection<'a> {
    fn new(
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
            registration: None,
            registration_tried: false,
            policy: Policy::new(shared.options.zero_copy),
            estimator: Estimator::default(),
            pages: Pages::default(),
            prepared: None,
            current: None,
            in_flight: VecDeque::with_capacity(SLOTS),
            in_flight_bytes: 0,
            in_flight_pages: 0,
            sequence: 0,
            acknowledgement: Vec::with_capacity(Acknowledgement::BYTES),
            min_rtt: Duration::ZERO,
            link_bytes: 0,
            bytes_acked: 0,
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
    fn serve(&mut self) -> Result<(), TransportError> {
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
                    self.policy.reported(copied);
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
        self.last_progress = Instant::now();
        if self.in_flight.is_empty() {
            self.sample(self.last_progress)?;
        }
        self.shared.dealer.acknowledged(pages);
        Ok(())
    }

    /// Asks the kernel, some fifty times a second, what arrived; gives up a connection on which nothing does.
    fn look(&mut self, now: Instant) -> Result<(), TransportError> {
        if self.in_flight.is_empty() || !self.estimator.is_due(now) {
            return Ok(());
        }
        self.sample(now)?;
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

    fn sample(&mut self, now: Instant) -> Result<(), TransportError> {
        let info = socket::tcp_info(&self.stream).map_err(|error| self.broken(error))?;
        if info.bytes_acked != self.bytes_acked {
            self.bytes_acked = info.bytes_acked;
            self.last_progress = now;
        }
        self.min_rtt = info.min_rtt;
        self.estimator.look(now, info.bytes_acked, !self.in_flight.is_empty());
        *self.counters.bandwidth.lock() = self.estimator.bandwidth();
        self.make_room()?;
        let mut sending = self.counters.sending.lock();
        sending.copies = self.policy.copies();
        sending.zero_copy_from_pages = self.policy.threshold_pages();
        Ok(())
    }

    /// Sees to it that the send buffer, and by what frames say the receive buffer, holds what the link does.
    fn make_room(&mut self) -> Result<(), TransportError> {
        let held = self.carries(self.min_rtt * 2 + BUFFER_SLACK).unwrap_or(0).min(socket::BUFFER_BYTES_MAX);
        let held = u32::try_from(held).unwrap_or(u32::MAX);
        // In steps, so that a wavering estimate does not cost a system call each time.
        if held <= self.link_bytes + self.link_bytes / 4 {
            return Ok(());
        }
        self.link_bytes = held;
        let room = socket::make_room(&self.stream, Buffer::Send, held.into());
        if let Some(room) = room.map_err(|error| self.broken(error))? {
            let reason =
                format!("the link holds {held} bytes, the send buffer {room}: raise net.core.wmem_max");
            self.counters.sending.lock().fallback = Some(reason);
        }
        Ok(())
    }

    /// Bytes that the link carries in `time`, once it is known.
    fn carries(&self, time: Duration) -> Option<u64> {
        let bandwidth = self.estimator.bandwidth();
        let bytes = bandwidth.bytes_per_s * time.as_secs_f64();
        // Rates of links are far inside the range of u64.
        (bandwidth.samples > 0)
            .then(|| Duration::from_secs_f64(bytes.clamp(0.0, 1e12) * 1e-9).as_nanos())
            .and_then(|bytes| u64::try_from(bytes).ok())
    }

    fn frame_pages(&self) -> u64 {
        let by_link = self.carries(FRAME_TIME).map_or(FRAME_PAGES_MIN * 4, |bytes| bytes / PAGE_SIZE as u64);
        let mut pages = by_link.clamp(FRAME_PAGES_MIN, FRAME_PAGES_MAX);
        if let Some(limit) = self.shared.options.max_bandwidth.get() {
            let by_limit = limit.get() / 200 / PAGE_SIZE as u64;
            pages = pages.min(by_limit.max(FRAME_PAGES_MIN));
        }
        match self.shared.options.frame_pages_max {
            0 => pages,
            pages => u64::from(pages.min(FRAME_DATA_PAGES_MAX)),
        }
    }

    fn window_bytes(&self) -> u64 {
        let bytes = self.carries(self.min_rtt * 2 + WINDOW_SLACK).unwrap_or(0);
        bytes.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
    }

    /// Prepares the next frame if there is room and work for one. When the limit says wait, for how long; zero
    /// duration is never returned.
    fn prepare(&mut self, now: Instant) -> Result<Option<Duration>, TransportError> {
        let full = self.in_flight.len() >= SLOTS || self.in_flight_bytes >= self.window_bytes();
        if self.prepared.is_some() || full {
            return Ok(None);
        }
        if let Err(wait) = self.shared.options.max_bandwidth.ask(now) {
            self.estimator.waited_for_tokens();
            return Ok(Some(wait));
        }
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
                    self.pages.frame(self.sequence + 1, round, self.link_bytes),
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
        let class = policy::class_of(self.pages.data_pages, payload.len());
        self.ring.load(payload, |header| write_frame(header, &frame, runs));
        let method = self.method(class);
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
        if self.estimator.is_due(now) {
            self.sample(now)?;
        }
        self.current = Some(Current {
            class,
            method,
            payload_bytes: frame.payload_bytes.into(),
            cpu: Duration::ZERO,
            retries: 0,
        });
        self.submit()
    }

    /// How the pages of the prepared frame shall leave.
    fn method(&mut self, class: u8) -> SendMethod {
        if self.pages.payload.is_empty() || !self.policy.zero_copy(class) {
            return SendMethod::Copy;
        }
        self.register_if_worth_it();
        let buffer = self.registration.as_ref().and_then(|table| table.buffer_of(&self.pages.payload));
        buffer.map_or(SendMethod::ZeroCopy, SendMethod::ZeroCopyFixed)
    }

    /// Submits what is left of the current frame.
    fn submit(&mut self) -> Result<(), TransportError> {
        let Some(Current { method, .. }) = self.current else { return Ok(()) };
        self.ring.send(method).map_err(|error| self.broken(error))?;
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
                if current.payload_bytes > 0 {
                    let copied = current.method == SendMethod::Copy;
                    self.policy.sent(current.class, !copied, current.cpu, current.payload_bytes);
                    if copied {
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
                    Some(error) if current.method != SendMethod::Copy => {
                        // Whatever zero-copy lacks here (memory that may be pinned, a socket that can), copying
                        // does not need it.
                        current.method = SendMethod::Copy;
                        self.give_up_zero_copy(&error);
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

    fn give_up_zero_copy(&mut self, error: &io::Error) {
        let advice = match error.raw_os_error() {
            Some(libc::ENOMEM | libc::ENOBUFS) => "raise RLIMIT_MEMLOCK (ulimit -l) or give CAP_IPC_LOCK",
            _ => "this kernel or socket cannot do it",
        };
        self.policy.refused();
        let reason = format!("zero-copy sends: {error}: {advice}");
        tracing::info!(channel = %self.counters.spec, reason, "copying from here on");
        self.counters.sending.lock().fallback = Some(reason);
    }

    /// Registers guest RAM once that is known to pay, or takes over what another channel registered.
    fn register_if_worth_it(&mut self) {
        if self.registration_tried || !self.policy.pays_to_register() {
            return;
        }
        self.registration_tried = true;
        let mut shared = self.shared.registered.lock();
        let buffers = shared.get_or_insert_with(|| {
            RegisteredBuffers::new(&self.shared.memory, &self.extents())
                .map_err(|error| format!("registering guest RAM: {error}: {}", registration_advice(&error)))
        });
        let result = buffers.as_ref().map_err(Clone::clone).and_then(|buffers| {
            let cloned = self.ring.register(buffers);
            cloned.map(|table| (table, buffers.bytes())).map_err(|error| {
                format!(
                    "registering guest RAM: taking over the table: {error}: {}",
                    registration_advice(&error)
                )
            })
        });
        let mut sending = self.counters.sending.lock();
        match result {
            Ok((registration, bytes)) => {
                sending.registered_bytes = bytes;
                self.registration = Some(registration);
            }
            Err(reason) => {
                tracing::info!(channel = %self.counters.spec, reason, "pages are pinned for each send");
                sending.fallback = Some(reason);
            }
        }
    }

    /// What is worth registering: what is populated, as far as it lies together.
    fn extents(&self) -> Vec<HostRun> {
        let memory = &self.shared.memory;
        let regions = memory.regions().iter().enumerate();
        let whole = regions.map(|(region, r)| HostRun { run: r.pages, region, host: r.host });
        if self.shared.options.zero_copy == ZeroCopy::AlwaysRegistered {
            return whole.collect();
        }
        let populated = page::populated(memory).pages;
        let mut extents = Vec::new();
        for region in memory.regions() {
            let mut extent: Option<PageRun> = None;
            for run in populated.runs_within(region.pages) {
                extent = match extent {
                    Some(last) if run.first.0 - last.end().0 <= EXTENT_GAP_PAGES => {
                        Some(PageRun { first: last.first, pages: run.end().0 - last.first.0 })
                    }
                    last => {
                        extents.extend(last);
                        Some(run)
                    }
                };
            }
            extents.extend(extent);
        }
        extents.into_iter().filter_map(|run| memory.host_runs(run).ok()).flatten().collect()
    }

    /// What must be sent again now that the connection is gone.
    fn unacknowledged(&mut self) -> Unacknowledged {
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

fn registration_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "raise RLIMIT_MEMLOCK (ulimit -l) to the size of guest RAM or give CAP_IPC_LOCK"
        }
        Some(libc::EFAULT | libc::EOPNOTSUPP) => {
            "memory from a shared file of a disk file system cannot be pinned"
        }
        Some(libc::EMFILE) => "guest RAM is in too many pieces",
        _ => "pages are pinned for each send instead",
    }
}

/// CPU time of this thread.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
