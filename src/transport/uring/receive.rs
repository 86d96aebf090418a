//! Receiving: short messages into a buffer of the ring's own, pages straight into guest RAM.

use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{opcode, types};
use rustix::mm::{Advice, madvise};

use super::ring::{POLL_INTERVAL, Ring, result_of};
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
    lent: Box<Lent>,
}

/// What the kernel reads and writes while an operation is in flight. Boxed: the kernel holds its address.
struct Lent {
    /// Keeps guest RAM mapped.
    _memory: Option<GuestMemory>,
    buffer: Box<[u8]>,
    pieces: Vec<libc::iovec>,
    message: libc::msghdr,
}

impl Default for Lent {
    fn default() -> Self {
        Self {
            _memory: None,
            buffer: Box::default(),
            pieces: Vec::new(),
            // SAFETY: a `msghdr` of zeros is one without address, data and control message.
            message: unsafe { std::mem::zeroed() },
        }
    }
}

impl ReceiveRing {
    pub(in crate::transport) fn new(
        stream: Arc<TcpStream>,
        memory: &GuestMemory,
    ) -> Result<Self, TransportError> {
        Ok(Self {
            ring: Ring::new(4)?,
            stream,
            lent: Box::new(Lent {
                _memory: Some(memory.clone()),
                buffer: vec![0; BUFFER_BYTES].into(),
                pieces: Vec::with_capacity(FRAME_DATA_PAGES_MAX as usize),
                ..Lent::default()
            }),
        })
    }

    /// What was read into this part of the buffer.
    pub(in crate::transport) fn bytes(&self, part: Range<usize>) -> &[u8] {
        &self.lent.buffer[part]
    }

