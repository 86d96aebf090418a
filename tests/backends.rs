//! One conformance test that every tracking backend passes, on a guest that writes the pages it is told to.
#![expect(unsafe_code, reason = "what a guest wrote is read where it is mapped")]
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::collections::BTreeSet;

use bare::{BareVcpu, BareVm, DATA, Privilege, Work, kvm};
use ringferry::kvm::RingSize;
use ringferry::testing::{AnonymousRam, Backing};
use ringferry::track::external::RegionLog;
use ringferry::track::{DirtyTracker, Observed, PagemapTracker, Session, VcpuHandle};
use ringferry::{
    DirtySource, GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Paused, Redirtied, SlotId, TrackError,
};

/// Two regions that touch each other, neither a multiple of 64 pages.
const REGION_PAGES: [u64; 2] = [4000, 1001];
const PAGES: u64 = REGION_PAGES[0] + REGION_PAGES[1];

/// A guest with RAM from [`DATA`] on.
trait Guest {
    fn memory(&self) -> &GuestMemory;
    fn source(&mut self) -> &mut dyn DirtySource;
    /// Writes `value` to the first word of each page, in order, and stands still again.
    fn write(&mut self, pages: &[PageIndex], value: u64);
    /// Whether the source cannot look without disturbing.
    const UNOBSERVABLE: bool;
    /// Whether it knows which vCPU wrote.
    const PER_VCPU: bool;
}

struct KvmGuest<const RING: bool> {
    vm: BareVm,
    vcpu: BareVcpu,
    handle: VcpuHandle,
    tracker: DirtyTracker,
    session: Session,
}

impl<const RING: bool> KvmGuest<RING> {
    fn new() -> Option<Self> {
        let vm = BareVm::new(&kvm()?, &REGION_PAGES).unwrap();
        let tracker = if RING {
            DirtyTracker::enable(vm.fd(), RingSize::MAX)
        } else {
            DirtyTracker::enable_bitmap(vm.fd())
        }
        .unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        let vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
        let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
        Some(Self { vm, vcpu, handle, session: tracker.session(), tracker })
    }
}

impl<const RING: bool> Guest for KvmGuest<RING> {
    fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    fn source(&mut self) -> &mut dyn DirtySource {
        &mut self.session
    }

    fn write(&mut self, pages: &[PageIndex], value: u64) {
        self.vcpu.set_work(&Work::List(pages.to_vec()), value).unwrap();
        self.vcpu.run_to_end(Some(&self.handle)).unwrap();
    }

    const UNOBSERVABLE: bool = !RING;
    const PER_VCPU: bool = RING;
}

struct ThreadGuest {
    ram: AnonymousRam,
    tracker: PagemapTracker,
}

impl ThreadGuest {
    fn new() -> Self {
        let (mut first, mut slots) = (DATA, Vec::new());
        for (slot, pages) in (0..).zip(REGION_PAGES) {
            slots.push((SlotId(slot), PageRun { first, pages }));
            first = PageIndex(first.0 + pages);
        }
        let ram = AnonymousRam::with_slots(&slots, Backing::SmallPages).unwrap();
        let tracker = PagemapTracker::new(ram.memory().clone()).unwrap();
        Self { ram, tracker }
    }
}

impl Guest for ThreadGuest {
    fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    fn source(&mut self) -> &mut dyn DirtySource {
        &mut self.tracker
    }

    fn write(&mut self, pages: &[PageIndex], value: u64) {
        let ram = &self.ram;
        std::thread::scope(|scope| {
            scope.spawn(|| pages.iter().for_each(|page| ram.write(*page, value)));
        });
    }

    const UNOBSERVABLE: bool = false;
    const PER_VCPU: bool = false;
}

fn word(memory: &GuestMemory, page: PageIndex) -> *mut u64 {
    memory.host_runs(PageRun { first: page, pages: 1 }).unwrap().next().unwrap().host.cast()
}

fn members(set: &PageSet) -> BTreeSet<PageIndex> {
    set.runs().flat_map(|run| (run.first.0..run.end().0).map(PageIndex)).collect()
}

fn harvest(guest: &mut impl Guest) -> BTreeSet<PageIndex> {
    let mut dirty = PageSet::new(guest.memory().end());
    guest.source().harvest(&mut dirty).unwrap();
    members(&dirty)
}

/// Every `step`th page of RAM, `offset` apart from the first.
fn every(step: usize, offset: u64) -> Vec<PageIndex> {
    (offset..PAGES).step_by(step).map(|page| PageIndex(DATA.0 + page)).collect()
}

fn set_of(pages: &[PageIndex]) -> BTreeSet<PageIndex> {
    pages.iter().copied().collect()
}

