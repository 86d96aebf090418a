//! Which channel sends what: the pages of a round, dealt to whichever channel has room, in portions of its own size,
//! and the chunks of device state, ahead of them.
//!
//! A page is in one of three places: not dealt yet, in a frame on its way, or acknowledged by the destination.
//! A channel that dies returns the pages of its unacknowledged frames, and the others are dealt those next. A page that
//! is not dealt yet may be struck off the round: the source knows that it is dirty again, and sends it once more anyway.
//!
//! **From the top down.** Most writers that go through memory in order go upwards. Against such a writer the scheduler
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
//!
//! **Why a slow channel neither holds up a round nor is lost to it.** When a round waits for one channel alone, the
//! others send second copies of what that channel has under way ([`Scheduler::begin_copies`]). The channel itself goes
//! on. If its own frames are acknowledged first, the copies that were not dealt yet are dropped, and nothing else
//! happened. If the copies arrive first, the channel gives its connection up, which is then retired like a dead one, so
//! that the proof above covers it, and connects anew. A connection is thus given up only when not a page of the round
//! depends on it any more, so each time that it happens is the end of the pages of a round: a link on which everything
//! is slow cannot lose its channels over and over and get nowhere.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::error::TransportError;
use crate::layout::{PageIndex, PageRun};
use crate::page_set::{FromTheTop, PageSet};
use crate::wire::STATE_WINDOW_BYTES;

/// A piece of the stream of device state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct StateChunk {
    /// Where in the stream it begins.
    pub offset: u64,
    pub bytes: Arc<Vec<u8>>,
}

/// What a channel shall send next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Pages; the runs are in the caller's buffer.
    Pages {
        /// The round they belong to.
        round: u32,
        /// Whether they are second copies of what a slow channel has under way.
        copies: bool,
    },
    /// Device state.
    State(StateChunk),
    /// That this connection is dead.
    Retire(u32),
    /// Nothing for now.
    Nothing,
}

/// What a channel had in flight when its connection ended.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    /// Pages of the round.
    pub runs: Vec<PageRun>,
    /// Whether copies of all of these have arrived by other channels; else they must be sent again.
    pub superseded: bool,
    /// Second copies of another channel's pages.
    pub copies: Vec<PageRun>,
    /// Connections whose retirement was not acknowledged.
    pub retiring: Vec<u32>,
    /// Device state.
    pub state: Vec<StateChunk>,
}

/// How a wait for the end of a round went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waited {
    /// The round has ended.
    Ended,
    /// Not yet.
    NotYet,
    /// It never will: no channel has a connection, and none came back in time.
    Abandoned,
}

#[derive(Default)]
struct State {
    round: u32,
    /// Pages that were never dealt.
    undealt: PageSet,
    from_the_top: FromTheTop,
    /// More pages of the round are to come.
    open: bool,
    /// Pages that came back from dead channels.
    returned: VecDeque<PageRun>,
    /// Pages in frames that are not acknowledged.
    in_flight: u64,
    /// The connection whose pages are being sent by others, too.
    copied: Option<u32>,
    copies: VecDeque<PageRun>,
    copies_in_flight: u64,
    /// Device state that was not dealt yet.
    chunks: VecDeque<StateChunk>,
    /// Bytes of device state that were not acknowledged, those that were not dealt included.
    state_bytes: u64,
    /// Connections to retire, and retirements on their way.
    to_retire: Vec<u32>,
    retiring: u64,
    /// Threads of channels, and those of them that have a connection.
    channels: usize,
    live_channels: usize,
    /// Since when nothing was acknowledged, counted from the moment when no channel had a connection.
    hopeless_since: Option<Instant>,
    failure: Option<TransportError>,
    stopping: bool,
}

impl State {
    fn has_work(&self) -> bool {
        !self.chunks.is_empty() || self.has_work_of_round()
    }

    fn has_work_of_round(&self) -> bool {
        !self.undealt.is_empty()
            || !self.returned.is_empty()
            || !self.copies.is_empty()
            || !self.to_retire.is_empty()
    }

    fn is_complete(&self) -> bool {
        !self.open
            && !self.has_work_of_round()
            && self.in_flight == 0
            && self.copies_in_flight == 0
            && self.retiring == 0
    }

    /// When the round is lost, given `grace` for reconnecting: it takes more than a connection to begin to hope again.
    fn hope_ends(&self, grace: Duration) -> Option<Instant> {
        self.hopeless_since.filter(|_| self.live_channels == 0).map(|since| since + grace)
    }

    fn is_abandoned(&self, grace: Duration) -> bool {
        let ended = |end: Instant| Instant::now() >= end;
        self.stopping || self.channels == 0 || self.hope_ends(grace).is_some_and(ended)
    }
}

/// The work of the current round, shared by all channels.
#[derive(Default)]
pub(super) struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

