//! The outgoing data side: connects the channels, sends rounds and device state, ends.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::channel;
use super::channel_spec::ChannelSpec;
use super::counters::{ChannelLoss, SendCounters, Totals};
use super::error::TransportError;
use super::options::SendOptions;
use super::pacing::Lifted;
use super::scheduler::{StateChunk, Waited};
use super::session::Session;
use super::token::MigrationToken;
use crate::converge::LinkSample;
use crate::layout::GuestMemory;
use crate::page_set::PageSet;
use crate::wire::{CHANNELS_MAX, STATE_CHUNK_BYTES_MAX, STATE_WINDOW_BYTES};

/// The end of a sender waits no longer than this for its threads; only one that panicked takes so long.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// A wait for connections polls this often whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(5);
/// [`Sender::send_round`] asks this often for the end of the round.
const ROUND_POLL: Duration = Duration::from_millis(100);

/// The outgoing data side of a migration: one thread and one io_uring per channel. Dropping it closes the
/// connections.
pub struct Sender {
    session: Arc<Session>,
    /// The round that was begun and has not ended.
    current: Option<Round>,
}

/// What is to be known about a round when it ends.
struct Round {
    number: u32,
    begun: Instant,
    totals_before: Totals,
    losses_before: usize,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("counters", &self.session.counters).finish_non_exhaustive()
    }
}

/// What another thread may do to a [`Sender`] while it sends a round.
#[derive(Clone)]
pub struct SendHandle(Arc<Session>);

impl fmt::Debug for SendHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SendHandle")
    }
}

impl SendHandle {
    /// Lets `strike_off` take pages out of those of this round that no channel was given yet; how many it took. They
    /// will not be sent in this round: only for pages that a later one will contain.
    pub fn strike_off(&self, strike_off: impl FnOnce(&mut PageSet)) -> u64 {
        let struck = self.0.scheduler.strike_off(strike_off);
        self.0.counters.pages_struck_off.add(struck);
        struck
    }

    /// Live figures.
    pub fn totals(&self) -> Totals {
        self.0.counters.totals()
    }

    /// What is known of the link.
    pub fn link(&self) -> LinkSample {
        let Session { counters, options, .. } = &*self.0;
        LinkSample {
            bytes_acked: counters.bytes_acknowledged(),
            unpaced_bytes_per_s: options.max_bandwidth.unpaced(Instant::now()),
            round_trip: counters.round_trip().unwrap_or_default(),
        }
    }

    /// Makes the round that is being sent, and all later ones, end with [`TransportError::Cancelled`] at once.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// What a round took.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct RoundSent {
    /// The round.
    pub round: u32,
    /// What was sent: `pages_sent + zero_pages + pages_struck_off` is the number of pages in the round.
    pub totals: Totals,
    /// From its begin to the last acknowledgement.
    pub duration: Duration,
    /// Connections that died during it.
    pub losses: Vec<ChannelLoss>,
}

impl Sender {
    /// Connects every channel, all side by side, and greets the destination with the token. All of that takes at most
    /// [`SendOptions::connect_timeout`], and ends within 20 ms once `cancel` is raised.
    ///
    /// # Errors
    ///
    /// [`TransportError::Connect`], [`TransportError::Refused`] and their like for the first channel that
    /// cannot be had; a channel that is lost later is no error. [`TransportError::Cancelled`].
    pub fn connect(
        channels: &[ChannelSpec],
        token: MigrationToken,
        memory: GuestMemory,
        options: SendOptions,
        cancel: &AtomicBool,
    ) -> Result<Self, TransportError> {
        if channels.is_empty() || channels.len() > usize::from(CHANNELS_MAX) {
            return Err(TransportError::ChannelCount { found: channels.len(), limit: CHANNELS_MAX });
        }
        let session = Arc::new(Session::new(channels, token, memory, options));
        let sender = Self { session: Arc::clone(&session), current: None };
        let (outcome, outcomes) = mpsc::channel();
        for index in 0..channels.len() {
            let name = format!("ringferry-send-{index}");
            let (of_channel, outcome) = (Arc::clone(&session), outcome.clone());
            session.scheduler.channel_began();
            let spawned = std::thread::Builder::new().name(name.clone()).spawn(move || {
                channel::run(&of_channel, index, |connected| {
                    // Nobody asks any more once one channel has failed.
                    let _ = outcome.send(connected);
                });
                of_channel.scheduler.channel_ended();
            });
            if let Err(source) = spawned {
                session.scheduler.channel_ended();
                return Err(TransportError::Thread { name, source });
            }
        }
        drop(outcome);
        let mut missing = channels.len();
        while missing > 0 {
            // Relaxed: a flag without data, read again at the next poll.
            if cancel.load(Ordering::Relaxed) {
                return Err(TransportError::Cancelled);
            }
            match outcomes.recv_timeout(CANCEL_POLL) {
                Ok(connected) => connected.map(|()| missing -= 1)?,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(sender.no_channel_left()),
            }
        }
        Ok(sender)
    }

