//! The control connection: whole messages over TCP, each wait bounded and cancellable.
//!
//! Owns the stream; what the messages mean is in [`wire::control`](crate::wire::control).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::wire::control::{ControlFormatError, HEAD_BYTES, Head, Message};

/// How long one read waits before it looks at the cancellation flag again: bounds the answer to Ctrl-C.
const CANCEL_POLL: Duration = Duration::from_millis(20);
/// A body is read in pieces of this size, so that a peer that announces much and sends little costs little.
const BODY_CHUNK_BYTES: usize = 64 << 10;

/// Why the control connection did not deliver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nobody answered at the address.
    #[error("cannot reach {address}: {source}; is `ringferry receive` running there?")]
    Connect {
        /// Where we tried.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection broke while a message was sent.
    #[error("cannot send {message} to the peer: {source}")]
    Send {
        /// Which message.
        message: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection broke or ended while a message was expected.
    #[error("the connection ended while waiting for {expected}: {source}")]
    Receive {
        /// What was waited for.
        expected: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The peer kept silent for too long.
    #[error("no {expected} from the peer within {} s", waited.as_secs_f32())]
    Timeout {
        /// What was waited for.
        expected: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The bytes are not a message.
    #[error(transparent)]
    Format(#[from] ControlFormatError),
    /// The user asked to stop.
    #[error("cancelled while waiting for {expected}")]
    Cancelled {
        /// What was waited for.
        expected: &'static str,
    },
}

/// One side of the control connection.
#[derive(Debug)]
pub struct ControlConnection {
    stream: TcpStream,
}

impl ControlConnection {
    /// Connects to a destination.
    ///
    /// # Errors
    ///
    /// [`ControlError::Connect`] if the name does not resolve or no address of it answers within `timeout` each.
    pub fn connect(address: &str, timeout: Duration) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Connect { address: address.to_owned(), source };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for candidate in address.to_socket_addrs().map_err(failed)? {
            match TcpStream::connect_timeout(&candidate, timeout) {
                Ok(stream) => return Self::from_stream(stream).map_err(failed),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// Takes over an accepted connection.
    ///
    /// # Errors
    ///
    /// Of the kernel, when the socket options cannot be set.
    pub fn from_stream(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CANCEL_POLL))?;
        Ok(Self { stream })
    }

    /// The peer's address.
    ///
    /// # Errors
    ///
    /// Of the kernel, when the connection is gone.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// Sends a message, waiting at most `timeout` for the kernel to take it.
    ///
    /// # Errors
    ///
    /// [`ControlError::Send`] if the connection is broken, [`ControlError::Format`] if it is over its limit.
    pub fn send(&mut self, message: &Message, timeout: Duration) -> Result<(), ControlError> {
        let bytes = message.encode()?;
        tracing::debug!(message = message.name(), bytes = bytes.len(), "send");
        self.stream
            .set_write_timeout(Some(timeout.max(CANCEL_POLL)))
            .and_then(|()| self.stream.write_all(&bytes))
            .map_err(|source| ControlError::Send { message: message.name(), source })
    }

    /// Waits for the next message.
    ///
    /// # Errors
    ///
    /// [`ControlError`] says whether the peer is gone, silent or not speaking our protocol, or whether `cancel`
    /// was raised.
    pub fn receive(
        &mut self,
        expected: &'static str,
        timeout: Duration,
        cancel: &AtomicBool,
    ) -> Result<Message, ControlError> {
        let wait = Wait { expected, since: Instant::now(), timeout, cancel };
        let mut head = [0; HEAD_BYTES];
        self.read_exact(&mut head, &wait)?;
        let head = Head::parse(head)?;
        let mut body = Vec::new();
        while body.len() < head.body_bytes() {
            let read = body.len();
            body.resize(head.body_bytes().min(read + BODY_CHUNK_BYTES), 0);
            self.read_exact(&mut body[read..], &wait)?;
        }
        let message = Message::decode(&head, &body)?;
        tracing::debug!(message = message.name(), bytes = body.len(), "received");
        Ok(message)
    }

    /// Waits until the peer has said something, or is gone, for 20 ms at most: true if so.
    pub fn is_readable(&self) -> bool {
        let silent = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut, io::ErrorKind::Interrupted];
        !matches!(self.stream.peek(&mut [0]), Err(error) if silent.contains(&error.kind()))
    }

    fn read_exact(&mut self, mut buffer: &mut [u8], wait: &Wait<'_>) -> Result<(), ControlError> {
        let Wait { expected, since, timeout, cancel } = *wait;
        while !buffer.is_empty() {
            match self.stream.read(buffer) {
                Ok(0) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed it");
                    return Err(ControlError::Receive { expected, source });
                }
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(source) => return Err(ControlError::Receive { expected, source }),
            }
            // Relaxed: the flag carries no data, and is looked at again within `CANCEL_POLL`.
            if cancel.load(Ordering::Relaxed) {
                return Err(ControlError::Cancelled { expected });
            }
            if !buffer.is_empty() && since.elapsed() >= timeout {
                return Err(ControlError::Timeout { expected, waited: timeout });
            }
        }
        Ok(())
    }
}

struct Wait<'a> {
    expected: &'static str,
    since: Instant,
    timeout: Duration,
    cancel: &'a AtomicBool,
}