impl Scheduler {
    /// Puts the pages of a round before the channels; with `open`, more are to come.
    pub(super) fn begin(&self, round: u32, pages: PageSet, open: bool) {
        let mut state = self.state.lock();
        (state.round, state.open) = (round, open);
        state.from_the_top.reach(pages.capacity());
        state.undealt = pages;
        drop(state);
        self.changed.notify_all();
    }

    /// Puts more pages of the round before the channels; the last ones, unless it stays `open`.
    pub(super) fn add(&self, pages: &PageSet, open: bool) {
        let mut state = self.state.lock();
        debug_assert!(state.open, "only an open round grows");
        state.undealt.union(pages);
        state.from_the_top.reach(pages.capacity());
        state.open = open;
        drop(state);
        self.changed.notify_all();
    }

    /// Puts a chunk of device state before the channels; false if more is on its way already than may be.
    pub(super) fn add_state(&self, chunk: StateChunk) -> bool {
        let mut state = self.state.lock();
        let state_bytes = state.state_bytes + chunk.bytes.len() as u64;
        if state_bytes > STATE_WINDOW_BYTES {
            return false;
        }
        state.state_bytes = state_bytes;
        state.chunks.push_back(chunk);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Bytes of device state that are queued or on their way.
    pub(super) fn state_bytes(&self) -> u64 {
        self.state.lock().state_bytes
    }

    /// The destination has a chunk of device state.
    pub(super) fn state_arrived(&self, chunk: &StateChunk) {
        let mut state = self.state.lock();
        state.hopeless_since = None;
        state.state_bytes = state.state_bytes.saturating_sub(chunk.bytes.len() as u64);
    }

    /// Lets `strike_off` take pages out of those that were never dealt; how many it took.
    pub(super) fn strike_off(&self, strike_off: impl FnOnce(&mut PageSet)) -> u64 {
        let mut state = self.state.lock();
        let before = state.undealt.len();
        strike_off(&mut state.undealt);
        let struck = before.saturating_sub(state.undealt.len());
        self.notify_if_complete(state);
        struck
    }

    /// Takes every page that no channel has out of the round.
    pub(super) fn recall(&self) -> PageSet {
        let mut state = self.state.lock();
        let none = PageSet::new(state.undealt.capacity());
        let mut recalled = std::mem::replace(&mut state.undealt, none);
        state.returned.drain(..).for_each(|run| recalled.insert_run(run));
        self.notify_if_complete(state);
        recalled
    }

    /// The round gets no more pages.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.open = false;
        self.notify_if_complete(state);
    }

    fn notify_if_complete(&self, state: parking_lot::MutexGuard<'_, State>) {
        let complete = state.is_complete();
        drop(state);
        if complete {
            self.changed.notify_all();
        }
    }

