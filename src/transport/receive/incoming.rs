//! One incoming connection: reads frames, checks them, puts what they bring in place, acknowledges.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::connections::{Membership, NotPlaced};
use super::inbound::Inbound;
use crate::layout::HostRun;
use crate::transport::error::TransportError;
use crate::transport::socket::{self, Buffer};
use crate::transport::uring::{ReceiveRing, Received as Read};
use crate::wire::STATE_CHUNK_BYTES_MAX;
use crate::wire::data::{
    Acknowledgement, DataError, DataWelcome, Frame, FrameHeader, FrameKind, FrameRun, RunKind, Verdict,
    payload_checksum, read_runs,
};

/// Runs from this length on are populated by one call when their first page is new.
const POPULATE_PAGES_MIN: u64 = 16;

/// Where a payload that is no pages begins in the ring's buffer.
const PAYLOAD: usize = FrameHeader::HEAD_BYTES_MAX;

/// One incoming connection.
pub(super) struct Incoming {
    /// Before `seat`, as fields are dropped in this order: the connection has left only when the kernel can no
    /// longer write guest RAM for it.
    ring: ReceiveRing,
    seat: Seat,
    peer: SocketAddr,
    stream: Arc<TcpStream>,
    sequence: u64,
    round: u32,
    link_bytes: u64,
    runs: Vec<FrameRun>,
}

/// A connection's place in its migration; the connection leaves with this value.
pub(super) struct Seat {
    inbound: Arc<Inbound>,
    membership: Membership,
}

impl Seat {
    pub(super) fn new(inbound: Arc<Inbound>, membership: Membership) -> Self {
        Self { inbound, membership }
    }

    fn must_end(&self) -> bool {
        self.inbound.connections.must_end(&self.membership)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.inbound.connections.leave(&self.membership);
    }
}

