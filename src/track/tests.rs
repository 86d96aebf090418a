//! Tracking against a kernel in memory: every event in any order, against a model that counts versions.
//!
//! The model is end to end. Each page has a version, which every write raises. Whoever harvests "sends" the pages
//! handed out: notes their versions at that time. When all is over and the last harvest is sent, every page must
//! have been sent in its last version. A page handed out before it was protected, an entry lost, a page given back
//! and forgotten: each leaves a page behind.

mod edges;
mod externals;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::kvm::RingSize;
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::page_set::PageSet;
use crate::testing::{FakeKernel, Interruption, WriteDuringReset};
use crate::vm::{Paused, VmError};

const RING: u32 = 256;
const SLOT_PAGES: u64 = 300;
/// Slot `n` begins at page `n * SLOT_STRIDE`, not aligned to a word.
const SLOT_STRIDE: u64 = 1_001;
const SLOTS: u32 = 3;

fn slot_pages(slot: u32) -> PageRun {
    PageRun { first: PageIndex(u64::from(slot) * SLOT_STRIDE), pages: SLOT_PAGES }
}

/// A migration's view of a guest.
struct Model {
    kernel: FakeKernel,
    tracker: DirtyTracker,
    session: Session,
    vcpus: Vec<VcpuHandle>,
    slots: BTreeSet<u32>,
    version: BTreeMap<u64, u64>,
    sent: BTreeMap<u64, u64>,
    /// What was harvested and may yet fail to arrive.
    taken: PageSet,
    /// Pages that observations reported and no harvest handed out yet.
    redirtied: Redirtied,
    /// What the last harvest left behind unprotected.
    behind: Redirtied,
}

fn end() -> PageIndex {
    slot_pages(SLOTS).end()
}

impl Model {
    fn new(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool) -> Self {
        Self::leaving(vcpus, position, cpu_log_entries, bitmap, 0)
    }

