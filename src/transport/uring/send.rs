//! Sending frames: the header copied, the pages by the method that was asked for, in order, with as many
//! notifications outstanding as the socket allows.
//!
//! A frame is sent as two linked operations: `SEND` of header and run list (with `MSG_MORE`), then `SENDMSG` or
//! `SENDMSG_ZC` of the pages. Only one frame is being sent at a time, because TCP has one order and io_uring
//! none; the socket's buffer keeps the wire busy meanwhile. What remains after a short send is sent by calling
//! [`SendRing::send`] again.

use std::io;
use std::mem::offset_of;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{cqueue, opcode, squeue, types};

use super::registration::{RegisteredBuffers, Registration};
use super::ring::{Ring, result_of};
use super::wake::Wake;
use crate::layout::GuestMemory;
use crate::page::Piece;
use crate::transport::error::TransportError;
use crate::transport::socket;
use crate::wire::FRAME_DATA_PAGES_MAX;
use crate::wire::data::{Acknowledgement, FrameHeader};

/// Frames that may wait for their acknowledgement on one connection.
pub(in crate::transport) const SLOTS: usize = 64;

/// Acknowledgements that one receive can take.
const ACKNOWLEDGEMENT_BYTES: usize = SLOTS * Acknowledgement::BYTES;

/// `IORING_RECVSEND_FIXED_BUF`: the buffer comes from the ring's table (`SENDMSG_ZC`: Linux 6.15).
const FIXED_BUFFER: u16 = 1 << 2;
/// `IORING_SEND_ZC_REPORT_USAGE`: the notification says whether the kernel copied after all (Linux 6.2).
pub(super) const REPORT_USAGE: u16 = 1 << 3;
/// `IORING_NOTIF_USAGE_ZC_COPIED`: it did.
const USAGE_COPIED: u32 = 1 << 31;

/// How the pages of a frame leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::transport) enum SendMethod {
    /// Copied into the socket's buffer.
    Copy,
    /// Zero-copy, the pages pinned for each send.
    ZeroCopy,
    /// Zero-copy out of this registered buffer.
    ZeroCopyFixed(u16),
}

/// How far a frame got.
#[derive(Debug)]
pub(in crate::transport) enum SendOutcome {
    /// The kernel took all of it.
    Complete,
    /// It took a part, or wants to be asked again: the same frame may be sent on.
    Short(Option<io::Error>),
    /// It will never take it.
    Failed(io::Error),
}

/// What came back from the kernel.
#[derive(Debug)]
pub(in crate::transport) enum Completion {
    /// A frame's send ended.
    Sent(SendOutcome),
    /// The kernel no longer needs the pages of a zero-copy send.
    Notified {
        /// Whether it had copied them.
        copied: bool,
    },
    /// Somebody used the [`Wake`].
    Woken,
    /// Bytes from the peer are in [`SendRing::received`]; 0 if it closed.
    Received(io::Result<usize>),
}

/// What the kernel reads of the frame that is being sent.
struct Outgoing {
    header: Vec<u8>,
    header_sent: usize,
    /// Payload that is not guest RAM.
    staged: Vec<u8>,
    pieces: Vec<libc::iovec>,
    piece: usize,
    message: libc::msghdr,
    /// Main completions outstanding.
    pending: u8,
    outcome: Option<io::Error>,
}

/// The ring of one outgoing connection.
pub(in crate::transport) struct SendRing {
    ring: Ring,
    stream: Arc<TcpStream>,
    /// Keeps guest RAM mapped while the kernel reads it.
    memory: Option<GuestMemory>,
    /// Boxed: the kernel holds its address.
    outgoing: Box<Outgoing>,
    received: Box<[u8; ACKNOWLEDGEMENT_BYTES]>,
    receiving: bool,
    wake: Arc<Wake>,
    wake_awaited: bool,
    finished: bool,
}

#[derive(Clone, Copy)]
#[repr(u64)]
enum Operation {
    Header = 1,
    Payload = 2,
    Receive = 3,
    Wake = 4,
}

