//! The backend on KVM's bitmap, one bit per page of a slot: get, then clear, which protects, then hand out.
//!
//! It needs no room in the guest's path and cannot overflow, but it costs by the size of memory, not by what was
//! written, and it cannot tell who wrote.

use std::time::Instant;

use super::error::TrackError;
use super::pending::ProtectedReadable;
use super::rings::Context;
use crate::layout::Region;
use crate::page_set::PageSet;

/// Proof that every page that was got has been cleared, and so protected.
pub(super) struct AllCleared(());

impl ProtectedReadable for AllCleared {}

/// The bitmap of the largest slot, kept from harvest to harvest.
#[derive(Default, Debug)]
pub(super) struct BitmapLog {
    words: Vec<u64>,
}

impl BitmapLog {
    /// Adds the dirty pages of every slot to `pending`, all of them protected by the time this returns `Ok`. After an
    /// error, what was cleared is in `pending`, and the rest still in KVM.
    pub(super) fn collect(
        &mut self,
        cx: Context<'_>,
        pending: &mut PageSet,
    ) -> Result<AllCleared, TrackError> {
        for region in cx.slots.regions() {
            let words = self.get(cx, region, pending)?;
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let started = Instant::now();
            // A page dirtied since the get keeps its bit if the get did not see it, and is in `pending` if it did.
            cx.kernel.clear_dirty_log(region.slot, region.pages.pages, words)?;
            cx.counters.resets.add(1);
            cx.counters.reset_ns.add_since(started);
        }
        Ok(AllCleared(()))
    }

    /// Adds the pages of the bitmaps beside the rings, which no vCPU dirtied. Nothing runs any more: so nothing has to
    /// be protected, and without manual protection the getting clears.
    pub(super) fn collect_beside_rings(
        &mut self,
        cx: Context<'_>,
        pending: &mut PageSet,
    ) -> Result<(), TrackError> {
        cx.slots.regions().try_for_each(|region| self.get(cx, region, pending).map(drop))
    }

    /// Gets the bitmap of a slot and adds its pages to `pending`.
    fn get(&mut self, cx: Context<'_>, region: &Region, pending: &mut PageSet) -> Result<&[u64], TrackError> {
        let pages = region.pages.pages;
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        let words = &mut self.words[..words];
        let started = Instant::now();
        cx.kernel.get_dirty_log(region.slot, pages, words)?;
        pending.union_words(region.pages.first, words);
        cx.counters.harvest_ns.add_since(started);
        Ok(words)
    }
}
