//! Which data connections of a migration there are, which were retired, and how all of them end.
//!
//! A connection that joined may write guest RAM while it [places](Membership::begin_to_place) a frame, until it has
//! left; [`Connections::retire`], [`Connections::seal`] and [`Connections::stop`] return when that is over.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::transport::socket::tcp_info;
use crate::wire::CHANNELS_MAX;
use crate::wire::data::Verdict;

/// A retired connection's thread is awaited this long; its socket is shut down, so it ends at once.
const RETIREMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// A thread that waits for a retirement polls this often whether its own connection was retired.
const RETIREMENT_POLL: Duration = Duration::from_millis(50);
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
    by_number: HashMap<u32, Connection>,
    sealed: bool,
    failures: Vec<String>,
}

enum Connection {
    /// It has a thread.
    Live {
        must_end: Arc<AtomicBool>,
        stream: Arc<TcpStream>,
        /// Whether the thread may be writing guest RAM.
        placing: bool,
    },
    /// Its thread will not write guest RAM any more.
    Ended,
}

/// What a connection's thread knows of its own place among the connections.
#[derive(Debug)]
pub(super) struct Membership {
    pub number: u32,
    must_end: Arc<AtomicBool>,
}

/// Why a frame of pages may not be placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotPlaced {
    /// Guest RAM is complete: nobody writes it any more.
    Sealed,
    /// The connection was retired, or this side stops.
    Ended,
}

impl Connections {
    /// Takes a connection in, unless its number was used, or retired, before.
    pub(super) fn join(&self, number: u32, stream: &Arc<TcpStream>) -> Result<Membership, Verdict> {
        let mut state = self.state.lock();
        let used_up = state.by_number.len() >= NUMBERS_MAX;
        if used_up || self.is_stopping() || state.by_number.contains_key(&number) {
            return Err(Verdict::NotExpected);
        }
        if state.live() >= usize::from(CHANNELS_MAX) {
            return Err(Verdict::Busy);
        }
        let must_end = Arc::new(AtomicBool::new(false));
        let membership = Membership { number, must_end: Arc::clone(&must_end) };
        let live = Connection::Live { must_end, stream: Arc::clone(stream), placing: false };
        state.by_number.insert(number, live);
        Ok(membership)
    }

    /// A connection's thread ends.
    pub(super) fn leave(&self, membership: &Membership) {
        self.state.lock().by_number.insert(membership.number, Connection::Ended);
        self.changed.notify_all();
    }

    /// Whether a connection was retired, or this side stops.
    pub(super) fn must_end(&self, membership: &Membership) -> bool {
        membership.must_end.load(Ordering::Acquire) || self.is_stopping()
    }

    /// From here until [`placed`](Self::placed), a connection writes guest RAM.
    pub(super) fn begin_to_place(&self, membership: &Membership) -> Result<(), NotPlaced> {
        let mut state = self.state.lock();
        if state.sealed {
            return Err(NotPlaced::Sealed);
        }
        match state.by_number.get_mut(&membership.number) {
            Some(Connection::Live { placing, .. }) if !self.must_end(membership) => {
                *placing = true;
                Ok(())
            }
            _ => Err(NotPlaced::Ended),
        }
    }

    /// A connection writes no more for this frame.
    pub(super) fn placed(&self, membership: &Membership) {
        let mut state = self.state.lock();
        if let Some(Connection::Live { placing, .. }) = state.by_number.get_mut(&membership.number) {
            *placing = false;
        }
        let sealed = state.sealed;
        drop(state);
        if sealed {
            self.changed.notify_all();
        }
    }

    /// Returns once connection `number` can write guest RAM no more, now or ever. `asking` is the connection
    /// that asks; if it is retired itself meanwhile, it gives up.
    pub(super) fn retire(&self, number: u32, asking: &Membership) -> io::Result<()> {
        let deadline = Instant::now() + RETIREMENT_TIMEOUT;
        let mut state = self.state.lock();
        let used_up = state.by_number.len() >= NUMBERS_MAX;
        match state.by_number.get(&number) {
            Some(live @ Connection::Live { .. }) => live.end(),
            Some(Connection::Ended) => return Ok(()),
            // It never came this far; should it still come, its number is taken.
            None if !used_up => {
                state.by_number.insert(number, Connection::Ended);
                return Ok(());
            }
            None => return Err(io::Error::other("too many connections were retired")),
        }
        while !matches!(state.by_number.get(&number), Some(Connection::Ended)) {
            if self.must_end(asking) {
                return Err(io::Error::other("retired while retiring another connection"));
            }
            let next = deadline.min(Instant::now() + RETIREMENT_POLL);
            if self.changed.wait_until(&mut state, next).timed_out() && Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// From the return on no connection writes guest RAM. Ends the connections that are about it. Whether the last of them had
    /// stopped before `deadline`.
    pub(super) fn seal(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        state.sealed = true;
        state.by_number.values().filter(|connection| connection.is_placing()).for_each(Connection::end);
        self.wait_until(state, deadline, |state| !state.by_number.values().any(Connection::is_placing))
    }

    /// Ends all connections; whether the last of their threads had ended before `deadline`.
    pub(super) fn stop(&self, deadline: Instant) -> bool {
        let state = self.state.lock();
        // Release, read with Acquire: a thread that sees it and ends, ends after whatever this one did before.
        self.stopping.store(true, Ordering::Release);
        state.by_number.values().for_each(Connection::end);
        self.wait_until(state, deadline, |state| state.live() == 0)
    }

    fn wait_until(
        &self,
        mut state: MutexGuard<'_, State>,
        deadline: Instant,
        holds: impl Fn(&State) -> bool,
    ) -> bool {
        while !holds(&state) && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        holds(&state)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Connections that have a thread.
    pub(super) fn live(&self) -> usize {
        self.state.lock().live()
    }

    /// Whether there were connections, and none is left.
    pub(super) fn is_abandoned(&self) -> bool {
        let state = self.state.lock();
        !state.by_number.is_empty() && state.live() == 0
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

impl Connections {
    /// Bytes that arrived on the connections that are up, whole frames or not.
    pub(super) fn bytes_arrived(&self) -> u64 {
        let arrived = |connection: &Connection| match connection {
            Connection::Live { stream, .. } => tcp_info(stream).map_or(0, |info| info.bytes_received),
            Connection::Ended => 0,
        };
        self.state.lock().by_number.values().map(arrived).sum()
    }
}

impl State {
    fn live(&self) -> usize {
        self.by_number.values().filter(|connection| matches!(connection, Connection::Live { .. })).count()
    }
}

impl Connection {
    fn is_placing(&self) -> bool {
        matches!(self, Self::Live { placing: true, .. })
    }

    /// Makes the connection's thread end.
    fn end(&self) {
        if let Self::Live { must_end, stream, .. } = self {
            must_end.store(true, Ordering::Release);
            // Wakes the thread. A socket that cannot be shut down is down already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
