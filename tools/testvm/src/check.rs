//! Whether a stopped guest's RAM is what its vCPUs wrote: from counters and pages alone.
//!
//! What makes the proof exact is written where the pages are, in [`workload::vcpu`](crate::workload::vcpu). A
//! page that is older than its vCPU's counters say, even by one write, breaks the sum of the stamps. The one thing
//! that RAM cannot tell is whether the single write in flight has begun: RAM before its first store and after
//! it are both what a stopped vCPU can leave behind.

use std::fmt;
use std::mem::offset_of;

use ringferry::{GuestMemory, PageIndex, PageRun};

use crate::guest::{Guest, GuestError};
use crate::machine::HostMachine;
use crate::workload::Machine;
use crate::workload::mailbox::{PAGE_BYTES, Stats, stats_address, touched_address};
use crate::workload::page::{HEADER_WORDS, Tag};
use crate::workload::setup::Plan;

/// What was looked at and found right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsistencyReport {
    /// Per vCPU.
    pub vcpus: Vec<VcpuConsistency>,
}

/// Of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuConsistency {
    /// Page writes that it has done; the write in flight not included.
    pub page_writes: u64,
    /// Pages that carry a stamp.
    pub stamped_pages: u64,
    /// Pages of the fill, not overwritten since.
    pub filled_pages: u64,
    /// Bytes of bodies compared.
    pub body_bytes: u64,
    /// Whether a page write is in flight.
    pub write_in_flight: bool,
}

/// The first thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Inconsistency {
    /// There is no guest to look at.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The plan names pages that are not RAM.
    #[error("the mailbox names pages that are not RAM, from page {0:?} on: it was lost or damaged")]
    NotRam(PageIndex),
    /// A page is not what it says, or not where it belongs.
    #[error("vCPU {vcpu}, page {page:?}: {what}")]
    Page {
        /// Whose page.
        vcpu: usize,
        /// Which.
        page: PageIndex,
        /// What is wrong with it.
        what: PageFault,
    },
    /// The stamps do not add up: a page is older than its last write.
    #[error(
        "vCPU {vcpu}: the stamps of its pages add up to {found}, its counters say {expected} after {writes} \
         page writes: some page is older than its last write"
    )]
    StampSum {
        /// Which vCPU.
        vcpu: usize,
        /// Page writes.
        writes: u64,
        /// The sum over the pages.
        found: u64,
        /// The sum that the vCPU kept.
        expected: u64,
    },
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// It should carry a tag.
    Untagged,
    /// Its tag names another page or another vCPU.
    Foreign(Tag),
    /// Its stamp is above all that its vCPU has given.
    Ahead {
        /// The stamp.
        stamp: u64,
        /// What the vCPU has given.
        writes: u64,
    },
    /// A word of the body does not follow from the header.
    Body {
        /// Which word of the page.
        word: u64,
        /// What is there.
        found: u64,
        /// What should be.
        expected: u64,
    },
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untagged => write!(f, "it has no tag although it was written"),
            Self::Foreign(tag) => write!(f, "it is page {:#x} of vCPU {}", tag.page, tag.vcpu),
            Self::Ahead { stamp, writes } => {
                write!(f, "its stamp is {stamp}, but the vCPU's counters end at {writes}: they are older")
            }
            Self::Body { word, found, expected } => {
                write!(f, "word {word} is {found:#x}, its header says {expected:#x}: two generations mixed")
            }
        }
    }
}

/// Checks the guest in `memory`, which stands still: every vCPU is outside `KVM_RUN`, or its thread between two
/// turns.
///
/// # Errors
///
/// The first [`Inconsistency`] found.
pub fn check(memory: &GuestMemory) -> Result<ConsistencyReport, Inconsistency> {
    let plan = Guest::new(memory, None)?.plan()?;
    for extent in plan.pool.as_slice() {
        let run = PageRun { first: PageIndex(extent.first), pages: extent.pages };
        memory.host_runs(run).map(drop).map_err(|_| Inconsistency::NotRam(run.first))?;
    }
    let machine = HostMachine::new(memory);
    let vcpus = (0..plan.vcpus).map(|vcpu| check_vcpu(&machine, &plan, vcpu)).collect::<Result<_, _>>()?;
    Ok(ConsistencyReport { vcpus })
}

fn check_vcpu(machine: &HostMachine, plan: &Plan, vcpu: usize) -> Result<VcpuConsistency, Inconsistency> {
    let stats = |offset| machine.load(stats_address(vcpu) + offset as u64);
    let writes = stats(offset_of!(Stats, writes));
    let stamp_sum = stats(offset_of!(Stats, stamp_sum));
    let (intent_page, intent_stamp) =
        (stats(offset_of!(Stats, intent_page)), stats(offset_of!(Stats, intent_stamp)));
    let touched = machine.load(touched_address(vcpu));
    let share = plan.shares[vcpu];
    let filled_until = share.fill_first.saturating_add(stats(offset_of!(Stats, filled_pages)));

    let mut report = VcpuConsistency { page_writes: writes, ..VcpuConsistency::default() };
    let mut sum = 0u64;
    let positions = plan.share_of(vcpu);
    let pages = positions.as_slice().iter().flat_map(|extent| extent.first..extent.first + extent.pages);
    // Beyond lies RAM that nobody writes.
    let written = touched.max(share.fill_first + share.fill_pages).min(share.pages);
    let written = usize::try_from(written).unwrap_or(usize::MAX);
    for (position, page) in (0u64..).zip(pages.take(written)) {
        let fault = |what| Inconsistency::Page { vcpu, page: PageIndex(page), what };
        let (stamp, tag) = (machine.load(page * PAGE_BYTES), machine.load(page * PAGE_BYTES + 8));
        let filled = (share.fill_first..filled_until).contains(&position);
        if stamp == 0 && tag == 0 && !filled {
            continue;
        }
        let tag = Tag::from_word(tag).ok_or_else(|| fault(PageFault::Untagged))?;
        if tag.page != page || tag.vcpu != vcpu {
            return Err(fault(PageFault::Foreign(tag)));
        }
        // The page at the end of the fill has its tag before it is counted; those behind it have none.
        if position >= touched && (stamp != 0 || position > filled_until) {
            return Err(fault(PageFault::Ahead { stamp, writes }));
        }
        let in_flight = stamp > writes;
        if in_flight && (stamp != writes.wrapping_add(1) || page != intent_page) {
            return Err(fault(PageFault::Ahead { stamp, writes }));
        }
        if in_flight {
            report.write_in_flight = true;
            sum = sum.wrapping_add(intent_stamp);
        } else {
            sum = sum.wrapping_add(stamp);
            compare_body(machine, tag, stamp).map_err(fault)?;
            report.body_bytes += tag.body_words * 8;
        }
        if stamp == 0 {
            report.filled_pages += 1;
        } else {
            report.stamped_pages += 1;
        }
    }
    if sum != stamp_sum {
        return Err(Inconsistency::StampSum { vcpu, writes, found: sum, expected: stamp_sum });
    }
    Ok(report)
}

fn compare_body(machine: &HostMachine, tag: Tag, stamp: u64) -> Result<(), PageFault> {
    for (word, expected) in (HEADER_WORDS..).zip(tag.body(stamp)) {
        let found = machine.load(tag.page * PAGE_BYTES + word * 8);
        if found != expected {
            return Err(PageFault::Body { word, found, expected });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