    /// The same where the kernel can take `granule` pages at once from a guest; none if it is 0.
    fn leaving(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool, granule: u64) -> Self {
        let kernel = FakeKernel::new();
        kernel.can_take_pages(NonZeroU64::new(granule));
        let tracker = if bitmap {
            DirtyTracker::on_fake_bitmap(&kernel)
        } else {
            DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(RING).unwrap())
        };
        let attach = |index| tracker.attach_fake_vcpu(index, &kernel, position, cpu_log_entries).unwrap();
        let vcpus = (0..vcpus).map(attach).collect();
        let mut model = Self {
            kernel,
            session: tracker.session(),
            tracker,
            vcpus,
            slots: BTreeSet::new(),
            version: BTreeMap::new(),
            sent: BTreeMap::new(),
            taken: PageSet::new(end()),
            redirtied: Redirtied::new(end()),
            behind: Redirtied::new(end()),
        };
        (0..SLOTS).for_each(|slot| model.add_slot(slot));
        model.start();
        model
    }

    fn add_slot(&mut self, slot: u32) {
        if self.slots.insert(slot) {
            let memory = self.kernel.create_slot(SlotId(slot), slot_pages(slot));
            self.tracker.add_memory(&memory).unwrap();
            for page in slot_pages(slot).first.0..slot_pages(slot).end().0 {
                self.version.insert(page, 1);
            }
        }
    }

    fn remove_slot(&mut self, slot: u32) {
        if self.slots.remove(&slot) {
            self.tracker.remove_slot(SlotId(slot)).unwrap();
            self.kernel.delete_slot(SlotId(slot));
            for page in slot_pages(slot).first.0..slot_pages(slot).end().0 {
                self.version.remove(&page);
                self.sent.remove(&page);
                self.taken.remove(PageIndex(page));
                self.redirtied.pages_mut().remove(PageIndex(page));
                self.behind.pages_mut().remove(PageIndex(page));
            }
        }
    }

    /// A migration begins: all of memory is sent once.
    fn start(&mut self) {
        self.session.start().unwrap();
        self.note_writes_during_reset();
        self.sent = self.version.clone();
        self.taken.clear();
        self.redirtied.clear();
        self.behind.clear();
    }

    fn wrote(&mut self, slot: u32, offset: u64) {
        if self.slots.contains(&slot) {
            *self.version.get_mut(&(slot_pages(slot).first.0 + offset)).unwrap() += 1;
        }
    }

    /// Runs the vCPU until it wrote: as a VMM does, with an exit for every full ring.
    fn write(&mut self, vcpu: usize, slot: u32, offset: u64) {
        for _ in 0..10_000 {
            if self.kernel.write(vcpu, SlotId(slot), offset) {
                return self.wrote(slot, offset);
            }
            self.vcpus[vcpu].ring_full().unwrap();
            let _ = self.vcpus[vcpu].before_run();
        }
        panic!("vCPU {vcpu} is stuck: its ring stays full");
    }

    fn emulate(&mut self, vcpu: usize, slot: u32, offsets: &[u64]) {
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

    fn send(&mut self, dirty: &PageSet) {
        self.note_writes_during_reset();
        for run in dirty.runs() {
            for page in run.first.0..run.end().0 {
                let version = self.version.get(&page).expect("a page that is not RAM was handed out");
                self.sent.insert(page, *version);
            }
        }
        self.taken.union(dirty);
        self.redirtied.pages_mut().subtract(dirty);
    }

    fn harvest(&mut self) {
        let mut dirty = PageSet::new(end());
        self.session.harvest(&mut dirty).unwrap();
        self.send(&dirty);
        assert!(
            self.redirtied.is_empty(),
            "pages were struck off a round and are in no later one: {:?}",
            self.redirtied
        );
    }

    fn harvest_protected(&mut self) {
        let mut dirty = PageSet::new(end());
        self.behind.clear();
        self.session.harvest_protected(&mut dirty, &mut self.behind).unwrap();
        assert!(!dirty.intersects(self.behind.pages_mut()), "protected or not");
        self.send(&dirty);
        self.behind.strike_off(self.redirtied.pages_mut());
        assert!(self.redirtied.is_empty(), "struck off and in no later round: {:?}", self.redirtied);
    }

    fn protect(&mut self, pages: u64) {
        let mut dirty = PageSet::new(end());
        let before = self.behind.len();
        self.session.protect(&mut self.behind, pages, &mut dirty).unwrap();
        assert!(dirty.len() <= before - self.behind.len(), "no other pages");
        self.send(&dirty);
    }

    fn harvest_paused(&mut self) -> PageSet {
        (0..self.vcpus.len()).for_each(|vcpu| self.kernel.exit(vcpu));
        self.kernel.cancel_writes_during_reset();
        let mut dirty = PageSet::new(end());
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        self.session.harvest_paused(&paused, &mut dirty).unwrap();
        dirty
    }

    fn harvest_final(&mut self) {
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        (0..self.vcpus.len()).for_each(|vcpu| self.kernel.exit(vcpu));
        self.kernel.cancel_writes_during_reset();
        let mut dirty = PageSet::new(end());
        self.session.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
        self.send(&dirty);
    }

    fn take_slot_bitmap(&mut self, slot: u32) {
        if !self.slots.contains(&slot) {
            let unknown = self.session.take_slot_bitmap(SlotId(slot));
            assert!(matches!(unknown, Err(TrackError::SlotUnknown(SlotId(id))) if id == slot));
            return;
        }
        let words = self.session.take_slot_bitmap(SlotId(slot)).unwrap();
        let mut dirty = PageSet::new(end());
        dirty.union_words(slot_pages(slot).first, &words);
        self.send(&dirty);
    }

    /// The migration fails: what was taken never arrived.
    fn fail(&mut self) {
        self.session.give_back(&self.taken);
        for run in self.taken.runs() {
            self.sent.extend((run.first.0..run.end().0).map(|page| (page, 0)));
        }
        self.taken.clear();
    }

    fn check_nothing_is_lost(&mut self) {
        self.harvest_final();
        for (page, version) in &self.version {
            assert_eq!(self.sent.get(page), Some(version), "page {page:#x} was sent in an old version");
        }
    }
}

/// All that may happen to a tracked VM.
#[derive(Clone, Debug)]
enum Event {
    Write { vcpu: Index, slot: u32, first: u64, pages: u64, step: u64 },
    Emulate { vcpu: Index, slot: u32, offsets: Vec<u64>, times: usize },
    WriteDuringReset { vcpu: Index, slot: u32, offset: u64, after: bool, emulated: Option<u64> },
    Interrupt(u32),
    ForeignReset,
    VmmWrite { slot: u32, offset: u64 },
    Observe,
    Harvest,
    HarvestProtected,
    Protect(u64),
    HarvestPaused { called_off: bool },
    HarvestFinal,
    CannotTakePages,
    TakeSlotBitmap(u32),
    Fail,
    Restart,
    AddSlot(u32),
    RemoveSlot(u32),
    SpuriousRingFull(Index),
}

fn emulation() -> impl Strategy<Value = Event> {
    let offsets = prop::collection::vec(0..SLOT_PAGES, 1..40);
    (any::<Index>(), 0..SLOTS, offsets, 1..30_usize).prop_map(|(vcpu, slot, offsets, times)| Event::Emulate {
        vcpu,
        slot,
        offsets,
        times,
    })
}

