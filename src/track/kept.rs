//! The tracker of a VM that is lent while its rings stay here: only the gates of its vCPUs are another process's, too.
//!
//! That process has a session of this tracker, as the VMM has its own: sessions begin and end, memory and vCPUs come and go.
//! Nothing has to be taken back when it dies but the gates.

use std::fs::File;
use std::sync::Arc;

use super::error::TrackError;
use super::lent_gates::LentGates;
use super::lent_page::LentPage;
use super::shared::Shared;
use super::tracker::DirtyTracker;
use crate::kvm::KvmError;
use crate::layout::{PageIndex, PageRun, SlotId};

/// A tracker whose gates are lent.
#[derive(Debug)]
pub(crate) struct Keeping {
    shared: Arc<Shared>,
    page: Arc<LentPage>,
    file: File,
}

impl DirtyTracker {
    /// Lets another process close the gates of this VM's vCPUs, up to `places` of them, and nothing else.
    ///
    /// # Errors
    ///
    /// [`TrackError::Ended`], [`TrackError::Lent`], or what the kernel refused.
    pub(crate) fn lend_gates(&self, places: usize) -> Result<Keeping, TrackError> {
        let state = &mut *self.shared.lock();
        state.check_not_ended()?;
        state.check_not_lent()?;
        let (page, file) = LentPage::create(c"ringferry-offload", places)
            .map_err(|source| KvmError::Ioctl { name: "memfd_create", source })?;
        let page = Arc::new(page);
        let mut gates = LentGates::new(&page);
        state.vcpus.iter().for_each(|vcpu| gates.lend(vcpu));
        state.gates = Some(gates);
        Ok(Keeping { shared: Arc::clone(&self.shared), page, file })
    }

    /// Where guest RAM ends, as far as it is tracked.
    pub(crate) fn tracked_end(&self) -> PageIndex {
        self.shared.lock().slots.end()
    }
}

impl Keeping {
    pub(crate) fn page(&self) -> &LentPage {
        &self.page
    }

    /// The page, to be passed on.
    pub(crate) fn page_file(&self) -> &File {
        &self.file
    }

    /// Each slot that is tracked.
    pub(crate) fn slots(&self) -> Vec<(SlotId, PageRun)> {
        self.shared.lock().slots.logged().map(|region| (region.slot, region.pages)).collect()
    }

    /// The VMM's index of each vCPU, in the order of attachment, and the place of its gate, if it has one.
    pub(crate) fn vcpus(&self) -> Vec<(usize, Option<usize>)> {
        let state = self.shared.lock();
        let place = |vcpu| state.gates.as_ref().and_then(|gates| gates.place(vcpu));
        state.vcpus.iter().map(|vcpu| (vcpu.index, place(vcpu))).collect()
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        let gates = self.shared.lock().gates.take();
        gates.into_iter().for_each(LentGates::take_back);
    }
}
