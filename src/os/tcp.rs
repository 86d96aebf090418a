//! TCP connections as only the kernel knows them: `TCP_INFO`, forced buffer sizes, and ending one at once.
#![expect(unsafe_code, reason = "these three have no safe wrapper")]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// A direction of a connection, by what buffers it at this end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Buffer {
    /// What is not acknowledged yet.
    Send,
    /// What is not read yet.
    Receive,
}

/// Sets the size of a buffer, beyond the limits of the system where `CAP_NET_ADMIN` allows that, else up to
/// `net.core.wmem_max` or `rmem_max`.
pub(crate) fn set_buffer_bytes(stream: &TcpStream, buffer: Buffer, bytes: u64) -> io::Result<()> {
    let (force, plain) = match buffer {
        Buffer::Send => (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        Buffer::Receive => (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
    };
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(stream, force, bytes).or_else(|_| set_option(stream, plain, bytes))
}

fn set_option(stream: &TcpStream, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(0);
    // SAFETY: the options that are set here take an `int`, which `value` is.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The first fields of `struct tcp_info`.
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
pub(crate) struct TcpInfo {
    /// The shortest round trip seen: the link's own, without the queues that we fill.
    pub min_rtt: Duration,
    /// Bytes that the peer's kernel acknowledged since the connection began.
    pub bytes_acked: u64,
    /// Bytes that arrived from the peer since the connection began, read or not.
    pub bytes_received: u64,
}

pub(crate) fn tcp_info(stream: &TcpStream) -> io::Result<TcpInfo> {
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
    Ok(TcpInfo {
        min_rtt: Duration::from_micros(raw.min_rtt_us.into()),
        bytes_acked: raw.bytes_acked,
        bytes_received: raw.bytes_received,
    })
}

/// Drops a connection at once, with everything queued in it: whatever io_uring has in flight on it completes,
/// and the kernel lets go of the pages that wait to be sent. (`close` would wait for io_uring's own references,
/// and for the peer to acknowledge what is queued.)
pub(crate) fn abort(stream: &TcpStream) {
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
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

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
