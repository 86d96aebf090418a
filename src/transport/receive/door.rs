//! Where data connections come in: strangers are heard for a moment, and let in or turned away.
//!
//! One thread listens and hears all greetings side by side, without waiting for any: a stranger that says nothing
//! holds a slot for two seconds and no thread, and when all slots are taken the oldest greeting gives way. Only a
//! connection that is let in gets a thread of its own.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use zerocopy::IntoBytes;

use super::inbound::Inbound;
use super::incoming::{Incoming, Seat};
use crate::transport::error::TransportError;
use crate::transport::socket;
use crate::transport::token::MigrationToken;
use crate::wire::data::{Answer, DataError, DataHello, DataWelcome, HelloHead, Verdict};

/// A stranger gets this long to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// Strangers that are heard at a time.
const GREETINGS_MAX: usize = 256;
/// Connections taken from one listener before greetings are heard again.
const ACCEPTS_MAX: usize = 64;
/// The pause after an `accept` that failed for want of something, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The listening thread waits this long when nothing happens.
const IDLE: Duration = Duration::from_secs(3600);
/// Failures that are remembered one by one.
const FAILURES_MAX: usize = 256;

/// The listening thread and what it shares. Dropped, it lets nobody in any more.
pub(super) struct Door {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    listeners: Vec<TcpListener>,
    stall_timeout: Duration,
    /// Readable once `stopping` is set.
    stop: OwnedFd,
    stopping: AtomicBool,
    migrations: Mutex<HashMap<MigrationToken, Arc<Inbound>>>,
    failures: Mutex<Vec<String>>,
}

/// A connection that has not said yet who it is.
struct Greeting {
    stream: TcpStream,
    peer: SocketAddr,
    bytes: Vec<u8>,
    until: Instant,
}