impl SendRing {
    pub(in crate::transport) fn new(
        stream: Arc<TcpStream>,
        memory: &GuestMemory,
    ) -> Result<Self, TransportError> {
        let wake = Wake::new().map_err(|source| TransportError::Ring { what: "eventfd", source })?;
        Ok(Self {
            ring: Ring::new(8)?,
            stream,
            memory: Some(memory.clone()),
            outgoing: Box::new(Outgoing {
                header: Vec::with_capacity(FrameHeader::HEAD_BYTES_MAX),
                pieces: Vec::with_capacity(FRAME_DATA_PAGES_MAX as usize),
                ..Outgoing::default()
            }),
            received: Box::new([0; ACKNOWLEDGEMENT_BYTES]),
            receiving: false,
            wake: Arc::new(wake),
            wake_awaited: false,
            finished: false,
        })
    }

    /// Makes registered buffers this ring's own, too.
    pub(in crate::transport) fn register(&self, buffers: &RegisteredBuffers) -> io::Result<Registration> {
        buffers.clone_into(&self.ring)
    }

    /// Lets go of registered buffers; what is being sent out of them goes on.
    pub(in crate::transport) fn unregister(&self) -> io::Result<()> {
        self.ring.io.submitter().unregister_buffers()
    }

    /// Whether a frame is being sent.
    pub(in crate::transport) fn is_sending(&self) -> bool {
        self.outgoing.pending > 0
    }

    /// What ends this ring's waits from outside.
    pub(in crate::transport) fn wake(&self) -> &Arc<Wake> {
        &self.wake
    }

    /// Takes up the next frame: `write` fills in header and run list; `pieces` is its payload, the staged ones in
    /// `staged`, which is exchanged for another buffer. No frame may be on its way.
    pub(in crate::transport) fn load(
        &mut self,
        pieces: &[Piece],
        staged: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        assert!(!self.is_sending(), "the kernel still reads the frame before");
        let Outgoing { header, header_sent, staged: own, pieces: vectors, piece, .. } = &mut *self.outgoing;
        write(header);
        *header_sent = 0;
        std::mem::swap(own, staged);
        vectors.clear();
        *piece = 0;
        vectors.extend(pieces.iter().map(|piece| match piece {
            Piece::Ram(run) => libc::iovec { iov_base: run.host.cast(), iov_len: run.len_bytes() },
            Piece::Staged(range) => {
                let bytes = &mut own[range.clone()];
                libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
            }
        }));
    }

    /// Sends what is left of the loaded frame.
    pub(in crate::transport) fn send(&mut self, method: SendMethod) -> io::Result<()> {
        assert!(!self.is_sending(), "the kernel still reads the frame before");
        let fd = types::Fd(self.stream.as_raw_fd());
        let outgoing = &mut *self.outgoing;
        let header = &outgoing.header[outgoing.header_sent..];
        let pieces = &mut outgoing.pieces[outgoing.piece..];
        let wait_all = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let header_entry = (!header.is_empty()).then(|| {
            let more = if pieces.is_empty() { 0 } else { libc::MSG_MORE };
            let length = u32::try_from(header.len()).unwrap_or(u32::MAX);
            opcode::Send::new(fd, header.as_ptr(), length)
                .flags(wait_all | more)
                .build()
                .user_data(Operation::Header as u64)
        });
        let payload_entry = (!pieces.is_empty()).then(|| {
            outgoing.message.msg_iov = pieces.as_mut_ptr();
            outgoing.message.msg_iovlen = pieces.len() as _;
            let message = &raw const outgoing.message;
            let flags = wait_all.cast_unsigned();
            let entry = match method {
                SendMethod::Copy => opcode::SendMsg::new(fd, message).flags(flags).build(),
                SendMethod::ZeroCopy => {
                    opcode::SendMsgZc::new(fd, message).flags(flags).ioprio(REPORT_USAGE).build()
                }
                SendMethod::ZeroCopyFixed(buffer) => {
                    let ioprio = REPORT_USAGE | FIXED_BUFFER;
                    let entry = opcode::SendMsgZc::new(fd, message).flags(flags).ioprio(ioprio).build();
                    with_buffer_index(entry, buffer)
                }
            };
            entry.user_data(Operation::Payload as u64)
        });
        let result = match (header_entry, payload_entry) {
            (Some(header), Some(payload)) => {
                outgoing.pending = 2;
                // Linked: the pages go only after the whole header; otherwise they come back as cancelled.
                let header = header.flags(squeue::Flags::IO_LINK);
                // SAFETY:
                // * `outgoing` is boxed and not touched while `pending` counts these operations: `load` and
                //   `send` refuse, and drop drains the ring first.
                // * The pieces are guest RAM, mapped as long as `memory` lives, or in `outgoing.staged`.
                // * The socket is open as long as `stream` is held.
                unsafe { self.ring.push(&[header, payload]) }
            }
            (Some(entry), None) | (None, Some(entry)) => {
                outgoing.pending = 1;
                // SAFETY: as above.
                unsafe { self.ring.push(&[entry]) }
            }
            (None, None) => Ok(()),
        };
        if result.is_err() {
            self.outgoing.pending = 0;
        }
        result
    }

