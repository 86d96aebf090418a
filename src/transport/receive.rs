//! The incoming data side: greets connections, checks every frame, puts pages into guest RAM, acknowledges.
//!
//! Nothing a peer says is believed before it is checked: lengths against the limits of `wire`, header and run
//! list against their checksum, each run against the guest's layout. Only then are the pages read, straight to
//! where they belong. A connection that breaks the rules is closed and remembered with the reason; the others
//! go on.

mod connections;
mod incoming;

use std::fmt;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use zerocopy::IntoBytes;

use self::connections::{Admitted, Connections};
use self::incoming::{ACKNOWLEDGEMENT_TIMEOUT, Incoming};
use super::counters::Counter;
use super::{MigrationToken, TransportError, socket};
use crate::layout::GuestMemory;
use crate::page_set::AtomicPageSet;
use crate::wire::CHANNELS_MAX;
use crate::wire::data::{DataError, DataHello, DataWelcome, Verdict};

/// A stranger gets this long to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after an `accept` that failed for want of something, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Sockets on which a destination expects data connections.
#[derive(Debug)]
pub struct DataListener {
    listeners: Vec<TcpListener>,
}

impl DataListener {
    /// Listens on each of the addresses; port 0 takes a free one.
    ///
    /// # Errors
    ///
    /// [`TransportError::Bind`] for the first address that cannot be had.
    pub fn bind(addresses: &[SocketAddr]) -> Result<Self, TransportError> {
        if addresses.is_empty() || addresses.len() > usize::from(CHANNELS_MAX) {
            return Err(TransportError::ChannelCount { found: addresses.len(), limit: CHANNELS_MAX });
        }
        let listen = |address: &SocketAddr| {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listeners = addresses
            .iter()
            .map(|address| {
                listen(address).map_err(|source| TransportError::Bind { address: *address, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { listeners })
    }

    /// Where it listens, with the ports that port 0 became.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Begins to receive the migration that `token` names into `memory`, on threads of its own: one that
    /// listens, one per connection.
    ///
    /// The memory must be zero when this is called, as fresh memory is: a zero page that arrives first is not
    /// written.
    ///
    /// # Errors
    ///
    /// [`TransportError::Thread`].
    pub fn receive(self, token: MigrationToken, memory: GuestMemory) -> Result<Receiver, TransportError> {
        let arrivals = Arc::new(Arrivals {
            written: AtomicPageSet::new(memory.end()),
            memory,
            pages: Counter::default(),
            zero_pages: Counter::default(),
            bytes: Counter::default(),
        });
        let name = "ringferry-listen".to_owned();
        let failed = |source| TransportError::Thread { name: "ringferry-listen".to_owned(), source };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let door = Arc::new(Door { listeners: self.listeners, stop, token });
        let connections = Arc::new(Connections::default());
        let of_thread = (Arc::clone(&door), Arc::clone(&connections), Arc::clone(&arrivals));
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || of_thread.0.listen(&of_thread.1, &of_thread.2))
            .map_err(failed)?;
        Ok(Receiver { arrivals, connections, door, thread: Some(thread) })
    }
}

/// The incoming data side of a migration. Dropping it closes the connections, and guarantees that no page is
/// written any more.
pub struct Receiver {
    arrivals: Arc<Arrivals>,
    connections: Arc<Connections>,
    door: Arc<Door>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("received", &self.received()).finish_non_exhaustive()
    }
}

/// What has arrived so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Received {
    /// Pages of content put in place, those that were sent twice counted twice.
    pub pages: u64,
    /// Pages that arrived as zero.
    pub zero_pages: u64,
    /// Bytes of frames, headers counted.
    pub bytes: u64,
    /// Data connections that are up.
    pub connections: usize,
}

/// Where pages go, and how many did.
struct Arrivals {
    memory: GuestMemory,
    /// Pages that were written here, and may hold something else than zeros.
    written: AtomicPageSet,
    pages: Counter,
    zero_pages: Counter,
    bytes: Counter,
}

impl Receiver {
    /// What has arrived so far.
    pub fn received(&self) -> Received {
        Received {
            pages: self.arrivals.pages.get(),
            zero_pages: self.arrivals.zero_pages.get(),
            bytes: self.arrivals.bytes.get(),
            connections: self.connections.live(),
        }
    }

