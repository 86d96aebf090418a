//! The outgoing data side: connects the channels, sends rounds, ends.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::layout::GuestMemory;
use crate::page_set::PageSet;
use crate::transport::channel;
use crate::transport::deal::Dealer;
use crate::transport::{
    ChannelLoss, ChannelSpec, MaxBandwidth, MigrationToken, SendCounters, Totals, TransportError, ZeroCopy,
};
use crate::wire::CHANNELS_MAX;

/// The end of a sender waits no longer than this for its threads; only one that panicked takes so long.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How to send.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Copy or zero-copy.
    pub zero_copy: ZeroCopy,
    /// Whether guest RAM may be registered with the kernel where that pays. Not for a VMM that discards guest memory
    /// (balloon, `MADV_DONTNEED`, hole punching) while it migrates: a registered page that was discarded would be
    /// sent as it was.
    pub register_memory: bool,
    /// The limit over all channels; keep a clone to change it while a round is being sent.
    pub max_bandwidth: MaxBandwidth,
    /// How long a connection attempt, and the answer to the greeting, may take.
    pub connect_timeout: Duration,
    /// How long nothing may be acknowledged before a channel is given up: its pages wait that long.
    pub stall_timeout: Duration,
    /// Whether channels that died are connected again while the others carry on.
    pub reconnect: bool,
    /// Pages per frame, at most; 0 leaves it to the measured bandwidth. For experiments.
    pub frame_pages_max: u32,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            zero_copy: ZeroCopy::Auto,
            register_memory: true,
            max_bandwidth: MaxBandwidth::default(),
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(5),
            reconnect: true,
            frame_pages_max: 0,
        }
    }
}

/// What all channels share.
pub(super) struct Shared {
    pub memory: GuestMemory,
    pub token: MigrationToken,
    pub options: SendOptions,
    pub dealer: Dealer,
    pub counters: Arc<SendCounters>,
    pub cancelled: AtomicBool,
    pub next_connection: AtomicU32,
    pub begun: Instant,
    pub registered: channel::SharedRegistration,
}

impl Shared {
    /// A number that no connection of this migration had.
    pub(super) fn connection_number(&self) -> u32 {
        // Relaxed: only uniqueness matters.
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        // Relaxed: the flag carries no data, and is looked at again within milliseconds.
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// The outgoing data side of a migration: one thread and one io_uring per channel. Dropping it closes the
/// connections.
pub struct Sender {
    shared: Arc<Shared>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("counters", &self.shared.counters).finish_non_exhaustive()
    }
}

/// What another thread may do to a [`Sender`] while it sends a round.
#[derive(Clone)]
pub struct SendHandle(Arc<Shared>);

impl fmt::Debug for SendHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SendHandle")
    }
}

impl SendHandle {
    /// Lets `strike_off` take pages out of those of this round that no channel was given yet; how many it took. They
    /// will not be sent in this round: only for pages that a later one will contain.
    pub fn strike_off(&self, strike_off: impl FnOnce(&mut PageSet)) -> u64 {
        let struck = self.0.dealer.strike_off(strike_off);
        self.0.counters.pages_struck_off.add(struck);
        struck
    }

    /// Live figures.
    pub fn totals(&self) -> Totals {
        self.0.counters.totals()
    }

    /// Makes the round that is being sent, and all later ones, end with [`TransportError::Cancelled`] at once.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
        self.0.dealer.stop();
    }
}

/// What a round took.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundSent {
    /// The round.
    pub round: u32,
    /// What was sent: `pages_sent + zero_pages + pages_struck_off` is the number of pages in the round.
    pub totals: Totals,
    /// From the call to the last acknowledgement.
    pub duration: Duration,
    /// Connections that died during it.
    pub losses: Vec<ChannelLoss>,
}

