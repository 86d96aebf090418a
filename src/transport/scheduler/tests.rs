use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(PageIndex(1 << 22));
    set.extend(pages.into_iter().map(PageIndex));
    set
}

fn pages_of(runs: &[PageRun]) -> impl Iterator<Item = u64> + '_ {
    runs.iter().flat_map(|run| run.first.0..run.end().0)
}

proptest! {
    /// Channels that take, acknowledge and die at random, and a guest that dirties pages again.
    #[test]
    fn every_page_is_acknowledged_exactly_once_or_struck_off_whoever_dies(
        pages in prop::collection::btree_set(prop_oneof![0..3000_u64, 0..4_000_000_u64], 1..300),
        steps in prop::collection::vec((0..3_usize, 0..10_u8, 1..40_u64), 0..400),
    ) {
        let scheduler = Scheduler::default();
        (0..3).for_each(|_| scheduler.joined());
        scheduler.begin(1, set(pages.iter().copied()));
        let mut in_flight: [Unacknowledged; 3] = Default::default();
        let mut arrived = BTreeSet::new();
        let mut next_connection = 100;
        let (mut struck_off, mut struck) = (BTreeSet::new(), 0);
        let ending = (0..3).cycle().take(3000).map(|channel| (channel, 1_u8, 40));
        for (channel, action, count) in steps.into_iter().chain(ending) {
            let flying = &mut in_flight[channel];
            match action {
                // Acknowledge all that is in flight.
                1..=3 => {
                    let mut count = 0;
                    for page in pages_of(&flying.runs) {
                        count += 1;
                        prop_assert!(arrived.insert(page), "page {} twice", page);
                    }
                    flying.runs.clear();
                    scheduler.acknowledged(count);
                    flying.retiring.drain(..).for_each(|_| scheduler.retired());
                }
                // Die and come back.
                0 => {
                    scheduler.lost(next_connection, std::mem::take(flying));
                    next_connection += 1;
                    scheduler.joined();
                }
                // The guest dirties pages again.
                4 => {
                    let first = pages.iter().nth(usize::try_from(count).unwrap() * 7).copied().unwrap_or(0);
                    let run = PageRun { first: PageIndex(first), pages: count * 3 };
                    let counted = scheduler.strike_off(|undealt| {
                        struck_off.extend(undealt.runs_within(run).flat_map(|run| run.first.0..run.end().0));
                        undealt.remove_run(run);
                    });
                    struck += counted;
                    prop_assert_eq!(struck, struck_off.len() as u64);
                }
                _ => {}
            }
            let mut runs = Vec::new();
            match scheduler.take(count, &mut runs) {
                Work::Pages { round } => {
                    prop_assert_eq!(round, 1);
                    prop_assert!(runs.iter().map(|run| run.pages).sum::<u64>() <= count);
                    prop_assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
                    in_flight[channel].runs.append(&mut runs);
                }
                Work::Retire(connection) => in_flight[channel].retiring.push(connection),
                Work::Nothing => {}
            }
        }
        prop_assert!(arrived.is_disjoint(&struck_off));
        arrived.append(&mut struck_off);
        prop_assert_eq!(arrived, pages);
        prop_assert!(scheduler.wait_complete(Duration::ZERO).unwrap());
        prop_assert_eq!(scheduler.pages_left(), 0);
    }
}

#[test]
fn a_round_ends_only_when_the_dead_connection_is_retired() {
    let scheduler = Scheduler::default();
    scheduler.joined();
    scheduler.joined();
    scheduler.begin(1, set(0..10));
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(10, &mut runs), Work::Pages { round: 1 });
    scheduler.lost(77, Unacknowledged { runs, retiring: Vec::new() });
    let mut runs = Vec::new();
    assert_eq!(scheduler.take(10, &mut runs), Work::Retire(77));
    assert_eq!(scheduler.take(10, &mut runs), Work::Pages { round: 1 });
    scheduler.acknowledged(10);
    assert!(!scheduler.wait_complete(Duration::ZERO).unwrap());
    scheduler.retired();
    assert!(scheduler.wait_complete(Duration::ZERO).unwrap());
}

#[test]
fn a_connection_that_dies_with_nothing_in_flight_needs_no_retirement() {
    let scheduler = Scheduler::default();
    scheduler.joined();
    scheduler.begin(1, set([]));
    scheduler.lost(5, Unacknowledged::default());
    assert!(scheduler.wait_complete(Duration::ZERO).unwrap());
}

#[test]
fn pages_are_dealt_from_the_top_and_those_struck_off_are_not() {
    let scheduler = Scheduler::default();
    scheduler.joined();
    scheduler.begin(1, set((0..10).chain(3_000_000..3_000_004)));
    let mut runs = Vec::new();
    let run = |first, pages| PageRun { first: PageIndex(first), pages };
    assert_eq!(scheduler.take(6, &mut runs), Work::Pages { round: 1 });
    assert_eq!(runs, [run(8, 2), run(3_000_000, 4)]);
    // What is dealt already cannot be struck off any more.
    assert_eq!(scheduler.strike_off(|undealt| undealt.remove_run(run(5, 4))), 3);
    assert_eq!(scheduler.take(6, &mut runs), Work::Pages { round: 1 });
    assert_eq!(runs, [run(0, 5)]);
    scheduler.acknowledged(11);
    assert!(scheduler.wait_complete(Duration::ZERO).unwrap());
    // The last pages of a round may be struck off.
    scheduler.begin(2, set([1, 2]));
    assert!(!scheduler.wait_complete(Duration::ZERO).unwrap());
    assert_eq!(scheduler.strike_off(PageSet::clear), 2);
    assert!(scheduler.wait_complete(Duration::ZERO).unwrap());
}
