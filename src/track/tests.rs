//! Tracking against a kernel in memory: every event in any order, against a model that counts versions.
//!
//! The model is end to end. Each page has a version, which every write raises. Whoever harvests "sends" the pages
//! handed out: notes their versions at that time. When all is over and the last harvest is sent, every page must
//! have been sent in its last version. A page handed out before it was protected, an entry lost, a page given back
//! and forgotten: each leaves a page behind.

mod edges;
#[cfg(feature = "offload")]
mod lending;

use std::collections::{BTreeMap, BTreeSet};

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
    vcpus: Vec<VcpuHandle>,
    slots: BTreeSet<u32>,
    version: BTreeMap<u64, u64>,
    sent: BTreeMap<u64, u64>,
    /// What was harvested and may yet fail to arrive.
    taken: PageSet,
    /// Pages that observations reported and no harvest handed out yet.
    redirtied: Redirtied,
}

fn end() -> PageIndex {
    slot_pages(SLOTS).end()
}

impl Model {
    fn new(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool) -> Self {
        let kernel = FakeKernel::new();
        let tracker = if bitmap {
            DirtyTracker::on_fake_bitmap(&kernel)
        } else {
            DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(RING).unwrap())
        };
        let attach = |index| tracker.attach_fake_vcpu(index, &kernel, position, cpu_log_entries).unwrap();
        let vcpus = (0..vcpus).map(attach).collect();
        let mut model = Self {
            kernel,
            tracker,
            vcpus,
            slots: BTreeSet::new(),
            version: BTreeMap::new(),
            sent: BTreeMap::new(),
            taken: PageSet::new(end()),
            redirtied: Redirtied::new(end()),
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
            }
        }
    }

    /// A migration begins: all of memory is sent once.
    fn start(&mut self) {
        self.tracker.start().unwrap();
        self.note_writes_during_reset();
        self.sent = self.version.clone();
        self.taken.clear();
        self.redirtied.clear();
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
        self.tracker.harvest(&mut dirty).unwrap();
        self.send(&dirty);
        assert!(
            self.redirtied.is_empty(),
            "pages were struck off a round and are in no later one: {:?}",
            self.redirtied
        );
    }

    fn harvest_final(&mut self) {
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        (0..self.vcpus.len()).for_each(|vcpu| self.kernel.exit(vcpu));
        self.kernel.cancel_writes_during_reset();
        let mut dirty = PageSet::new(end());
        self.tracker.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
        self.send(&dirty);
    }

    fn take_slot_bitmap(&mut self, slot: u32) {
        if !self.slots.contains(&slot) {
            let unknown = self.tracker.take_slot_bitmap(SlotId(slot));
            assert!(matches!(unknown, Err(TrackError::SlotUnknown(SlotId(id))) if id == slot));
            return;
        }
        let words = self.tracker.take_slot_bitmap(SlotId(slot)).unwrap();
        let mut dirty = PageSet::new(end());
        dirty.union_words(slot_pages(slot).first, &words);
        self.send(&dirty);
    }

    /// The migration fails: what was taken never arrived.
    fn fail(&mut self) {
        self.tracker.give_back(&self.taken);
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
    HarvestFinal,
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
        1 => Just(Event::HarvestFinal),
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
            Event::Observe => drop(self.tracker.observe_into(&mut self.redirtied).unwrap()),
            Event::Harvest => self.harvest(),
            Event::HarvestFinal => self.harvest_final(),
            Event::TakeSlotBitmap(slot) => self.take_slot_bitmap(*slot),
            Event::Fail => self.fail(),
            Event::Restart => {
                self.tracker.stop().unwrap();
                self.start();
            }
            Event::AddSlot(slot) => self.add_slot(*slot),
            Event::RemoveSlot(slot) => self.remove_slot(*slot),
            Event::SpuriousRingFull(vcpu) => self.vcpus[vcpu.index(count)].ring_full().unwrap(),
        }
    }
}

fn run(vcpus: usize, position: u32, cpu_log_entries: usize, bitmap: bool, events: &[Event]) {
    let mut model = Model::new(vcpus, position, cpu_log_entries, bitmap);
    events.iter().for_each(|event| model.apply(event));
    model.check_nothing_is_lost();
}

/// Rings that begin anywhere, and often shortly before the index wraps at 2³².
fn position() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..2000_u32).prop_map(|before| before.wrapping_neg()), any::<u32>()]
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
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, position, cpu_log_entries, false, &events);
    }

    #[test]
    fn rings_lose_nothing_when_emulation_overruns_them(
        vcpus in 1..5_usize,
        position in position(),
        events in prop::collection::vec(prop_oneof![1 => emulation(), 5 => event()], 1..60),
    ) {
        run(vcpus, position, 0, false, &events);
    }

    #[test]
    fn the_bitmap_loses_nothing_whatever_happens_in_whatever_order(
        vcpus in 1..5_usize,
        events in prop::collection::vec(event(), 1..60),
    ) {
        run(vcpus, 0, 0, true, &events);
    }
}

