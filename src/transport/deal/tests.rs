use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn set(pages: impl IntoIterator<Item = u64>) -> Arc<PageSet> {
    let mut set = PageSet::new(PageIndex(1 << 22));
    set.extend(pages.into_iter().map(PageIndex));
    Arc::new(set)
}

fn pages_of(runs: &[PageRun]) -> impl Iterator<Item = u64> + '_ {
    runs.iter().flat_map(|run| run.first.0..run.end().0)
}

proptest! {
    /// Channels that take, acknowledge and die at random.
    #[test]
    fn every_page_is_acknowledged_exactly_once_whoever_dies(
        pages in prop::collection::btree_set(prop_oneof![0..3000_u64, 0..4_000_000_u64], 1..300),
        steps in prop::collection::vec((0..3_usize, 0..10_u8, 1..40_u64), 0..400),
    ) {
        let dealer = Dealer::default();
        (0..3).for_each(|_| dealer.joined());
        dealer.begin(1, set(pages.iter().copied()));
        let mut in_flight: [Unacknowledged; 3] = Default::default();
        let mut arrived = BTreeSet::new();
        let mut next_connection = 100;
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
                    dealer.acknowledged(count);
                    flying.retiring.drain(..).for_each(|_| dealer.retired());
                }
                // Die and come back.
                0 => {
                    dealer.lost(next_connection, std::mem::take(flying));
                    next_connection += 1;
                    dealer.joined();
                }
                _ => {}
            }
            let mut runs = Vec::new();
            match dealer.take(count, &mut runs) {
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
        prop_assert_eq!(arrived, pages);
        prop_assert!(dealer.wait_complete(Duration::ZERO).unwrap());
        prop_assert_eq!(dealer.pages_left(), 0);
    }
}

#[test]
fn a_round_ends_only_when_the_dead_connection_is_retired() {
    let dealer = Dealer::default();
    dealer.joined();
    dealer.joined();
    dealer.begin(1, set(0..10));
    let mut runs = Vec::new();
    assert_eq!(dealer.take(10, &mut runs), Work::Pages { round: 1 });
    dealer.lost(77, Unacknowledged { runs, retiring: Vec::new() });
    let mut runs = Vec::new();
    assert_eq!(dealer.take(10, &mut runs), Work::Retire(77));
    assert_eq!(dealer.take(10, &mut runs), Work::Pages { round: 1 });
    dealer.acknowledged(10);
    assert!(!dealer.wait_complete(Duration::ZERO).unwrap());
    dealer.retired();
    assert!(dealer.wait_complete(Duration::ZERO).unwrap());
}

#[test]
fn a_connection_that_dies_with_nothing_in_flight_needs_no_retirement() {
    let dealer = Dealer::default();
    dealer.joined();
    dealer.begin(1, set([]));
    dealer.lost(5, Unacknowledged::default());
    assert!(dealer.wait_complete(Duration::ZERO).unwrap());
}
