//! What the user chooses for one migration, and how long a guest may stand still.

use std::time::Duration;

use crate::transport::{ChannelSpec, SendOptions};

/// What the user chooses for one migration. What may change while it runs is in
/// [`Parameters`](crate::progress::Parameters).
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// `HOST:PORT` of the destination's control connection.
    pub destination: String,
    /// Data connections to open, if `channel_specs` is empty: all to the destination's address.
    pub channels: u32,
    /// Data connections bound to addresses and devices of their own.
    pub channel_specs: Vec<ChannelSpec>,
    /// Compare RAM digests before the handing over, and audit RAM after it.
    pub verify: bool,
    /// Zero-copy, and how.
    pub send: SendOptions,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// The VM's name among those of its owner; may be empty. Printable ASCII, at most 64 bytes.
    pub vm_id: String,
    /// What the VMM says of the VM, so that the destination's VMM can build it; at most 32 KiB, in the VMM's own format.
    pub description: Vec<u8>,
    /// Longest wait for an answer of the destination before the guest is stopped.
    pub answer_timeout: Duration,
    /// A destination that gives no sign of life for this long is gone.
    pub peer_timeout: Duration,
    /// How long the destination's word is awaited after `Commit`.
    pub confirm_timeout: Duration,
    /// How long the guest may stand still before it runs on here.
    pub standstill: StandstillLimit,
}

impl Default for SourceOptions {
    /// Two data connections, not verified, 30 s for an answer, 5 s for a sign of life, 10 s for the last word; the
    /// destination is to be filled in.
    fn default() -> Self {
        Self {
            destination: String::new(),
            channels: 2,
            channel_specs: Vec::new(),
            verify: false,
            send: SendOptions::default(),
            vcpus: 1,
            vm_id: String::new(),
            description: Vec::new(),
            answer_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(5),
            confirm_timeout: Duration::from_secs(10),
            standstill: StandstillLimit::default(),
        }
    }
}

/// The bound of a standstill: when it is over before `Commit` has left, the guest runs on here.
///
/// It follows from the downtime that is expected: the limit that the user set, or more where a limit of rounds or time
/// ordered the stop and more is left than fits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StandstillLimit {
    /// How many times the expected downtime.
    pub factor: f64,
    /// At least so long, whatever is expected.
    pub floor: Duration,
}

impl Default for StandstillLimit {
    /// Four times what is expected, at least a second: room for a host that is busy for a moment, and short enough that
    /// no TCP connection of the guest's ends by it.
    fn default() -> Self {
        Self { factor: 4.0, floor: Duration::from_secs(1) }
    }
}

impl StandstillLimit {
    /// The budget of a standstill that is expected to last for `expected`.
    pub fn budget(&self, expected: Duration) -> Duration {
        let factor = if self.factor.is_finite() { self.factor.clamp(1.0, 1e6) } else { 1.0 };
        Duration::try_from_secs_f64(expected.as_secs_f64() * factor).unwrap_or(Duration::MAX).max(self.floor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standstill_has_a_bound_whatever_is_expected() {
        let limit = StandstillLimit { factor: 3.0, floor: Duration::from_millis(500) };
        assert_eq!(limit.budget(Duration::from_millis(300)), Duration::from_millis(900));
        assert_eq!(limit.budget(Duration::ZERO), Duration::from_millis(500));
        let nonsense = StandstillLimit { factor: f64::NAN, floor: Duration::ZERO };
        assert_eq!(nonsense.budget(Duration::from_secs(2)), Duration::from_secs(2));
        assert_eq!(StandstillLimit { factor: 1e300, ..limit }.budget(Duration::MAX), Duration::MAX);
    }
}
