//! Data sockets as the transport wants them: no waiting for small segments, dead peers noticed in seconds, and room
//! for what the link holds. All that is particular to TCP is here and in `os::tcp`.

use std::io::{self, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::os::tcp;
pub(super) use crate::os::tcp::{Buffer, abort, tcp_info};

/// A data connection on which nothing moves for this long is given up. On a link that several connections share, one of
/// them may well starve for some seconds (its retransmissions back off); others carry its pages meanwhile, and a dead peer
/// is noticed by its silence on the control connection.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(15);

/// A wait for bytes polls this often whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(10);

/// What both ends of a connection want of it. A peer whose kernel acknowledges neither bytes (`TCP_USER_TIMEOUT`)
/// nor, on an idle connection, keepalive probes for `timeout` is taken for dead. It also bounds a `write`.
pub(crate) fn prepare(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(timeout))?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(timeout))?;
    // Keepalive is counted in whole seconds; the user timeout bounds how many probes stay unanswered.
    let second = Duration::from_secs(1);
    let keepalive = TcpKeepalive::new().with_time((timeout / 2).max(second)).with_interval(second);
    socket.set_tcp_keepalive(&keepalive)
}

/// Reads exactly `bytes` before `deadline`, however slowly they drip, unless `cancelled` says otherwise.
pub(super) fn read_exact_before(
    mut stream: &TcpStream,
    mut bytes: &mut [u8],
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if cancelled() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
        }
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.min(CANCEL_POLL)))?;
        match stream.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => bytes = &mut bytes[read..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    stream.set_read_timeout(None)
}

/// A connection's buffers are never made larger than this: 100 Gbit/s over 5 ms.
pub(super) const BUFFER_BYTES_MAX: u64 = 64 << 20;

/// Makes room for `bytes` under way. The kernel sizes buffers by itself, up to a limit of the system
/// (`net.ipv4.tcp_wmem`, `tcp_rmem`); only a link that holds more needs to be helped. Returns what there is room
/// for then, where that was asked and is less: without `CAP_NET_ADMIN`, `net.core.wmem_max` and `rmem_max` limit it.
pub(super) fn make_room(stream: &TcpStream, buffer: Buffer, bytes: u64) -> io::Result<Option<u64>> {
    let sysctl = match buffer {
        Buffer::Send => "/proc/sys/net/ipv4/tcp_wmem",
        Buffer::Receive => "/proc/sys/net/ipv4/tcp_rmem",
    };
    // Of what the kernel counts, about half is content, the rest its own bookkeeping.
    let automatic = std::fs::read_to_string(sysctl)
        .ok()
        .and_then(|limits| limits.split_whitespace().nth(2)?.parse::<u64>().ok())
        .unwrap_or(0);
    if bytes <= automatic / 2 {
        return Ok(None);
    }
    let socket = SockRef::from(stream);
    let size = || {
        let size = match buffer {
            Buffer::Send => socket.send_buffer_size(),
            Buffer::Receive => socket.recv_buffer_size(),
        };
        size.map(|size| size as u64 / 2)
    };
    if size()? >= bytes {
        return Ok(None);
    }
    tcp::set_buffer_bytes(stream, buffer, bytes.min(BUFFER_BYTES_MAX))?;
    let room = size()?;
    Ok((room < bytes).then_some(room))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn buffers_are_left_to_the_kernel_until_the_link_holds_more_than_it_would_give() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        for (stream, buffer) in [(&near, Buffer::Send), (&far, Buffer::Receive)] {
            let size = || match buffer {
                Buffer::Send => SockRef::from(stream).send_buffer_size().unwrap() as u64,
                Buffer::Receive => SockRef::from(stream).recv_buffer_size().unwrap() as u64,
            };
            let before = size();
            assert_eq!(make_room(stream, buffer, 10_000).unwrap(), None);
            assert_eq!(size(), before);
            // With the privilege there is room for all of it; without, what there is room for is said.
            match make_room(stream, buffer, BUFFER_BYTES_MAX).unwrap() {
                None => assert!(size() >= BUFFER_BYTES_MAX, "{buffer:?}: {}", size()),
                Some(room) => assert_eq!(room, size() / 2),
            }
        }
    }
}
