use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const NO_TIME: Duration = Duration::ZERO;
const GRACE: Duration = Duration::from_secs(60);

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(PageIndex(1 << 22));
    set.extend(pages.into_iter().map(PageIndex));
    set
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun { first: PageIndex(first), pages }
}

fn pages_of(runs: &[PageRun]) -> impl Iterator<Item = u64> + '_ {
    runs.iter().flat_map(|run| run.first.0..run.end().0)
}

fn count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.pages).sum()
}

fn chunk(offset: u64) -> StateChunk {
    StateChunk { offset, bytes: Arc::new(vec![1]) }
}

const PAGES: Work = Work::Pages { round: 1, copies: false };
const COPIES: Work = Work::Pages { round: 1, copies: true };

/// A scheduler with so many channels that have a connection.
fn scheduler(channels: usize) -> Scheduler {
    let scheduler = Scheduler::default();
    for _ in 0..channels {
        scheduler.channel_began();
        scheduler.joined();
    }
    scheduler
}

fn wait(scheduler: &Scheduler) -> Waited {
    scheduler.wait(NO_TIME, GRACE).unwrap()
}

/// A channel of the model, with what its connection has under way.
#[derive(Default)]
struct Channel {
    connection: u32,
    flying: Unacknowledged,
    copied: bool,
}

/// Channels, and a destination that remembers what landed and which connections may still land something.
struct Model {
    scheduler: Scheduler,
    channels: [Channel; 3],
    next_connection: u32,
    /// Pages in place, by whatever way.
    landed: BTreeSet<u64>,
    /// How often each page was counted as sent.
    counted: BTreeMap<u64, u32>,
    /// Dead connections that may have pages in the destination's socket.
    undead: BTreeSet<u32>,
    state: BTreeSet<u64>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            scheduler: scheduler(3),
            channels: Default::default(),
            next_connection: 1,
            landed: BTreeSet::new(),
            counted: BTreeMap::new(),
            undead: BTreeSet::new(),
            state: BTreeSet::new(),
        };
        (0..3).for_each(|channel| model.connect(channel));
        model
    }

    fn connect(&mut self, channel: usize) {
        let connection = self.next_connection;
        self.channels[channel] = Channel { connection, ..Channel::default() };
        self.next_connection += 1;
    }

    fn count(&mut self, runs: &[PageRun]) {
        for page in pages_of(runs) {
            *self.counted.entry(page).or_default() += 1;
        }
    }

    fn acknowledge(&mut self, channel: usize) {
        let flying = std::mem::take(&mut self.channels[channel].flying);
        self.landed.extend(pages_of(&flying.runs).chain(pages_of(&flying.copies)));
        self.count(&flying.runs);
        self.state.extend(flying.state.iter().map(|chunk| chunk.offset));
        flying.state.iter().for_each(|chunk| self.scheduler.state_arrived(chunk));
        self.scheduler.acknowledged(count(&flying.runs), count(&flying.copies));
        for connection in flying.retiring {
            self.undead.remove(&connection);
            self.scheduler.retired();
        }
        let Channel { connection, copied, .. } = &mut self.channels[channel];
        if std::mem::take(copied) {
            self.scheduler.end_copies(*connection);
        }
    }

    fn die(&mut self, channel: usize, superseded: bool) {
        let Channel { connection, flying, .. } = std::mem::take(&mut self.channels[channel]);
        if superseded {
            self.count(&flying.runs);
        }
        if !(flying.runs.is_empty() && flying.copies.is_empty()) {
            self.undead.insert(connection);
        }
        self.scheduler.lost(connection, Unacknowledged { superseded, ..flying });
        self.scheduler.joined();
        self.connect(channel);
    }

    /// The channel is slow: others send copies, or have done so.
    fn dawdle(&mut self, channel: usize) -> Result<(), TestCaseError> {
        let Channel { connection, flying, copied } = &mut self.channels[channel];
        let pages = count(&flying.runs);
        if !*copied {
            *copied = self.scheduler.begin_copies(*connection, pages, flying.runs.iter().copied());
        } else if self.scheduler.have_copies_arrived(*connection, pages) {
            prop_assert!(pages_of(&flying.runs).all(|page| self.landed.contains(&page)));
            self.die(channel, true);
        }
        Ok(())
    }

    fn take(&mut self, channel: usize, pages_max: u64) -> Result<(), TestCaseError> {
        let Channel { connection, flying, copied } = &mut self.channels[channel];
        if *copied {
            return Ok(());
        }
        let mut runs = Vec::new();
        match self.scheduler.take(*connection, pages_max, &mut runs) {
            Work::Pages { round, copies } => {
                prop_assert_eq!(round, 1);
                prop_assert!(count(&runs) <= pages_max);
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
                if copies { flying.copies.append(&mut runs) } else { flying.runs.append(&mut runs) }
            }
            Work::State(chunk) => flying.state.push(chunk),
            Work::Retire(connection) => flying.retiring.push(connection),
            Work::Nothing => {}
        }
        Ok(())
    }

    /// What must hold whenever a round has ended: nothing of it can land any more.
    fn check_if_ended(&self) -> Result<(), TestCaseError> {
        if wait(&self.scheduler) == Waited::Ended {
            prop_assert!(self.undead.is_empty(), "{:?} may land pages later", self.undead);
            let idle = |channel: &Channel| channel.flying.runs.is_empty() && channel.flying.copies.is_empty();
            prop_assert!(self.channels.iter().all(idle));
            prop_assert_eq!(self.scheduler.pages_left(), 0);
        }
        Ok(())
    }
}

