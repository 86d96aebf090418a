//! A tracked guest and those who watch it, against a model that counts versions.
//!
//! The model is end to end. Each page has a version, which every write raises. Whoever harvests "sends" the pages
//! handed out: notes their versions at that time. When all is over and the last harvest is sent, every page must
//! have been sent in its last version, by each session. A page handed out before it was protected, an entry lost, a page
//! given back and forgotten, a page that another session took: each leaves a page behind.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use proptest::prelude::*;
use proptest::sample::Index;

use super::super::*;
use crate::kvm::RingSize;
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::page_set::PageSet;
use crate::testing::{FakeKernel, Interruption, WriteDuringReset};
use crate::vm::Paused;

pub(super) const RING: u32 = 256;
pub(super) const SLOT_PAGES: u64 = 300;
/// Slot `n` begins at page `n * SLOT_STRIDE`, not aligned to a word.
const SLOT_STRIDE: u64 = 1_001;
pub(super) const SLOTS: u32 = 3;
/// More vCPUs and sessions than these are not plugged in.
const VCPUS_MAX: usize = 8;
const VIEWS_MAX: usize = 4;

pub(super) fn slot_pages(slot: u32) -> PageRun {
    PageRun { first: PageIndex(u64::from(slot) * SLOT_STRIDE), pages: SLOT_PAGES }
}

pub(super) fn end() -> PageIndex {
    slot_pages(SLOTS).end()
}

pub(super) fn pages(set: &PageSet) -> BTreeSet<u64> {
    set.runs().flat_map(|run| run.first.0..run.end().0).collect()
}

/// What one session has seen.
pub(super) struct View {
    pub(super) session: Session,
    sent: BTreeMap<u64, u64>,
    /// What was harvested and may yet fail to arrive.
    taken: PageSet,
    /// Pages that observations reported and no harvest handed out yet.
    pub(super) redirtied: Redirtied,
    /// What the last harvest left behind unprotected.
    behind: Redirtied,
}

/// A guest and its sessions. The first of them always runs.
pub(super) struct Model {
    pub(super) kernel: FakeKernel,
    pub(super) tracker: DirtyTracker,
    pub(super) vcpus: Vec<VcpuHandle>,
    pub(super) views: Vec<View>,
    slots: BTreeSet<u32>,
    version: BTreeMap<u64, u64>,
    position: u32,
    cpu_log_entries: usize,
}

impl View {
    fn new(session: Session) -> Self {
        let (sent, taken) = (BTreeMap::new(), PageSet::new(end()));
        let nothing = || Redirtied::new(end());
        Self { session, sent, taken, redirtied: nothing(), behind: nothing() }
    }

    /// A migration begins: all of memory is sent once.
    fn all_is_sent(&mut self, version: &BTreeMap<u64, u64>) {
        self.sent.clone_from(version);
        self.taken.clear();
        self.redirtied.clear();
        self.behind.clear();
    }
}

impl Model {
    pub(super) fn new(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool) -> Self {
        Self::leaving(vcpus, position, cpu_log_entries, bitmap, 0)
    }