    /// Asks for acknowledgements, unless that is already asked.
    pub(in crate::transport) fn receive(&mut self) -> io::Result<()> {
        if self.receiving {
            return Ok(());
        }
        let fd = types::Fd(self.stream.as_raw_fd());
        let length = u32::try_from(self.received.len()).unwrap_or(0);
        let entry = opcode::Recv::new(fd, self.received.as_mut_ptr(), length)
            .build()
            .user_data(Operation::Receive as u64);
        // SAFETY: `received` is boxed, and read only after `receiving` turned false; drop drains the ring first.
        unsafe { self.ring.push(&[entry]) }?;
        self.receiving = true;
        Ok(())
    }

    /// Waits for the [`Wake`], unless that is already so.
    pub(in crate::transport) fn await_wake(&mut self) -> io::Result<()> {
        if self.wake_awaited {
            return Ok(());
        }
        let events = u32::try_from(libc::POLLIN).unwrap_or(0);
        let entry = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), events)
            .build()
            .user_data(Operation::Wake as u64);
        // SAFETY: the entry points to nothing; the descriptor is open as long as `wake` is held.
        unsafe { self.ring.push(&[entry]) }?;
        self.wake_awaited = true;
        Ok(())
    }

    /// What the last [`Completion::Received`] brought.
    pub(in crate::transport) fn received(&self, length: usize) -> &[u8] {
        if self.receiving { &[] } else { &self.received[..length] }
    }

    /// Everything sent has been acknowledged: closes the connection in good order, not by abortion.
    pub(in crate::transport) fn finish(&mut self) {
        self.finished = !self.is_sending();
    }

    /// Submits what is queued.
    pub(in crate::transport) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Submits what is queued and waits for something to come back, at most `timeout`.
    pub(in crate::transport) fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        self.ring.enter(timeout)
    }

    /// The next thing that came back.
    pub(in crate::transport) fn completion(&mut self) -> Option<Completion> {
        while let Some(entry) = self.ring.completion() {
            if cqueue::notif(entry.flags()) {
                let copied = entry.result().cast_unsigned() & USAGE_COPIED != 0;
                return Some(Completion::Notified { copied });
            }
            if entry.user_data() == Operation::Receive as u64 {
                self.receiving = false;
                return Some(Completion::Received(result_of(&entry)));
            }
            if entry.user_data() == Operation::Wake as u64 {
                self.wake_awaited = false;
                self.wake.reset();
                return Some(Completion::Woken);
            }
            let of_header = entry.user_data() == Operation::Header as u64;
            self.outgoing.advance(of_header, result_of(&entry));
            if self.outgoing.pending == 0 {
                return Some(Completion::Sent(self.outgoing.outcome()));
            }
        }
        None
    }
}

