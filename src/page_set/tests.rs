//! The sets against a `BTreeSet`; small under Miri, which cannot run the real sizes.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use bitvec::order::Lsb0;
use bitvec::view::BitView;
use proptest::prelude::*;

use super::*;

/// Large enough for all levels to have more than one word, or for Miri.
const END: u64 = if cfg!(miri) { 64 * 64 + 77 } else { 64 * 64 * 64 + 77 };
/// Runs of many words, and runs that go on.
const LONG: u64 = if cfg!(miri) { 200 } else { 9000 };
const ENDLESS: u64 = if cfg!(miri) { 300 } else { u64::MAX };
/// Pages one by one.
const MANY: usize = if cfg!(miri) { 10 } else { 50 };
/// Operations in a row.
const OPS: usize = if cfg!(miri) { 10 } else { 24 };

fn page(n: u64) -> PageIndex {
    PageIndex(n)
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun { first: page(first), pages }
}

fn model_runs(model: &BTreeSet<u64>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for &n in model {
        match runs.last_mut() {
            Some(last) if last.end() == page(n) => last.pages += 1,
            _ => runs.push(run(n, 1)),
        }
    }
    runs
}

/// The invariant of the summaries, and that pages, length and runs are the model's.
fn assert_is(set: &PageSet, model: &BTreeSet<u64>) {
    for level in 1..LEVELS {
        for (i, word) in set.levels[level - 1].iter().enumerate() {
            let (w, bit) = split(i);
            assert_eq!(set.levels[level][w] & bit != 0, *word != 0, "summary {level}, bit {i}");
        }
    }
    assert_eq!(set.len(), model.len() as u64);
    assert_eq!(set.is_empty(), model.is_empty());
    assert_eq!(set.runs().collect::<Vec<_>>(), model_runs(model));
    assert_eq!(
        set.levels[0].view_bits::<Lsb0>().iter_ones().map(|n| n as u64).collect::<Vec<_>>(),
        Vec::from_iter(model.clone())
    );
}

fn from_model(end: u64, model: &BTreeSet<u64>) -> PageSet {
    let mut set = PageSet::new(page(end));
    set.extend(model.iter().map(|n| page(*n)));
    set
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    Extend(Vec<u64>),
    InsertRun(u64, u64),
    Remove(u64),
    RemoveRun(u64, u64),
    Union(Vec<u64>),
    UnionWords(u64, Vec<u64>),
    Subtract(Vec<u64>),
    TakeWords(u64, u64),
    Clear,
}

/// Pages that cluster around word and level edges, some beyond the end.
fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..END,
        0..200_u64,
        END - 100..END + 100,
        (0..END / 4096, 0..3_u64).prop_map(|(n, k)| n * 4096 + 4095 + k),
        Just(u64::MAX),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    let length = || prop_oneof![9 => 0..3_u64, 9 => 60..70_u64, 9 => 0..LONG, 1 => Just(ENDLESS)];
    let many = || prop::collection::vec(pages(), 0..MANY);
    prop_oneof![
        4 => pages().prop_map(Op::Insert),
        2 => (pages(), length()).prop_map(|(n, k)| Op::InsertRun(n, k)),
        2 => many().prop_map(Op::Extend),
        2 => pages().prop_map(Op::Remove),
        2 => (pages(), length()).prop_map(|(n, k)| Op::RemoveRun(n, k)),
        2 => many().prop_map(Op::Union),
        2 => (0..END + 10, prop::collection::vec(any::<u64>(), 0..4)).prop_map(|(n, w)| Op::UnionWords(n, w)),
        2 => many().prop_map(Op::Subtract),
        2 => (pages(), length()).prop_map(|(n, k)| Op::TakeWords(n, k)),
        1 => Just(Op::Clear),
    ]
}

fn bit_pages(first: u64, words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..words.len() as u64 * 64).filter(|i| words[index(i / 64)] >> (i % 64) & 1 != 0).map(move |i| first + i)
}

