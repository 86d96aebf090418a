//! The incoming side: from an offered VM to one that runs here, or to nothing at all.
//!
//! ```text
//! door       strangers are greeted side by side, briefly; sources wait for a seat or hear "busy"
//! setup      an offered VM is accepted or refused; data connections are awaited
//! receive    pages and device state arrive; the guest runs at the source
//! prepare    all has arrived: verify, restore, take what can fail; PREPARED
//! take_over  COMMIT: the VM runs here, or the source hears a definite no
//! ```
//!
//! A VMM calls [`Destination::accept`], looks at what is offered, builds a VM of that shape, and calls
//! [`Incoming::receive`], which mirrors [`source`](crate::source) phase by phase. Until `Commit` arrives, every failure
//! means that the VM stays with the source and what was received is worthless; from `Commit` on the VM is ours, unless we
//! say that it is not.

mod door;
mod error;
mod prepare;
mod receive;
mod report;
mod setup;
mod take_over;
mod verification;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use error::DestinationError;
pub use report::DestinationReport;
pub use setup::Incoming;

use self::door::Door;

/// Where a destination waits, and for how many.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Where the control connections of sources are awaited.
    pub address: SocketAddr,
    /// Where data connections are awaited, for dedicated NICs; if empty, on a free port of the address at which the
    /// source reached the control connection.
    pub data_addresses: Vec<SocketAddr>,
    /// Whether addresses that other machines can reach are allowed, although nothing is encrypted or authenticated.
    pub insecure: bool,
    /// VMs that are received at the same time; further sources hear that this side is busy.
    pub vms: usize,
    /// A source that gives no sign of life for this long is gone.
    pub peer_timeout: Duration,
}

impl ListenOptions {
    /// One VM at a time, data beside the control connection, 5 s for a sign of life.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            data_addresses: Vec::new(),
            insecure: false,
            vms: 1,
            peer_timeout: Duration::from_secs(5),
        }
    }
}

/// What the user of a destination chooses for one VM.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// Longest time from `Prepare` to `Prepared`, and from there to `Commit`. The source has a bound of its own, which
    /// is shorter as a rule.
    pub commit: Duration,
    /// Longest state of the machine that is held until RAM is complete: 16 vCPUs of our test VMM need 0.2 MiB. Device
    /// state in pieces is not held, and not limited.
    pub machine_state_bytes_max: usize,
}

impl Default for DestinationOptions {
    /// A minute, 64 MiB.
    fn default() -> Self {
        Self { commit: Duration::from_secs(60), machine_state_bytes_max: 64 << 20 }
    }
}

/// Waits for migrations.
#[derive(Debug)]
pub struct Destination {
    door: Door,
}

impl Destination {
    /// Listens for sources.
    ///
    /// # Errors
    ///
    /// [`DestinationError::Exposed`] for a non-loopback address unless `insecure`, [`DestinationError::Listen`]
    /// or [`DestinationError::Transport`] if an address is in use or not ours.
    pub fn bind(options: ListenOptions) -> Result<Self, DestinationError> {
        Door::open(options).map(|door| Self { door })
    }

    /// Where it listens; with the port that the kernel chose, if none was asked for.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.door.local_addr()
    }

    /// Waits for a source to offer a VM, for `limit` if there is one. Whoever is no source of ours is turned away and not
    /// told of here.
    ///
    /// # Errors
    ///
    /// [`DestinationError::NobodyCame`] or [`DestinationError::Cancelled`].
    pub fn accept(&self, limit: Option<Duration>, cancel: &AtomicBool) -> Result<Incoming, DestinationError> {
        self.door.accept(limit, cancel)
    }
}
