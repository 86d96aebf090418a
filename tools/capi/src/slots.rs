//! The slots as C told of them: guest addresses in bytes become runs of pages here, and where RAM ends is known here.

use std::collections::BTreeMap;

use ringferry::{PAGE_SIZE, PageIndex, PageRun};

use crate::status::{Failure, Status};

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// The pages of each slot.
#[derive(Default, Debug)]
pub(crate) struct Slots(BTreeMap<u32, PageRun>);

impl Slots {
    pub(crate) fn insert(&mut self, slot: u32, pages: PageRun) {
        self.0.insert(slot, pages);
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        self.0.remove(&slot);
    }

    pub(crate) fn get(&self, slot: u32) -> Result<PageRun, Failure> {
        let known = self.0.get(&slot).copied();
        known.ok_or(Failure::With(
            Status::SlotUnknown,
            "no slot with this id is tracked: add it first",
            slot.into(),
        ))
    }

    /// One past the highest page of any slot.
    pub(crate) fn end(&self) -> PageIndex {
        self.0.values().map(|run| run.end()).max().unwrap_or(PageIndex(0))
    }
}

/// Whole pages.
pub(crate) fn whole_pages(guest_address: u64, bytes: u64) -> Result<PageRun, Failure> {
    if !guest_address.is_multiple_of(PAGE_BYTES) {
        let text = "the guest address is not a multiple of 4096";
        return Err(Failure::With(Status::Argument, text, guest_address));
    }
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(Failure::With(Status::Argument, "the length is 0 or not a multiple of 4096", bytes));
    }
    Ok(PageRun { first: PageIndex(guest_address / PAGE_BYTES), pages: bytes / PAGE_BYTES })
}

/// Every page that one of these bytes is in. `None` if there are none.
pub(crate) fn pages_touched(guest_address: u64, bytes: u64) -> Option<PageRun> {
    let last = guest_address.saturating_add(bytes.checked_sub(1)?) / PAGE_BYTES;
    let first = guest_address / PAGE_BYTES;
    Some(PageRun { first: PageIndex(first), pages: last - first + 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_over_a_border_touches_both_pages_and_none_touches_nothing() {
        let run = |first, pages| Some(PageRun { first: PageIndex(first), pages });
        assert_eq!(pages_touched(0x1fff, 2), run(1, 2));
        assert_eq!(pages_touched(0x1000, 0x1000), run(1, 1));
        assert_eq!(pages_touched(0x1000, 0), None);
        assert_eq!(pages_touched(u64::MAX, u64::MAX), run(u64::MAX >> 12, 1));
    }

    #[test]
    fn ram_ends_with_the_highest_slot_that_is_left() {
        let mut slots = Slots::default();
        for (slot, first) in [(0, 0), (1, 0x100)] {
            slots.insert(slot, PageRun { first: PageIndex(first), pages: 0x10 });
        }
        assert_eq!(slots.end(), PageIndex(0x110));
        slots.remove(1);
        assert_eq!(slots.end(), PageIndex(0x10));
    }
}
