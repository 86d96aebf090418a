//! Who sends what: the pages of a round, dealt to whichever channel has room, in portions of its own size.
//!
//! A page is in one of three places: not dealt yet, in a frame on its way, or acknowledged by the destination.
//! A channel that dies returns the pages of its unacknowledged frames, and the others are dealt those next. A page that
//! is not dealt yet may be struck off the round: who knows that it is dirty again will send it once more anyway.
//!
//! **From the top down.** Most writers that go through memory in order go upwards. Against such a writer the dealer
//! goes to meet it: half of what such a writer dirties in one time around is struck off before it is sent, wherever it
//! began. Going the same way, it would be all or nothing, by where the writer happened to be. For writers
//! without an order the order does not matter.
//!
//! **Why no older page overwrites a newer one.** A round ends when every page of it was acknowledged, and the
//! destination acknowledges a frame after its last byte is in place; so what a live channel sent in one round
//! has landed before any channel is dealt a page of the next. What a dead channel sent may still sit in the
//! destination's socket, unacknowledged, and land late: therefore the round does not end either before another
//! channel has told the destination to retire that connection, and the destination, having closed it and seen
//! its thread end, has acknowledged that. Within one round the order of two copies of a page does not matter:
//! if they differ, the guest wrote it in between, and the page is dirty again for the next round.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::layout::{PageIndex, PageRun};
use crate::page_set::PageSet;
use crate::transport::TransportError;

/// Pages of the set that the first look covers, and those where there are few: so that the lock is held for
/// microseconds.
const WINDOW_PAGES: u64 = 1 << 11;
const WINDOW_PAGES_MAX: u64 = 1 << 24;

/// What a channel shall send next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// These pages; the runs are in the caller's buffer.
    Pages {
        /// The round they belong to.
        round: u32,
    },
    /// That this connection is dead.
    Retire(u32),
    /// Nothing for now.
    Nothing,
}

/// What a channel had in flight.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    /// Pages that must be sent again.
    pub runs: Vec<PageRun>,
    /// Connections whose retirement was not acknowledged.
    pub retiring: Vec<u32>,
}

#[derive(Default)]
struct State {
    round: u32,
    /// Pages that were never dealt, all below `cursor`.
    undealt: PageSet,
    cursor: u64,
    /// Runs of one look, kept for their memory.
    found: Vec<PageRun>,
    /// Pages that came back from dead channels.
    returned: VecDeque<PageRun>,
    /// Pages in frames that are not acknowledged.
    in_flight: u64,
    /// Connections to retire, and retirements on their way.
    to_retire: Vec<u32>,
    retiring: u64,
    live_channels: usize,
    failure: Option<TransportError>,
    stopping: bool,
}

impl State {
    fn has_work(&self) -> bool {
        !self.undealt.is_empty() || !self.returned.is_empty() || !self.to_retire.is_empty()
    }

    fn is_complete(&self) -> bool {
        self.undealt.is_empty()
            && self.returned.is_empty()
            && self.in_flight == 0
            && self.to_retire.is_empty()
            && self.retiring == 0
    }
}

/// The work of the current round, shared by all channels.
#[derive(Default)]
pub(super) struct Dealer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Dealer {
    /// Puts the pages of a round on the table.
    pub(super) fn begin(&self, round: u32, pages: PageSet) {
        let mut state = self.state.lock();
        state.round = round;
        state.cursor = pages.capacity().0;
        state.undealt = pages;
        drop(state);
        self.changed.notify_all();
    }

    /// Lets `strike_off` take pages out of those that were never dealt; how many it took.
    pub(super) fn strike_off(&self, strike_off: impl FnOnce(&mut PageSet)) -> u64 {
        let mut state = self.state.lock();
        let before = state.undealt.len();
        strike_off(&mut state.undealt);
        let struck = before.saturating_sub(state.undealt.len());
        let complete = state.is_complete();
        drop(state);
        if complete {
            self.changed.notify_all();
        }
        struck
    }