/// Applies one operation to both; returns how many pages should have been ignored.
fn apply(op: Op, set: &mut PageSet, model: &mut BTreeSet<u64>) -> u64 {
    let offer = |model: &mut BTreeSet<u64>, pages: &mut dyn Iterator<Item = u64>| {
        let (inside, outside): (Vec<_>, Vec<_>) = pages.partition(|n| *n < END);
        model.extend(inside);
        outside.len() as u64
    };
    match op {
        Op::Insert(n) => {
            assert_eq!(set.insert(page(n)), n < END && !model.contains(&n));
            offer(model, &mut [n].into_iter())
        }
        Op::Extend(pages) => {
            set.extend(pages.iter().map(|n| page(*n)));
            offer(model, &mut pages.into_iter())
        }
        Op::InsertRun(n, k) => {
            set.insert_run(run(n, k));
            let end = n.saturating_add(k);
            model.extend(n..end.min(END));
            end.saturating_sub(n.max(END))
        }
        Op::Remove(n) => {
            assert_eq!(set.remove(page(n)), model.remove(&n));
            0
        }
        Op::RemoveRun(n, k) => {
            set.remove_run(run(n, k));
            model.retain(|m| !(n..n.saturating_add(k)).contains(m));
            0
        }
        Op::Union(pages) => {
            let wider: BTreeSet<u64> = pages.into_iter().filter(|n| *n < END * 2).collect();
            set.union(&from_model(END * 2, &wider));
            offer(model, &mut wider.into_iter())
        }
        Op::UnionWords(n, words) => {
            set.union_words(page(n), &words);
            offer(model, &mut bit_pages(n, &words))
        }
        Op::Subtract(pages) => {
            let wider: BTreeSet<u64> = pages.into_iter().filter(|n| *n < END * 2).collect();
            set.subtract(&from_model(END * 2, &wider));
            *model = &*model - &wider;
            0
        }
        Op::TakeWords(n, k) => {
            let words = set.take_words(run(n, k));
            let range = n..n.saturating_add(k).min(END);
            assert_eq!(words.len(), index(range.end.saturating_sub(n).div_ceil(64)));
            let taken: BTreeSet<u64> = bit_pages(n, &words).collect();
            assert!(taken.iter().all(|m| model.contains(m) && range.contains(m)));
            model.retain(|m| !range.contains(m) || !taken.contains(m));
            assert!(!model.iter().any(|m| range.contains(m)), "take_words left a page of its range");
            0
        }
        Op::Clear => {
            set.clear();
            model.clear();
            0
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 100 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_operations_leaves_what_a_btree_set_would_hold(ops in prop::collection::vec(ops(), 1..OPS)) {
        let (mut set, mut model) = (PageSet::new(page(END)), BTreeSet::new());
        let mut ignored = 0_u64;
        for op in ops {
            ignored = if matches!(op, Op::Clear) { 0 } else { ignored };
            ignored = ignored.saturating_add(apply(op, &mut set, &mut model));
            prop_assert_eq!(set.ignored(), ignored);
        }
        assert_is(&set, &model);
        let copy = set.clone();
        prop_assert_eq!(&copy, &set);
        assert_is(&copy, &model);
    }

    #[test]
    fn looking_at_a_part_shows_that_part(members in prop::collection::btree_set(0..20_000_u64, 0..6 * MANY),
                                         first in 0..20_000_u64, pages in 0..2000_u64) {
        let set = from_model(END.min(20_000), &members);
        let members: BTreeSet<u64> = members.into_iter().filter(|n| *n < END).collect();
        let part: BTreeSet<u64> = members.range(first..first + pages).copied().collect();
        prop_assert_eq!(set.runs_within(run(first, pages)).collect::<Vec<_>>(), model_runs(&part));
        prop_assert_eq!(set.count_within(run(first, pages)), part.len() as u64);
        let words = set.words_in(run(first, pages));
        prop_assert!(bit_pages(first, &words).eq(part.iter().copied()));
        for n in first..first + MANY as u64 {
            prop_assert_eq!(set.contains(page(n)), members.contains(&n));
        }
    }

    #[test]
    fn sets_intersect_exactly_when_they_share_a_page(a in prop::collection::btree_set(0..3000_u64, 0..20),
                                                     b in prop::collection::btree_set(0..9000_u64, 0..20)) {
        let (set_a, set_b) = (from_model(3000, &a), from_model(9000, &b));
        prop_assert_eq!(set_a.intersects(&set_b), !a.is_disjoint(&b));
        prop_assert_eq!(set_b.intersects(&set_a), !a.is_disjoint(&b));
    }

    #[test]
    fn a_shared_set_drains_to_what_was_put_in(singles in prop::collection::vec(pages(), 0..MANY),
                                              runs in prop::collection::vec((0..END, 0..200_u64), 0..5)) {
        let shared = AtomicPageSet::new(page(END));
        let (mut expected, mut drained) = (PageSet::new(page(END)), PageSet::new(page(END)));
        for n in singles {
            prop_assert_eq!(shared.insert(page(n)), expected.insert(page(n)));
        }
        for (n, k) in runs {
            shared.insert_run(run(n, k));
            expected.insert_run(run(n, k));
        }
        shared.union(&expected);
        prop_assert_eq!(shared.ignored(), expected.ignored());
        shared.drain_into(&mut drained);
        prop_assert_eq!(&drained, &expected);
        drained.clear();
        shared.drain_into(&mut drained);
        prop_assert!(drained.is_empty());
    }
}

#[test]
fn an_empty_set_answers_every_question() {
    for mut set in [PageSet::default(), PageSet::new(page(0))] {
        assert!(!set.insert(page(0)));
        set.insert_run(run(3, 2));
        assert_eq!((set.ignored(), set.len(), set.runs().count()), (3, 0, 0));
        assert!(!set.contains(page(0)) && !set.remove(page(u64::MAX)));
        assert!(set.take_words(run(0, u64::MAX)).is_empty());
        set.clear();
        assert_eq!(set.ignored(), 0);
    }
}

#[test]
fn a_set_never_covers_more_than_a_guest_may_have() {
    let set = AtomicPageSet::new(page(0));
    assert!(!set.insert(page(0)));
    if !cfg!(miri) {
        assert_eq!(PageSet::new(page(u64::MAX)).capacity(), RAM_END_MAX);
    }
}

#[test]
fn a_set_prints_its_size_and_first_runs() {
    let mut set = PageSet::new(page(1000));
    set.insert_run(run(16, 4));
    assert_eq!(format!("{set:?}"), "PageSet(4 of 1000 pages: 0x10+4)");
    set.extend((100..200).step_by(2).map(page));
    assert!(format!("{set:?}").ends_with(" …)"));
}

#[test]
fn drains_beside_writers_lose_no_page_and_invent_none() {
    const WRITERS: u64 = 3;
    let rounds = if cfg!(miri) { 2 } else { 300 };
    let per_writer = if cfg!(miri) { 20 } else { 2000 };
    let shared = AtomicPageSet::new(page(END));
    let start = Barrier::new(index(WRITERS) + 1);
    let mut total = PageSet::new(page(END));
    // Neighbouring pages, so that writers share words and summary words with each other and the drain.
    let nth =
        |round: u64, writer: u64, i: u64| (round * 7919 + i * (1 + round % 67) * WRITERS + writer) % END;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (shared, start) = (&shared, &start);
            scope.spawn(move || {
                for round in 0..rounds {
                    start.wait();
                    for i in 0..per_writer {
                        shared.insert(page(nth(round, writer, i)));
                    }
                    start.wait();
                }
            });
        }
        for round in 0..rounds {
            start.wait();
            for _ in 0..20 {
                shared.drain_into(&mut total);
            }
            start.wait();
            shared.drain_into(&mut total);
            let expected: BTreeSet<u64> =
                (0..WRITERS).flat_map(|w| (0..per_writer).map(move |i| nth(round, w, i))).collect();
            assert_eq!(total, from_model(END, &expected), "round {round}");
            total.clear();
        }
    });
}

#[test]
fn a_page_whose_insert_returned_is_in_the_next_drain() {
    // Two writers insert into the same word all the time, so that each often meets a word, or a summary, that
    // the other has half published. After its insert, a writer asks for a drain and must find its page there.
    let rounds = if cfg!(miri) { 10 } else { 20_000 };
    let shared = AtomicPageSet::new(page(END));
    let (noise, mut missing) = (AtomicBool::new(true), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while noise.load(Ordering::Relaxed) {
                shared.insert(page(1));
                std::hint::spin_loop();
            }
        });
        let mut seen = PageSet::new(page(END));
        for _ in 0..rounds {
            shared.insert(page(0));
            shared.drain_into(&mut seen);
            missing += u32::from(!seen.contains(page(0)));
            seen.clear();
        }
        noise.store(false, Ordering::Relaxed);
    });
    assert_eq!(missing, 0);
}
