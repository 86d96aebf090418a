//! Which data connections there are, which were retired, and how all of them end.
//!
//! A connection that joined may write guest RAM until it has left; [`Connections::retire`] and
//! [`Connections::stop`] return when that is over.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::wire::CHANNELS_MAX;
use crate::wire::data::Verdict;

/// A retired connection's thread is awaited this long; its socket is shut down, so it ends at once.
const RETIREMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever waits for a retirement looks this often whether it is retired itself.
const LOOK_UP: Duration = Duration::from_millis(50);
/// Connections at a time, those in greeting counted.
const THREADS_MAX: usize = 2 * CHANNELS_MAX as usize;
/// Connections of one migration, all reconnects counted.
const NUMBERS_MAX: usize = 4096;
/// Failures that are remembered one by one.
const FAILURES_MAX: usize = 256;

/// All data connections of a migration, past ones included.
#[derive(Default)]
pub(super) struct Connections {
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Sockets of threads that have not ended.
    admitted: HashMap<u64, Arc<TcpStream>>,
    next_admission: u64,
    /// By connection number.
    joined: HashMap<u32, Connection>,
    failures: Vec<String>,
}

enum Connection {
    /// Its thread may write guest RAM.
    Live { retired: Arc<AtomicBool>, stream: Arc<TcpStream> },
    /// Its thread will not write guest RAM any more.
    Ended,
}

/// A thread that serves a connection; ends with this value.
pub(super) struct Admitted {
    connections: Arc<Connections>,
    admission: u64,
    pub stream: Arc<TcpStream>,
}

/// A connection that may write guest RAM; leaves with this value.
pub(super) struct Joined<'a> {
    connections: &'a Connections,
    pub number: u32,
    retired: Arc<AtomicBool>,
}

impl Connections {
    /// Takes note of a connection that is about to get a thread; `None` if there are too many, or this side
    /// stops.
    pub(super) fn admit(self: &Arc<Self>, stream: TcpStream) -> Option<Admitted> {
        let stream = Arc::new(stream);
        let mut state = self.state.lock();
        if self.is_stopping() || state.admitted.len() >= THREADS_MAX {
            return None;
        }
        state.next_admission += 1;
        let admission = state.next_admission;
        state.admitted.insert(admission, Arc::clone(&stream));
        Some(Admitted { connections: Arc::clone(self), admission, stream })
    }

    /// Takes a connection in, unless its number was used, or retired, before.
    pub(super) fn join(&self, number: u32, stream: &Arc<TcpStream>) -> Result<Joined<'_>, Verdict> {
        let mut state = self.state.lock();
        let full = state.live() >= usize::from(CHANNELS_MAX) || state.joined.len() >= NUMBERS_MAX;
        if full || self.is_stopping() || state.joined.contains_key(&number) {
            return Err(Verdict::NotExpected);
        }
        let retired = Arc::new(AtomicBool::new(false));
        let live = Connection::Live { retired: Arc::clone(&retired), stream: Arc::clone(stream) };
        state.joined.insert(number, live);
        Ok(Joined { connections: self, number, retired })
    }

    /// Returns once connection `number` can write guest RAM no more, now or ever. `asking` is the connection
    /// that asks; if it is retired itself meanwhile, it gives up.
    pub(super) fn retire(&self, number: u32, asking: &Joined<'_>) -> io::Result<()> {
        let deadline = Instant::now() + RETIREMENT_TIMEOUT;
        let mut state = self.state.lock();
        let full = state.joined.len() >= NUMBERS_MAX;
        match state.joined.get(&number) {
            Some(Connection::Live { retired, stream }) => {
                retired.store(true, Ordering::Release);
                // Wakes its thread. A socket that cannot be shut down is down already.
                let _ = stream.shutdown(Shutdown::Both);
            }
            Some(Connection::Ended) => return Ok(()),
            // It never came this far; should it still come, its number is taken.
            None if !full => {
                state.joined.insert(number, Connection::Ended);
                return Ok(());
            }
            None => return Err(io::Error::other("too many connections were retired")),
        }
        while !matches!(state.joined.get(&number), Some(Connection::Ended)) {
            if asking.must_end() {
                return Err(io::Error::other("retired while retiring another connection"));
            }
            let next = deadline.min(Instant::now() + LOOK_UP);
            if self.changed.wait_until(&mut state, next).timed_out() && Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Ends all connections, and returns when the last of their threads has.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        // Release, read with Acquire: who sees it and ends, ends after whatever this thread did before.
        self.stopping.store(true, Ordering::Release);
        for stream in state.admitted.values() {
            // Wakes its thread. A socket that cannot be shut down is down already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        while !state.admitted.is_empty() {
            self.changed.wait(&mut state);
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Connections that may write guest RAM.
    pub(super) fn live(&self) -> usize {
        self.state.lock().live()
    }

    /// Whether there were connections, and none is left.
    pub(super) fn is_abandoned(&self) -> bool {
        let state = self.state.lock();
        !state.joined.is_empty() && state.live() == 0
    }

    /// Puts a failure on record, unless it is only this side's own stopping.
    pub(super) fn failed(&self, failure: String) {
        if self.is_stopping() {
            return;
        }
        tracing::warn!(failure, "data connection");
        let mut state = self.state.lock();
        if state.failures.len() < FAILURES_MAX {
            state.failures.push(failure);
        }
    }

    pub(super) fn failures(&self) -> Vec<String> {
        self.state.lock().failures.clone()
    }
}

impl State {
    fn live(&self) -> usize {
        self.joined.values().filter(|connection| matches!(connection, Connection::Live { .. })).count()
    }
}

impl Joined<'_> {
    /// Whether the connection was retired, or this side stops.
    pub(super) fn must_end(&self) -> bool {
        self.retired.load(Ordering::Acquire) || self.connections.is_stopping()
    }
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.connections.state.lock().joined.insert(self.number, Connection::Ended);
        self.connections.changed.notify_all();
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.state.lock().admitted.remove(&self.admission);
        self.connections.changed.notify_all();
    }
}