    /// Waits, at most `timeout`, for the end of the round, a failure, or the end of all hope: that all connections were
    /// lost, and for `grace` none came back that carried anything.
    ///
    /// # Errors
    ///
    /// The failure of a channel that is everyone's, such as a page outside RAM.
    pub(super) fn wait(&self, timeout: Duration, grace: Duration) -> Result<Waited, TransportError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            if state.is_complete() {
                return Ok(Waited::Ended);
            }
            if state.is_abandoned(grace) {
                return Ok(Waited::Abandoned);
            }
            if Instant::now() >= deadline {
                return Ok(Waited::NotYet);
            }
            let until = state.hope_ends(grace).map_or(deadline, |end| end.min(deadline));
            self.changed.wait_until(&mut state, until);
        }
    }

    /// Deals the next piece of work to connection `connection`, of pages up to `pages_max`: their runs are in `runs`
    /// then, ascending, at most one per page.
    pub(super) fn take(&self, connection: u32, pages_max: u64, runs: &mut Vec<PageRun>) -> Work {
        runs.clear();
        let mut state = self.state.lock();
        if let Some(connection) = state.to_retire.pop() {
            state.retiring += 1;
            return Work::Retire(connection);
        }
        if let Some(chunk) = state.chunks.pop_front() {
            return Work::State(chunk);
        }
        let round = state.round;
        let mut pages = take_runs(&mut state.returned, pages_max, runs);
        if pages == 0 {
            let State { undealt, from_the_top, .. } = &mut *state;
            pages = from_the_top.take(undealt, pages_max, runs);
        }
        if pages > 0 {
            state.in_flight += pages;
            return Work::Pages { round, copies: false };
        }
        if state.copied != Some(connection) {
            pages = take_runs(&mut state.copies, pages_max, runs);
        }
        if pages > 0 {
            state.copies_in_flight += pages;
            return Work::Pages { round, copies: true };
        }
        Work::Nothing
    }

    /// The destination has `pages` more pages of the round in place, and `copies` second copies.
    pub(super) fn acknowledged(&self, pages: u64, copies: u64) {
        let mut state = self.state.lock();
        state.hopeless_since = None;
        state.in_flight = state.in_flight.saturating_sub(pages);
        state.copies_in_flight = state.copies_in_flight.saturating_sub(copies);
        self.notify_if_complete(state);
    }

    /// The destination has retired a connection.
    pub(super) fn retired(&self) {
        let mut state = self.state.lock();
        state.retiring = state.retiring.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// Lets the others send second copies of what `connection` has under way, if that is all that the round waits for:
    /// `pages` pages, in `runs`. Whether they do.
    pub(super) fn begin_copies(
        &self,
        connection: u32,
        pages: u64,
        runs: impl Iterator<Item = PageRun>,
    ) -> bool {
        let mut state = self.state.lock();
        let alone = !state.has_work()
            && !state.open
            && pages > 0
            && state.in_flight == pages
            && state.copies_in_flight == 0;
        if !alone || state.copied.is_some() || state.live_channels < 2 {
            return false;
        }
        state.copied = Some(connection);
        state.copies.extend(runs);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Whether copies of the `pages` pages that `connection` has under way have all arrived, and nothing else is missing.
    pub(super) fn have_copies_arrived(&self, connection: u32, pages: u64) -> bool {
        let state = self.state.lock();
        state.copied == Some(connection)
            && !state.has_work_of_round()
            && state.copies_in_flight == 0
            && state.in_flight == pages
            && state.live_channels > 1
    }

    /// Everything that `connection` had under way was acknowledged after all: copies that were not dealt are dropped.
    pub(super) fn end_copies(&self, connection: u32) {
        let mut state = self.state.lock();
        state.end_copies(connection);
        self.notify_if_complete(state);
    }

    /// A channel's thread has begun: it has no connection yet.
    pub(super) fn channel_began(&self) {
        self.state.lock().channels += 1;
    }

    /// A channel's thread ends.
    pub(super) fn channel_ended(&self) {
        self.state.lock().channels -= 1;
        self.changed.notify_all();
    }

    /// A channel has a connection again, or for the first time.
    pub(super) fn joined(&self) {
        self.state.lock().live_channels += 1;
    }

    /// A channel lost connection `connection` with this in flight, which the others are dealt now.
    pub(super) fn lost(&self, connection: u32, mut unacknowledged: Unacknowledged) {
        let sum = |runs: &[PageRun]| runs.iter().map(|run| run.pages).sum::<u64>();
        let (pages, copies) = (sum(&unacknowledged.runs), sum(&unacknowledged.copies));
        let mut state = self.state.lock();
        state.in_flight = state.in_flight.saturating_sub(pages);
        state.copies_in_flight = state.copies_in_flight.saturating_sub(copies);
        state.retiring = state.retiring.saturating_sub(unacknowledged.retiring.len() as u64);
        // No page unacknowledged means that no page of this connection can land any more.
        if pages + copies > 0 {
            state.to_retire.push(connection);
        }
        state.to_retire.append(&mut unacknowledged.retiring);
        state.end_copies(connection);
        if state.copied.is_some() {
            state.copies.extend(unacknowledged.copies);
        }
        if !unacknowledged.superseded {
            state.returned.extend(unacknowledged.runs);
        }
        // In the order of the stream, ahead of what comes later in it.
        unacknowledged.state.into_iter().rev().for_each(|chunk| state.chunks.push_front(chunk));
        state.live_channels = state.live_channels.saturating_sub(1);
        if state.live_channels == 0 {
            state.hopeless_since.get_or_insert_with(Instant::now);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits, at most `timeout`, until no channel has a thread; whether that is so.
    pub(super) fn wait_ended(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.channels > 0 && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        state.channels == 0
    }

    /// Something is wrong that no other channel could do better.
    pub(super) fn fail(&self, failure: TransportError) {
        self.state.lock().failure.get_or_insert(failure);
        self.changed.notify_all();
    }

    /// Pages of the round that are not in place at the destination yet.
    pub(super) fn pages_left(&self) -> u64 {
        let state = self.state.lock();
        state.undealt.len() + state.in_flight + state.returned.iter().map(|run| run.pages).sum::<u64>()
    }

    /// Pages of the round that no channel was given yet.
    pub(super) fn undealt_pages(&self) -> u64 {
        self.state.lock().undealt.len()
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

    /// Ends the channels, and every wait for a round.
    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }
}

/// Moves up to `pages_max` pages from the front of `queue` to `runs`; how many.
fn take_runs(queue: &mut VecDeque<PageRun>, pages_max: u64, runs: &mut Vec<PageRun>) -> u64 {
    let mut wanted = pages_max;
    while wanted > 0
        && let Some(run) = queue.pop_front()
    {
        let pages = run.pages.min(wanted);
        runs.push(PageRun { first: run.first, pages });
        wanted -= pages;
        if pages < run.pages {
            let first = PageIndex(run.first.0 + pages);
            queue.push_front(PageRun { first, pages: run.pages - pages });
        }
    }
    // They may come from several channels; a frame's runs ascend.
    runs.sort_unstable_by_key(|run| run.first);
    pages_max - wanted
}

impl State {
    fn end_copies(&mut self, connection: u32) {
        if self.copied == Some(connection) {
            self.copied = None;
            self.copies.clear();
        }
    }
}

#[cfg(test)]
mod tests;
