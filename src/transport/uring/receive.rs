//! Receiving: short messages into a buffer of the ring's own, pages straight into guest RAM.

use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use rustix::mm::{Advice, madvise};

use super::ring::{DRAIN, POLL_INTERVAL, Ring, result_of};
use crate::layout::{GuestMemory, HostRun, PAGE_SIZE};
use crate::transport::error::TransportError;
use crate::transport::socket;
use crate::wire::data::FrameHeader;
use crate::wire::{FRAME_DATA_PAGES_MAX, STATE_CHUNK_BYTES_MAX};

/// The head of a frame, and a payload that is no pages. What is never used is never touched.
const BUFFER_BYTES: usize = FrameHeader::HEAD_BYTES_MAX + STATE_CHUNK_BYTES_MAX as usize;

/// A receive that the kernel has no memory for is asked again this often, a millisecond apart.
const RETRIES_MAX: u32 = 1000;
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// How a receive ended.
#[derive(Debug)]
pub(in crate::transport) enum Received {
    /// With everything that was asked for.
    All,
    /// The peer closed at the beginning of what was asked for.
    Closed,
    /// The caller's `stop` said so.
    Stopped,
}

/// The ring of one incoming connection.
pub(in crate::transport) struct ReceiveRing {
    ring: Ring,
    stream: Arc<TcpStream>,
    /// Keeps guest RAM mapped while the kernel writes it.
    _memory: GuestMemory,
    buffer: Box<[u8]>,
    pieces: Vec<libc::iovec>,
    message: Box<libc::msghdr>,
}

impl ReceiveRing {
    pub(in crate::transport) fn new(
        stream: Arc<TcpStream>,
        memory: &GuestMemory,
    ) -> Result<Self, TransportError> {
        Ok(Self {
            ring: Ring::new(4)?,
            stream,
            _memory: memory.clone(),
            buffer: vec![0; BUFFER_BYTES].into(),
            pieces: Vec::with_capacity(FRAME_DATA_PAGES_MAX as usize),
            // SAFETY: a `msghdr` of zeros is one without address, data and control message.
            message: Box::new(unsafe { std::mem::zeroed() }),
        })
    }

    /// What was read into this part of the buffer.
    pub(in crate::transport) fn bytes(&self, part: Range<usize>) -> &[u8] {
        &self.buffer[part]
    }

    /// Fills a part of the buffer. `stop` is asked about fifty times a second.
    pub(in crate::transport) fn read_bytes(
        &mut self,
        part: Range<usize>,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Received> {
        self.pieces.clear();
        let wanted = &mut self.buffer[part];
        self.pieces.push(libc::iovec { iov_base: wanted.as_mut_ptr().cast(), iov_len: wanted.len() });
        self.read_pieces(stop)
    }

    /// Fills guest RAM, run after run.
    pub(in crate::transport) fn read_pages(
        &mut self,
        runs: &[HostRun],
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Received> {
        self.pieces.clear();
        self.pieces.extend(
            runs.iter().map(|run| libc::iovec { iov_base: run.host.cast(), iov_len: run.len_bytes() }),
        );
        self.read_pieces(stop)
    }

    /// Lets the kernel allocate a run's pages in one go, which costs a fifth less than a fault for each page
    /// while it is read into. Where that does not work, the faults do. If the first page is there already, the
    /// others are taken to be: to populate what is populated costs, too.
    pub(in crate::transport) fn populate(&mut self, run: &HostRun) {
        let mut resident = 0;
        // SAFETY: guest RAM, mapped as long as `_memory` lives; one byte is written for one page.
        let known = unsafe { libc::mincore(run.host.cast(), PAGE_SIZE, &raw mut resident) } == 0;
        if known && resident & 1 == 0 {
            // SAFETY: guest RAM, mapped as long as `_memory` lives; populating changes no content.
            let _ = unsafe { madvise(run.host.cast(), run.len_bytes(), Advice::LinuxPopulateWrite) };
        }
    }

    fn read_pieces(&mut self, stop: &dyn Fn() -> bool) -> io::Result<Received> {
        let (mut piece, mut begun, mut retries) = (0, false, 0);
        while piece < self.pieces.len() {
            match self.read_once(piece, stop) {
                Ok(Some(0)) if stop() => return Ok(Received::Stopped),
                Ok(Some(0)) if begun => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(Some(0)) => return Ok(Received::Closed),
                Ok(Some(read)) => {
                    begun = true;
                    piece = self.advance(piece, read);
                }
                Ok(None) => return Ok(Received::Stopped),
                Err(_) if stop() => return Ok(Received::Stopped),
                Err(error) if is_transient(&error) && retries < RETRIES_MAX => {
                    retries += 1;
                    std::thread::sleep(RETRY_DELAY);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Received::All)
    }

    /// Reads into the pieces from `piece` on: how many bytes, or `None` if stopped.
    fn read_once(&mut self, piece: usize, stop: &dyn Fn() -> bool) -> io::Result<Option<usize>> {
        let pieces = &mut self.pieces[piece..];
        self.message.msg_iov = pieces.as_mut_ptr();
        self.message.msg_iovlen = pieces.len() as _;
        let entry = opcode::RecvMsg::new(types::Fd(self.stream.as_raw_fd()), &raw mut *self.message)
            .flags(libc::MSG_WAITALL.cast_unsigned())
            .build();
        // SAFETY:
        // * `message`, `pieces` and `buffer` are on the heap and untouched until the loop below has seen the
        //   completion; every other way out drains the ring first.
        // * The pieces are the buffer, or guest RAM that stays mapped as long as `_memory` lives, checked
        //   against the layout, at the destination of a migration, where no Rust reference to it exists.
        unsafe { self.ring.push(&[entry]) }?;
        loop {
            if let Some(entry) = self.ring.completion() {
                return result_of(&entry).map(Some);
            }
            if stop() {
                self.drain();
                return Ok(None);
            }
            if let Err(error) = self.ring.enter(POLL_INTERVAL) {
                self.drain();
                return Err(error);
            }
        }
    }

    fn advance(&mut self, mut piece: usize, mut read: usize) -> usize {
        while read > 0 && piece < self.pieces.len() {
            let current = &mut self.pieces[piece];
            let step = read.min(current.iov_len);
            current.iov_base = current.iov_base.wrapping_byte_add(step);
            current.iov_len -= step;
            read -= step;
            if current.iov_len == 0 {
                piece += 1;
            }
        }
        piece
    }

    /// Aborts the connection and waits until the kernel can write neither buffer nor guest RAM any more.
    fn drain(&mut self) {
        socket::abort(&self.stream);
        let deadline = Instant::now() + DRAIN;
        while self.ring.in_flight > 0 && Instant::now() < deadline {
            while self.ring.completion().is_some() {}
            if self.ring.in_flight == 0 || self.ring.enter(POLL_INTERVAL).is_err() {
                break;
            }
        }
        while self.ring.completion().is_some() {}
    }
}

impl Drop for ReceiveRing {
    fn drop(&mut self) {
        self.drain();
        if self.ring.in_flight > 0 {
            // Never seen; but the kernel's claim on this memory goes before ours.
            tracing::error!("io_uring keeps a receive of an aborted socket");
            std::mem::forget(std::mem::take(&mut self.buffer));
            std::mem::forget(std::mem::take(&mut self.pieces));
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM))
}
