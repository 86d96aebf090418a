//! The socket between a VMM and its offload process: SEQPACKET, so that one packet is one message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown,
    socketpair, sockopt,
};

use super::error::OffloadError;
use super::protocol::{Message, PACKET_BYTES_MAX};

/// Descriptors in one packet, at most.
const DESCRIPTORS_MAX: usize = 2;

/// One end of the connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// Who is at the other end.
    peer: &'static str,
    buffer: Vec<u8>,
}

/// The offload process, as its VMM names it.
pub(super) const OFFLOAD_PROCESS: &str = "offload process";
/// The VMM, as its offload process names it.
pub(super) const VMM: &str = "VMM";

impl Channel {
    /// Over a connected SEQPACKET socket.
    pub(super) fn new(socket: OwnedFd, peer: &'static str) -> Result<Self, OffloadError> {
        let refused =
            |source: io::Error| OffloadError::Socket { peer, action: "looking at the socket to", source };
        let found = sockopt::socket_type(&socket).map_err(|errno| refused(errno.into()))?;
        if found != SocketType::SEQPACKET {
            return Err(refused(io::Error::other("it is not of the type SEQPACKET")));
        }
        Ok(Self { socket, peer, buffer: vec![0; PACKET_BYTES_MAX] })
    }

    /// A connection of which the far end is to be passed on.
    pub(super) fn pair(peer: &'static str) -> Result<(Self, OwnedFd), OffloadError> {
        let made = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (near, far) = made.map_err(|errno| OffloadError::Socket {
            peer,
            action: "making a socket to",
            source: errno.into(),
        })?;
        Ok((Self::new(near, peer)?, far))
    }