fn event() -> impl Strategy<Value = Event> {
    let slot = 0..SLOTS;
    let offset = 0..SLOT_PAGES;
    let vcpu = any::<Index>();
    prop_oneof![
        8 => (vcpu.clone(), slot.clone(), offset.clone(), 1..SLOT_PAGES, 1..80_u64).prop_map(
            |(vcpu, slot, first, pages, step)| Event::Write { vcpu, slot, first, pages, step }
        ),
        2 => (vcpu.clone(), slot.clone(), offset.clone(), any::<bool>()).prop_map(
            |(vcpu, slot, offset, after)| Event::WriteDuringReset { vcpu, slot, offset, after, emulated: None }
        ),
        2 => (0..400_u32).prop_map(Event::Interrupt),
        1 => Just(Event::ForeignReset),
        2 => (slot.clone(), offset).prop_map(|(slot, offset)| Event::VmmWrite { slot, offset }),
        2 => Just(Event::Observe),
        4 => Just(Event::Harvest),
        4 => Just(Event::HarvestProtected),
        4 => (0..SLOT_PAGES).prop_map(Event::Protect),
        2 => any::<bool>().prop_map(|called_off| Event::HarvestPaused { called_off }),
        1 => Just(Event::HarvestFinal),
        1 => Just(Event::CannotTakePages),
        2 => slot.clone().prop_map(Event::TakeSlotBitmap),
        1 => Just(Event::Fail),
        1 => Just(Event::Restart),
        1 => slot.clone().prop_map(Event::AddSlot),
        1 => slot.prop_map(Event::RemoveSlot),
        1 => vcpu.prop_map(Event::SpuriousRingFull),
    ]
}

impl Model {
    fn apply(&mut self, event: &Event) {
        self.apply_one(event);
        self.note_writes_during_reset();
    }

    fn apply_one(&mut self, event: &Event) {
        let count = self.vcpus.len();
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
            Event::ForeignReset => self.kernel.foreign_reset(),
            Event::VmmWrite { slot, offset } => {
                self.wrote(*slot, *offset);
                let first = PageIndex(slot_pages(*slot).first.0 + offset);
                self.tracker.mark_dirty(PageRun { first, pages: 1 });
            }
            Event::Observe => drop(self.session.observe_into(&mut self.redirtied).unwrap()),
            Event::Harvest => self.harvest(),
            Event::HarvestProtected => self.harvest_protected(),
            Event::Protect(pages) => self.protect(*pages),
            Event::HarvestPaused { called_off } => {
                let dirty = self.harvest_paused();
                if *called_off {
                    self.session.give_back(&dirty);
                } else {
                    self.send(&dirty);
                }
            }
            Event::HarvestFinal => self.harvest_final(),
            Event::CannotTakePages => self.kernel.can_take_pages(None),
            Event::TakeSlotBitmap(slot) => self.take_slot_bitmap(*slot),
            Event::Fail => self.fail(),
            Event::Restart => {
                self.session.stop().unwrap();
                self.start();
            }
            Event::AddSlot(slot) => self.add_slot(*slot),
            Event::RemoveSlot(slot) => self.remove_slot(*slot),
            Event::SpuriousRingFull(vcpu) => self.vcpus[vcpu.index(count)].ring_full().unwrap(),
        }
    }
}

fn run(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool, granule: u64, events: &[Event]) {
    let mut model = Model::leaving(vcpus, position, cpu_log_entries, bitmap, granule);
    events.iter().for_each(|event| model.apply(event));
    model.check_nothing_is_lost();
}

/// Rings that begin anywhere, and often shortly before the index wraps at 2³².
fn position() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..2000_u32).prop_map(|before| before.wrapping_neg()), any::<u32>()]
}

/// Whether rings are recycled without protection: not where the kernel cannot take pages from a guest later.
fn granule() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0_u64), Just(1), Just(4)]
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(cases.unwrap_or(100))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn rings_lose_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        position in position(),
        cpu_log_entries in prop_oneof![Just(0_usize), Just(16)],
        granule in granule(),
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, position, cpu_log_entries, false, granule, &events);
    }

    #[test]
    fn rings_lose_nothing_when_emulation_overruns_them(
        vcpus in 1..5_usize,
        position in position(),
        granule in granule(),
        events in prop::collection::vec(prop_oneof![1 => emulation(), 5 => event()], 1..60),
    ) {
        run(vcpus, position, 0, false, granule, &events);
    }

    #[test]
    fn the_bitmap_loses_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, 0, 0, true, 0, &events);
    }
}

