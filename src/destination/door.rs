//! Where sources come in: every connection is greeted on a thread of its own, for a moment and a few bytes, so that no
//! stranger stands in an honest source's way.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::DestinationError;
use super::incoming::Incoming;
use super::options::ListenOptions;
use super::seats::Seats;
use super::setup::objection;
use crate::transport::connection::Connection;
use crate::transport::control::{ControlConnection, ControlError, Wait, first_message, send_bytes};
use crate::transport::{DataListener, socket};
use crate::wire::control::{Message, refusal_of_version_1};
use crate::wire::error::ControlFormatError;
use crate::wire::features;
use crate::wire::hello::Hello;
use crate::wire::reason::Reason;

/// A peer that has connected says within this time what it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections that are greeted at a time. When one more comes, the oldest has to go: a source needs a round trip.
const GREETINGS_MAX: usize = 32;
/// How often the listening thread looks whether the door is closed.
const DOOR_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// The pause after an `accept` that failed for want of something, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often a wait for a source looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(20);

/// The open door of a destination; it closes with this value.
#[derive(Debug)]
pub(super) struct Door {
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: TcpListener,
    options: ListenOptions,
    /// If it has addresses of its own; else each VM gets one beside its control connection.
    data: Option<Arc<DataListener>>,
    seats: Arc<Seats>,
    closing: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Sources that have a seat and wait for the VMM.
    waiting: VecDeque<Incoming>,
    /// Connections that are greeted, the oldest first.
    greetings: VecDeque<(u64, Arc<TcpStream>)>,
    next_greeting: u64,
}

