//! Which pages belong to which vCPU.
//!
//! The RAM that the workload may use, extent after extent, is the pool; a page's number in it is its position.
//! The pool is dealt out once, in order of the vCPUs: each gets a share of as many pages as its first working
//! set has, and an equal part of what is left. A working set is always the first so many pages of its share, so
//! it can grow and shrink while the guest runs and never meets another vCPU's. The fill lies behind the first
//! working set, and pages that a grown working set takes over from it count as never stamped.

use core::fmt;

use super::command_line::Config;
use super::mailbox::{Extent, MAX_EXTENTS, MAX_VCPUS, PAGE_BYTES, RESERVED_END, Share};

/// Up to [`MAX_EXTENTS`] extents, ascending.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extents {
    extents: [Extent; MAX_EXTENTS],
    count: usize,
}

/// There is not enough RAM, or nothing to write to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeError {
    /// The working sets and the fill together are larger than the pool.
    TooLarge {
        /// Pages wanted.
        wanted: u64,
        /// Pages of the pool.
        pool: u64,
    },
    /// The working set of this vCPU has no page.
    Empty {
        /// Which.
        vcpu: usize,
    },
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { wanted, pool } => write!(
                f,
                "working sets and fill need {} KiB, but the guest has {} KiB of RAM above 4 MiB: \
                 give it more, or ask for less",
                wanted.saturating_mul(4),
                pool * 4
            ),
            Self::Empty { vcpu } => {
                write!(f, "the working set of vCPU {vcpu} is empty; give it at least 4KiB")
            }
        }
    }
}

impl Extents {
    /// Adds the usable bytes `[start, end)`, which follow all that were added before, without what is reserved
    /// for image and mailbox. What exceeds [`MAX_EXTENTS`] is not used.
    pub fn add_bytes(&mut self, start: u64, end: u64) {
        let first = start.max(RESERVED_END).div_ceil(PAGE_BYTES);
        let after = end / PAGE_BYTES;
        if after > first {
            self.push(Extent { first, pages: after - first });
        }
    }

    fn push(&mut self, extent: Extent) {
        if let Some(free) = self.extents.get_mut(self.count) {
            *free = extent;
            self.count += 1;
        }
    }

    /// The extents.
    pub fn as_slice(&self) -> &[Extent] {
        &self.extents[..self.count]
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.as_slice().iter().map(|extent| extent.pages).sum()
    }

    /// The extents of positions `[first, first + pages)`.
    pub fn part(&self, first: u64, pages: u64) -> Self {
        let mut part = Self::default();
        let (mut skip, mut left) = (first, pages);
        for extent in self.as_slice() {
            let skipped = skip.min(extent.pages);
            skip -= skipped;
            let taken = left.min(extent.pages - skipped);
            left -= taken;
            if taken > 0 {
                part.push(Extent { first: extent.first + skipped, pages: taken });
            }
        }
        part
    }

    /// Guest frame number of the page at `position`, which is below [`pages`](Self::pages).
    #[inline]
    pub fn page(&self, position: u64) -> u64 {
        let mut left = position;
        for extent in self.as_slice() {
            if left < extent.pages {
                return extent.first + left;
            }
            left -= extent.pages;
        }
        // Not reached with a position of the pool; the last page is at least one of ours.
        self.as_slice().last().map_or(0, |extent| extent.first + extent.pages.saturating_sub(1))
    }
}

impl FromIterator<Extent> for Extents {
    fn from_iter<T: IntoIterator<Item = Extent>>(extents: T) -> Self {
        let mut collected = Self::default();
        for extent in extents {
            collected.push(extent);
        }
        collected
    }
}

