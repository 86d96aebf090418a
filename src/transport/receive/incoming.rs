//! One incoming connection: reads frames, checks them, puts their pages in place, acknowledges.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::Arrivals;
use super::connections::{Connections, Joined};
use crate::layout::{HostRun, PageRun};
use crate::transport::TransportError;
use crate::transport::socket::{self, Buffer};
use crate::transport::uring::{ReceiveRing, Received as Read};
use crate::wire::data::{
    Acknowledgement, DataError, Frame, FrameHeader, FrameKind, FrameRun, RunKind, WireRun, read_runs,
};

/// A source that does not take its acknowledgements for this long is gone.
pub(super) const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Runs from this length on are populated by one call when their first page is new.
const POPULATE_PAGES_MIN: u64 = 16;

/// One incoming connection.
pub(super) struct Incoming<'a> {
    arrivals: &'a Arrivals,
    connections: &'a Connections,
    /// Before `joined`, as fields are dropped in this order: the connection has left only when the kernel can no
    /// longer write guest RAM for it.
    ring: ReceiveRing,
    joined: Joined<'a>,
    peer: SocketAddr,
    stream: Arc<TcpStream>,
    sequence: u64,
    round: u32,
    link_bytes: u32,
    runs: Vec<FrameRun>,
}

impl<'a> Incoming<'a> {
    /// Makes a connection ready to receive.
    pub(super) fn new(
        arrivals: &'a Arrivals,
        connections: &'a Connections,
        joined: Joined<'a>,
        stream: &Arc<TcpStream>,
        peer: SocketAddr,
    ) -> Result<Self, TransportError> {
        Ok(Self {
            arrivals,
            connections,
            joined,
            peer,
            stream: Arc::clone(stream),
            ring: ReceiveRing::new(Arc::clone(stream), &arrivals.memory)?,
            sequence: 0,
            round: 0,
            link_bytes: 0,
            runs: Vec::new(),
        })
    }

    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken { peer: self.peer.to_string(), source }
    }

    fn malformed(&self, source: DataError) -> TransportError {
        TransportError::Malformed { peer: self.peer.to_string(), source }
    }

    /// Receives until the source closes between two frames, or this side stops (both `Ok`), or the connection
    /// breaks.
    pub(super) fn serve(&mut self) -> Result<(), TransportError> {
        while let Some(frame) = self.next_frame()? {
            match frame.kind {
                FrameKind::Pages => {
                    self.make_room(frame.argument)?;
                    if !self.place_pages()? {
                        return Ok(());
                    }
                }
                FrameKind::Retire => {
                    let retired = self.connections.retire(frame.argument, &self.joined);
                    retired.map_err(|error| self.broken(error))?;
                }
            }
            let header = FrameHeader::BYTES as u64 + u64::from(frame.run_count) * WireRun::BYTES as u64;
            self.arrivals.bytes.add(header + u64::from(frame.payload_bytes));
            let acknowledgement = Acknowledgement::new(frame.sequence);
            (&*self.stream).write_all(acknowledgement.as_bytes()).map_err(|error| self.broken(error))?;
        }
        Ok(())
    }

    fn read(&mut self, from: usize, to: usize) -> Result<Read, TransportError> {
        let joined = &self.joined;
        self.ring.read_bytes(from, to, &|| joined.must_end()).map_err(|error| self.broken(error))
    }

    /// Header and run list of the next frame, checked; `None` when there is none.
    fn next_frame(&mut self) -> Result<Option<Frame>, TransportError> {
        match self.read(0, FrameHeader::BYTES)? {
            Read::All => {}
            Read::Closed | Read::Stopped => return Ok(None),
        }
        let mut header = [0; FrameHeader::BYTES];
        header.copy_from_slice(self.ring.bytes(FrameHeader::BYTES));
        let frame = FrameHeader::read(&header).map_err(|error| self.malformed(error))?;
        // Bounded by `FRAME_RUNS_MAX`.
        let length = FrameHeader::BYTES + usize::try_from(frame.run_count).unwrap_or(0) * WireRun::BYTES;
        if length > FrameHeader::BYTES {
            match self.read(FrameHeader::BYTES, length)? {
                Read::All => {}
                Read::Closed => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Read::Stopped => return Ok(None),
            }
        }
        read_runs(&frame, self.ring.bytes(length), &mut self.runs).map_err(|error| self.malformed(error))?;
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
        let memory = &self.arrivals.memory;
        let (mut data, mut zeros) = (Vec::new(), Vec::new());
        // Every run is looked up before anything lands.
        for run in &self.runs {
            let pieces = memory
                .host_runs(run.run())
                .map_err(|source| TransportError::Layout { peer: self.peer.to_string(), source })?;
            match run.kind {
                RunKind::Data => data.extend(pieces),
                RunKind::Zero => zeros.extend(pieces),
            }
        }
        let pages = |runs: &[HostRun]| runs.iter().map(|piece| piece.run.pages).sum();
        let (data_pages, zero_pages) = (pages(&data), pages(&zeros));
        for piece in &data {
            if piece.run.pages >= POPULATE_PAGES_MIN && !self.arrivals.written.contains(piece.run.first) {
                self.ring.populate(piece);
            }
        }
        // Marked first: a read that breaks off half-way has written, too.
        data.iter().for_each(|piece| self.arrivals.written.insert_run(piece.run));
        if !data.is_empty() {
            let joined = &self.joined;
            match self.ring.read_pages(&data, &|| joined.must_end()).map_err(|error| self.broken(error))? {
                Read::All => {}
                Read::Closed => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Read::Stopped => return Ok(false),
            }
        }
        zeros.iter().for_each(|piece| self.clear(piece));
        self.arrivals.pages.add(data_pages);
        self.arrivals.zero_pages.add(zero_pages);
        Ok(true)
    }

    /// Gives the receive buffer room for what the source says that the link holds, within our own limit.
    fn make_room(&mut self, link_bytes: u32) -> Result<(), TransportError> {
        if link_bytes <= self.link_bytes {
            return Ok(());
        }
        self.link_bytes = link_bytes;
        let wanted = u64::from(link_bytes).min(socket::BUFFER_BYTES_MAX);
        let room = socket::make_room(&self.stream, Buffer::Receive, wanted);
        if let Some(room) = room.map_err(|error| self.broken(error))? {
            tracing::info!(peer = %self.peer, wanted, room, "receive buffer: raise net.core.rmem_max");
        }
        Ok(())
    }

    /// Makes pages zero that may not be. Fresh memory is left untouched, so that it stays unallocated.
    fn clear(&mut self, piece: &HostRun) {
        let written = &self.arrivals.written;
        let mut page = piece.run.first;
        while page < piece.run.end() {
            let mut end = page;
            while end < piece.run.end() && written.contains(end) {
                end.0 += 1;
            }
            if end > page {
                let run = PageRun { first: page, pages: end.0 - page.0 };
                // Inside RAM, as the whole piece is.
                self.arrivals
                    .memory
                    .host_runs(run)
                    .into_iter()
                    .flatten()
                    .for_each(|run| self.ring.clear(&run));
            }
            page.0 = end.0 + 1;
        }
    }
}
