//! Three sessions over one guest on real KVM: a migration that harvests without rest, a backup that does at intervals, a
//! measurement that mostly looks. Memory is plugged in and out meanwhile, and each session's own model has to agree.
//!
//! CI has a few seconds for it. A minute: `RINGFERRY_STRESS_SECONDS=60 cargo test -p ringferry --release --test track_sessions`
#![expect(unsafe_code, reason = "a VMM gives the memory of slots to KVM, and names it to the tracker")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bare::{BareVm, DATA, Pages, Privilege, StopOnDrop, Work, kvm};
use kvm_bindings::kvm_userspace_memory_region;
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, Initially, Observed, Session};
use ringferry::{PAGE_SIZE, PageIndex, PageSet, Paused, Redirtied, Region, SlotId};

/// The third slot comes and goes.
const SLOT_PAGES: [u64; 3] = [3000, 2001, 777];
const PAGES: u64 = SLOT_PAGES[0] + SLOT_PAGES[1] + SLOT_PAGES[2];

fn set_slot(vm: &BareVm, region: &Region, is_there: bool) {
    let slot = kvm_userspace_memory_region {
        slot: region.slot.0,
        flags: 0,
        guest_phys_addr: region.pages.first.address().0,
        memory_size: if is_there { region.pages.pages * PAGE_SIZE as u64 } else { 0 },
        userspace_addr: region.host.addr() as u64,
    };
    // SAFETY: the memory belongs to the VM and outlives its descriptor.
    unsafe { vm.fd().set_user_memory_region(slot) }.unwrap();
}

fn add_slot(tracker: &DirtyTracker, region: &Region, initially: Initially) {
    let Region { slot, pages, host, .. } = *region;
    let bytes = pages.pages * PAGE_SIZE as u64;
    // SAFETY: the memory belongs to the VM, which outlives the tracker's use of it, and is read as atomics.
    unsafe { tracker.add_slot(slot, pages.first.address(), bytes, host, initially) }.unwrap();
}

/// What one session "sent": each page's word as read after the harvest that handed the page out.
struct Copy<'a> {
    vm: &'a BareVm,
    session: Session,
    sent: Vec<u64>,
}

impl<'a> Copy<'a> {
    /// A session that begins now, and a copy of all of RAM.
    fn new(vm: &'a BareVm, tracker: &DirtyTracker) -> Self {
        let session = tracker.start().unwrap();
        let sent = (0..PAGES).map(|i| vm.word(PageIndex(DATA.0 + i)).unwrap()).collect();
        Self { vm, session, sent }
    }

    fn send(&mut self, dirty: &PageSet) {
        for page in dirty.runs().flat_map(|run| run.first.0..run.end().0) {
            self.sent[usize::try_from(page - DATA.0).unwrap()] = self.vm.word(PageIndex(page)).unwrap();
        }
    }

    fn harvest(&mut self) {
        let mut dirty = PageSet::new(PageIndex(DATA.0 + PAGES));
        self.session.harvest(&mut dirty).unwrap();
        self.send(&dirty);
    }

    /// Every vCPU is outside.
    fn check_nothing_is_lost(&mut self, name: &str) {
        let mut dirty = PageSet::new(PageIndex(DATA.0 + PAGES));
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        self.session.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
        self.send(&dirty);
        for (i, sent) in self.sent.iter().enumerate() {
            let now = self.vm.word(PageIndex(DATA.0 + i as u64)).unwrap();
            assert_eq!(*sent, now, "page {i} was sent in an old version by the {name}");
        }
    }
}

#[test]
fn three_sessions_over_a_guest_whose_memory_comes_and_goes_lose_nothing() {
    let Some(kvm) = kvm() else { return };
    let seconds = std::env::var("RINGFERRY_STRESS_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let ends_at = Instant::now() + Duration::from_secs(seconds.unwrap_or(4));
    let vm = BareVm::new(&kvm, &SLOT_PAGES).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::from_entries(1024).unwrap()).unwrap();
    let regions = vm.memory().regions();
    regions.iter().for_each(|region| add_slot(&tracker, region, Initially::Clean));
    let pluggable = regions[2];
    let mut vcpus: Vec<_> = (0..3)
        .map(|index| {
            let vcpu = vm.create_vcpu(index, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(index, vcpu.fd()).unwrap();
            (vcpu, handle)
        })
        .collect();
    let mut copies = [0; 3].map(|_| Copy::new(&vm, &tracker));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (stop, tracker, vm) = (&stop, &tracker, &vm);
        let (plugged, permanent) = vcpus.split_last_mut().unwrap();
        let running: Vec<_> = permanent
            .iter_mut()
            .zip([(0, 1), (SLOT_PAGES[0], 3)])
            .map(|((vcpu, handle), (first, stride))| {
                scope.spawn(move || {
                    let pages = SLOT_PAGES[usize::from(first > 0)] / stride;
                    let first = PageIndex(DATA.0 + first);
                    let work = Work::Loop(Pages { first, pages, stride, passes: u64::MAX });
                    vcpu.set_work(&work, 1).unwrap();
                    vcpu.run_to_end(Some(handle)).unwrap();
                })
            })
            .collect();
        let [migration, backup, measurement] = &mut copies;
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                migration.session.observe().unwrap();
                migration.harvest();
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(70));
                backup.harvest();
            }
        });
        scope.spawn(move || {
            let mut redirtied = Redirtied::new(PageIndex(DATA.0 + PAGES));
            for look in 1.. {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
                let observed = measurement.session.observe_into(&mut redirtied).unwrap();
                let Observed::PerVcpu { vcpus: pages, .. } = observed else { panic!("{observed:?}") };
                // The third writes its pages once between two times that memory is plugged in.
                let most = [SLOT_PAGES[0], SLOT_PAGES[1] / 3, SLOT_PAGES[2]];
                assert!(pages.iter().zip(most).all(|(pages, most)| *pages <= most), "{pages:?}");
                if look % 200 == 0 {
                    measurement.harvest();
                    redirtied.clear();
                }
            }
        });
        let _stop = StopOnDrop(stop);
        let (vcpu, handle) = plugged;
        for value in 1.. {
            let list = (0..SLOT_PAGES[2]).map(|i| PageIndex(pluggable.pages.first.0 + i)).collect();
            vcpu.set_work(&Work::List(list), value).unwrap();
            vcpu.run_to_end(Some(handle)).unwrap();
            thread::sleep(Duration::from_millis(30));
            if Instant::now() > ends_at {
                break;
            }
            assert!(tracker.remove_slot(pluggable.slot).unwrap());
            set_slot(vm, &pluggable, false);
            thread::sleep(Duration::from_millis(3));
            set_slot(vm, &pluggable, true);
            // It kept what it held, and not every session had sent that.
            add_slot(tracker, &pluggable, Initially::Dirty);
        }
        (0..2).for_each(|vcpu| vm.stop(vcpu));
        running.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
    for (copy, name) in copies.iter_mut().zip(["migration", "backup", "measurement"]) {
        copy.check_nothing_is_lost(name);
    }
    let figures = tracker.snapshot();
    assert_eq!(figures.foreign_resets, 0, "{figures:?}");
    eprintln!("{figures:?}");
    let [_, backup, _] = copies;
    drop(backup);
    assert!(tracker.remove_slot(SlotId(1)).unwrap());
}
