//! What the sender and all its channels share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use super::channel_spec::ChannelSpec;
use super::counters::SendCounters;
use super::options::SendOptions;
use super::scheduler::Scheduler;
use super::token::MigrationToken;
use super::uring::SharedRegistration;
use crate::layout::GuestMemory;

/// One sending side.
pub(super) struct Session {
    pub memory: GuestMemory,
    pub token: MigrationToken,
    pub options: SendOptions,
    pub scheduler: Scheduler,
    pub counters: Arc<SendCounters>,
    pub begun: Instant,
    pub registered: SharedRegistration,
    discards_before: u64,
    cancelled: AtomicBool,
    /// The guest stands still.
    last_phase: AtomicBool,
    next_connection: AtomicU32,
}

impl Session {
    pub(super) fn new(
        channels: &[ChannelSpec],
        token: MigrationToken,
        memory: GuestMemory,
        options: SendOptions,
    ) -> Self {
        Self {
            memory,
            token,
            discards_before: options.discards.count(),
            options,
            scheduler: Scheduler::default(),
            counters: Arc::new(SendCounters::new(channels)),
            begun: Instant::now(),
            registered: SharedRegistration::default(),
            cancelled: AtomicBool::new(false),
            last_phase: AtomicBool::new(false),
            next_connection: AtomicU32::new(1),
        }
    }

    /// A number that no connection of this migration had.
    pub(super) fn connection_number(&self) -> u32 {
        // Relaxed: only uniqueness matters.
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    /// Ends everything: rounds with an error, and the channels.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.scheduler.stop();
    }

    /// Whether the guest stands still. Relaxed: the flag carries no data, and is looked at again within milliseconds.
    pub(super) fn is_last_phase(&self) -> bool {
        self.last_phase.load(Ordering::Relaxed)
    }

    pub(super) fn set_last_phase(&self, last: bool) {
        self.last_phase.store(last, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        // Relaxed: the flag carries no data, and is read again within milliseconds.
        self.cancelled.load(Ordering::Relaxed)
    }

    /// How often guest memory had been discarded when the session began: what is registered from then on may be old once that
    /// has changed.
    pub(super) fn discards_before(&self) -> u64 {
        self.discards_before
    }

    /// Whether the channels shall end.
    pub(super) fn is_ending(&self) -> bool {
        self.scheduler.is_stopping()
    }
}