    /// Puts every page of `pages` before the channels as round `round`, and returns at once. Rounds must have
    /// ascending numbers.
    ///
    /// # Errors
    ///
    /// [`TransportError::RoundUnfinished`] if the round before has not ended, [`TransportError::Cancelled`].
    pub fn begin_round(&mut self, round: u32, pages: PageSet) -> Result<(), TransportError> {
        self.begin(round, pages, false)
    }

    /// The same for a round that gets [more pages](Self::add_to_round), and does not end before it has them.
    ///
    /// # Errors
    ///
    /// As for `begin_round`.
    pub fn begin_open_round(&mut self, round: u32, pages: PageSet) -> Result<(), TransportError> {
        self.begin(round, pages, true)
    }

    /// Puts more pages of an open round before the channels, none of which they were given in this round. `gone` further
    /// pages are not to be sent after all, and count as struck off. Unless the round stays `open`, these were the last.
    pub fn add_to_round(&mut self, pages: &PageSet, gone: u64, open: bool) {
        self.session.counters.pages_struck_off.add(gone);
        self.session.scheduler.add(pages, open);
    }

    /// An open round gets no more pages: `gone` pages that were to come count as struck off.
    pub fn close_round(&mut self, gone: u64) {
        self.session.counters.pages_struck_off.add(gone);
        self.session.scheduler.close();
    }

    /// Pages of the round that no channel was given yet.
    pub fn undealt_pages(&self) -> u64 {
        self.session.scheduler.undealt_pages()
    }

    fn begin(&mut self, round: u32, pages: PageSet, open: bool) -> Result<(), TransportError> {
        if self.session.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        if let Some(Round { number: unfinished, .. }) = self.current {
            return Err(TransportError::RoundUnfinished { round, unfinished });
        }
        let Session { scheduler, counters, .. } = &*self.session;
        tracing::debug!(round, pages = pages.len(), "round begins");
        self.current = Some(Round {
            number: round,
            begun: Instant::now(),
            totals_before: counters.totals(),
            losses_before: counters.losses().len(),
        });
        scheduler.begin(round, pages, open);
        Ok(())
    }

    /// Waits, at most `timeout`, for the end of the round: until the destination has acknowledged all of its pages,
    /// that is, until each is in place in its guest RAM. The end of a round needs no further barrier. `None`: not yet.
    ///
    /// # Errors
    ///
    /// [`TransportError::NoChannelLeft`] once no channel has come back within
    /// [`SendOptions::reconnect_grace`], [`TransportError::Cancelled`], [`TransportError::Layout`]. How many of the
    /// pages arrived is then unknown: all of them must count as dirty, and no further round can be sent.
    /// [`TransportError::NoRound`].
    pub fn wait_round(&mut self, timeout: Duration) -> Result<Option<RoundSent>, TransportError> {
        let Session { scheduler, counters, options, begun, .. } = &*self.session;
        if self.current.is_none() {
            return Err(TransportError::NoRound);
        }
        match scheduler.wait(timeout, options.reconnect_grace)? {
            Waited::Ended => {}
            _ if self.session.is_cancelled() => return Err(TransportError::Cancelled),
            Waited::NotYet => return Ok(None),
            Waited::Abandoned => return Err(self.no_channel_left()),
        }
        let Some(round) = self.current.take() else { return Err(TransportError::NoRound) };
        let sent = RoundSent {
            round: round.number,
            totals: counters.totals().since(round.totals_before),
            duration: round.begun.elapsed(),
            losses: counters.losses().split_off(round.losses_before),
        };
        tracing::debug!(round = sent.round, at = ?begun.elapsed(), totals = ?sent.totals, "round ends");
        Ok(Some(sent))
    }