impl Incoming {
    /// Makes a connection ready to receive, and tells the source so.
    pub(super) fn welcome(
        seat: Seat,
        stream: &Arc<TcpStream>,
        peer: SocketAddr,
    ) -> Result<Self, TransportError> {
        let ring = ReceiveRing::new(Arc::clone(stream), &seat.inbound.arrivals.memory)?;
        let incoming = Self {
            ring,
            seat,
            peer,
            stream: Arc::clone(stream),
            sequence: 0,
            round: 0,
            link_bytes: 0,
            runs: Vec::new(),
        };
        incoming.write(DataWelcome::new((Verdict::Welcome, 0)).as_bytes())?;
        Ok(incoming)
    }

    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken { peer: self.peer.to_string(), source }
    }

    fn malformed(&self, source: DataError) -> TransportError {
        TransportError::Malformed { peer: self.peer.to_string(), source }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), TransportError> {
        (&*self.stream).write_all(bytes).map_err(|error| self.broken(error))
    }

    /// Receives until the source closes between two frames, or this side stops (both `Ok`), or the connection
    /// breaks.
    pub(super) fn serve(&mut self) -> Result<(), TransportError> {
        while let Some(frame) = self.next_frame()? {
            let in_place = match frame.kind {
                FrameKind::Pages => {
                    self.make_room(frame.argument)?;
                    self.place_pages()?
                }
                FrameKind::Retire => self.retire(frame.argument)?,
                FrameKind::State => self.take_state(&frame)?,
                FrameKind::Unknown(kind) => {
                    tracing::debug!(kind, "a frame of a later version is skipped");
                    self.skip(frame.payload_bytes)?
                }
            };
            if !in_place {
                return Ok(());
            }
            self.seat.inbound.arrivals.bytes.add(frame.bytes());
            self.write(Acknowledgement::new(frame.sequence).as_bytes())?;
        }
        Ok(())
    }

    fn read(&mut self, part: Range<usize>) -> Result<Read, TransportError> {
        let seat = &self.seat;
        self.ring.read_bytes(part, &|| seat.must_end()).map_err(|error| self.broken(error))
    }

    /// Reads a part of a frame that has begun; false if this side stops.
    fn read_on(&mut self, part: Range<usize>) -> Result<bool, TransportError> {
        if part.is_empty() {
            return Ok(true);
        }
        match self.read(part)? {
            Read::All => Ok(true),
            Read::Closed => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Read::Stopped => Ok(false),
        }
    }

    /// Header and run list of the next frame, checked; `None` when there is none.
    fn next_frame(&mut self) -> Result<Option<Frame>, TransportError> {
        match self.read(0..FrameHeader::BYTES)? {
            Read::All => {}
            Read::Closed | Read::Stopped => return Ok(None),
        }
        let mut header = [0; FrameHeader::BYTES];
        header.copy_from_slice(self.ring.bytes(0..FrameHeader::BYTES));
        let frame = FrameHeader::read(&header).map_err(|error| self.malformed(error))?;
        let head = 0..frame.head_bytes();
        if !self.read_on(FrameHeader::BYTES..head.end)? {
            return Ok(None);
        }
        read_runs(&frame, self.ring.bytes(head), &mut self.runs).map_err(|error| self.malformed(error))?;
        if frame.sequence != self.sequence + 1 {
            let (found, expected) = (frame.sequence, self.sequence + 1);
            return Err(self.malformed(DataError::Sequence { found, expected }));
        }
        if frame.round < self.round {
            return Err(self.malformed(DataError::Round { found: frame.round, newest: self.round }));
        }
        (self.sequence, self.round) = (frame.sequence, frame.round);
        Ok(Some(frame))
    }

    /// Puts the pages of the current frame in place; false if this side stops.
    fn place_pages(&mut self) -> Result<bool, TransportError> {
        let inbound = Arc::clone(&self.seat.inbound);
        let (mut raw, mut zeros) = (Vec::new(), Vec::new());
        // Every run is looked up before anything lands.
        for run in &self.runs {
            let parts = inbound
                .arrivals
                .memory
                .host_runs(run.run())
                .map_err(|source| TransportError::Layout { peer: self.peer.to_string(), source })?;
            match run.kind {
                RunKind::Raw => raw.extend(parts),
                RunKind::Zero => zeros.push(run.run()),
            }
        }
        match inbound.connections.begin_to_place(&self.seat.membership) {
            Ok(()) => {}
            Err(NotPlaced::Ended) => return Ok(false),
            Err(NotPlaced::Sealed) => return Err(TransportError::Sealed { peer: self.peer.to_string() }),
        }
        let in_place = self.read_raw(&inbound, &raw);
        // A read that breaks off half-way has changed pages, too.
        raw.iter().for_each(|part| inbound.arrivals.arrived.insert_run(part.run));
        if matches!(in_place, Ok(true)) {
            zeros.iter().for_each(|run| inbound.arrivals.clear(*run));
            inbound.arrivals.pages.add(raw.iter().map(|part| part.run.pages).sum());
            inbound.arrivals.zero_pages.add(zeros.iter().map(|run| run.pages).sum());
        }
        inbound.connections.placed(&self.seat.membership);
        in_place
    }

    /// Reads pages to where they belong; false if this side stops.
    fn read_raw(&mut self, inbound: &Inbound, parts: &[HostRun]) -> Result<bool, TransportError> {
        let written = &inbound.arrivals.written;
        for part in parts {
            if part.run.pages >= POPULATE_PAGES_MIN && !written.contains(part.run.first) {
                self.ring.populate(part);
            }
        }
        // Marked first: a read that breaks off half-way has written, too.
        parts.iter().for_each(|part| written.insert_run(part.run));
        if parts.is_empty() {
            return Ok(true);
        }
        let seat = &self.seat;
        match self.ring.read_pages(parts, &|| seat.must_end()).map_err(|error| self.broken(error))? {
            Read::All => Ok(true),
            Read::Closed => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Read::Stopped => Ok(false),
        }
    }

    fn retire(&self, connection: u64) -> Result<bool, TransportError> {
        let number = u32::try_from(connection).map_err(|error| self.broken(io::Error::other(error)))?;
        let retired = self.seat.inbound.connections.retire(number, &self.seat.membership);
        retired.map(|()| true).map_err(|error| self.broken(error))
    }

    /// Takes a chunk of device state; false if this side stops.
    fn take_state(&mut self, frame: &Frame) -> Result<bool, TransportError> {
        // Bounded by `STATE_CHUNK_BYTES_MAX`.
        let length = usize::try_from(frame.payload_bytes).unwrap_or(0);
        let part = PAYLOAD..PAYLOAD + length;
        if !self.read_on(part.clone())? {
            return Ok(false);
        }
        let bytes = self.ring.bytes(part).to_vec();
        let (stated, computed) = (frame.payload_checksum, payload_checksum(&bytes));
        if stated != computed {
            let message = "a chunk of device state";
            return Err(self.malformed(DataError::Checksum { message, stated, computed }));
        }
        let inserted = self.seat.inbound.state.insert(frame.argument, bytes);
        inserted.map(|()| true).map_err(|error| self.malformed(error))
    }

    /// Reads a payload and forgets it; false if this side stops.
    fn skip(&mut self, mut bytes: u32) -> Result<bool, TransportError> {
        while bytes > 0 {
            let step = bytes.min(STATE_CHUNK_BYTES_MAX);
            if !self.read_on(PAYLOAD..PAYLOAD + usize::try_from(step).unwrap_or(0))? {
                return Ok(false);
            }
            bytes -= step;
        }
        Ok(true)
    }

    /// Gives the receive buffer room for what the source says that the link holds, within our own limit.
    fn make_room(&mut self, link_bytes: u64) -> Result<(), TransportError> {
        if link_bytes <= self.link_bytes {
            return Ok(());
        }
        self.link_bytes = link_bytes;
        let wanted = link_bytes.min(socket::BUFFER_BYTES_MAX);
        let room = socket::make_room(&self.stream, Buffer::Receive, wanted);
        if let Some(room) = room.map_err(|error| self.broken(error))? {
            tracing::info!(peer = %self.peer, wanted, room, "receive buffer: raise net.core.rmem_max");
        }
        Ok(())
    }
}
