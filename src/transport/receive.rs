//! The incoming data side: greets connections, checks every frame, puts pages into guest RAM, acknowledges.
//!
//! Nothing a peer says is believed before it is checked: lengths against the limits of `wire`, header and run
//! list against their checksum, each run against the guest's layout. Only then are the pages read, straight to
//! where they belong. A connection that breaks the rules is closed and remembered with the reason; the others
//! go on.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::IntoBytes;

use super::counters::Counter;
use super::uring::{ReceiveRing, Received as Read};
use super::{MigrationToken, TransportError, socket};
use crate::layout::{GuestMemory, HostRun, PageRun};
use crate::page_set::AtomicPageSet;
use crate::wire::CHANNELS_MAX;
use crate::wire::data::{
    Acknowledgement, DataError, DataHello, DataWelcome, Frame, FrameHeader, FrameKind, FrameRun, RunKind,
    Verdict, WireRun, read_runs,
};

/// A stranger gets this long to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// A source that does not take its acknowledgements for this long is gone.
const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A retired connection's thread is awaited this long; it looks up fifty times a second.
const RETIREMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The listening thread looks up this often.
const LISTEN_LOOK_UP: Duration = Duration::from_millis(50);
/// Connections at a time, those in greeting counted.
const CONNECTIONS_MAX: usize = 2 * CHANNELS_MAX as usize;
/// Connections of one migration, all reconnects counted.
const CONNECTION_NUMBERS_MAX: usize = 4096;
/// Runs from this length on are populated by one call when their first page is new.
const POPULATE_PAGES_MIN: u64 = 8;
/// Ends of connections that are remembered one by one.
const ENDS_MAX: usize = 256;

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
        let shared = Arc::new(Shared {
            written: AtomicPageSet::new(memory.end()),
            memory,
            token,
            state: Mutex::default(),
            changed: Condvar::new(),
            pages: Counter::default(),
            zero_pages: Counter::default(),
            bytes: Counter::default(),
            stopping: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let name = "ringferry-listen".to_owned();
        let listener = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || listen(&of_thread, &self.listeners))
            .map_err(|source| TransportError::Thread { name, source })?;
        Ok(Receiver { shared, listener: Some(listener) })
    }
}

/// The incoming data side of a migration. Dropping it closes the connections, and guarantees that no page is
/// written any more.
pub struct Receiver {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
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

struct Shared {
    memory: GuestMemory,
    token: MigrationToken,
    /// Pages that were written here, and may hold something else than zeros.
    written: AtomicPageSet,
    state: Mutex<State>,
    changed: Condvar,
    pages: Counter,
    zero_pages: Counter,
    bytes: Counter,
    stopping: AtomicBool,
}

#[derive(Default)]
struct State {
    connections: HashMap<u32, Connection>,
    /// Threads that have not ended.
    threads: usize,
    ends: Vec<String>,
}

enum Connection {
    /// Its thread may write guest RAM.
    Live { retired: bool, stream: Arc<TcpStream> },
    /// Its thread will not write guest RAM any more.
    Ended,
}

impl Receiver {
    /// What has arrived so far.
    pub fn received(&self) -> Received {
        let shared = &self.shared;
        Received {
            pages: shared.pages.get(),
            zero_pages: shared.zero_pages.get(),
            bytes: shared.bytes.get(),
            connections: shared.state.lock().live(),
        }
    }

    /// Why connections ended that did not end as they should: wrong tokens, impossible frames, broken links.
    pub fn failures(&self) -> Vec<String> {
        self.shared.state.lock().ends.clone()
    }

    /// Whether every connection that there was is gone.
    pub fn is_abandoned(&self) -> bool {
        let state = self.shared.state.lock();
        !state.connections.is_empty() && state.live() == 0
    }

    /// Closes all connections and returns once no thread can write guest RAM any more: to be called before the
    /// guest runs. Whoever drops the receiver has called it.
    pub fn close(mut self) -> Received {
        let received = self.received();
        self.stop();
        received
    }