    /// The same where the kernel can take `granule` pages at once from a guest; none if it is 0.
    pub(super) fn leaving(
        vcpus: usize,
        position: u32,
        cpu_log_entries: usize,
        bitmap: bool,
        granule: u64,
    ) -> Self {
        let kernel = FakeKernel::new();
        kernel.can_take_pages(NonZeroU64::new(granule));
        let tracker = if bitmap {
            DirtyTracker::on_fake_bitmap(&kernel)
        } else {
            DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(RING).unwrap())
        };
        let mut model = Self {
            kernel,
            views: vec![View::new(tracker.session())],
            tracker,
            vcpus: Vec::new(),
            slots: BTreeSet::new(),
            version: BTreeMap::new(),
            position,
            cpu_log_entries,
        };
        (0..vcpus).for_each(|_| model.add_vcpu());
        (0..SLOTS).for_each(|slot| model.add_slot(slot));
        model.start(0);
        model
    }

    pub(super) fn session(&self) -> &Session {
        &self.views[0].session
    }

    /// Pages by vCPU that the first session observes, every page reported.
    pub(super) fn observe(&mut self) -> Observed {
        let View { session, redirtied, .. } = &mut self.views[0];
        session.observe_into(redirtied).unwrap()
    }

    fn add_vcpu(&mut self) {
        if self.vcpus.len() < VCPUS_MAX {
            let (index, log) = (self.vcpus.len(), self.cpu_log_entries);
            let vcpu = self.tracker.attach_fake_vcpu(index, &self.kernel, self.position, log);
            self.vcpus.push(vcpu.unwrap());
        }
    }

    pub(super) fn add_slot(&mut self, slot: u32) {
        if self.slots.insert(slot) {
            let memory = self.kernel.create_slot(SlotId(slot), slot_pages(slot));
            self.tracker.add_memory(&memory).unwrap();
            for page in slot_pages(slot).first.0..slot_pages(slot).end().0 {
                self.version.insert(page, 1);
            }
        }
    }

    pub(super) fn remove_slot(&mut self, slot: u32) {
        if self.slots.remove(&slot) {
            self.tracker.remove_slot(SlotId(slot)).unwrap();
            self.kernel.delete_slot(SlotId(slot));
            for page in slot_pages(slot).first.0..slot_pages(slot).end().0 {
                self.version.remove(&page);
                for view in &mut self.views {
                    view.sent.remove(&page);
                    view.taken.remove(PageIndex(page));
                    view.redirtied.pages_mut().remove(PageIndex(page));
                    view.behind.pages_mut().remove(PageIndex(page));
                }
            }
        }
    }

    fn start(&mut self, view: usize) {
        self.views[view].session.start().unwrap();
        self.note_writes_during_reset();
        self.views[view].all_is_sent(&self.version);
    }

    fn add_view(&mut self) {
        if self.views.len() < VIEWS_MAX {
            self.views.push(View::new(self.tracker.session()));
            self.start(self.views.len() - 1);
        }
    }

    fn remove_view(&mut self, view: usize) {
        if view > 0 {
            self.views.remove(view);
        }
    }

    /// A session leaves its pages to the next one, which goes on where it was.
    fn replace_session(&mut self, view: usize) {
        // Nobody sees what is written between the two.
        self.kernel.cancel_writes_during_reset();
        let view = &mut self.views[view];
        let old = std::mem::replace(&mut view.session, self.tracker.session());
        old.end(Leftover::GiveBack).unwrap();
        view.session.start().unwrap();
        view.redirtied.clear();
        view.behind.clear();
    }

    fn wrote(&mut self, slot: u32, offset: u64) {
        if self.slots.contains(&slot) {
            *self.version.get_mut(&(slot_pages(slot).first.0 + offset)).unwrap() += 1;
        }
    }

    /// Runs the vCPU until it wrote: as a VMM does, with an exit for every full ring.
    pub(super) fn write(&mut self, vcpu: usize, slot: u32, offset: u64) {
        for _ in 0..10_000 {
            if self.kernel.write(vcpu, SlotId(slot), offset) {
                return self.wrote(slot, offset);
            }
            self.vcpus[vcpu].ring_full().unwrap();
            let _ = self.vcpus[vcpu].before_run();
        }
        panic!("vCPU {vcpu} is stuck: its ring stays full");
    }

    pub(super) fn emulate(&mut self, vcpu: usize, slot: u32, offsets: &[u64]) {
        for _ in 0..10_000 {
            if self.kernel.emulate_writes(vcpu, SlotId(slot), offsets.iter().copied()) {
                return offsets.iter().for_each(|offset| self.wrote(slot, *offset));
            }
            self.vcpus[vcpu].ring_full().unwrap();
            let _ = self.vcpus[vcpu].before_run();
        }
        panic!("vCPU {vcpu} is stuck: its ring stays full");
    }

    fn note_writes_during_reset(&mut self) {
        for (slot, offset) in self.kernel.take_written_during_reset() {
            self.wrote(slot.0, offset);
        }
    }

    fn send_of(&mut self, view: usize, dirty: &PageSet) {
        self.note_writes_during_reset();
        let view = &mut self.views[view];
        for page in pages(dirty) {
            let version = self.version.get(&page).expect("a page that is not RAM was handed out");
            view.sent.insert(page, *version);
        }
        view.taken.union(dirty);
        view.redirtied.pages_mut().subtract(dirty);
    }

    pub(super) fn send(&mut self, dirty: &PageSet) {
        self.send_of(0, dirty);
    }

    pub(super) fn harvest(&mut self) {
        self.harvest_of(0);
    }

    pub(super) fn harvest_of(&mut self, view: usize) -> BTreeSet<u64> {
        let mut dirty = PageSet::new(end());
        self.views[view].session.harvest(&mut dirty).unwrap();
        self.send_of(view, &dirty);
        assert!(
            self.views[view].redirtied.is_empty(),
            "pages were struck off a round and are in no later one: {:?}",
            self.views[view].redirtied
        );
        pages(&dirty)
    }

    fn harvest_protected(&mut self, view: usize) {
        let mut dirty = PageSet::new(end());
        let View { session, behind, .. } = &mut self.views[view];
        behind.clear();
        session.harvest_protected(&mut dirty, behind).unwrap();
        assert!(!dirty.intersects(behind.pages_mut()), "protected or not");
        self.send_of(view, &dirty);
        let View { behind, redirtied, .. } = &mut self.views[view];
        behind.strike_off(redirtied.pages_mut());
        assert!(redirtied.is_empty(), "struck off and in no later round: {redirtied:?}");
    }

    fn protect(&mut self, view: usize, pages: u64) {
        let mut dirty = PageSet::new(end());
        let View { session, behind, .. } = &mut self.views[view];
        let before = behind.len();
        session.protect(behind, pages, &mut dirty).unwrap();
        assert!(dirty.len() <= before - behind.len(), "no other pages");
        self.send_of(view, &dirty);
    }

    fn harvest_paused(&mut self, view: usize) -> PageSet {
        (0..self.vcpus.len()).for_each(|vcpu| self.kernel.exit(vcpu));
        self.kernel.cancel_writes_during_reset();
        let mut dirty = PageSet::new(end());
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        self.views[view].session.harvest_paused(&paused, &mut dirty).unwrap();
        dirty
    }

    fn harvest_final_of(&mut self, view: usize) {
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        (0..self.vcpus.len()).for_each(|vcpu| self.kernel.exit(vcpu));
        self.kernel.cancel_writes_during_reset();
        let mut dirty = PageSet::new(end());
        let settled = paused.declare_nothing_else_writes();
        self.views[view].session.harvest_final(&settled, &mut dirty).unwrap();
        self.send_of(view, &dirty);
    }

    pub(super) fn take_slot_bitmap(&mut self, slot: u32) {
        self.take_slot_bitmap_of(0, slot);
    }

    fn take_slot_bitmap_of(&mut self, view: usize, slot: u32) {
        let words = self.views[view].session.take_slot_bitmap(SlotId(slot));
        if !self.slots.contains(&slot) {
            assert!(matches!(words, Err(TrackError::SlotUnknown(SlotId(id))) if id == slot));
            return;
        }
        let mut dirty = PageSet::new(end());
        dirty.union_words(slot_pages(slot).first, &words.unwrap());
        self.send_of(view, &dirty);
    }

    /// The migration fails: what was taken never arrived.
    fn fail(&mut self, view: usize) {
        let View { session, sent, taken, .. } = &mut self.views[view];
        session.give_back(taken);
        sent.extend(pages(taken).into_iter().map(|page| (page, 0)));
        taken.clear();
    }

    pub(super) fn check_nothing_is_lost(&mut self) {
        for view in 0..self.views.len() {
            self.harvest_final_of(view);
            for (page, version) in &self.version {
                let sent = self.views[view].sent.get(page);
                assert_eq!(
                    sent,
                    Some(version),
                    "page {page:#x} was sent in an old version by session {view}"
                );
            }
        }
    }
}