    /// [Begins](Self::begin_round) a round and [waits](Self::wait_round) for its end.
    ///
    /// # Errors
    ///
    /// As these two.
    pub fn send_round(&mut self, round: u32, pages: PageSet) -> Result<RoundSent, TransportError> {
        self.begin_round(round, pages)?;
        loop {
            if let Some(sent) = self.wait_round(ROUND_POLL)? {
                return Ok(sent);
            }
        }
    }

    /// Takes every page that no channel has out of the current round, and hands them out: the guest has been stopped,
    /// and they go with the last round. They count as struck off.
    pub fn recall(&mut self) -> PageSet {
        let recalled = self.session.scheduler.recall();
        self.session.counters.pages_struck_off.add(recalled.len());
        recalled
    }

    /// Queues a chunk of device state that begins at `offset` of the whole stream: any channel sends it, ahead of
    /// pages that no channel has yet, and another sends it again if that one dies. Never blocks: the caller sends no
    /// further than [`STATE_WINDOW_BYTES`] beyond what the destination's VMM has taken, and has no more
    /// [under way](Self::state_under_way).
    ///
    /// # Errors
    ///
    /// [`TransportError::StateChunk`] for an empty chunk or one of more than
    /// [`STATE_CHUNK_BYTES_MAX`], [`TransportError::StateWindow`] if that much is on its way, [`TransportError::Cancelled`].
    pub fn send_state(&self, offset: u64, bytes: Vec<u8>) -> Result<(), TransportError> {
        if self.session.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        let limit = STATE_CHUNK_BYTES_MAX;
        if bytes.is_empty() || bytes.len() as u64 > u64::from(limit) {
            return Err(TransportError::StateChunk { bytes: bytes.len(), limit });
        }
        if self.session.scheduler.add_state(StateChunk { offset, bytes: Arc::new(bytes) }) {
            Ok(())
        } else {
            Err(TransportError::StateWindow { offset, limit: STATE_WINDOW_BYTES })
        }
    }

    /// Bytes of device state that are queued or on their way. The destination's VMM may have taken some of them already:
    /// its word comes on another connection than the acknowledgements.
    pub fn state_under_way(&self) -> u64 {
        self.session.scheduler.state_bytes()
    }

    fn no_channel_left(&self) -> TransportError {
        let of = |loss: &ChannelLoss| format!("{} after {:.3?}: {}", loss.channel, loss.at, loss.reason);
        TransportError::NoChannelLeft { losses: self.session.counters.losses().iter().map(of).collect() }
    }

    /// Live figures; keep the `Arc` to read them from another thread.
    pub fn counters(&self) -> Arc<SendCounters> {
        Arc::clone(&self.session.counters)
    }

    /// Pages of the current round that are not in place at the destination yet.
    pub fn pages_left(&self) -> u64 {
        self.session.scheduler.pages_left()
    }

    /// For other threads.
    pub fn handle(&self) -> SendHandle {
        SendHandle(Arc::clone(&self.session))
    }

    /// To be called when the guest stands still. Until the value that it returns ends, no limit of bandwidth holds, and a
    /// channel that is stuck is waited for no longer than a moment.
    pub fn last_phase(&self) -> LastPhase {
        self.session.set_last_phase(true);
        LastPhase {
            _unlimited: self.session.options.max_bandwidth.lift(),
            session: Arc::clone(&self.session),
        }
    }

    /// Changes `max_bandwidth`, in bytes per second; `None` is no limit.
    pub fn set_max_bandwidth(&self, bytes_per_s: Option<NonZeroU64>) {
        self.session.options.max_bandwidth.set(bytes_per_s);
    }
}

/// The guest stands still: see [`Sender::last_phase`].
pub struct LastPhase {
    _unlimited: Lifted,
    session: Arc<Session>,
}

impl fmt::Debug for LastPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LastPhase")
    }
}

impl Drop for LastPhase {
    fn drop(&mut self) {
        self.session.set_last_phase(false);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Threads that send or connect end within milliseconds.
        self.session.scheduler.stop();
        if !self.session.scheduler.wait_ended(END_TIMEOUT) {
            tracing::error!("a channel's thread does not end");
        }
    }
}
