//! How to send.

use std::time::Duration;

use super::discards::Discards;
use super::pacing::MaxBandwidth;
use super::policy::ZeroCopy;
use super::socket::STALL_TIMEOUT;

/// How to send.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Copy or zero-copy.
    pub zero_copy: ZeroCopy,
    /// Whether guest RAM may be registered with the kernel, and pinned with that, where that pays. Only for a VMM that
    /// discards no guest memory while it migrates (balloon, `MADV_DONTNEED`, hole punching), or says so in `discards`:
    /// else a page that was discarded and written anew is sent as it was before.
    pub register_memory: bool,
    /// What the VMM discards: keep a clone to say so. The first discard ends registration.
    pub discards: Discards,
    /// The limit over all channels; keep a clone to change it while a round is being sent.
    pub max_bandwidth: MaxBandwidth,
    /// How long it may take until every channel is connected and its greeting answered.
    pub connect_timeout: Duration,
    /// How long nothing may be acknowledged before a channel is given up. Its pages wait that long if no other
    /// channel can carry them.
    pub stall_timeout: Duration,
    /// Whether channels that died are connected again while the others carry on.
    pub reconnect: bool,
    /// How long a round waits for a channel to come back when all are gone, with `reconnect`.
    pub reconnect_grace: Duration,
    /// Pages per frame, at most; 0 leaves it to the measured bandwidth. For experiments.
    pub frame_pages_max: u32,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            zero_copy: ZeroCopy::Auto,
            register_memory: false,
            discards: Discards::default(),
            max_bandwidth: MaxBandwidth::default(),
            connect_timeout: Duration::from_secs(5),
            stall_timeout: STALL_TIMEOUT,
            reconnect: true,
            reconnect_grace: Duration::from_secs(10),
            frame_pages_max: 0,
        }
    }
}