    pub(super) fn peer(&self) -> &'static str {
        self.peer
    }

    /// Sends a message, within `limit`.
    pub(super) fn send(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), OffloadError> {
        let packet = message.encode();
        let deadline = Instant::now() + limit;
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(self.failed("passing descriptors to", Errno::TOOBIG));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(&packet)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.is_ready(PollFlags::OUT, deadline)? {
                        return Err(self.silent("room for a message", limit));
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    return Err(OffloadError::Gone { peer: self.peer, waiting_for: "room for a message" });
                }
                Err(errno) => return Err(self.failed("writing to", errno)),
            }
        }
    }

    /// The next message, within `limit`.
    pub(super) fn receive(
        &mut self,
        waiting_for: &'static str,
        limit: Duration,
    ) -> Result<(Message, Vec<OwnedFd>), OffloadError> {
        let received = self.receive_within(waiting_for, limit)?;
        received.ok_or_else(|| self.silent(waiting_for, limit))
    }

    /// The next message, if one comes within `limit`.
    pub(super) fn receive_within(
        &mut self,
        waiting_for: &'static str,
        limit: Duration,
    ) -> Result<Option<(Message, Vec<OwnedFd>)>, OffloadError> {
        let deadline = Instant::now() + limit;
        loop {
            if !self.is_ready(PollFlags::IN, deadline)? {
                return Ok(None);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let read = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut self.buffer)], &mut control, flags);
            let gone = OffloadError::Gone { peer: self.peer, waiting_for };
            let read = match read {
                Ok(read) => read,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Err(gone),
                Err(errno) => return Err(self.failed("reading from", errno)),
            };
            // Those of a packet that is refused are closed.
            let mut descriptors = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(passed) = message {
                    descriptors.extend(passed);
                }
            }
            if read.bytes == 0 {
                return Err(gone);
            }
            let malformed = |what| OffloadError::Malformed { peer: self.peer, what };
            if read.flags.intersects(ReturnFlags::TRUNC) {
                return Err(malformed("longer than any message"));
            }
            if read.flags.intersects(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS_MAX {
                return Err(malformed("more descriptors than any message has"));
            }
            let packet = self.buffer.get(..read.bytes).unwrap_or(&[]);
            return Ok(Some((Message::decode(packet).map_err(malformed)?, descriptors)));
        }
    }

    /// Whether the socket is ready before `deadline`. One that has ended is.
    fn is_ready(&self, flags: PollFlags, deadline: Instant) -> Result<bool, OffloadError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.socket, flags)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("waiting for", errno)),
            }
        }
    }

    /// A value that tells when the other end has gone, while this one is used elsewhere.
    pub(super) fn watch(&self) -> Result<Watch, OffloadError> {
        let again = self.socket.try_clone();
        let failed =
            |source| OffloadError::Socket { peer: self.peer, action: "watching the socket to", source };
        again.map(Watch).map_err(failed)
    }

    /// Ends the connection for both ends, whoever waits on it.
    pub(super) fn close(&self) {
        // One that has ended already is closed, too.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    fn failed(&self, action: &'static str, errno: Errno) -> OffloadError {
        OffloadError::Socket { peer: self.peer, action, source: errno.into() }
    }

    fn silent(&self, waiting_for: &'static str, waited: Duration) -> OffloadError {
        OffloadError::Silent { peer: self.peer, waiting_for, waited }
    }

    pub(super) fn unexpected(&self, expected: &'static str, got: &Message) -> OffloadError {
        OffloadError::Unexpected { peer: self.peer, expected, got: got.name() }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Tells when the other end has gone.
#[derive(Debug)]
pub(super) struct Watch(OwnedFd);

impl Watch {
    pub(super) fn has_gone(&self) -> bool {
        let mut polled = [PollFd::new(&self.0, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok()
            && polled[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::send;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, Channel) {
        let (near, far) = Channel::pair(OFFLOAD_PROCESS).unwrap();
        (near, Channel::new(far, VMM).unwrap())
    }

    #[test]
    fn messages_arrive_one_by_one_with_their_descriptors() {
        let (near, mut far) = pair();
        let (passed, _other) = Channel::pair(VMM).unwrap();
        near.send(&Message::Pause, &[], SOON).unwrap();
        near.send(&Message::Bytes(7), &[passed.as_fd(), passed.as_fd()], SOON).unwrap();
        assert_eq!(far.receive("Pause", SOON).unwrap().0, Message::Pause);
        let (message, descriptors) = far.receive("Bytes", SOON).unwrap();
        assert_eq!((message, descriptors.len()), (Message::Bytes(7), 2));
        assert!(far.receive_within("nothing", Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn an_end_that_is_gone_or_silent_is_told_apart() {
        let (near, mut far) = pair();
        let silent = far.receive("Done", Duration::from_millis(10)).unwrap_err();
        assert!(matches!(silent, OffloadError::Silent { peer: VMM, .. }), "{silent}");
        let watch = far.watch().unwrap();
        assert!(!watch.has_gone());
        drop(near);
        assert!(watch.has_gone());
        let gone = far.receive("Done", SOON).unwrap_err();
        assert!(matches!(gone, OffloadError::Gone { peer: VMM, waiting_for: "Done" }), "{gone}");
        let gone = far.send(&Message::Done, &[], SOON).unwrap_err();
        assert!(matches!(gone, OffloadError::Gone { .. }), "{gone}");
    }

    #[test]
    fn a_peer_that_does_not_read_blocks_nobody_for_longer_than_allowed() {
        let (near, _far) = pair();
        let piece = Message::Piece { bytes: vec![0; 60 << 10] };
        let refused = (0..100).find_map(|_| near.send(&piece, &[], Duration::from_millis(10)).err());
        assert!(matches!(refused, Some(OffloadError::Silent { .. })), "{refused:?}");
    }

    #[test]
    fn packets_that_are_no_messages_are_refused() {
        let (near, mut far) = pair();
        for packet in [vec![255], vec![64, 0], vec![1; PACKET_BYTES_MAX + 1]] {
            send(&near.socket, &packet, SendFlags::NOSIGNAL).unwrap();
            let refused = far.receive("Done", SOON).unwrap_err();
            assert!(matches!(refused, OffloadError::Malformed { .. }), "{refused}");
        }
        let more = [near.as_fd(); DESCRIPTORS_MAX + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&more)));
        let packet = Message::Done.encode();
        sendmsg(&near.socket, &[IoSlice::new(&packet)], &mut control, SendFlags::empty()).unwrap();
        let refused = far.receive("Done", SOON).unwrap_err();
        assert!(matches!(refused, OffloadError::Malformed { .. }), "{refused}");
    }

    #[test]
    fn a_stream_socket_is_refused() {
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Channel::new(stream.into(), VMM), Err(OffloadError::Socket { .. })));
    }
}