#[test]
fn an_observation_reports_each_page_once_and_those_that_were_taken_early_too() {
    let mut model = Model::new(2, 0, 0, false);
    let reported = |model: &mut Model| {
        let mut redirtied = Redirtied::new(end());
        model.session.observe_into(&mut redirtied).unwrap();
        redirtied.pages_mut().runs().flat_map(|run| run.first.0..run.end().0).collect::<Vec<_>>()
    };
    for page in [3, 4, 90] {
        model.write(0, 0, page);
    }
    assert_eq!(reported(&mut model), [3, 4, 90]);
    assert!(reported(&mut model).is_empty());
    model.write(1, 0, 7);
    model.write(0, 0, 3);
    assert_eq!(reported(&mut model), [7]);
    // Its own vCPU recycles a ring that nobody has observed.
    model.write(0, 0, 8);
    model.vcpus[0].ring_full().unwrap();
    assert!(reported(&mut model).contains(&8));
    model.harvest();
    assert!(reported(&mut model).is_empty());
}

#[test]
fn an_observation_that_reports_counts_a_page_once_however_often_kvm_names_it() {
    let mut model = Model::new(2, 0, 0, false);
    let mut redirtied = Redirtied::new(end());
    let mut observe = |model: &mut Model| {
        redirtied.clear();
        model.session.observe_into(&mut redirtied).unwrap()
    };
    model.emulate(0, 1, &[5, 5, 9]);
    assert_eq!(observe(&mut model), Observed::PerVcpu(vec![2, 0]));
    // Again after an observation, and by the other vCPU.
    model.emulate(0, 1, &[9, 11]);
    model.emulate(1, 1, &[5, 12]);
    assert_eq!(observe(&mut model), Observed::PerVcpu(vec![3, 1]));
    // In another round they are new, wholly or a slot at a time.
    model.harvest();
    model.emulate(1, 1, &[9, 9]);
    assert_eq!(observe(&mut model), Observed::PerVcpu(vec![0, 1]));
    model.session.take_slot_bitmap(SlotId(1)).unwrap();
    model.emulate(1, 1, &[9]);
    assert_eq!(observe(&mut model), Observed::PerVcpu(vec![0, 1]));
}

/// A signal that comes after the last entry was counted leaves the count right and the last batch unprotected.
#[test]
fn a_reset_that_was_stopped_at_its_very_end_is_not_trusted() {
    let mut model = Model::new(1, 0, 0, false);
    for page in [3, 4, 200] {
        model.write(0, 1, page);
    }
    model.kernel.interrupt_a_reset(Interruption { after_entries: 3 });
    model.harvest();
    model.write(0, 1, 200);
    model.check_nothing_is_lost();
}

#[test]
fn a_short_reset_is_retried_until_every_entry_is_protected() {
    let mut model = Model::new(2, 0, 0, false);
    for page in 0..100 {
        model.write(0, 1, page);
        model.write(1, 2, page * 3);
    }
    for after_entries in [0, 10, 0, 150, 7] {
        model.kernel.interrupt_a_reset(Interruption { after_entries });
    }
    model.harvest();
    let figures = model.tracker.snapshot();
    assert_eq!((figures.short_resets, figures.entries_reset, figures.rearms), (5, 200, 0));
    for page in 0..100 {
        model.write(0, 1, page);
        model.write(1, 2, page * 3);
    }
    model.check_nothing_is_lost();
}

/// KVM's emulator pushes an entry for each write, PML may push two for one.
#[test]
fn a_page_that_is_named_again_and_again_is_one_page_and_duplicates() {
    let mut model = Model::new(1, 0, 0, false);
    model.emulate(0, 1, &[5, 5, 9, 5]);
    model.harvest();
    let vcpu = model.tracker.snapshot().vcpus[0];
    assert_eq!((vcpu.pages, vcpu.duplicate_entries), (2, 2));
    model.check_nothing_is_lost();
}

#[test]
fn a_ring_goes_on_when_its_index_wraps() {
    let mut model = Model::new(1, u32::MAX - 10, 0, false);
    for _ in 0..3 {
        (0..20).for_each(|page| model.write(0, 1, page));
        let observed = model.session.observe().unwrap();
        assert_eq!(observed, Observed::PerVcpu(vec![20]));
        model.harvest();
    }
    let figures = model.tracker.snapshot();
    assert_eq!((figures.entries_reset, figures.vcpus[0].pages, figures.rearms), (60, 60, 0));
    model.check_nothing_is_lost();
}
