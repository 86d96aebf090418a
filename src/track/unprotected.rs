//! Pages that a ring was recycled without are protected here: in ranges, right before somebody reads them.
//!
//! One call to the kernel costs as much as fifty pages of it, so that neighbours go together. Long runs are taken from the
//! guest exactly. Short ones with small gaps become one range, gaps included; the pages in the gaps are clean, so such a
//! range is protected in the way that does not mistake reading for writing.

use std::time::Instant;

use super::error::TrackError;
use super::pending::{Pending, TheseReadable};
use super::rings::Context;
use super::session_pages::SessionKey;
use crate::kvm::{Granule, Protection, UnmapError, Until};
use crate::layout::{PageIndex, PageRun, Region};
use crate::page_set::PageSet;

/// Proof that the pages at hand have been protected.
pub(super) struct Unmapped(());

impl TheseReadable for Unmapped {}

/// A run of so many pages is worth a call of its own: a call costs 10 to 20 µs while vCPUs run, a page 0.2 to 0.3
/// (kernel-notes/dirty-ring.md).
const LONG_RUN: u64 = 16;
/// A gap of so many pages between short runs costs less than a call.
const GAP_MAX: u64 = 32;
/// No call covers more: a guest that faults waits for it, 0.6 ms here.
const CALL_PAGES_MAX: u64 = 2048;

/// Ascending runs as ranges that are cheap to protect.
fn ranges(runs: impl Iterator<Item = PageRun>) -> Vec<Protection> {
    let mut ranges: Vec<Protection> = Vec::new();
    for run in runs {
        match ranges.last_mut() {
            Some(Protection { pages, until })
                if run.pages < LONG_RUN
                    && run.first.0 - pages.end().0 <= GAP_MAX
                    && (*until == Until::Written || pages.pages < LONG_RUN) =>
            {
                pages.pages = run.end().0 - pages.first.0;
                *until = Until::Written;
            }
            _ => ranges.push(Protection { pages: run, until: Until::Touched }),
        }
    }
    ranges
}

/// A part of a region in whole granules, no more than a call may cover at a time.
fn calls(region: &Region, granule: Granule, pages: PageRun) -> impl Iterator<Item = PageRun> {
    let (base, granule) = (region.pages.first.0, granule.get());
    let mut first = (pages.first.0 - base) / granule * granule;
    let end = (pages.end().0 - base).next_multiple_of(granule).min(region.pages.pages);
    std::iter::from_fn(move || {
        let pages = (end - first).min(CALL_PAGES_MAX.max(granule));
        let call = PageRun { first: PageIndex(base + first), pages };
        first += pages;
        (pages > 0).then_some(call)
    })
}

/// Protects the pages of `runs`, ascending, wherever they are RAM.
fn protect(cx: Context<'_>, runs: impl Fn(PageRun) -> Vec<PageRun>) -> Result<Unmapped, UnmapError> {
    for (region, granule) in cx.slots.protectable() {
        let found = ranges(runs(region.pages).into_iter()).into_iter();
        let calls: Vec<Protection> = found
            .flat_map(|Protection { pages, until }| {
                calls(region, granule, pages).map(move |pages| Protection { pages, until })
            })
            .collect();
        if !calls.is_empty() {
            cx.kernel.protect(region, &calls)?;
            cx.counters.protects.add(calls.len() as u64);
        }
    }
    Ok(Unmapped(()))
}

/// Protects every page that is not.
pub(super) fn protect_all(cx: Context<'_>, pending: &mut Pending) {
    if pending.unprotected().is_empty() {
        return;
    }
    let started = Instant::now();
    let outcome = protect(cx, |region| pending.unprotected().runs_within(region).collect());
    cx.counters.protect_ns.add_since(started);
    match outcome {
        Ok(proof) => pending.all_are_protected(&proof),
        Err(error) => pending.cannot_protect(error),
    }
}

/// A harvest protects so many pages at a time, and then lets a vCPU with a full ring have its turn: a millisecond.
const STEP_PAGES: u64 = 4096;

/// Protects up to [`STEP_PAGES`] unprotected pages from `from` on, which stay with every session. Returns where the next step
/// begins, if there is one.
pub(super) fn protect_step(cx: Context<'_>, pending: &mut Pending, from: PageIndex) -> Option<PageIndex> {
    let rest = PageRun { first: from, pages: pending.capacity().0.saturating_sub(from.0) };
    let mut left = STEP_PAGES;
    let found = pending.unprotected().runs_within(rest).map_while(|run| {
        let pages = run.pages.min(left);
        left -= pages;
        (pages > 0).then_some(PageRun { pages, ..run })
    });
    let found: Vec<PageRun> = found.collect();
    let next = found.last()?.end();
    let started = Instant::now();
    let outcome = protect(cx, |region| within(&found, region));
    cx.counters.protect_ns.add_since(started);
    match outcome {
        Ok(proof) => pending.these_are_protected(&proof, &found),
        Err(error) => pending.cannot_protect(error),
    }
    Some(next).filter(|_| !pending.everything)
}

/// Those parts of `runs` that lie in a region.
fn within(runs: &[PageRun], region: PageRun) -> Vec<PageRun> {
    let clipped = runs.iter().map(|run| {
        let first = run.first.max(region.first);
        PageRun { first, pages: run.end().min(region.end()).0.saturating_sub(first.0) }
    });
    clipped.filter(|run| run.pages > 0).collect()
}

/// Protects those pages of `runs` that are unprotected, and hands them out to a session. The others were protected since: if
/// they are dirty, it has them.
pub(super) fn protect_some(
    cx: Context<'_>,
    pending: &mut Pending,
    key: SessionKey,
    runs: &[PageRun],
    dirty: &mut PageSet,
) -> Result<(), TrackError> {
    let started = Instant::now();
    let unprotected = |run: &PageRun| pending.unprotected().runs_within(*run).collect::<Vec<_>>();
    let found: Vec<PageRun> = runs.iter().flat_map(unprotected).collect();
    let outcome = protect(cx, |region| within(&found, region));
    cx.counters.protect_ns.add_since(started);
    match outcome {
        Ok(proof) => pending.hand_out_these(&proof, key, &found, dirty),
        Err(error) => {
            pending.cannot_protect(error);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    #[test]
    fn long_runs_are_protected_exactly_and_short_neighbours_together() {
        let range = |first, pages, until| Protection { pages: run(first, pages), until };
        let given =
            [run(0, 100), run(110, 1), run(120, 2), run(154, 1), run(300, 1), run(310, 16), run(330, 4)];
        assert_eq!(
            ranges(given.into_iter()),
            [
                range(0, 100, Until::Touched),
                range(110, 45, Until::Written),
                range(300, 1, Until::Touched),
                range(310, 16, Until::Touched),
                range(330, 4, Until::Touched),
            ]
        );
    }

    #[test]
    fn calls_are_whole_granules_within_the_region_and_bounded() {
        let region = Region::new(crate::SlotId(0), run(1000, 5120), std::ptr::null_mut());
        let of = |granule, pages| -> Vec<PageRun> {
            calls(&region, Granule::new(granule).unwrap(), pages).collect()
        };
        assert_eq!(of(1, run(1003, 5)), [run(1003, 5)]);
        assert_eq!(of(512, run(1003, 5)), [run(1000, 512)]);
        assert_eq!(of(512, run(1511, 2)), [run(1000, 1024)]);
        assert_eq!(of(1, run(1001, 5000)), [run(1001, 2048), run(3049, 2048), run(5097, 904)]);
        assert_eq!(of(512, run(6119, 1)), [run(5608, 512)]);
    }
}