fn test_backend<G: Guest>(mut guest: G) {
    let clean = BTreeSet::new();
    let end = guest.memory().end();
    let mut dirty = PageSet::new(end);

    // Only a started source has answers.
    assert!(matches!(guest.source().harvest(&mut dirty), Err(TrackError::NotTracking)));
    assert!(matches!(guest.source().observe(), Err(TrackError::NotTracking)));

    // What was written before the start is not dirty, whether it is there already or not.
    guest.write(&every(3, 0), 1);
    guest.source().start().unwrap();
    assert!(matches!(guest.source().start(), Err(TrackError::AlreadyTracking)));
    assert_eq!(harvest(&mut guest), clean);

    // A page is harvested once, however often it was written, and the next write makes it dirty again.
    for (step, offset) in [(2, 0), (1, 0), (7, 5), (64, 63), (5000, 0)] {
        let pages = every(step, offset);
        let twice: Vec<PageIndex> = pages.iter().chain(&pages).copied().collect();
        guest.write(&twice, 2);
        let count = pages.len() as u64;
        let mut round = PageSet::new(end);
        round.extend(pages.iter().copied());
        for _ in 0..2 {
            // Looking does not take.
            let mut redirtied = Redirtied::new(end);
            match guest.source().observe_into(&mut redirtied).unwrap() {
                Observed::PerVcpu { vcpus, others } => {
                    assert!(G::PER_VCPU && (vcpus.as_slice(), others) == (&[count], 0), "{vcpus:?}, {count}")
                }
                Observed::Total(total) => assert!(!G::PER_VCPU && total == count, "{total}, {count}"),
                Observed::Unobservable => assert!(G::UNOBSERVABLE && redirtied.is_empty()),
                other => panic!("{other:?}"),
            }
            assert!(redirtied.len() <= count, "{redirtied:?}");
            redirtied.strike_off(&mut round);
        }
        // It tells which pages, or not at all.
        assert!(round.is_empty() != G::UNOBSERVABLE, "{round:?}");
        assert_eq!(harvest(&mut guest), set_of(&pages));
        assert_eq!(harvest(&mut guest), clean);
    }

    // A harvest adds to a set, and refuses one that is too small without losing a page.
    let pages = every(100, 50);
    guest.write(&pages, 3);
    let mut small = PageSet::new(PageIndex(end.0 - 1));
    assert!(matches!(guest.source().harvest(&mut small), Err(TrackError::SetTooSmall { .. })));
    dirty.insert(PageIndex(1));
    guest.source().harvest(&mut dirty).unwrap();
    assert!(dirty.remove(PageIndex(1)));
    assert_eq!(members(&dirty), set_of(&pages));

    // A page that is written after it was harvested and read is dirty again: nothing that a reader saw is stale
    // without the next harvest saying so.
    for value in 10..20 {
        guest.write(&pages, value);
        assert_eq!(harvest(&mut guest), set_of(&pages));
        for page in &pages {
            // SAFETY: a page of a live mapping, aligned; nothing writes it now.
            assert_eq!(unsafe { word(guest.memory(), *page).read_volatile() }, value);
        }
    }

    // What did not arrive comes again: with the next harvest, and also after a stop and a new start.
    let mut unsent = PageSet::new(end);
    unsent.extend(pages[..5].iter().copied());
    guest.source().give_back(&unsent);
    guest.write(&pages[3..7], 4);
    assert_eq!(harvest(&mut guest), set_of(&pages[..7]));
    guest.source().give_back(&unsent);
    guest.write(&pages[5..], 4);
    guest.source().stop().unwrap();
    assert!(matches!(guest.source().harvest(&mut dirty), Err(TrackError::NotTracking)));
    guest.write(&every(2, 1), 5);
    guest.source().start().unwrap();
    assert_eq!(harvest(&mut guest), set_of(&pages[..5]));

    // The last view is complete.
    guest.write(&every(1, 0), 6);
    let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
    dirty.clear();
    guest.source().harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
    assert_eq!(members(&dirty), set_of(&every(1, 0)));
    guest.source().stop().unwrap();
    guest.source().stop().unwrap();
}

#[test]
fn what_the_vmm_writes_is_harvested_beside_what_the_guest_writes() {
    let Some(mut guest) = KvmGuest::<true>::new() else { return };
    let log = RegionLog::new(usize::try_from(REGION_PAGES[0]).unwrap() * PAGE_SIZE);
    guest.tracker.add_external(Box::new(log.source(DATA))).unwrap();
    log.mark_dirty(0, 1);
    guest.session.start().unwrap();
    log.mark_dirty(7 * PAGE_SIZE, 1);
    guest.write(&[PageIndex(DATA.0 + 9)], 1);
    assert_eq!(harvest(&mut guest), set_of(&[PageIndex(DATA.0 + 7), PageIndex(DATA.0 + 9)]));
    assert_eq!(harvest(&mut guest), BTreeSet::new());
}

#[test]
fn the_ring_backend_conforms() {
    if let Some(guest) = KvmGuest::<true>::new() {
        test_backend(guest);
    }
}

#[test]
fn the_bitmap_backend_conforms() {
    if let Some(guest) = KvmGuest::<false>::new() {
        test_backend(guest);
    }
}

#[test]
fn the_pagemap_backend_conforms() {
    test_backend(ThreadGuest::new());
}