impl Sender {
    /// Connects every channel and greets the destination with the token.
    ///
    /// # Errors
    ///
    /// [`TransportError::Connect`], [`TransportError::Refused`] and their like for the first channel that
    /// cannot be had; a channel that is lost later is no error.
    pub fn connect(
        channels: &[ChannelSpec],
        token: MigrationToken,
        memory: GuestMemory,
        options: SendOptions,
    ) -> Result<Self, TransportError> {
        if channels.is_empty() || channels.len() > usize::from(CHANNELS_MAX) {
            return Err(TransportError::ChannelCount { found: channels.len(), limit: CHANNELS_MAX });
        }
        let shared = Arc::new(Shared {
            memory,
            token,
            options,
            dealer: Dealer::default(),
            counters: Arc::new(SendCounters::new(channels)),
            cancelled: AtomicBool::new(false),
            next_connection: AtomicU32::new(1),
            begun: Instant::now(),
            registered: channel::SharedRegistration::default(),
        });
        let sender = Self { shared: Arc::clone(&shared) };
        for index in 0..channels.len() {
            let connected = channel::connect(&shared, index, shared.options.connect_timeout)?;
            shared.dealer.joined();
            let name = format!("ringferry-send-{index}");
            let of_channel = Arc::clone(&shared);
            let spawned = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || channel::run(&of_channel, index, connected));
            if let Err(source) = spawned {
                shared.dealer.left();
                return Err(TransportError::Thread { name, source });
            }
        }
        Ok(sender)
    }

    /// Sends every page of `pages` as round `round`, zero pages as such. Returns when the destination has
    /// acknowledged all of them, that is, when each is in place in its guest RAM: the end of a round needs no
    /// further barrier. Rounds must have ascending numbers.
    ///
    /// # Errors
    ///
    /// [`TransportError::NoChannelLeft`], [`TransportError::Cancelled`], [`TransportError::Layout`]. How many
    /// of the pages arrived is then unknown: all of them must count as dirty.
    pub fn send_round(&mut self, round: u32, pages: PageSet) -> Result<RoundSent, TransportError> {
        let Shared { dealer, counters, begun, .. } = &*self.shared;
        let (start, before, losses_before) = (Instant::now(), counters.totals(), counters.losses().len());
        if self.shared.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        tracing::debug!(round, pages = pages.len(), "round begins");
        dealer.begin(round, pages);
        loop {
            if dealer.wait_complete(Duration::from_millis(100))? {
                break;
            }
            if self.shared.is_cancelled() {
                return Err(TransportError::Cancelled);
            }
            if dealer.live_channels() == 0 {
                let of =
                    |loss: &ChannelLoss| format!("{} after {:.3?}: {}", loss.channel, loss.at, loss.reason);
                return Err(TransportError::NoChannelLeft {
                    losses: counters.losses().iter().map(of).collect(),
                });
            }
        }
        let losses = counters.losses().split_off(losses_before);
        let sent =
            RoundSent { round, totals: counters.totals().since(before), duration: start.elapsed(), losses };
        tracing::debug!(round, at = ?begun.elapsed(), totals = ?sent.totals, "round ends");
        Ok(sent)
    }

    /// Live figures; keep the `Arc` to read them from another thread.
    pub fn counters(&self) -> Arc<SendCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// Pages of the current round that are not in place at the destination yet.
    pub fn pages_left(&self) -> u64 {
        self.shared.dealer.pages_left()
    }

    /// For other threads.
    pub fn handle(&self) -> SendHandle {
        SendHandle(Arc::clone(&self.shared))
    }

    /// Changes `max_bandwidth`, in bytes per second; `None` lifts it.
    pub fn set_max_bandwidth(&self, bytes_per_s: Option<NonZeroU64>) {
        self.shared.options.max_bandwidth.set(bytes_per_s);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Whoever has a connection ends within a millisecond or two. A thread that is trying to reconnect is not
        // awaited: it will find that there is nothing to do, and has nothing of ours until then.
        self.shared.dealer.stop();
        self.shared.dealer.wait_none_live(END_TIMEOUT);
    }
}