/// All that may happen to a tracked VM.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write { vcpu: Index, slot: u32, first: u64, pages: u64, step: u64 },
    Emulate { vcpu: Index, slot: u32, offsets: Vec<u64>, times: usize },
    WriteDuringReset { vcpu: Index, slot: u32, offset: u64, after: bool, emulated: Option<u64> },
    Interrupt(u32),
    ForeignReset,
    ForeignFlush,
    VmmWrite { slot: u32, offset: u64 },
    Observe(Index),
    Harvest(Index),
    HarvestProtected(Index),
    Protect(Index, u64),
    HarvestPaused { view: Index, called_off: bool },
    HarvestFinal(Index),
    CannotTakePages,
    TakeSlotBitmap(Index, u32),
    Fail(Index),
    Restart(Index),
    AddSession,
    DropSession(Index),
    ReplaceSession(Index),
    AddSlot(u32),
    RemoveSlot(u32),
    AddVcpu,
    SpuriousRingFull(Index),
}

pub(super) fn emulation() -> impl Strategy<Value = Event> {
    let offsets = prop::collection::vec(0..SLOT_PAGES, 1..40);
    (any::<Index>(), 0..SLOTS, offsets, 1..30_usize).prop_map(|(vcpu, slot, offsets, times)| Event::Emulate {
        vcpu,
        slot,
        offsets,
        times,
    })
}

pub(super) fn write() -> impl Strategy<Value = Event> {
    (any::<Index>(), 0..SLOTS, 0..SLOT_PAGES, 1..SLOT_PAGES, 1..80_u64)
        .prop_map(|(vcpu, slot, first, pages, step)| Event::Write { vcpu, slot, first, pages, step })
}

