//! The control connection: whole messages, each wait bounded and cancellable, and a peer that is known to be alive.
//!
//! A thread keeps the connection. It answers the peer's pings and sends its own, so that both sides notice within
//! seconds that the other one is gone, whatever the thread that owns the connection is doing. What the messages mean is
//! in [`wire::control`](crate::wire::control).

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::connection::Connection;
use crate::wire::control::{HEAD_BYTES, Head, Message};
use crate::wire::error::ControlFormatError;

/// How often a wait looks whether it was cancelled: well within the 100 ms in which a cancellation takes effect.
const CANCEL_POLL: Duration = Duration::from_millis(10);
/// Each side asks the other so often whether it is alive.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Messages that wait to be taken. No phase has more than three; a peer that sends more breaks the protocol.
const INBOX_MAX: usize = 16;
/// What the keeper sends by itself has to be taken within this time: a peer that reads takes it at once.
const KEEPER_PATIENCE: Duration = Duration::from_millis(200);
/// The end of a connection waits so long for the peer to have read the last message.
const LINGER: Duration = Duration::from_secs(1);

/// How long a wait may last, and what ends it early.
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    /// When it is over.
    pub deadline: Instant,
    /// Raised by the thread that cancels.
    pub cancel: &'a AtomicBool,
}

impl Wait<'_> {
    /// Whether the wait was cancelled. Relaxed: the flag carries no data, and is looked at again within milliseconds.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Whether the wait may go on for `expected`.
    ///
    /// # Errors
    ///
    /// [`ControlError::Cancelled`] or [`ControlError::Timeout`].
    pub fn check(&self, expected: &'static str) -> Result<(), ControlError> {
        if self.is_cancelled() {
            Err(ControlError::Cancelled { expected })
        } else if Instant::now() >= self.deadline {
            Err(ControlError::Timeout { expected })
        } else {
            Ok(())
        }
    }

    /// When to look again, at the latest.
    pub fn next_poll(&self) -> Instant {
        self.deadline.min(Instant::now() + CANCEL_POLL)
    }
}

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
    /// The peer did not answer in time.
    #[error("no {expected} from the peer in time")]
    Timeout {
        /// What was waited for.
        expected: &'static str,
    },
    /// The peer gives no sign of life.
    #[error("the peer has been silent for {} s: its host or process is gone or frozen, or the network is cut", silent.as_secs_f32())]
    Silent {
        /// For how long.
        silent: Duration,
    },
    /// The peer sends messages that nobody asked for, faster than they are taken.
    #[error("the peer floods the control connection")]
    Flooded,
    /// The bytes are not a message.
    #[error(transparent)]
    Format(#[from] ControlFormatError),
    /// A thread of the connection could not be started.
    #[error("no thread for the control connection: {0}")]
    Thread(io::Error),
    /// Somebody asked to stop.
    #[error("cancelled while waiting for {expected}")]
    Cancelled {
        /// What was waited for.
        expected: &'static str,
    },
}

/// Why nothing more will come.
#[derive(Clone, Debug)]
enum End {
    Broken(io::ErrorKind, String),
    Silent(Duration),
    Flooded,
    Format(ControlFormatError),
}

impl End {
    fn error(&self, expected: &'static str) -> ControlError {
        match self {
            Self::Broken(kind, text) => {
                ControlError::Receive { expected, source: io::Error::new(*kind, text.clone()) }
            }
            Self::Silent(silent) => ControlError::Silent { silent: *silent },
            Self::Flooded => ControlError::Flooded,
            Self::Format(error) => ControlError::Format(error.clone()),
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.kind(), error.to_string())
    }
}

/// Reads one message after the other, in whatever pieces they come.
#[derive(Debug, Default)]
struct Reader {
    head: Option<Head>,
    bytes: Vec<u8>,
}

/// What a read brought.
enum Read {
    Message(Message),
    /// Something came, though no whole message that this version knows.
    Something,
    Nothing,
}

