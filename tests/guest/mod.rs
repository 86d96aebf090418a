//! A tracked VM of one vCPU, which writes the pages that a test says.

use std::collections::BTreeSet;

use ringferry::track::{DirtyTracker, Session, VcpuHandle};
use ringferry::{PageIndex, PageSet};

use crate::bare::{BareVcpu, BareVm, Privilege, Work};

pub struct Guest {
    pub vm: BareVm,
    pub tracker: DirtyTracker,
    pub session: Session,
    pub vcpu: BareVcpu,
    pub handle: VcpuHandle,
    /// What it wrote last.
    pub value: u64,
}

impl Guest {
    /// A session of it has not started.
    pub fn tracked(vm: BareVm, tracker: DirtyTracker) -> Self {
        tracker.add_memory(vm.memory()).unwrap();
        let vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
        let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
        Self { vm, session: tracker.session(), tracker, vcpu, handle, value: 0 }
    }

    pub fn write(&mut self, pages: &BTreeSet<PageIndex>) {
        self.value += 1;
        self.vcpu.set_work(&Work::List(pages.iter().copied().collect()), self.value).unwrap();
        self.vcpu.run_to_end(Some(&self.handle)).unwrap();
        let is_written = |page: &PageIndex| self.vm.word(*page).unwrap() == self.value;
        assert!(pages.iter().all(is_written), "the guest did not write");
    }

    pub fn harvest(&mut self) -> BTreeSet<PageIndex> {
        let mut dirty = PageSet::new(self.vm.memory().end());
        self.session.harvest(&mut dirty).unwrap();
        pages(&dirty)
    }
}

pub fn pages(set: &PageSet) -> BTreeSet<PageIndex> {
    set.runs().flat_map(|run| (run.first.0..run.end().0).map(PageIndex)).collect()
}
