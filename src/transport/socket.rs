//! Sockets as the transport wants them: bound to their NIC, no waiting for small segments, and dead connections
//! noticed. What the kernel knows of a connection (`TCP_INFO`) is read here too.
#![expect(
    unsafe_code,
    reason = "TCP_INFO, forced buffer sizes and the abort of a connection have no safe wrapper"
)]

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::TcpKeepalive;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Keepalive probes on a connection that idles between rounds: 5 s, then one a second, dead after five.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(5))
    .with_interval(Duration::from_secs(1))
    .with_retries(5);

/// What both ends of a data connection want of it. `stall` is how long the kernel keeps bytes that nobody
/// acknowledges before it declares the connection dead (`TCP_USER_TIMEOUT`); it also bounds a `write`.
pub(crate) fn prepare(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(stall))?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(stall))?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

/// Reads exactly `bytes` before `deadline`, however slowly they drip.
pub(super) fn read_exact_before(
    mut stream: &TcpStream,
    mut bytes: &mut [u8],
    deadline: Instant,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
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

/// A direction of a connection, by what buffers it at this end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Buffer {
    /// What is not acknowledged yet.
    Send,
    /// What is not read yet.
    Receive,
}

/// A connection's buffers are never made larger than this: 100 Gbit/s over 5 ms.
pub(super) const BUFFER_BYTES_MAX: u64 = 64 << 20;

/// Makes room for `bytes` under way. The kernel sizes buffers by itself, up to a limit of the system
/// (`net.ipv4.tcp_wmem`, `tcp_rmem`); only a link that holds more needs to be helped. Returns what there is room
/// for then, where that was asked and is less: without `CAP_NET_ADMIN`, `net.core.wmem_max` and `rmem_max` limit it.
pub(super) fn make_room(stream: &TcpStream, buffer: Buffer, bytes: u64) -> io::Result<Option<u64>> {
    let (sysctl, force, plain) = match buffer {
        Buffer::Send => ("/proc/sys/net/ipv4/tcp_wmem", libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        Buffer::Receive => ("/proc/sys/net/ipv4/tcp_rmem", libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
    };
    // Of what the kernel counts, about half is content, the rest its own bookkeeping.
    let automatic = std::fs::read_to_string(sysctl)
        .ok()
        .and_then(|limits| limits.split_whitespace().nth(2)?.parse::<u64>().ok())
        .unwrap_or(0);
    if bytes <= automatic / 2 {
        return Ok(None);
    }
    let socket = socket2::SockRef::from(stream);
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
    let wanted = libc::c_int::try_from(bytes.min(BUFFER_BYTES_MAX)).unwrap_or(libc::c_int::MAX);
    if set_option(stream, force, wanted).is_err() {
        set_option(stream, plain, wanted)?;
    }
    let room = size()?;
    Ok((room < bytes).then_some(room))
}

fn set_option(stream: &TcpStream, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(0);
    // SAFETY: the options that are set here take an `int`, which `value` is.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel knows of a connection, as far as the transport asks: the first fields of `struct tcp_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawTcpInfo {
    state_and_options: [u8; 8],
    before_rtt: [u32; 15],
    rtt_us: u32,
    after_rtt: [u32; 8],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt_us: u32,
}

const _: () = assert!(std::mem::offset_of!(RawTcpInfo, rtt_us) == 68);
const _: () = assert!(std::mem::offset_of!(RawTcpInfo, bytes_acked) == 120);
const _: () = assert!(std::mem::offset_of!(RawTcpInfo, min_rtt_us) == 148);

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct TcpInfo {
    /// The shortest round trip seen: the link's own, without the queues that we fill.
    pub min_rtt: Duration,
    /// Bytes that the peer's kernel acknowledged since the connection began.
    pub bytes_acked: u64,
}

pub(super) fn tcp_info(stream: &TcpStream) -> io::Result<TcpInfo> {
    let mut raw = RawTcpInfo::new_zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<RawTcpInfo>()).unwrap_or(0);
    // SAFETY:
    // * `raw` is `length` writable bytes, and any bytes make a valid `RawTcpInfo`.
    // * The kernel writes at most `length` bytes; an older one that knows fewer fields leaves zeros.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut raw).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpInfo { min_rtt: Duration::from_micros(raw.min_rtt_us.into()), bytes_acked: raw.bytes_acked })
}

/// Drops a connection at once, with everything queued in it: whatever io_uring has in flight on it completes,
/// and the kernel lets go of the pages that wait to be sent. (`close` would wait for io_uring's own references,
/// and for the peer to acknowledge what is queued.)
pub(super) fn abort(stream: &TcpStream) {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC.try_into().unwrap_or(0), sa_data: [0; 14] };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).unwrap_or(0);
    // SAFETY: `unspecified` is a valid address of `length` bytes. Connecting a TCP socket to `AF_UNSPEC`
    // disconnects it. A failure leaves the connection as it was, and the shutdown below still ends it.
    unsafe { libc::connect(stream.as_raw_fd(), &raw const unspecified, length) };
    // A connection that is already gone has nothing to shut down.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn buffers_are_left_to_the_kernel_until_the_link_holds_more_than_it_would_give() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        for (stream, buffer) in [(&near, Buffer::Send), (&far, Buffer::Receive)] {
            let size = || match buffer {
                Buffer::Send => socket2::SockRef::from(stream).send_buffer_size().unwrap() as u64,
                Buffer::Receive => socket2::SockRef::from(stream).recv_buffer_size().unwrap() as u64,
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

    #[test]
    fn acknowledged_bytes_are_counted_by_the_kernel_and_an_aborted_connection_is_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        let before = tcp_info(&near).unwrap().bytes_acked;
        near.write_all(&[7; 5000]).unwrap();
        far.read_exact(&mut [0; 5000]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while tcp_info(&near).unwrap().bytes_acked < before + 5000 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        abort(&near);
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