    fn stop(&mut self) {
        // Release: nothing is published with it, but nobody should see it later than what follows.
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(listener) = self.listener.take() {
            // A listening thread that panicked has said so; the connections' threads are awaited below.
            let _ = listener.join();
        }
        let mut state = self.shared.state.lock();
        // Each sees the flag within milliseconds, in whatever it waits for.
        while state.threads > 0 {
            self.shared.changed.wait(&mut state);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    fn live(&self) -> usize {
        self.connections.values().filter(|connection| matches!(connection, Connection::Live { .. })).count()
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn is_retired(&self, number: u32) -> bool {
        let state = self.state.lock();
        !matches!(state.connections.get(&number), Some(Connection::Live { retired: false, .. }))
    }

    fn remember(&self, end: String) {
        tracing::warn!(end, "data connection ended");
        let mut state = self.state.lock();
        if state.ends.len() < ENDS_MAX {
            state.ends.push(end);
        }
    }

    /// Takes a connection in, unless its number was used, or retired, before.
    fn join(&self, number: u32, stream: &Arc<TcpStream>) -> Verdict {
        let mut state = self.state.lock();
        let full =
            state.live() >= usize::from(CHANNELS_MAX) || state.connections.len() >= CONNECTION_NUMBERS_MAX;
        if full || state.connections.contains_key(&number) {
            return Verdict::NotExpected;
        }
        state.connections.insert(number, Connection::Live { retired: false, stream: Arc::clone(stream) });
        Verdict::Welcome
    }

    fn leave(&self, number: u32) {
        self.state.lock().connections.insert(number, Connection::Ended);
        self.changed.notify_all();
    }

    /// Returns once connection `number` can write guest RAM no more, now or ever. `own` is the connection that
    /// asks; if it is retired itself meanwhile, it gives up.
    fn retire(&self, number: u32, own: u32) -> io::Result<()> {
        let deadline = Instant::now() + RETIREMENT_TIMEOUT;
        let mut state = self.state.lock();
        let full = state.connections.len() >= CONNECTION_NUMBERS_MAX;
        match state.connections.get_mut(&number) {
            Some(Connection::Live { retired, stream }) => {
                *retired = true;
                // Wakes its thread. A socket that cannot be shut down is down already.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            Some(Connection::Ended) => return Ok(()),
            // It never came this far; should it still come, its number is taken.
            None if !full => {
                state.connections.insert(number, Connection::Ended);
                return Ok(());
            }
            None => return Err(io::Error::other("too many connections were retired")),
        }
        loop {
            let ended = |number| matches!(state.connections.get(&number), Some(Connection::Ended));
            if ended(number) {
                return Ok(());
            }
            let own_end = matches!(state.connections.get(&own), Some(Connection::Live { retired: true, .. }));
            if own_end || self.is_stopping() {
                return Err(io::Error::other("retired while retiring another connection"));
            }
            let next = deadline.min(Instant::now() + LISTEN_LOOK_UP);
            if self.changed.wait_until(&mut state, next).timed_out() && Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

/// The listening thread.
fn listen(shared: &Arc<Shared>, listeners: &[TcpListener]) {
    let wait = Timespec { tv_sec: 0, tv_nsec: LISTEN_LOOK_UP.subsec_nanos().into() };
    while !shared.is_stopping() {
        let mut ready: Vec<_> = listeners
            .iter()
            .map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN))
            .collect();
        if poll(&mut ready, Some(&wait)).is_err() {
            std::thread::sleep(LISTEN_LOOK_UP);
        }
        for listener in listeners {
            match listener.accept() {
                Ok((stream, peer)) => admit(shared, stream, peer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Too many open files and the like: the next look may find it better.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a data connection");
                    std::thread::sleep(LISTEN_LOOK_UP);
                }
            }
        }
    }
}

/// Gives a connection a thread of its own, if there is room for one.
fn admit(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    {
        let mut state = shared.state.lock();
        if state.threads >= CONNECTIONS_MAX {
            drop(state);
            return shared.remember(format!("{peer}: turned away, {CONNECTIONS_MAX} connections are enough"));
        }
        state.threads += 1;
    }
    let of_thread = Arc::clone(shared);
    let spawned = std::thread::Builder::new().name("ringferry-receive".to_owned()).spawn(move || {
        if let Err(error) = greet_and_serve(&of_thread, stream, peer) {
            of_thread.remember(error.to_string());
        }
        of_thread.state.lock().threads -= 1;
        of_thread.changed.notify_all();
    });
    if let Err(error) = spawned {
        shared.state.lock().threads -= 1;
        shared.remember(format!("{peer}: no thread to receive: {error}"));
    }
}

fn greet_and_serve(shared: &Shared, stream: TcpStream, peer: SocketAddr) -> Result<(), TransportError> {
    let broken = |source| TransportError::Broken { peer: peer.to_string(), source };
    let malformed = |source| TransportError::Malformed { peer: peer.to_string(), source };
    stream.set_nonblocking(false).map_err(broken)?;
    let stream = Arc::new(stream);
    socket::prepare(&stream, ACKNOWLEDGEMENT_TIMEOUT).map_err(broken)?;
    let mut hello = [0; DataHello::BYTES];
    socket::read_exact_before(&stream, &mut hello, Instant::now() + GREETING_TIMEOUT).map_err(broken)?;
    let answer = |verdict: Verdict| {
        socket::write_short(&stream, DataWelcome::new(verdict).as_bytes(), ACKNOWLEDGEMENT_TIMEOUT)
            .map_err(broken)
    };
    let hello = match DataHello::read(&hello) {
        Ok(hello) => hello,
        Err(error) => {
            if matches!(error, DataError::Version { .. }) {
                answer(Verdict::WrongVersion)?;
            }
            return Err(malformed(error));
        }
    };
    let number = hello.connection();
    let verdict =
        if hello.token() == shared.token.0 { shared.join(number, &stream) } else { Verdict::WrongToken };
    if verdict != Verdict::Welcome {
        answer(verdict)?;
        return Err(broken(io::Error::other(format!("refused: {verdict}"))));
    }
    let served = answer(Verdict::Welcome).and_then(|()| {
        let stream = Arc::clone(&stream);
        let ring = ReceiveRing::new(Arc::clone(&stream), &shared.memory)?;
        Incoming { shared, number, peer, stream, ring, sequence: 0, round: 0, runs: Vec::new() }.serve()
        // Here the ring is gone, and with it the kernel's leave to write guest RAM.
    });
    shared.leave(number);
    served
}

/// One incoming connection.
struct Incoming<'a> {
    shared: &'a Shared,
    number: u32,
    peer: SocketAddr,
    stream: Arc<TcpStream>,
    ring: ReceiveRing,
    sequence: u64,
    round: u32,
    runs: Vec<FrameRun>,
}

impl Incoming<'_> {
    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken { peer: self.peer.to_string(), source }
    }

    fn malformed(&self, source: DataError) -> TransportError {
        TransportError::Malformed { peer: self.peer.to_string(), source }
    }

    /// Receives until the source closes between two frames, or this side stops (both `Ok`), or the connection
    /// breaks.
    fn serve(&mut self) -> Result<(), TransportError> {
        while let Some(frame) = self.next_frame()? {
            match frame.kind {
                FrameKind::Pages => {
                    if !self.place_pages()? {
                        return Ok(());
                    }
                }
                FrameKind::Retire => {
                    self.shared.retire(frame.argument, self.number).map_err(|error| self.broken(error))?;
                }
            }
            let header = FrameHeader::BYTES as u64 + u64::from(frame.run_count) * WireRun::BYTES as u64;
            self.shared.bytes.add(header + u64::from(frame.payload_bytes));
            let acknowledgement = Acknowledgement::new(frame.sequence);
            socket::write_short(&self.stream, acknowledgement.as_bytes(), ACKNOWLEDGEMENT_TIMEOUT)
                .map_err(|error| self.broken(error))?;
        }
        Ok(())
    }

    fn read(&mut self, from: usize, to: usize) -> Result<Read, TransportError> {
        let (shared, number) = (self.shared, self.number);
        let stop = || shared.is_stopping() || shared.is_retired(number);
        self.ring.read_bytes(from, to, &stop).map_err(|error| self.broken(error))
    }

    /// Header and run list of the next frame, checked; `None` when there is none.
    fn next_frame(&mut self) -> Result<Option<Frame>, TransportError> {
        match self.read(0, FrameHeader::BYTES)? {
            Read::All => {}
            Read::Closed | Read::Stopped => return Ok(None),
        }
        let mut header = [0; FrameHeader::BYTES];
        header.copy_from_slice(self.ring.bytes(FrameHeader::BYTES));
        let frame = FrameHeader::read(&header).map_err(|error| self.malformed(error))?;
        // Bounded by `FRAME_RUNS_MAX`.
        let length = FrameHeader::BYTES + usize::try_from(frame.run_count).unwrap_or(0) * WireRun::BYTES;
        if length > FrameHeader::BYTES {
            match self.read(FrameHeader::BYTES, length)? {
                Read::All => {}
                Read::Closed => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Read::Stopped => return Ok(None),
            }
        }
        read_runs(&frame, self.ring.bytes(length), &mut self.runs).map_err(|error| self.malformed(error))?;
        if frame.sequence != self.sequence + 1 {
            let (found, expected) = (frame.sequence, self.sequence + 1);
            return Err(self.malformed(DataError::Sequence { found, expected }));
        }
        if frame.round < self.round {
            return Err(self.malformed(DataError::Round { found: frame.round, newest: self.round }));
        }
        (self.sequence, self.round) = (frame.sequence, frame.round);
        Ok(Some(frame))
    }

    /// Puts the pages of the current frame in place; false if this side stops.
    fn place_pages(&mut self) -> Result<bool, TransportError> {
        let memory = &self.shared.memory;
        let (mut data, mut zeros) = (Vec::new(), Vec::new());
        // Every run is looked up before anything lands.
        for run in &self.runs {
            let pieces = memory
                .host_runs(run.run())
                .map_err(|source| TransportError::Layout { peer: self.peer.to_string(), source })?;
            match run.kind {
                RunKind::Data => data.extend(pieces),
                RunKind::Zero => zeros.extend(pieces),
            }
        }
        let pages = |runs: &[HostRun]| runs.iter().map(|piece| piece.run.pages).sum();
        let (data_pages, zero_pages) = (pages(&data), pages(&zeros));
        for piece in &data {
            if piece.run.pages >= POPULATE_PAGES_MIN && !self.shared.written.contains(piece.run.first) {
                self.ring.populate(piece);
            }
        }
        // Marked first: a read that breaks off half-way has written, too.
        data.iter().for_each(|piece| self.shared.written.insert_run(piece.run));
        if !data.is_empty() {
            let (shared, number) = (self.shared, self.number);
            let stop = || shared.is_stopping() || shared.is_retired(number);
            match self.ring.read_pages(&data, &stop).map_err(|error| self.broken(error))? {
                Read::All => {}
                Read::Closed => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Read::Stopped => return Ok(false),
            }
        }
        zeros.iter().for_each(|piece| self.clear(piece));
        self.shared.pages.add(data_pages);
        self.shared.zero_pages.add(zero_pages);
        Ok(true)
    }

    /// Makes pages zero that may not be. Fresh memory is left untouched, so that it stays unallocated.
    fn clear(&mut self, piece: &HostRun) {
        let written = &self.shared.written;
        let mut page = piece.run.first;
        while page < piece.run.end() {
            let mut end = page;
            while end < piece.run.end() && written.contains(end) {
                end.0 += 1;
            }
            if end > page {
                let run = PageRun { first: page, pages: end.0 - page.0 };
                // Inside RAM, as the whole piece is.
                self.shared.memory.host_runs(run).into_iter().flatten().for_each(|run| self.ring.clear(&run));
            }
            page.0 = end.0 + 1;
        }
    }
}