impl Reader {
    fn read(&mut self, connection: &dyn Connection, deadline: Instant) -> Result<Read, End> {
        let wanted = self.head.map_or(HEAD_BYTES, |head| head.body_bytes()) - self.bytes.len();
        if wanted > 0 {
            // What a peer announces is not allocated before it comes.
            let mut piece = [0; 4096];
            let room = wanted.min(piece.len());
            let read = match connection.read(&mut piece[..room], deadline) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed it").into());
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(Read::Nothing),
                Err(error) => return Err(error.into()),
            };
            self.bytes.extend_from_slice(&piece[..read]);
            if read < wanted {
                return Ok(Read::Something);
            }
        }
        match self.head.take() {
            None => {
                let head = <[u8; HEAD_BYTES]>::try_from(self.bytes.as_slice()).unwrap_or([0; HEAD_BYTES]);
                self.head = Some(Head::parse(head).map_err(End::Format)?);
                self.bytes.clear();
                Ok(Read::Something)
            }
            Some(head) => {
                let message = Message::decode(&head, &self.bytes).map_err(End::Format)?;
                self.bytes.clear();
                Ok(message.map_or(Read::Something, Read::Message))
            }
        }
    }
}

/// Reads the first message of a peer that nothing is known of yet, on the caller's thread.
///
/// # Errors
///
/// [`ControlError`]; a peer that drips bytes is given up at the deadline like one that is silent.
pub fn first_message(
    connection: &dyn Connection,
    expected: &'static str,
    wait: Wait<'_>,
) -> Result<Message, ControlError> {
    let mut reader = Reader::default();
    loop {
        wait.check(expected)?;
        let read = reader.read(connection, wait.next_poll()).map_err(|end| end.error(expected))?;
        if let Read::Message(message) = read {
            return Ok(message);
        }
    }
}