    /// Fills a part of the buffer. `stop` is asked about fifty times a second.
    pub(in crate::transport) fn read_bytes(
        &mut self,
        part: Range<usize>,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Received> {
        self.check_idle()?;
        let Lent { buffer, pieces, .. } = &mut *self.lent;
        pieces.clear();
        let wanted = &mut buffer[part];
        pieces.push(libc::iovec { iov_base: wanted.as_mut_ptr().cast(), iov_len: wanted.len() });
        self.read_pieces(stop)
    }

    /// Fills guest RAM, run after run.
    pub(in crate::transport) fn read_pages(
        &mut self,
        runs: &[HostRun],
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Received> {
        self.check_idle()?;
        let vectors =
            runs.iter().map(|run| libc::iovec { iov_base: run.host.cast(), iov_len: run.len_bytes() });
        self.lent.pieces.clear();
        self.lent.pieces.extend(vectors);
        self.read_pieces(stop)
    }

    /// Lets the kernel allocate a run's pages in one go, which costs a fifth less than a fault for each page
    /// while it is read into. Where that does not work, the faults do. If the first page is there already, the
    /// others are taken to be: to populate what is populated costs, too.
    pub(in crate::transport) fn populate(&mut self, run: &HostRun) {
        let mut resident = 0;
        // SAFETY: guest RAM, mapped as long as `lent._memory` lives; one byte is written for one page.
        let known = unsafe { libc::mincore(run.host.cast(), PAGE_SIZE, &raw mut resident) } == 0;
        if known && resident & 1 == 0 {
            // SAFETY: guest RAM, mapped as long as `lent._memory` lives; populating changes no content.
            let _ = unsafe { madvise(run.host.cast(), run.len_bytes(), Advice::LinuxPopulateWrite) };
        }
    }

    /// Nothing that is lent may be touched while the kernel has it, which it has after a stop that could not be waited for.
    fn check_idle(&self) -> io::Result<()> {
        if self.ring.in_flight == 0 {
            return Ok(());
        }
        Err(io::Error::other("the kernel still holds a receive of this connection, which was aborted"))
    }

    fn read_pieces(&mut self, stop: &dyn Fn() -> bool) -> io::Result<Received> {
        let (mut piece, mut begun, mut retries) = (0, false, 0);
        while piece < self.lent.pieces.len() {
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
        let Lent { pieces, message, .. } = &mut *self.lent;
        let pieces = &mut pieces[piece..];
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len() as _;
        let entry = opcode::RecvMsg::new(types::Fd(self.stream.as_raw_fd()), &raw mut *message)
            .flags(libc::MSG_WAITALL.cast_unsigned())
            .build();
        // SAFETY:
        // * What is lent is on the heap and untouched until the loop below has seen the completion; every other way out
        //   drains the ring. If the kernel keeps the operation even then, `check_idle` refuses and drop frees nothing.
        // * The pieces are the buffer, or guest RAM that stays mapped as long as `lent._memory` lives, checked
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
        let pieces = &mut self.lent.pieces;
        while read > 0 && piece < pieces.len() {
            let current = &mut pieces[piece];
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

    /// Aborts the connection and waits until the kernel can write neither buffer nor guest RAM any more. False if it still can.
    fn drain(&mut self) -> bool {
        socket::abort(&self.stream);
        self.ring.drain()
    }
}

impl Drop for ReceiveRing {
    fn drop(&mut self) {
        if !self.drain() {
            // Never seen; but the kernel's claim on this memory goes before ours. Guest RAM stays mapped, too: else the
            // kernel would write into whatever is mapped there next.
            std::mem::forget(std::mem::take(&mut self.lent));
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;
    use crate::testing::AnonymousRam;

    fn pair() -> (Arc<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Arc::new(near), listener.accept().unwrap().0)
    }

    /// A kernel that does not end the operations of an aborted connection: a receive on a connection that nobody aborts.
    fn receive_that_outlasts_the_abort(ring: &mut ReceiveRing, other: &TcpStream) {
        let (aborted, lasting) = (Arc::clone(&ring.stream), Arc::new(other.try_clone().unwrap()));
        ring.stream = lasting;
        let Lent { pieces, message, .. } = &mut *ring.lent;
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len();
        let entry = opcode::RecvMsg::new(types::Fd(ring.stream.as_raw_fd()), &raw mut *message).build();
        // SAFETY: that drop takes care of what the entry points to is what these tests show.
        unsafe { ring.ring.push(&[entry]) }.unwrap();
        ring.ring.submit().unwrap();
        ring.stream = aborted;
    }

    /// RAM of its own, and whether it is still mapped.
    fn owned_ram() -> (GuestMemory, std::sync::Weak<AnonymousRam>) {
        let ram = Arc::new(AnonymousRam::new(16).unwrap());
        let weak = Arc::downgrade(&ram);
        let memory = ram.memory().clone().kept_by(ram);
        (memory, weak)
    }

    #[test]
    fn what_the_kernel_may_still_write_is_never_freed() {
        let ((stream, _peer), (other, mut other_peer)) = (pair(), pair());
        let (memory, mapped) = owned_ram();
        let page = memory.regions()[0].host;
        let mut ring = ReceiveRing::new(stream, &memory).unwrap();
        drop(memory);
        ring.lent.pieces.push(libc::iovec { iov_base: page.cast(), iov_len: PAGE_SIZE });
        receive_that_outlasts_the_abort(&mut ring, &other);
        let begun = Instant::now();
        drop(ring);
        assert!(begun.elapsed() < Duration::from_secs(5), "the wait for the kernel has a bound");
        assert!(mapped.upgrade().is_some(), "guest RAM was unmapped under the kernel's hand");
        // Whether the kernel gave up the receive with the ring or not: the bytes land nowhere else.
        io::Write::write_all(&mut other_peer, &[7; PAGE_SIZE]).unwrap();
    }

    #[test]
    fn what_the_kernel_has_let_go_of_is_freed() {
        let (stream, _peer) = pair();
        let (memory, mapped) = owned_ram();
        let ring = ReceiveRing::new(stream, &memory).unwrap();
        drop((ring, memory));
        assert!(mapped.upgrade().is_none());
    }

    #[test]
    fn after_a_stop_that_the_kernel_does_not_heed_nothing_lent_is_touched() {
        let ((stream, _peer), (other, _other_peer)) = (pair(), pair());
        let (memory, _) = owned_ram();
        let mut ring = ReceiveRing::new(stream, &memory).unwrap();
        let page = memory.regions()[0].host;
        ring.lent.pieces.push(libc::iovec { iov_base: page.cast(), iov_len: PAGE_SIZE });
        receive_that_outlasts_the_abort(&mut ring, &other);
        assert!(!ring.drain());
        let error = ring.read_bytes(0..8, &|| false).unwrap_err();
        assert!(error.to_string().contains("still holds"), "{error}");
    }
}