impl Door {
    /// Begins to listen.
    pub(super) fn open(listeners: Vec<TcpListener>, stall_timeout: Duration) -> Result<Self, TransportError> {
        let name = "ringferry-listen".to_owned();
        let failed = |source| TransportError::Thread { name: "ringferry-listen".to_owned(), source };
        let shared = Arc::new(Shared {
            listeners,
            stall_timeout,
            stop: eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?,
            stopping: AtomicBool::new(false),
            migrations: Mutex::default(),
            failures: Mutex::default(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name).spawn(move || of_thread.listen());
        Ok(Self { shared, thread: Some(thread.map_err(failed)?) })
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.shared.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Lets the connections of a migration in from now on; false if there is one of that name already.
    pub(super) fn expect(&self, token: MigrationToken, inbound: &Arc<Inbound>) -> bool {
        let mut migrations = self.shared.migrations.lock();
        let is_new = !migrations.contains_key(&token);
        if is_new {
            migrations.insert(token, Arc::clone(inbound));
        }
        is_new
    }

    /// Lets no further connection of a migration in.
    pub(super) fn forget(&self, token: MigrationToken) {
        self.shared.migrations.lock().remove(&token);
    }

    /// Why strangers were turned away.
    pub(super) fn failures(&self) -> Vec<String> {
        self.shared.failures.lock().clone()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Release, read with Acquire after the event: whatever was done before is seen by the thread.
        self.shared.stopping.store(true, Ordering::Release);
        // An event counter at 0 takes a 1.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // The thread waits for nothing but what is polled here. One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The listening thread.
    fn listen(&self) {
        let mut greetings = VecDeque::new();
        while !self.stopping.load(Ordering::Acquire) {
            self.wait(&greetings);
            greetings = greetings.into_iter().filter_map(|greeting| self.hear(greeting)).collect();
            for listener in &self.listeners {
                self.accept(listener, &mut greetings);
            }
        }
    }

    /// Waits until somebody comes, says something, or has kept silent for too long.
    fn wait(&self, greetings: &VecDeque<Greeting>) {
        let fds = self.listeners.iter().map(AsFd::as_fd).chain([self.stop.as_fd()]);
        let fds = fds.chain(greetings.iter().map(|greeting| greeting.stream.as_fd()));
        let mut ready: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let until = greetings.front().map(|oldest| oldest.until.saturating_duration_since(Instant::now()));
        let timeout = Timespec::try_from(until.unwrap_or(IDLE)).ok();
        // After an error, everybody is asked all the same.
        let _ = poll(&mut ready, timeout.as_ref());
    }

    fn accept(&self, listener: &TcpListener, greetings: &mut VecDeque<Greeting>) {
        for _ in 0..ACCEPTS_MAX {
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Too many open files and the like: the next attempt may find it better.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a data connection");
                    return std::thread::sleep(ACCEPT_PAUSE);
                }
            };
            if greetings.len() >= GREETINGS_MAX
                && let Some(oldest) = greetings.pop_front()
            {
                self.failed(format!("{}: silent, gave way to others", oldest.peer));
            }
            if let Err(error) = stream.set_nonblocking(true) {
                self.failed(format!("{peer}: {error}"));
                continue;
            }
            let until = Instant::now() + GREETING_TIMEOUT;
            greetings.extend(self.hear(Greeting { stream, peer, bytes: Vec::new(), until }));
        }
    }

    /// Reads what a stranger has said so far; the greeting back if it has not ended.
    fn hear(&self, mut greeting: Greeting) -> Option<Greeting> {
        match greeting.read() {
            Ok(Some(hello)) => self.admit(greeting, &hello),
            Ok(None) if Instant::now() < greeting.until => return Some(greeting),
            Ok(None) => self.failed(format!("{}: no greeting within {GREETING_TIMEOUT:?}", greeting.peer)),
            Err(Unheard::Broken(error)) => self.failed(format!("{}: {error}", greeting.peer)),
            Err(Unheard::Malformed(source)) => {
                if let Some(answer) = Verdict::about(&source) {
                    greeting.answer(answer);
                }
                let peer = greeting.peer.to_string();
                self.failed(TransportError::Malformed { peer, source }.to_string());
            }
        }
        None
    }

    /// Lets a connection in, if it belongs here.
    fn admit(&self, greeting: Greeting, hello: &DataHello) {
        let token = MigrationToken(hello.token());
        let Some(inbound) = self.migrations.lock().get(&token).cloned() else {
            greeting.answer((Verdict::WrongToken, 0));
            return self.failed(format!("{}: refused: {}", greeting.peer, Verdict::WrongToken));
        };
        let (stream, peer) = (Arc::new(greeting.stream), greeting.peer);
        let membership = match inbound.connections.join(hello.connection(), &stream) {
            Ok(membership) => membership,
            Err(verdict) => {
                answer(&stream, (verdict, 0));
                return inbound.connections.failed(format!("{peer}: refused: {verdict}"));
            }
        };
        let seat = Seat::new(Arc::clone(&inbound), membership);
        let (of_thread, stall_timeout) = (Arc::clone(&inbound), self.stall_timeout);
        let spawned = std::thread::Builder::new().name("ringferry-receive".to_owned()).spawn(move || {
            let served = prepare(&stream, peer, stall_timeout)
                .and_then(|()| Incoming::welcome(seat, &stream, peer))
                .and_then(|mut incoming| incoming.serve());
            if let Err(error) = served {
                of_thread.connections.failed(error.to_string());
            }
        });
        if let Err(error) = spawned {
            inbound.connections.failed(format!("{peer}: no thread to receive: {error}"));
        }
    }

    fn failed(&self, failure: String) {
        tracing::debug!(failure, "a stranger at the data port");
        let mut failures = self.failures.lock();
        if failures.len() < FAILURES_MAX {
            failures.push(failure);
        }
    }
}

fn prepare(stream: &TcpStream, peer: SocketAddr, stall_timeout: Duration) -> Result<(), TransportError> {
    let prepared = stream.set_nonblocking(false).and_then(|()| socket::prepare(stream, stall_timeout));
    prepared.map_err(|source| TransportError::Broken { peer: peer.to_string(), source })
}

/// Why a greeting is none.
enum Unheard {
    Broken(io::Error),
    Malformed(DataError),
}

impl Greeting {
    /// Reads on, without waiting, and not a byte beyond the greeting; the greeting, if it is complete.
    fn read(&mut self) -> Result<Option<DataHello>, Unheard> {
        loop {
            let length = match self.bytes.first_chunk() {
                None => HelloHead::BYTES,
                Some(head) => HelloHead::read(head).map_err(Unheard::Malformed)?,
            };
            let have = self.bytes.len();
            if have == length {
                return DataHello::read(&self.bytes).map(Some).map_err(Unheard::Malformed);
            }
            self.bytes.resize(length, 0);
            let read = self.stream.read(&mut self.bytes[have..]);
            self.bytes.truncate(have + read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => return Err(Unheard::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(Unheard::Broken(error)),
            }
        }
    }

    fn answer(&self, verdict: Answer) {
        answer(&self.stream, verdict);
    }
}

/// Tells a stranger why it is turned away, if it listens.
fn answer(mut stream: &TcpStream, verdict: Answer) {
    // Nothing was ever sent on this connection: there is room for 16 bytes, or it is gone.
    let _ = stream.write(DataWelcome::new(verdict).as_bytes());
}