    /// Waits for the end of the round, a failure, or `timeout`. True at the end.
    ///
    /// # Errors
    ///
    /// The failure of a channel that is everyone's, such as a page outside RAM.
    pub(super) fn wait_complete(&self, timeout: Duration) -> Result<bool, TransportError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            if state.is_complete() {
                return Ok(true);
            }
            let hopeless = state.live_channels == 0 || state.stopping;
            if hopeless || self.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok(state.is_complete());
            }
        }
    }

    /// Deals up to `pages_max` pages into `runs`, ascending. At most one run per page, so `pages_max` bounds
    /// the runs too.
    pub(super) fn take(&self, pages_max: u64, runs: &mut Vec<PageRun>) -> Work {
        runs.clear();
        let mut state = self.state.lock();
        if let Some(connection) = state.to_retire.pop() {
            state.retiring += 1;
            return Work::Retire(connection);
        }
        let mut wanted = pages_max;
        while wanted > 0
            && let Some(run) = state.returned.pop_front()
        {
            let pages = run.pages.min(wanted);
            runs.push(PageRun { first: run.first, pages });
            wanted -= pages;
            if pages < run.pages {
                let first = PageIndex(run.first.0 + pages);
                state.returned.push_front(PageRun { first, pages: run.pages - pages });
            }
        }
        // They may come from several channels; a frame's runs ascend.
        runs.sort_unstable_by_key(|run| run.first);
        if runs.is_empty() {
            wanted -= state.deal(wanted, runs);
        }
        let dealt = pages_max - wanted;
        if dealt == 0 {
            return Work::Nothing;
        }
        state.in_flight += dealt;
        Work::Pages { round: state.round }
    }

    /// The destination has `pages` more pages in place.
    pub(super) fn acknowledged(&self, pages: u64) {
        let mut state = self.state.lock();
        state.in_flight = state.in_flight.saturating_sub(pages);
        let complete = state.is_complete();
        drop(state);
        if complete {
            self.changed.notify_all();
        }
    }

    /// The destination has retired a connection.
    pub(super) fn retired(&self) {
        let mut state = self.state.lock();
        state.retiring = state.retiring.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// A channel has a connection again, or for the first time.
    pub(super) fn joined(&self) {
        self.state.lock().live_channels += 1;
    }

    /// A channel lost connection `connection` with this in flight, which the others are dealt now.
    pub(super) fn lost(&self, connection: u32, mut unacknowledged: Unacknowledged) {
        let mut state = self.state.lock();
        let pages: u64 = unacknowledged.runs.iter().map(|run| run.pages).sum();
        state.in_flight = state.in_flight.saturating_sub(pages);
        state.retiring = state.retiring.saturating_sub(unacknowledged.retiring.len() as u64);
        // Nothing unacknowledged means that the destination has read all that was ever sent.
        if pages > 0 {
            state.to_retire.push(connection);
        }
        state.to_retire.append(&mut unacknowledged.retiring);
        state.returned.extend(unacknowledged.runs);
        state.live_channels = state.live_channels.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// A connection ended without having sent anything.
    pub(super) fn left(&self) {
        self.state.lock().live_channels -= 1;
    }

    /// Waits, at most `timeout`, until no channel has a connection.
    pub(super) fn wait_none_live(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.live_channels > 0 && !self.changed.wait_until(&mut state, deadline).timed_out() {}
    }

    /// Something is wrong that no other channel could do better.
    pub(super) fn fail(&self, failure: TransportError) {
        self.state.lock().failure.get_or_insert(failure);
        self.changed.notify_all();
    }

    /// Channels that have a connection.
    pub(super) fn live_channels(&self) -> usize {
        self.state.lock().live_channels
    }

    /// Whether all that is missing are the `pages` that one channel has under way, and others could send them.
    pub(super) fn waits_only_for(&self, pages: u64) -> bool {
        let state = self.state.lock();
        !state.has_work() && pages > 0 && state.in_flight == pages && state.live_channels > 1
    }

    /// Pages of the round that are not in place at the destination yet.
    pub(super) fn pages_left(&self) -> u64 {
        let state = self.state.lock();
        state.undealt.len() + state.in_flight + state.returned.iter().map(|run| run.pages).sum::<u64>()
    }

    /// Whether there is something to send.
    pub(super) fn has_work(&self) -> bool {
        self.state.lock().has_work()
    }

    /// Waits, at most `timeout`, for something to do.
    pub(super) fn wait_for_work(&self, timeout: Duration) {
        let mut state = self.state.lock();
        if !state.has_work() && !state.stopping {
            self.changed.wait_for(&mut state, timeout);
        }
    }

    /// The round that is being sent, or was last.
    pub(super) fn round(&self) -> u32 {
        self.state.lock().round
    }

    /// Sleeps, unless the channels shall end: false then.
    pub(super) fn sleep(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !state.stopping && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        !state.stopping
    }

    /// Whether the channels shall end.
    pub(super) fn is_stopping(&self) -> bool {
        self.state.lock().stopping
    }

    /// Ends the channels, and whoever waits for the round.
    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }
}

impl State {
    /// Deals up to `wanted` pages that were never dealt, the highest first; how many.
    fn deal(&mut self, wanted: u64, runs: &mut Vec<PageRun>) -> u64 {
        let (mut dealt, mut window) = (0, WINDOW_PAGES);
        while dealt < wanted && !self.undealt.is_empty() && self.cursor > 0 {
            let first = self.cursor.saturating_sub(window);
            let look = PageRun { first: PageIndex(first), pages: self.cursor - first };
            self.found.clear();
            self.found.extend(self.undealt.runs_within(look));
            let mut next = first;
            while let Some(run) = self.found.pop() {
                let pages = run.pages.min(wanted - dealt);
                let highest = PageRun { first: PageIndex(run.end().0 - pages), pages };
                self.undealt.remove_run(highest);
                runs.push(highest);
                dealt += pages;
                if dealt == wanted {
                    next = highest.first.0;
                    break;
                }
            }
            self.cursor = next;
            // Where there are few pages, the next look reaches further.
            window = window.saturating_mul(2).min(WINDOW_PAGES_MAX);
        }
        // A frame's runs ascend.
        runs.reverse();
        dealt
    }
}

#[cfg(test)]
mod tests;