pub(super) fn event() -> impl Strategy<Value = Event> {
    let (slot, offset, any_one) = (0..SLOTS, 0..SLOT_PAGES, any::<Index>());
    prop_oneof![
        8 => write(),
        2 => (any_one.clone(), slot.clone(), offset.clone(), any::<bool>()).prop_map(
            |(vcpu, slot, offset, after)| Event::WriteDuringReset { vcpu, slot, offset, after, emulated: None }
        ),
        2 => (0..400_u32).prop_map(Event::Interrupt),
        1 => Just(Event::ForeignReset),
        1 => Just(Event::ForeignFlush),
        2 => (slot.clone(), offset).prop_map(|(slot, offset)| Event::VmmWrite { slot, offset }),
        2 => any_one.clone().prop_map(Event::Observe),
        4 => any_one.clone().prop_map(Event::Harvest),
        4 => any_one.clone().prop_map(Event::HarvestProtected),
        4 => (any_one.clone(), 0..SLOT_PAGES).prop_map(|(view, pages)| Event::Protect(view, pages)),
        2 => (any_one.clone(), any::<bool>())
            .prop_map(|(view, called_off)| Event::HarvestPaused { view, called_off }),
        1 => any_one.clone().prop_map(Event::HarvestFinal),
        1 => Just(Event::CannotTakePages),
        2 => (any_one.clone(), slot.clone()).prop_map(|(view, slot)| Event::TakeSlotBitmap(view, slot)),
        1 => any_one.clone().prop_map(Event::Fail),
        1 => any_one.clone().prop_map(Event::Restart),
        1 => Just(Event::AddSession),
        1 => any_one.clone().prop_map(Event::DropSession),
        1 => any_one.clone().prop_map(Event::ReplaceSession),
        1 => slot.clone().prop_map(Event::AddSlot),
        1 => slot.prop_map(Event::RemoveSlot),
        1 => Just(Event::AddVcpu),
        1 => any_one.prop_map(Event::SpuriousRingFull),
    ]
}

impl Model {
    pub(super) fn apply(&mut self, event: &Event) {
        self.apply_one(event);
        self.note_writes_during_reset();
    }

    fn apply_one(&mut self, event: &Event) {
        let (count, views) = (self.vcpus.len(), self.views.len());
        match event {
            Event::Write { vcpu, slot, first, pages, step } => {
                for i in 0..*pages {
                    self.write(vcpu.index(count), *slot, (first + i * step) % SLOT_PAGES);
                }
            }
            Event::Emulate { vcpu, slot, offsets, times } => {
                self.emulate(vcpu.index(count), *slot, &offsets.repeat(*times));
            }
            Event::WriteDuringReset { vcpu, slot, offset, after, emulated } => {
                let (vcpu, slot) = (vcpu.index(count), SlotId(*slot));
                let (offset, after, emulated) = (*offset, *after, *emulated);
                self.kernel.write_during_reset(WriteDuringReset { vcpu, slot, offset, after, emulated });
            }
            Event::Interrupt(after_entries) => {
                self.kernel.interrupt_a_reset(Interruption { after_entries: *after_entries });
            }
            Event::ForeignReset => self.kernel.foreign_reset_before_the_next(),
            Event::ForeignFlush => self.kernel.foreign_flush(),
            Event::VmmWrite { slot, offset } => {
                self.wrote(*slot, *offset);
                let first = PageIndex(slot_pages(*slot).first.0 + offset);
                self.tracker.mark_dirty(PageRun { first, pages: 1 });
            }
            Event::Observe(view) => {
                let View { session, redirtied, .. } = &mut self.views[view.index(views)];
                session.observe_into(redirtied).unwrap();
            }
            Event::Harvest(view) => drop(self.harvest_of(view.index(views))),
            Event::HarvestProtected(view) => self.harvest_protected(view.index(views)),
            Event::Protect(view, pages) => self.protect(view.index(views), *pages),
            Event::HarvestPaused { view, called_off } => {
                let view = view.index(views);
                let dirty = self.harvest_paused(view);
                if *called_off {
                    self.views[view].session.give_back(&dirty);
                } else {
                    self.send_of(view, &dirty);
                }
            }
            Event::CannotTakePages => self.kernel.can_take_pages(None),
            Event::HarvestFinal(view) => self.harvest_final_of(view.index(views)),
            Event::TakeSlotBitmap(view, slot) => self.take_slot_bitmap_of(view.index(views), *slot),
            Event::Fail(view) => self.fail(view.index(views)),
            Event::Restart(view) => {
                let view = view.index(views);
                self.views[view].session.stop().unwrap();
                self.start(view);
            }
            Event::AddSession => self.add_view(),
            Event::DropSession(view) => self.remove_view(view.index(views)),
            Event::ReplaceSession(view) => self.replace_session(view.index(views)),
            Event::AddSlot(slot) => self.add_slot(*slot),
            Event::RemoveSlot(slot) => self.remove_slot(*slot),
            Event::AddVcpu => self.add_vcpu(),
            Event::SpuriousRingFull(vcpu) => self.vcpus[vcpu.index(count)].ring_full().unwrap(),
        }
    }
}