proptest! {
    /// Channels that take, acknowledge, dawdle and die at random, and a guest that dirties pages again.
    #[test]
    fn every_page_counts_once_or_is_struck_off_and_none_lands_after_the_end_whoever_dies_or_dawdles(
        pages in prop::collection::btree_set(prop_oneof![0..3000_u64, 0..4_000_000_u64], 1..300),
        steps in prop::collection::vec((0..3_usize, 0..12_u8, 1..40_u64), 0..400),
    ) {
        let mut model = Model::new();
        model.scheduler.begin(1, set(pages.iter().copied()), false);
        let (mut struck_off, mut struck, mut chunks) = (BTreeSet::new(), 0, BTreeSet::new());
        let ending = (0..3).cycle().take(3000).map(|channel| (channel, 1_u8, 40));
        for (channel, action, number) in steps.into_iter().chain(ending) {
            match action {
                0 => model.die(channel, false),
                1..=3 => model.acknowledge(channel),
                4 => {
                    let first = pages.iter().nth(usize::try_from(number).unwrap() * 7).copied().unwrap_or(0);
                    let dirtied = run(first, number * 3);
                    struck += model.scheduler.strike_off(|undealt| {
                        struck_off.extend(undealt.runs_within(dirtied).flat_map(|run| run.first.0..run.end().0));
                        undealt.remove_run(dirtied);
                    });
                    prop_assert_eq!(struck, struck_off.len() as u64);
                }
                5 if number < 4 => struck_off.extend(
                    model.scheduler.recall().runs().flat_map(|run| run.first.0..run.end().0).inspect(|_| struck += 1)
                ),
                6 if chunks.len() < 20 => {
                    prop_assert!(model.scheduler.add_state(chunk(chunks.len() as u64)));
                    chunks.insert(chunks.len() as u64);
                }
                7..=8 => model.dawdle(channel)?,
                _ => {}
            }
            model.check_if_ended()?;
            model.take(channel, number)?;
        }
        prop_assert_eq!(wait(&model.scheduler), Waited::Ended);
        model.check_if_ended()?;
        prop_assert!(model.counted.values().all(|times| *times == 1), "{:?}", model.counted);
        let mut accounted: BTreeSet<u64> = model.counted.keys().copied().collect();
        prop_assert!(accounted.iter().all(|page| model.landed.contains(page)));
        prop_assert!(accounted.is_disjoint(&struck_off));
        accounted.append(&mut struck_off);
        prop_assert_eq!(accounted, pages);
        prop_assert_eq!(model.state, chunks);
    }
}

#[test]
fn a_round_ends_only_when_the_dead_connection_is_retired() {
    let scheduler = scheduler(2);
    scheduler.begin(1, set(0..10), false);
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(77, 10, &mut runs), PAGES);
    scheduler.lost(77, Unacknowledged { runs, ..Unacknowledged::default() });
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(78, 10, &mut runs), Work::Retire(77));
    assert_eq!(scheduler.take(78, 10, &mut runs), PAGES);
    scheduler.acknowledged(10, 0);
    assert_eq!(wait(&scheduler), Waited::NotYet);
    scheduler.retired();
    assert_eq!(wait(&scheduler), Waited::Ended);
}

#[test]
fn a_connection_that_dies_with_nothing_in_flight_needs_no_retirement() {
    let scheduler = scheduler(1);
    scheduler.begin(1, set([]), false);
    scheduler.lost(5, Unacknowledged::default());
    assert_eq!(wait(&scheduler), Waited::Ended);
}

