//! The stream of device state, put together again from chunks that came by several connections.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::wire::STATE_WINDOW_BYTES;
use crate::wire::data::DataError;

/// Chunks that may wait: those of a window of 256 bytes each. A peer that cuts the stream finer wastes memory.
const CHUNKS_MAX: usize = 1 << 16;

/// Chunks that wait for those ahead of them, or for the VMM to take them.
#[derive(Default)]
pub(super) struct StateStream {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Up to here the VMM has taken the stream.
    taken: u64,
    /// By their offsets; none overlaps another, or what was taken.
    chunks: BTreeMap<u64, Vec<u8>>,
    received_bytes: u64,
    closed: bool,
}

impl StateStream {
    /// Takes in a chunk; one that is there already, because it was sent again, changes nothing.
    pub(super) fn insert(&self, offset: u64, bytes: Vec<u8>) -> Result<(), DataError> {
        let mut state = self.state.lock();
        let end = offset.saturating_add(bytes.len() as u64);
        let limit = state.taken.saturating_add(STATE_WINDOW_BYTES);
        let crowded = state.chunks.len() >= CHUNKS_MAX && offset != state.taken;
        if end > limit || crowded {
            return Err(DataError::StateWindow { offset, end, limit });
        }
        if end <= state.taken || state.chunks.get(&offset).is_some_and(|there| there.len() == bytes.len()) {
            return Ok(());
        }
        let before_ends = state.chunks.range(..offset).next_back().map(|(at, chunk)| at + chunk.len() as u64);
        let next_begins = state.chunks.range(offset..).next().map(|(at, _)| *at);
        let free = state.taken.max(before_ends.unwrap_or(0))..next_begins.unwrap_or(u64::MAX);
        if offset < free.start || end > free.end {
            return Err(DataError::StateOverlap { offset, end });
        }
        state.received_bytes += bytes.len() as u64;
        state.chunks.insert(offset, bytes);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The next piece of the stream; `None` if none came within `timeout`.
    pub(super) fn next(&self, timeout: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            let taken = state.taken;
            if let Some(bytes) = state.chunks.remove(&taken) {
                state.taken += bytes.len() as u64;
                return Some(bytes);
            }
            if state.closed || self.changed.wait_until(&mut state, deadline).timed_out() {
                return None;
            }
        }
    }

    /// Ends all waits: nothing comes any more.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    /// Bytes that came, those that were sent twice counted once.
    pub(super) fn received_bytes(&self) -> u64 {
        self.state.lock().received_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::ZERO;

    proptest! {
        #[test]
        fn chunks_in_any_order_and_sent_again_make_the_same_stream(
            lengths in prop::collection::vec(1..50_usize, 1..20),
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let mut chunks = Vec::new();
            let mut whole = Vec::new();
            for length in lengths {
                let offset = whole.len() as u64;
                let bytes: Vec<u8> = (0..length).map(|_| u8::try_from(whole.len() % 251).unwrap()).collect();
                whole.extend_from_slice(&bytes);
                chunks.push((offset, bytes));
            }
            let stream = StateStream::default();
            let mut taken = Vec::new();
            let in_order = chunks.clone();
            let at_random = order.iter().map(|index| index.get(&chunks).clone());
            for (offset, bytes) in at_random.chain(in_order) {
                stream.insert(offset, bytes).unwrap();
                if taken.len() % 3 == 0 {
                    taken.extend(stream.next(NOW).into_iter().flatten());
                }
            }
            while let Some(bytes) = stream.next(NOW) {
                taken.extend(bytes);
            }
            prop_assert_eq!(&taken, &whole);
            prop_assert_eq!(stream.received_bytes(), whole.len() as u64);
        }
    }

    #[test]
    fn what_is_too_far_ahead_or_overlaps_is_refused_and_holds_no_memory() {
        let stream = StateStream::default();
        let limit = STATE_WINDOW_BYTES;
        let beyond = stream.insert(limit - 1, vec![0; 2]).unwrap_err();
        assert_eq!(beyond, DataError::StateWindow { offset: limit - 1, end: limit + 1, limit });
        stream.insert(10, vec![1; 10]).unwrap();
        for (offset, length) in [(5, 6), (15, 10), (10, 9), (9, 30)] {
            let end = offset + length as u64;
            assert_eq!(stream.insert(offset, vec![2; length]), Err(DataError::StateOverlap { offset, end }));
        }
        stream.insert(0, vec![3; 10]).unwrap();
        assert_eq!(stream.next(NOW), Some(vec![3; 10]));
        assert_eq!(stream.insert(9, vec![4; 1]), Ok(()), "taken already");
        assert_eq!(stream.insert(9, vec![4; 4]), Err(DataError::StateOverlap { offset: 9, end: 13 }));
        assert_eq!(stream.next(NOW), Some(vec![1; 10]));
        assert_eq!(stream.next(NOW), None);
    }

    #[test]
    fn a_wait_for_state_ends_when_nothing_comes_any_more() {
        let stream = StateStream::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| stream.next(Duration::from_secs(60)));
            std::thread::sleep(Duration::from_millis(20));
            stream.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