#[test]
fn an_observation_reports_each_page_once_and_those_that_were_taken_early_too() {
    let mut model = Model::new(2, 0, 0, false);
    let reported = |model: &mut Model| {
        let mut redirtied = Redirtied::new(end());
        model.tracker.observe_into(&mut redirtied).unwrap();
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
        model.tracker.observe_into(&mut redirtied).unwrap()
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
    model.tracker.take_slot_bitmap(SlotId(1)).unwrap();
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
        let observed = model.tracker.observe().unwrap();
        assert_eq!(observed, Observed::PerVcpu(vec![20]));
        model.harvest();
    }
    let figures = model.tracker.snapshot();
    assert_eq!((figures.entries_reset, figures.vcpus[0].pages, figures.rearms), (60, 60, 0));
    model.check_nothing_is_lost();
}

/// A log that a test fills; it can be reported to refuse its start.
#[derive(Default)]
struct Log {
    pages: std::sync::Arc<std::sync::Mutex<Option<Vec<u64>>>>,
    refuses: bool,
}

impl external::ExternalSource for Log {
    fn name(&self) -> &'static str {
        "test"
    }

    fn start(&mut self) -> Result<(), VmError> {
        if self.refuses {
            return Err("no room".into());
        }
        *self.pages.lock().unwrap() = Some(Vec::new());
        Ok(())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let mut pages = self.pages.lock().unwrap();
        dirty.extend(pages.as_mut().unwrap().drain(..).map(PageIndex));
    }

    fn stop(&mut self) {
        *self.pages.lock().unwrap() = None;
    }
}

#[test]
fn external_logs_begin_end_and_are_harvested_with_the_tracker() {
    let mut model = Model::new(1, 0, 0, false);
    let log = Log::default();
    let pages = std::sync::Arc::clone(&log.pages);
    let id = model.tracker.add_external(Box::new(log)).unwrap();
    pages.lock().unwrap().as_mut().expect("started, as tracking is on").extend([5, SLOT_PAGES, u64::MAX]);
    model.write(0, 0, 7);
    let mut dirty = PageSet::new(end());
    model.tracker.harvest(&mut dirty).unwrap();
    assert_eq!(
        dirty.runs().map(|run| run.first.0).collect::<Vec<_>>(),
        [5, 7],
        "and no page that is not RAM"
    );

    model.tracker.stop().unwrap();
    assert!(pages.lock().unwrap().is_none());
    let refusing = Log { refuses: true, ..Log::default() };
    let refusing = model.tracker.add_external(Box::new(refusing)).unwrap();
    let error = model.tracker.start().unwrap_err();
    assert!(matches!(error, TrackError::External { name: "test", .. }), "{error:?}");
    assert!(pages.lock().unwrap().is_none(), "the first log was stopped again");
    assert!(model.tracker.remove_external(refusing).is_some());
    assert!(model.tracker.remove_external(refusing).is_none());

    model.tracker.start().unwrap();
    pages.lock().unwrap().as_mut().unwrap().push(9);
    assert!(model.tracker.remove_external(id).is_some());
    dirty.clear();
    model.tracker.harvest(&mut dirty).unwrap();
    assert!(dirty.contains(PageIndex(9)), "what it had logged when it went");
}

/// On arm64, pages that no vCPU dirtied are in a bitmap beside the rings, to be collected last.
#[test]
fn what_no_vcpu_wrote_comes_from_the_bitmap_beside_the_rings_with_the_final_harvest() {
    let kernel = FakeKernel::new();
    let mut tracker = DirtyTracker::on_fake_rings_with_bitmap(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), slot_pages(1))).unwrap();
    tracker.attach_fake_vcpu(0, &kernel, 0, 0).unwrap();
    tracker.start().unwrap();
    kernel.write_without_vcpu(SlotId(1), 70);
    assert!(kernel.write(0, SlotId(1), 5));
    let mut dirty = PageSet::new(end());
    tracker.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.len(), 1, "while vCPUs run, the rings only");
    kernel.write_without_vcpu(SlotId(1), 71);
    tracker
        .harvest_final(
            &Paused::declare_every_vcpu_is_outside_kvm_run().declare_nothing_else_writes(),
            &mut dirty,
        )
        .unwrap();
    let first = slot_pages(1).first.0;
    let pages: Vec<u64> = dirty.runs().flat_map(|run| run.first.0..run.end().0).collect();
    assert_eq!(pages, [first + 5, first + 70, first + 71]);
}

#[test]
fn what_was_given_back_outlasts_everything_but_a_harvest() {
    let mut model = Model::new(1, 0, 0, false);
    let (kept, other) = (slot_pages(1).first, slot_pages(2).first);
    let mut given_back = PageSet::new(end());
    given_back.extend([kept, other, PageIndex(slot_pages(0).end().0)]);
    model.tracker.give_back(&given_back);
    model.tracker.stop().unwrap();
    let beyond = PageRun { first: PageIndex(50_000), pages: 10 };
    model.tracker.add_memory(&model.kernel.create_slot(SlotId(9), beyond)).unwrap();
    model.tracker.start().unwrap();
    assert_eq!(model.tracker.take_slot_bitmap(SlotId(2)).unwrap()[0], 1);
    model.tracker.stop().unwrap();
    model.tracker.start().unwrap();
    let mut dirty = PageSet::new(beyond.end());
    model.tracker.harvest(&mut dirty).unwrap();
    let pages: Vec<PageIndex> = dirty.runs().map(|run| run.first).collect();
    assert_eq!((dirty.len(), pages), (1, vec![kept]), "once, and no page that is not RAM");
    dirty.clear();
    model.tracker.harvest(&mut dirty).unwrap();
    assert!(dirty.is_empty());
}