impl Default for Outgoing {
    fn default() -> Self {
        Self {
            header: Vec::new(),
            header_sent: 0,
            staged: Vec::new(),
            pieces: Vec::new(),
            piece: 0,
            // SAFETY: a `msghdr` of zeros is one without address, data and control message.
            message: unsafe { std::mem::zeroed() },
            pending: 0,
            outcome: None,
        }
    }
}

impl Outgoing {
    /// Books the end of one of the frame's operations.
    fn advance(&mut self, of_header: bool, result: io::Result<usize>) {
        self.pending = self.pending.saturating_sub(1);
        match result {
            Ok(sent) if of_header => self.header_sent += sent,
            Ok(mut sent) => {
                while sent > 0 && self.piece < self.pieces.len() {
                    let piece = &mut self.pieces[self.piece];
                    let step = sent.min(piece.iov_len);
                    piece.iov_base = piece.iov_base.wrapping_byte_add(step);
                    piece.iov_len -= step;
                    sent -= step;
                    if piece.iov_len == 0 {
                        self.piece += 1;
                    }
                }
            }
            // The pages were cancelled because their header did not go in one piece: its own result says why.
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
            Err(error) => self.outcome = Some(error),
        }
    }

    fn outcome(&mut self) -> SendOutcome {
        let complete = self.header_sent == self.header.len() && self.piece == self.pieces.len();
        match self.outcome.take() {
            None if complete => SendOutcome::Complete,
            None => SendOutcome::Short(None),
            Some(error) => match error.raw_os_error() {
                Some(
                    libc::EAGAIN
                    | libc::EINTR
                    | libc::ENOBUFS
                    | libc::ENOMEM
                    | libc::EOPNOTSUPP
                    | libc::EINVAL,
                ) => SendOutcome::Short(Some(error)),
                _ => SendOutcome::Failed(error),
            },
        }
    }
}

impl Drop for SendRing {
    fn drop(&mut self) {
        if self.finished {
            // A connection that cannot be shut down is gone already.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        } else {
            socket::abort(&self.stream);
        }
        self.wake.wake();
        if !self.ring.drain() {
            // Never seen; but the kernel's claim on this memory goes before ours.
            std::mem::forget(std::mem::take(&mut self.outgoing));
            std::mem::forget(std::mem::replace(&mut self.received, Box::new([0; ACKNOWLEDGEMENT_BYTES])));
            std::mem::forget(self.memory.take());
        }
    }
}

/// The part of `struct io_uring_sqe` that matters here; `SendMsgZc` of the io-uring crate cannot set
/// `buf_index`.
#[repr(C)]
struct SubmissionEntry {
    before: [u64; 5],
    buf_index: u16,
    personality: u16,
    splice_fd_in: i32,
    after: [u64; 2],
}

const _: () = assert!(size_of::<SubmissionEntry>() == 64 && size_of::<squeue::Entry>() == 64);
const _: () = assert!(offset_of!(SubmissionEntry, buf_index) == 40);
const _: () = assert!(align_of::<SubmissionEntry>() <= align_of::<squeue::Entry>());