    /// Why connections ended that did not end as they should: wrong tokens, impossible frames, broken links.
    pub fn failures(&self) -> Vec<String> {
        self.connections.failures()
    }

    /// Whether every connection that there was is gone.
    pub fn is_abandoned(&self) -> bool {
        self.connections.is_abandoned()
    }

    /// Closes all connections and returns, within a millisecond or two, once no thread can write guest RAM any
    /// more: to be called before the guest runs. Whoever drops the receiver has called it.
    pub fn close(mut self) -> Received {
        let received = self.received();
        self.stop();
        received
    }

    fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.connections.stop();
        // An event counter at 0 takes a 1.
        let _ = rustix::io::write(&self.door.stop, &1_u64.to_ne_bytes());
        // A listening thread that panicked has said so, and has started no connection since.
        let _ = thread.join();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where connections come in.
struct Door {
    listeners: Vec<TcpListener>,
    /// Readable when nobody is let in any more.
    stop: OwnedFd,
    token: MigrationToken,
}

impl Door {
    /// The listening thread.
    fn listen(self: &Arc<Self>, connections: &Arc<Connections>, arrivals: &Arc<Arrivals>) {
        let hour = Timespec { tv_sec: 3600, tv_nsec: 0 };
        while !connections.is_stopping() {
            let doors = self.listeners.iter().map(AsFd::as_fd).chain([self.stop.as_fd()]);
            let mut ready: Vec<_> = doors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            // After an error, the listeners are asked all the same.
            let _ = poll(&mut ready, Some(&hour));
            for listener in &self.listeners {
                match listener.accept() {
                    Ok((stream, peer)) => self.admit(connections, arrivals, stream, peer),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // Too many open files and the like: the next look may find it better.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a data connection");
                        std::thread::sleep(ACCEPT_PAUSE);
                    }
                }
            }
        }
    }

    /// Gives a connection a thread of its own, if there is room for one.
    fn admit(
        self: &Arc<Self>,
        connections: &Arc<Connections>,
        arrivals: &Arc<Arrivals>,
        stream: TcpStream,
        peer: SocketAddr,
    ) {
        let Some(admitted) = connections.admit(stream) else {
            return connections.failed(format!("{peer}: turned away, there are connections enough"));
        };
        let of_thread = (Arc::clone(self), Arc::clone(connections), Arc::clone(arrivals));
        let spawned = std::thread::Builder::new().name("ringferry-receive".to_owned()).spawn(move || {
            let (door, connections, arrivals) = of_thread;
            if let Err(error) = door.greet_and_serve(&connections, &arrivals, &admitted, peer) {
                connections.failed(error.to_string());
            }
        });
        if let Err(error) = spawned {
            connections.failed(format!("{peer}: no thread to receive: {error}"));
        }
    }

    fn greet_and_serve(
        &self,
        connections: &Connections,
        arrivals: &Arrivals,
        admitted: &Admitted,
        peer: SocketAddr,
    ) -> Result<(), TransportError> {
        let stream = &admitted.stream;
        let broken = |source| TransportError::Broken { peer: peer.to_string(), source };
        stream.set_nonblocking(false).map_err(broken)?;
        socket::prepare(stream, ACKNOWLEDGEMENT_TIMEOUT).map_err(broken)?;
        let answer = |verdict: Verdict| {
            let welcome = DataWelcome::new(verdict);
            (&**stream).write_all(welcome.as_bytes()).map_err(broken)
        };
        let mut hello = [0; DataHello::BYTES];
        socket::read_exact_before(stream, &mut hello, Instant::now() + GREETING_TIMEOUT).map_err(broken)?;
        let hello = match DataHello::read(&hello) {
            Ok(hello) => hello,
            Err(source) => {
                if matches!(source, DataError::Version { .. }) {
                    answer(Verdict::WrongVersion)?;
                }
                return Err(TransportError::Malformed { peer: peer.to_string(), source });
            }
        };
        let joined = if hello.token() == self.token.0 {
            connections.join(hello.connection(), stream)
        } else {
            Err(Verdict::WrongToken)
        };
        match joined {
            Ok(joined) => {
                let mut incoming = Incoming::new(arrivals, connections, joined, stream, peer)?;
                answer(Verdict::Welcome)?;
                incoming.serve()
            }
            Err(verdict) => {
                answer(verdict)?;
                Err(broken(io::Error::other(format!("refused: {verdict}"))))
            }
        }
    }
}
