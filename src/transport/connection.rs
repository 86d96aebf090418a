//! What the control connection needs of a byte stream: bytes in, bytes out, a deadline, an end.
//!
//! TCP and Unix sockets are such streams; TLS can be one. Nothing looks ahead into a stream, and nothing asks for more
//! than this trait.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The shortest timeout that a socket is given: zero would mean none.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// A stream of bytes in both directions, which one thread may read while others write.
pub trait Connection: fmt::Debug + Send + Sync {
    /// Reads at least one byte and at most `buffer`; 0 if the peer has closed.
    ///
    /// # Errors
    ///
    /// `TimedOut` when `deadline` has passed and nothing has come, else what the stream says.
    fn read(&self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize>;

    /// Writes at least one byte of `bytes`.
    ///
    /// # Errors
    ///
    /// `TimedOut` when `deadline` has passed and nothing could be written, else what the stream says.
    fn write(&self, bytes: &[u8], deadline: Instant) -> io::Result<usize>;

    /// Says that nothing more will be written; what was written still arrives.
    fn close_write(&self);

    /// Ends the stream in both directions, and every `read` and `write` that waits on it.
    fn shutdown(&self);

    /// The peer, as a log names it.
    fn peer(&self) -> String;
}

fn left(deadline: Instant) -> Option<Duration> {
    Some(deadline.saturating_duration_since(Instant::now()).max(TIMEOUT_MIN))
}

/// A socket says `WouldBlock` where its timeout has passed.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn again<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(timed_out),
        }
    }
}

/// Both kinds of sockets have the same methods, and no trait for them.
macro_rules! socket {
    ($stream:ty, $peer:expr) => {
        impl Connection for $stream {
            fn read(&self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
                again(|| {
                    self.set_read_timeout(left(deadline))?;
                    Read::read(&mut &*self, buffer)
                })
            }

            fn write(&self, bytes: &[u8], deadline: Instant) -> io::Result<usize> {
                again(|| {
                    self.set_write_timeout(left(deadline))?;
                    Write::write(&mut &*self, bytes)
                })
            }

            // A socket that cannot be shut down is down already.

            fn close_write(&self) {
                let _ = <$stream>::shutdown(self, Shutdown::Write);
            }

            fn shutdown(&self) {
                let _ = <$stream>::shutdown(self, Shutdown::Both);
            }

            fn peer(&self) -> String {
                $peer(self)
            }
        }
    };
}

socket!(TcpStream, |stream: &TcpStream| {
    stream.peer_addr().map_or_else(|_| "a peer that is gone".to_owned(), |address| address.to_string())
});
socket!(UnixStream, |_: &UnixStream| "a Unix socket".to_owned());

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_read_ends_with_bytes_with_its_deadline_or_with_a_shutdown_from_another_thread() {
        let (near, far) = UnixStream::pair().unwrap();
        let near: Arc<dyn Connection> = Arc::new(near);
        let soon = || Instant::now() + Duration::from_millis(10);
        let mut buffer = [0; 8];
        assert_eq!(near.read(&mut buffer, soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        Connection::write(&far, b"abc", soon()).unwrap();
        assert_eq!(near.read(&mut buffer, soon()).unwrap(), 3);
        let reading = {
            let near = Arc::clone(&near);
            std::thread::spawn(move || near.read(&mut [0; 8], Instant::now() + Duration::from_secs(60)))
        };
        std::thread::sleep(Duration::from_millis(20));
        near.shutdown();
        assert_eq!(reading.join().unwrap().unwrap(), 0);
    }
}
