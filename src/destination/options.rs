//! Where a destination waits, and what it allows one VM.

use std::net::SocketAddr;
use std::time::Duration;

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
    /// Longest time without a page or a piece of state, from the acceptance to `Prepare`: a source that answers pings and
    /// sends nothing does not keep a seat for ever.
    pub silence: Duration,
    /// Longest time from `Prepare` to `Prepared`, and from there to `Commit`. The source has a bound of its own, which
    /// is shorter as a rule.
    pub commit: Duration,
    /// Longest state of the machine that is held until RAM is complete: 16 vCPUs of our test VMM need 0.2 MiB. Device
    /// state in pieces is not held, and not limited.
    pub machine_state_bytes_max: usize,
}

impl Default for DestinationOptions {
    /// A minute for either, 64 MiB.
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self { silence: minute, commit: minute, machine_state_bytes_max: 64 << 20 }
    }
}