/// Sends one message to such a peer.
///
/// # Errors
///
/// [`ControlError::Send`] if it did not go whole before the deadline.
pub fn send_bytes(
    connection: &dyn Connection,
    message: &'static str,
    bytes: &[u8],
    wait: Wait<'_>,
) -> Result<(), ControlError> {
    let failed = |source| ControlError::Send { message, source };
    let mut rest = bytes;
    while !rest.is_empty() {
        match connection.write(rest, wait.next_poll()) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                if wait.is_cancelled() {
                    return Err(ControlError::Cancelled { expected: message });
                }
                if Instant::now() >= wait.deadline {
                    return Err(failed(error));
                }
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

/// One side of the control connection.
#[derive(Debug)]
pub struct ControlConnection {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    connection: Arc<dyn Connection>,
    peer_timeout: Duration,
    /// Held while a message is written, so that messages never mix.
    writing: Mutex<()>,
    closing: AtomicBool,
    /// Nothing more is written: a message went in part, or the last one has gone.
    mute: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    elsewhere: Mutex<Elsewhere>,
}

/// Signs of life on other connections: on a slow link those delay the answers to pings.
struct Elsewhere {
    /// Bytes that the peer took or sent there, so far.
    bytes: Box<dyn Fn() -> u64 + Send>,
    seen: u64,
}

impl fmt::Debug for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elsewhere").field("seen", &self.seen).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    inbox: VecDeque<Message>,
    end: Option<End>,
    last_heard: Instant,
    ping: u64,
    /// When the ping was sent that is not answered yet.
    asked: Option<Instant>,
    /// When the newest ping was sent that is answered.
    answered: Option<Instant>,
    /// The shortest time that an answer took.
    round_trip: Option<Duration>,
    state_taken: u64,
}

impl ControlConnection {
    /// Keeps a connection whose peer is known by its first message. A peer that gives no sign of life for `peer_timeout`
    /// is gone.
    ///
    /// # Errors
    ///
    /// [`ControlError::Thread`].
    pub fn keep(connection: Arc<dyn Connection>, peer_timeout: Duration) -> Result<Self, ControlError> {
        let state = State {
            inbox: VecDeque::new(),
            end: None,
            last_heard: Instant::now(),
            ping: 0,
            asked: None,
            answered: None,
            round_trip: None,
            state_taken: 0,
        };
        let shared = Arc::new(Shared {
            connection,
            peer_timeout,
            writing: Mutex::new(()),
            closing: AtomicBool::new(false),
            mute: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            elsewhere: Mutex::new(Elsewhere { bytes: Box::new(|| 0), seen: 0 }),
        });
        let of_keeper = Arc::clone(&shared);
        let keeper = std::thread::Builder::new()
            .name("ringferry-control".to_owned())
            .spawn(move || of_keeper.keep())
            .map_err(ControlError::Thread)?;
        Ok(Self { shared, keeper: Some(keeper) })
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// [`ControlError::Send`] if it did not go whole: the peer can then not have read it, and the connection is over.
    pub fn send(&self, message: &Message, wait: Wait<'_>) -> Result<(), ControlError> {
        self.shared.send(message, wait)
    }

    /// Waits for the next message that is not a sign of life. One that is there already is delivered whatever `wait`
    /// says.
    ///
    /// # Errors
    ///
    /// [`ControlError`] says whether the peer is gone, silent or not speaking our protocol, or that the wait was
    /// cancelled.
    pub fn receive(&self, expected: &'static str, wait: Wait<'_>) -> Result<Message, ControlError> {
        let mut state = self.shared.state.lock();
        loop {
            if let Some(message) = state.inbox.pop_front() {
                return Ok(message);
            }
            if let Some(end) = &state.end {
                return Err(end.error(expected));
            }
            wait.check(expected)?;
            self.shared.changed.wait_until(&mut state, wait.next_poll());
        }
    }

    /// The next message, if one is there.
    ///
    /// # Errors
    ///
    /// [`ControlError`] if the connection is over.
    pub fn poll(&self, expected: &'static str) -> Result<Option<Message>, ControlError> {
        let mut state = self.shared.state.lock();
        match (state.inbox.pop_front(), &state.end) {
            (None, Some(end)) => Err(end.error(expected)),
            (message, _) => Ok(message),
        }
    }

    /// From now on, that `bytes` grows is a sign of life of the peer, too: it counts what the peer took or sent on other
    /// connections.
    pub fn watch_elsewhere(&self, bytes: impl Fn() -> u64 + Send + 'static) {
        *self.shared.elsewhere.lock() = Elsewhere { bytes: Box::new(bytes), seen: 0 };
    }

    /// The shortest time that the peer has taken to answer a ping.
    pub fn round_trip(&self) -> Option<Duration> {
        self.shared.state.lock().round_trip
    }

    /// Asks the peer for a sign of life, unless it was asked and has not answered yet.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    pub fn ping(&self, wait: Wait<'_>) -> Result<(), ControlError> {
        self.shared.ping(wait)
    }

    /// Whether the peer has answered a ping that was sent after `since`.
    pub fn answered_since(&self, since: Instant) -> bool {
        self.shared.state.lock().answered.is_some_and(|answered| answered >= since)
    }

    /// Bytes of the state stream that the destination has taken, by its last word.
    pub fn state_taken(&self) -> u64 {
        self.shared.state.lock().state_taken
    }

    /// Says that nothing more follows, and waits a moment for the peer to close: what was sent last is read then.
    pub fn finish(self) {
        self.shared.fall_silent();
        let deadline = Instant::now() + LINGER;
        let mut state = self.shared.state.lock();
        while state.end.is_none() && !self.shared.changed.wait_until(&mut state, deadline).timed_out() {
            state.inbox.clear();
        }
    }
}

impl Drop for ControlConnection {
    fn drop(&mut self) {
        // Relaxed: the shutdown wakes the keeper, and it sees the flag or the end of the stream.
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.connection.shutdown();
        if let Some(keeper) = self.keeper.take() {
            // A keeper that panicked has said so.
            let _ = keeper.join();
        }
    }
}

impl Shared {
    /// The keeper's thread.
    fn keep(&self) {
        let mut reader = Reader::default();
        let mut next_ping = Instant::now() + HEARTBEAT;
        while !self.closing.load(Ordering::Relaxed) {
            let ended = match reader.read(&*self.connection, next_ping) {
                Ok(Read::Message(message)) => self.take(message),
                Ok(Read::Something) => {
                    self.state.lock().last_heard = Instant::now();
                    Ok(())
                }
                Ok(Read::Nothing) => Ok(()),
                Err(end) => Err(end),
            };
            let ended = ended.and_then(|()| {
                if Instant::now() < next_ping {
                    return Ok(());
                }
                next_ping = Instant::now() + HEARTBEAT;
                self.look_after_the_peer()
            });
            if let Err(end) = ended {
                tracing::debug!(?end, peer = self.connection.peer(), "control connection");
                self.state.lock().end = Some(end);
                self.changed.notify_all();
                return;
            }
        }
    }

    fn look_after_the_peer(&self) -> Result<(), End> {
        let lives_elsewhere = {
            let mut elsewhere = self.elsewhere.lock();
            let bytes = (elsewhere.bytes)();
            std::mem::replace(&mut elsewhere.seen, bytes) != bytes
        };
        let silent = {
            let mut state = self.state.lock();
            if lives_elsewhere {
                state.last_heard = Instant::now();
            }
            state.last_heard.elapsed()
        };
        if silent > self.peer_timeout {
            return Err(End::Silent(silent));
        }
        self.say(|wait| self.ping(wait));
        Ok(())
    }

    /// Sends what the keeper sends by itself. That it cannot is no end of the connection: what the peer said before it
    /// closed is still to be read.
    fn say(&self, send: impl FnOnce(Wait<'_>) -> Result<(), ControlError>) {
        // Relaxed: a flag without data.
        if self.mute.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = send(Wait { deadline: Instant::now() + KEEPER_PATIENCE, cancel: &self.closing }) {
            tracing::debug!(%error, "the control connection falls silent");
        }
    }

    /// Nothing more is written.
    fn fall_silent(&self) {
        self.mute.store(true, Ordering::Relaxed);
        self.connection.close_write();
    }

    fn take(&self, message: Message) -> Result<(), End> {
        tracing::trace!(message = message.name(), "received");
        let mut state = self.state.lock();
        state.last_heard = Instant::now();
        match message {
            Message::Ping(number) => {
                drop(state);
                self.say(|wait| self.send(&Message::Pong(number), wait));
                return Ok(());
            }
            Message::Pong(number) => {
                if number == state.ping
                    && let Some(asked) = state.asked.take()
                {
                    let took = asked.elapsed();
                    state.answered = Some(asked);
                    state.round_trip = Some(state.round_trip.map_or(took, |shortest| shortest.min(took)));
                }
            }
            Message::StateTaken(bytes) => state.state_taken = state.state_taken.max(bytes),
            _ if state.inbox.len() >= INBOX_MAX => return Err(End::Flooded),
            message => state.inbox.push_back(message),
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn ping(&self, wait: Wait<'_>) -> Result<(), ControlError> {
        let number = {
            let mut state = self.state.lock();
            if state.asked.is_some() {
                return Ok(());
            }
            state.asked = Some(Instant::now());
            state.ping += 1;
            state.ping
        };
        self.send(&Message::Ping(number), wait)
    }

    fn send(&self, message: &Message, wait: Wait<'_>) -> Result<(), ControlError> {
        let bytes = message.encode()?;
        tracing::trace!(message = message.name(), bytes = bytes.len(), "send");
        let _one_at_a_time = loop {
            wait.check(message.name())?;
            if let Some(guard) = self.writing.try_lock_until(wait.next_poll()) {
                break guard;
            }
        };
        let sent = send_bytes(&*self.connection, message.name(), &bytes, wait);
        if sent.is_err() {
            // The rest of a message that went in part would be taken for the beginning of the next one.
            self.fall_silent();
        }
        sent
    }
}

#[cfg(test)]
mod tests;