#[test]
fn pages_are_dealt_from_the_top_and_those_struck_off_are_not() {
    let scheduler = scheduler(1);
    scheduler.begin(1, set((0..10).chain(3_000_000..3_000_004)), false);
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(1, 6, &mut runs), PAGES);
    assert_eq!(runs, [run(8, 2), run(3_000_000, 4)]);
    // What is dealt already cannot be struck off any more.
    assert_eq!(scheduler.strike_off(|undealt| undealt.remove_run(run(5, 4))), 3);
    assert_eq!(scheduler.take(1, 6, &mut runs), PAGES);
    assert_eq!(runs, [run(0, 5)]);
    scheduler.acknowledged(11, 0);
    assert_eq!(wait(&scheduler), Waited::Ended);
    // The last pages of a round may be struck off, or recalled.
    for recall in [false, true] {
        scheduler.begin(2, set([1, 2]), false);
        assert_eq!(wait(&scheduler), Waited::NotYet);
        let gone = if recall { scheduler.recall().len() } else { scheduler.strike_off(PageSet::clear) };
        assert_eq!((gone, wait(&scheduler)), (2, Waited::Ended));
    }
}

#[test]
fn the_slow_channels_own_acknowledgement_ends_the_round_without_the_copies() {
    let scheduler = scheduler(2);
    scheduler.begin(1, set(0..10), false);
    let mut slow = Vec::new();
    assert_eq!(scheduler.take(1, 10, &mut slow), PAGES);
    assert!(scheduler.begin_copies(1, 10, slow.iter().copied()));
    let mut copies = Vec::new();
    // Not to the one that is slow.
    assert_eq!(scheduler.take(1, 4, &mut copies), Work::Nothing);
    assert_eq!(scheduler.take(2, 4, &mut copies), COPIES);
    assert_eq!(copies, [run(0, 4)]);
    scheduler.acknowledged(10, 0);
    scheduler.end_copies(1);
    assert_eq!(scheduler.take(2, 4, &mut copies), Work::Nothing);
    assert_eq!(wait(&scheduler), Waited::NotYet, "a copy is still under way, and could land late");
    scheduler.acknowledged(0, 4);
    assert_eq!(wait(&scheduler), Waited::Ended);
}

#[test]
fn device_state_goes_ahead_of_pages_and_is_sent_again_in_order() {
    let scheduler = scheduler(2);
    scheduler.begin(1, set(0..10), false);
    assert!((0..3).all(|offset| scheduler.add_state(chunk(offset))));
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(1, 10, &mut runs), Work::State(chunk(0)));
    assert_eq!(scheduler.take(1, 10, &mut runs), Work::State(chunk(1)));
    scheduler.lost(1, Unacknowledged { state: vec![chunk(0), chunk(1)], ..Unacknowledged::default() });
    for offset in 0..3 {
        assert_eq!(scheduler.take(2, 10, &mut runs), Work::State(chunk(offset)));
    }
    assert_eq!(scheduler.take(2, 10, &mut runs), PAGES);
}

#[test]
fn no_more_device_state_is_taken_than_may_be_on_its_way() {
    let scheduler = scheduler(1);
    let bytes = Arc::new(vec![1; usize::try_from(STATE_WINDOW_BYTES).unwrap() / 2]);
    let half = |offset| StateChunk { offset, bytes: Arc::clone(&bytes) };
    assert!(scheduler.add_state(half(0)) && scheduler.add_state(half(1)) && !scheduler.add_state(chunk(2)));
    assert_eq!(scheduler.take(1, 1, &mut Vec::new()), Work::State(half(0)));
    assert!(!scheduler.add_state(chunk(2)));
    assert_eq!(scheduler.state_bytes(), STATE_WINDOW_BYTES, "taken by a channel is not arrived");
    scheduler.state_arrived(&half(0));
    assert_eq!(scheduler.state_bytes(), STATE_WINDOW_BYTES / 2);
    assert!(scheduler.add_state(chunk(2)));
}

#[test]
fn a_round_waits_for_a_channel_to_come_back_as_long_as_there_is_hope() {
    let scheduler = scheduler(1);
    scheduler.begin(1, set(0..10), false);
    scheduler.lost(1, Unacknowledged::default());
    assert_eq!(wait(&scheduler), Waited::NotYet);
    assert_eq!(scheduler.wait(GRACE, Duration::from_millis(20)).unwrap(), Waited::Abandoned);
    scheduler.joined();
    assert_eq!(scheduler.wait(NO_TIME, NO_TIME).unwrap(), Waited::NotYet);
    scheduler.lost(2, Unacknowledged::default());
    // Nobody is left to try.
    scheduler.channel_ended();
    assert_eq!(wait(&scheduler), Waited::Abandoned);
}
