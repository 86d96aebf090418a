//! The incoming data side: lets connections in, checks every frame, puts pages into guest RAM, acknowledges.
//!
//! Nothing a peer says is believed before it is checked: lengths against the limits of `wire`, header and run
//! list against their checksum, each run against the guest's layout. Only then are the pages read, straight to
//! where they belong. A connection that breaks the rules is closed and remembered with the reason; the others
//! go on.
//!
//! A connection comes in through `receive/door.rs`, is served by `receive/incoming.rs`, and brings pages to
//! `receive/arrivals.rs` and device state to `receive/state.rs`; `receive/connections.rs` knows which there are.

mod arrivals;
mod connections;
mod door;
mod inbound;
mod incoming;
mod state;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use self::arrivals::Arrivals;
use self::connections::Connections;
use self::door::Door;
use self::inbound::Inbound;
use self::state::StateStream;
use super::error::TransportError;
use super::socket::STALL_TIMEOUT;
use super::token::MigrationToken;
use crate::layout::GuestMemory;
use crate::page_set::AtomicPageSet;
use crate::wire::CHANNELS_MAX;

/// The end of a receiver waits no longer than this for its threads; their sockets are shut down, so they end at once.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Sockets on which a destination expects data connections, of one migration or of several.
pub struct DataListener {
    door: Arc<Door>,
}

impl fmt::Debug for DataListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataListener").field("addresses", &self.addresses()).finish_non_exhaustive()
    }
}

impl DataListener {
    /// Listens on each of the addresses, on a thread of its own; port 0 takes a free one.
    ///
    /// # Errors
    ///
    /// [`TransportError::Bind`] for the first address that cannot be had, [`TransportError::Thread`].
    pub fn bind(addresses: &[SocketAddr]) -> Result<Self, TransportError> {
        Self::bind_with(addresses, STALL_TIMEOUT)
    }

    /// [`bind`](Self::bind), with connections that end when the source's kernel keeps silent for `stall_timeout`.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind).
    pub fn bind_with(addresses: &[SocketAddr], stall_timeout: Duration) -> Result<Self, TransportError> {
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
        Ok(Self { door: Arc::new(Door::open(listeners, stall_timeout)?) })
    }

    /// Where it listens, with the ports that port 0 became.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.door.addresses()
    }

    /// Why connections of no migration were turned away: strangers, wrong tokens, other versions.
    pub fn failures(&self) -> Vec<String> {
        self.door.failures()
    }

    /// Begins to receive the migration that `token` names into `memory`, one thread per connection. The sockets stay
    /// open as long as the listener or any receiver lives.
    ///
    /// Where the memory is not zero it is cleared first, and [`Received::cleared_pages`] says how much that was: a page
    /// that is zero at the source may not be sent at all.
    ///
    /// # Errors
    ///
    /// [`TransportError::TokenInUse`], or [`TransportError::Cancelled`] if `cancel` is raised meanwhile.
    pub fn receive(
        &self,
        token: MigrationToken,
        memory: GuestMemory,
        cancel: &AtomicBool,
    ) -> Result<Receiver, TransportError> {
        let inbound = Arc::new(Inbound {
            arrivals: Arrivals::new(memory, cancel)?,
            state: StateStream::default(),
            connections: Connections::default(),
        });
        if !self.door.expect(token, &inbound) {
            return Err(TransportError::TokenInUse);
        }
        Ok(Receiver { inbound, token, door: Arc::clone(&self.door) })
    }
}

/// The incoming data side of a migration. Dropping it closes the connections, and guarantees that no page is
/// written any more.
pub struct Receiver {
    inbound: Arc<Inbound>,
    token: MigrationToken,
    door: Arc<Door>,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("received", &self.received()).finish_non_exhaustive()
    }
}

/// What has arrived so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Received {
    /// Pages of content put in place, those that were sent twice counted twice.
    pub pages: u64,
    /// Pages that arrived as zero.
    pub zero_pages: u64,
    /// Pages that held something before anything arrived, and were cleared: this RAM had been used.
    pub cleared_pages: u64,
    /// Bytes of device state, those that were sent twice counted once.
    pub state_bytes: u64,
    /// Bytes of frames, headers counted.
    pub bytes: u64,
    /// Data connections that are up.
    pub connections: usize,
}

impl Receiver {
    /// Counts the bytes that arrived on the data connections, whole frames or not: while the count changes, the source's
    /// host lives.
    pub fn bytes_arrived(&self) -> impl Fn() -> u64 + Send + 'static {
        let inbound = Arc::clone(&self.inbound);
        move || inbound.connections.bytes_arrived()
    }

    /// What has arrived so far.
    pub fn received(&self) -> Received {
        let Inbound { arrivals, state, connections } = &*self.inbound;
        Received {
            pages: arrivals.pages.get(),
            zero_pages: arrivals.zero_pages.get(),
            cleared_pages: arrivals.cleared_pages,
            state_bytes: state.received_bytes(),
            bytes: arrivals.bytes.get(),
            connections: connections.live(),
        }
    }

    /// Why connections of this migration ended that did not end as they should: impossible frames, broken links.
    pub fn failures(&self) -> Vec<String> {
        self.inbound.connections.failures()
    }

    /// Whether every connection that there was is gone.
    pub fn is_abandoned(&self) -> bool {
        self.inbound.connections.is_abandoned()
    }

    /// The next piece of the stream of device state, in order; `None` if none came within `timeout`.
    pub fn next_state(&self, timeout: Duration) -> Option<Vec<u8>> {
        self.inbound.state.next(timeout)
    }

    /// Pages whose content has changed here since they were last taken out: marked when the last byte of the frame is
    /// in place, so a thread that drains them and then reads them sees it whole. A page that arrives as zero where nothing
    /// else ever was is not among them.
    pub fn arrived(&self) -> &AtomicPageSet {
        &self.inbound.arrivals.arrived
    }

    /// From the return on, nobody writes guest RAM: to be called before the guest runs. Connections stay open, but a
    /// further frame of pages ends the one that it comes by; those that are in the middle of such a frame are ended now.
    ///
    /// # Errors
    ///
    /// [`TransportError::TimedOut`] if one of these had not ended by `deadline`: it may still be writing.
    pub fn seal(&self, deadline: Instant) -> Result<(), TransportError> {
        let begun = Instant::now();
        if self.inbound.connections.seal(deadline) {
            return Ok(());
        }
        let what = "a data connection that was to stop writing guest RAM".to_owned();
        Err(TransportError::TimedOut { what, after: begun.elapsed() })
    }

    /// Closes all connections and returns, within a millisecond or two, once no thread can write guest RAM any
    /// more. Dropping the receiver calls it, too.
    pub fn close(self) -> Received {
        self.received()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.door.forget(self.token);
        self.inbound.state.close();
        if !self.inbound.connections.stop(Instant::now() + END_TIMEOUT) {
            tracing::error!("a thread that receives does not end: guest RAM may still be written");
        }
    }
}