impl Door {
    pub fn open(options: ListenOptions) -> Result<Self, DestinationError> {
        let addresses = options.data_addresses.iter().chain([&options.address]);
        let exposed = |address: &&SocketAddr| !options.insecure && !address.ip().is_loopback();
        if let Some(exposed) = addresses.into_iter().find(exposed) {
            return Err(DestinationError::Exposed(*exposed));
        }
        let address = options.address;
        let listen = |source| DestinationError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let data = match options.data_addresses.as_slice() {
            [] => None,
            given => Some(Arc::new(DataListener::bind(given)?)),
        };
        let shared = Arc::new(Shared {
            listener,
            data,
            seats: Arc::new(Seats::new(options.vms)),
            options,
            closing: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let listening = std::thread::Builder::new()
            .name("ringferry-door".to_owned())
            .spawn(move || of_thread.listen())
            .map_err(listen)?;
        Ok(Self { shared, listening: Some(listening) })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.listener.local_addr()
    }

    pub fn accept(&self, limit: Option<Duration>, cancel: &AtomicBool) -> Result<Incoming, DestinationError> {
        let since = Instant::now();
        let mut state = self.shared.state.lock();
        loop {
            // A source that has gone meanwhile leaves its seat.
            while let Some(incoming) = state.waiting.pop_front() {
                match incoming.control.poll("patience") {
                    Ok(None) => return Ok(incoming),
                    left => tracing::warn!(?left, "a source has not waited"),
                }
            }
            // Relaxed: a flag without data, read again at the next poll.
            if cancel.load(Ordering::Relaxed) {
                return Err(DestinationError::Cancelled);
            }
            if let Some(waited) = limit.filter(|limit| since.elapsed() > *limit) {
                let address = self.local_addr().unwrap_or(self.shared.options.address);
                return Err(DestinationError::NobodyCame { address, waited });
            }
            self.shared.changed.wait_for(&mut state, CANCEL_POLL);
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Relaxed: looked at again within `DOOR_POLL`.
        self.shared.closing.store(true, Ordering::Relaxed);
        for (_, stream) in &self.shared.state.lock().greetings {
            Connection::shutdown(&**stream);
        }
        if let Some(listening) = self.listening.take() {
            // A thread that panicked has said so.
            let _ = listening.join();
        }
        // Greetings end at once, now that their connections have.
        let deadline = Instant::now() + GREETING_TIMEOUT;
        let mut state = self.shared.state.lock();
        while !state.greetings.is_empty() && !self.shared.changed.wait_until(&mut state, deadline).timed_out()
        {
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for incoming in waiting {
            incoming.refuse(Reason::Cancelled, "the destination has ended".to_owned());
        }
    }
}

impl Shared {
    /// The listening thread.
    fn listen(self: &Arc<Self>) {
        while !self.closing.load(Ordering::Relaxed) {
            // After an error, the listener is asked all the same.
            let _ = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&DOOR_POLL));
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Greets a connection on a thread of its own.
    fn admit(self: &Arc<Self>, stream: TcpStream) {
        let stream = Arc::new(stream);
        let number = {
            let mut state = self.state.lock();
            if state.greetings.len() >= GREETINGS_MAX
                && let Some((_, oldest)) = state.greetings.pop_front()
            {
                Connection::shutdown(&*oldest);
            }
            state.next_greeting += 1;
            let number = state.next_greeting;
            state.greetings.push_back((number, Arc::clone(&stream)));
            number
        };
        let of_thread = Arc::clone(self);
        let greeting = std::thread::Builder::new().name("ringferry-greet".to_owned()).spawn(move || {
            let peer = stream.peer();
            match of_thread.greet(stream) {
                Ok(incoming) => of_thread.state.lock().waiting.push_back(incoming),
                Err(error) => tracing::warn!(peer, %error, "turned away"),
            }
            of_thread.state.lock().greetings.retain(|(greeted, _)| *greeted != number);
            of_thread.changed.notify_all();
        });
        if let Err(error) = greeting {
            tracing::warn!(%error, "no thread to greet a connection");
            self.state.lock().greetings.retain(|(greeted, _)| *greeted != number);
        }
    }

    /// What a connection is: a source with a VM and a seat for it, or an error.
    fn greet(self: &Arc<Self>, stream: Arc<TcpStream>) -> Result<Incoming, DestinationError> {
        let wait = Wait { deadline: Instant::now() + GREETING_TIMEOUT, cancel: &self.closing };
        let broken = |source| ControlError::Receive { expected: "Hello", source };
        stream.set_nonblocking(false).map_err(broken)?;
        socket::prepare(&stream, self.options.peer_timeout).map_err(broken)?;
        let local = stream.local_addr().map_err(broken)?;
        let hello = match first_message(&*stream, "Hello", wait) {
            Ok(Message::Hello(hello)) => hello,
            Ok(other) => return Err(DestinationError::of_message(other, "Hello")),
            // It speaks our protocol, and a part of it is unknown here: it hears which.
            Err(ControlError::Format(error @ ControlFormatError::UnknownPart { .. })) => {
                return Err(refuse(&*stream, &Hello::default(), Reason::Feature, error.to_string(), wait));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some((reason, text)) = objection(&hello) {
            return Err(refuse(&*stream, &hello, reason, text, wait));
        }
        let seat = match self.seats.take(&hello.vm_id) {
            Ok(seat) => seat,
            Err(names) => {
                return Err(refuse(&*stream, &hello, Reason::Busy, format!("busy with {names}"), wait));
            }
        };
        let control = ControlConnection::keep(stream, self.options.peer_timeout)?;
        let data = match &self.data {
            Some(data) => Arc::clone(data),
            None => Arc::new(DataListener::bind(&[SocketAddr::new(local.ip(), 0)])?),
        };
        Ok(Incoming::new(control, hello, data, seat))
    }
}

/// Tells a source why not, in words that it understands. Returns the error to report here.
fn refuse(
    connection: &dyn Connection,
    hello: &Hello,
    reason: Reason,
    text: String,
    wait: Wait<'_>,
) -> DestinationError {
    let bytes = if hello.newest < features::OLDEST {
        Ok(refusal_of_version_1(&text))
    } else {
        Message::Refuse(reason, text.clone()).encode()
    };
    let told =
        bytes.map_err(ControlError::from).and_then(|bytes| send_bytes(connection, "Refuse", &bytes, wait));
    if let Err(error) = told {
        tracing::warn!(%error, "the source could not be told");
    }
    connection.close_write();
    DestinationError::Refused { reason, text }
}