/// Deals `pool` pages out to the first `vcpus` vCPUs.
///
/// # Errors
///
/// [`RangeError`].
pub fn deal(pool: u64, vcpus: usize, config: &Config) -> Result<[Share; MAX_VCPUS], RangeError> {
    let work = &config.work[..vcpus.min(MAX_VCPUS)];
    if let Some(vcpu) = work.iter().position(|work| work.working_set_pages == 0) {
        return Err(RangeError::Empty { vcpu });
    }
    let working_sets = work.iter().fold(0u64, |sum, work| sum.saturating_add(work.working_set_pages));
    let wanted = working_sets.saturating_add(config.fill_pages);
    if wanted > pool {
        return Err(RangeError::TooLarge { wanted, pool });
    }
    let mut shares = [Share::default(); MAX_VCPUS];
    let mut first = 0;
    let mut vcpus_left = work.len() as u64;
    let (mut spare_left, mut fill_left) = (pool - working_sets, config.fill_pages);
    for (share, work) in shares.iter_mut().zip(work) {
        // Rounded down for all but the last, which takes what is left; so fill never exceeds spare.
        let spare = spare_left / vcpus_left;
        let fill = fill_left / vcpus_left;
        let pages = work.working_set_pages + spare;
        *share = Share { first, pages, fill_first: work.working_set_pages, fill_pages: fill };
        first += pages;
        spare_left -= spare;
        fill_left -= fill;
        vcpus_left -= 1;
    }
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::workload::command_line::Work;

    fn pools() -> impl Strategy<Value = Extents> {
        prop::collection::vec((0..5u64, 1..30u64), 1..6).prop_map(|parts| {
            let mut next = RESERVED_END / PAGE_BYTES;
            parts
                .into_iter()
                .map(|(hole, pages)| {
                    let first = next + hole;
                    next = first + pages;
                    Extent { first, pages }
                })
                .collect()
        })
    }

    fn naive(extents: &Extents) -> Vec<u64> {
        extents.as_slice().iter().flat_map(|extent| extent.first..extent.first + extent.pages).collect()
    }

    fn config(working_sets: &[u64], fill_pages: u64) -> Config {
        let mut config = Config { fill_pages, ..Config::default() };
        for (work, pages) in config.work.iter_mut().zip(working_sets) {
            *work = Work { working_set_pages: *pages, ..Work::default() };
        }
        config
    }

    proptest! {
        #[test]
        fn positions_and_parts_are_those_of_the_list_of_all_pages(pool in pools(), first in 0..150u64, pages in 0..150u64) {
            let all = naive(&pool);
            for (position, page) in (0..).zip(&all) {
                prop_assert_eq!(pool.page(position), *page);
            }
            let (skip, take) = (usize::try_from(first).unwrap(), usize::try_from(pages).unwrap());
            let part: Vec<u64> = all.into_iter().skip(skip).take(take).collect();
            prop_assert_eq!(naive(&pool.part(first, pages)), part);
        }

        #[test]
        fn every_page_is_dealt_to_one_vcpu_and_all_get_what_they_asked_for(
            pool in pools(), working_sets in prop::collection::vec(1..12u64, 1..=MAX_VCPUS), fill in 0..100u64,
        ) {
            let vcpus = working_sets.len();
            let wanted = working_sets.iter().sum::<u64>() + fill;
            let shares = match deal(pool.pages(), vcpus, &config(&working_sets, fill)) {
                Ok(shares) => shares,
                Err(error) => {
                    prop_assert_eq!(error, RangeError::TooLarge { wanted, pool: pool.pages() });
                    prop_assert!(wanted > pool.pages());
                    return Ok(());
                }
            };
            let mut seen = BTreeSet::new();
            for (share, working_set) in shares[..vcpus].iter().zip(&working_sets) {
                prop_assert!(share.pages >= *working_set);
                prop_assert_eq!(share.fill_first, *working_set);
                prop_assert!(share.fill_first + share.fill_pages <= share.pages);
                for page in naive(&pool.part(share.first, share.pages)) {
                    prop_assert!(seen.insert(page), "page {:#x} is dealt twice", page);
                }
            }
            prop_assert_eq!(seen.len() as u64, pool.pages());
            prop_assert_eq!(shares.iter().map(|share| share.fill_pages).sum::<u64>(), fill);
        }
    }

    #[test]
    fn what_is_reserved_is_never_dealt() {
        let mut pool = Extents::default();
        pool.add_bytes(0, 0x9_fc00);
        pool.add_bytes(1 << 20, (8 << 20) + 5);
        pool.add_bytes((9 << 20) + 1, 9 << 20);
        pool.add_bytes(4 << 30, u64::MAX);
        assert_eq!(pool.as_slice()[0], Extent { first: 0x400, pages: 0x400 });
        assert_eq!(pool.as_slice().len(), 2);
        assert_eq!(pool.as_slice()[1].first, 1 << 20);
    }

    #[test]
    fn an_empty_working_set_is_refused() {
        assert_eq!(deal(100, 2, &config(&[1, 0], 0)), Err(RangeError::Empty { vcpu: 1 }));
        let huge = config(&[u64::MAX, u64::MAX], u64::MAX);
        assert_eq!(deal(100, 2, &huge), Err(RangeError::TooLarge { wanted: u64::MAX, pool: 100 }));
    }
}
