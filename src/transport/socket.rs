//! Sockets as the transport wants them: bound to their NIC, no waiting for small segments, and dead connections
//! noticed. What the kernel knows of a connection (`TCP_INFO`) is read here too.
#![expect(unsafe_code, reason = "TCP_INFO and the abort of a connection have no safe wrapper")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::transport::ChannelSpec;

/// Keepalive probes on a connection that idles between rounds: 5 s, then one a second, dead after five.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(5))
    .with_interval(Duration::from_secs(1))
    .with_retries(5);

/// Connects a channel. `stall` is how long the kernel keeps bytes that nobody acknowledges before it declares
/// the connection dead (`TCP_USER_TIMEOUT`).
pub(super) fn connect(spec: &ChannelSpec, timeout: Duration, stall: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(spec.remote), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(device) = &spec.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(local) = spec.local {
        socket.bind(&SockAddr::from(SocketAddr::new(local, 0)))?;
    }
    socket.connect_timeout(&SockAddr::from(spec.remote), timeout)?;
    let stream = TcpStream::from(socket);
    prepare(&stream, stall)?;
    Ok(stream)
}

/// What both ends of a data connection want of it.
pub(super) fn prepare(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
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

/// Writes a short message; the socket's buffer has room for it unless the peer never reads.
pub(super) fn write_short(mut stream: &TcpStream, bytes: &[u8], timeout: Duration) -> io::Result<()> {
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(bytes)
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