fn with_buffer_index(mut entry: squeue::Entry, index: u16) -> squeue::Entry {
    let view = (&raw mut entry).cast::<SubmissionEntry>();
    // SAFETY:
    // * `squeue::Entry` is `repr(C)` around the kernel's `io_uring_sqe`, plain integers without padding rules:
    //   same size, no stricter alignment (asserted above), any bits valid.
    // * The offset of `buf_index` is kernel ABI; a test compares it with the crate's own `SendZc`.
    unsafe { (*view).buf_index = index };
    entry
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever parts the kernel takes, what is sent next begins exactly where it stopped.
        #[test]
        fn short_sends_leave_exactly_the_rest(
            header in 1..200_usize,
            pieces in prop::collection::vec(1..10_usize, 0..40),
            takes in prop::collection::vec(1..30_000_usize, 0..60),
        ) {
            const BASE: usize = 1 << 30;
            let mut next = BASE;
            let mut outgoing = Outgoing::default();
            outgoing.header.resize(header, 0);
            outgoing.pieces.extend(pieces.iter().map(|pages| {
                let piece = libc::iovec {
                    iov_base: std::ptr::without_provenance_mut(next),
                    iov_len: pages * 4096,
                };
                next += pages * 4096;
                piece
            }));
            let (total, mut sent) = (header + next - BASE, 0);
            for take in takes.into_iter().chain([usize::MAX; 2]) {
                if sent < header {
                    let take = take.min(header - sent);
                    outgoing.advance(true, Ok(take));
                    // The pages were linked to a header that did not go in one piece.
                    if sent + take < header && !pieces.is_empty() {
                        outgoing.advance(false, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
                    }
                    sent += take;
                } else {
                    let take = take.min(total - sent);
                    outgoing.advance(false, Ok(take));
                    sent += take;
                }
                let outcome = outgoing.outcome();
                prop_assert_eq!(matches!(outcome, SendOutcome::Complete), sent == total, "{:?}", outcome);
                prop_assert_eq!(outgoing.header_sent, sent.min(header));
                let left: usize = outgoing.pieces[outgoing.piece..].iter().map(|piece| piece.iov_len).sum();
                prop_assert_eq!(left, total - sent.max(header));
                if let Some(piece) = outgoing.pieces.get(outgoing.piece) {
                    prop_assert_eq!(piece.iov_base.addr(), BASE + sent.saturating_sub(header));
                }
            }
        }
    }

    #[test]
    fn what_the_kernel_may_still_read_or_write_is_never_freed() {
        let connect = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let ((stream, _peer), (other, _other_peer)) = (connect(), connect());
        let ram = Arc::new(crate::testing::AnonymousRam::new(16).unwrap());
        let mapped = Arc::downgrade(&ram);
        let memory = ram.memory().clone().kept_by(ram);
        let mut ring = SendRing::new(Arc::new(stream), &memory).unwrap();
        drop(memory);
        // A kernel that does not end the operations of an aborted connection: a receive on one that nobody aborts.
        let aborted = std::mem::replace(&mut ring.stream, Arc::new(other));
        ring.receive().unwrap();
        ring.submit().unwrap();
        let lasting = std::mem::replace(&mut ring.stream, aborted);
        drop(ring);
        assert!(mapped.upgrade().is_some(), "guest RAM was unmapped under the kernel's hand");
        drop(lasting);
    }

    #[test]
    fn errors_that_pass_are_told_from_those_that_do_not() {
        for (error, passes) in [
            (libc::EAGAIN, true),
            (libc::ENOBUFS, true),
            (libc::ENOMEM, true),
            (libc::EOPNOTSUPP, true),
            (libc::EPIPE, false),
            (libc::ECONNRESET, false),
            (libc::EFAULT, false),
        ] {
            let mut outgoing = Outgoing::default();
            outgoing.header.resize(10, 0);
            outgoing.advance(true, Err(io::Error::from_raw_os_error(error)));
            outgoing.advance(false, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
            match outgoing.outcome() {
                SendOutcome::Short(Some(found)) if passes => assert_eq!(found.raw_os_error(), Some(error)),
                SendOutcome::Failed(found) if !passes => assert_eq!(found.raw_os_error(), Some(error)),
                other => panic!("{error}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_buffer_index_lands_where_the_crate_puts_it_itself() {
        let bytes = |entry: squeue::Entry| {
            // SAFETY: an entry is 64 initialised bytes.
            unsafe { std::mem::transmute::<squeue::Entry, [u8; 64]>(entry) }
        };
        let send = || opcode::SendZc::new(types::Fd(7), std::ptr::null(), 0);
        let by_crate = send().buf_index(Some(0x1234)).build();
        let by_us = with_buffer_index(send().buf_index(Some(0)).build(), 0x1234);
        assert_eq!(bytes(by_crate), bytes(by_us));
    }
}
