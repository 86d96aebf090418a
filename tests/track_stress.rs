//! Eight vCPUs dirty memory at once and are harvested live, while signals rain on every thread.
//!
//! CI has a few seconds for it. A minute for each of three ring sizes:
//! `RINGFERRY_STRESS_SECONDS=180 cargo test -p ringferry --release --test track_stress eight -- --nocapture`
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bare::{
    BareVcpu, BareVm, DATA, Kickable, Privilege, StopOnDrop, Stopper, Work, install_kick_handler, kvm,
};
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, Session, VcpuHandle};
use ringferry::{PageIndex, PageSet, Paused, Redirtied, SlotId};

const VCPUS: usize = 8;
/// Each vCPU has every eighth page, so that all share every word of every bitmap.
const PAGES_PER_VCPU: u64 = 2048;
const PAGES: u64 = PAGES_PER_VCPU * VCPUS as u64;

/// The two tests stop and kick whole processes: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn duration(default_s: u64) -> Duration {
    let seconds = std::env::var("RINGFERRY_STRESS_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(default_s))
}

/// xorshift64, enough to scatter pages.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

struct Rig {
    vm: BareVm,
    tracker: DirtyTracker,
    session: Session,
    vcpus: Vec<(BareVcpu, VcpuHandle)>,
    sent: Vec<u64>,
}

fn page(vcpu: usize, i: u64) -> PageIndex {
    PageIndex(DATA.0 + i % PAGES_PER_VCPU * VCPUS as u64 + vcpu as u64)
}

fn pages(set: &PageSet) -> BTreeSet<PageIndex> {
    set.runs().flat_map(|run| (run.first.0..run.end().0).map(PageIndex)).collect()
}

impl Rig {
    fn new(kvm: &kvm_ioctls::Kvm, entries: u32) -> Self {
        let vm = BareVm::new(kvm, &[PAGES / 2 + 40, PAGES / 2 - 40]).unwrap();
        let tracker = DirtyTracker::enable(vm.fd(), RingSize::from_entries(entries).unwrap()).unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        let vcpus = (0..VCPUS).map(|index| {
            let vcpu = vm.create_vcpu(index, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(index, vcpu.fd()).unwrap();
            (vcpu, handle)
        });
        let vcpus = vcpus.collect();
        let session = tracker.start().unwrap();
        Self { vm, tracker, session, vcpus, sent: vec![0; usize::try_from(PAGES).unwrap()] }
    }

    fn send(vm: &BareVm, sent: &mut [u64], dirty: &PageSet) {
        for page in pages(dirty) {
            sent[usize::try_from(page.0 - DATA.0).unwrap()] = vm.word(page).unwrap();
        }
    }

    /// All vCPUs write at random, the tracker is harvested, and every thread is kicked, until the time is over.
    fn storm(&mut self, duration: Duration) {
        let kickables: Vec<Kickable> = (0..=VCPUS).map(|_| Kickable::default()).collect();
        let stop = AtomicBool::new(false);
        let ends_at = Instant::now() + duration;
        let (vm, sent, session, vcpus) = (&self.vm, &mut self.sent, &self.session, &mut self.vcpus);
        thread::scope(|scope| {
            let (stop, kickables) = (&stop, &kickables);
            for (index, (vcpu, handle)) in vcpus.iter_mut().enumerate() {
                scope.spawn(move || {
                    let _inside = kickables[index].enter();
                    let mut random = Random(index as u64 + 1);
                    for value in 1.. {
                        let (first, count) = (random.next(), random.next() % 600 + 1);
                        let step = if random.next().is_multiple_of(2) { 1 } else { random.next() % 100 + 1 };
                        let list = (0..count).map(|i| page(index, first.wrapping_add(i * step))).collect();
                        vcpu.set_work(&Work::List(list), value).unwrap();
                        vcpu.run_until(Some(handle), stop).unwrap();
                        if stop.load(Ordering::Acquire) {
                            break;
                        }
                    }
                });
            }
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    for thread in kickables {
                        thread.kick();
                    }
                    thread::sleep(Duration::from_micros(50));
                }
                // The vCPUs look at the flag when they come out.
                while kickables[..VCPUS].iter().any(Kickable::kick) {
                    thread::sleep(Duration::from_micros(200));
                }
            });
            let _stop = StopOnDrop(stop);
            let _inside = kickables[VCPUS].enter();
            let mut dirty = PageSet::new(vm.memory().end());
            let mut random = Random(99);
            while Instant::now() < ends_at {
                match random.next() % 10 {
                    0 => {
                        let slot = u32::try_from(1 + random.next() % 2).unwrap();
                        let run = vm.memory().regions()[slot as usize - 1].pages;
                        let words = session.take_slot_bitmap(SlotId(slot)).unwrap();
                        dirty.clear();
                        dirty.union_words(run.first, &words);
                        Self::send(vm, sent, &dirty);
                    }
                    1..4 => drop(session.observe().unwrap()),
                    4..6 => {
                        dirty.clear();
                        let mut behind = Redirtied::new(vm.memory().end());
                        session.harvest_protected(&mut dirty, &mut behind).unwrap();
                        Self::send(vm, sent, &dirty);
                        while !behind.is_empty() {
                            dirty.clear();
                            session.protect(&mut behind, 1 + random.next() % 1000, &mut dirty).unwrap();
                            Self::send(vm, sent, &dirty);
                        }
                    }
                    _ => {
                        dirty.clear();
                        session.harvest(&mut dirty).unwrap();
                        Self::send(vm, sent, &dirty);
                    }
                }
            }
        });
    }

    fn check_nothing_is_lost(&mut self) {
        let mut dirty = PageSet::new(self.vm.memory().end());
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        self.session.harvest_final(&paused.declare_nothing_else_writes(), &mut dirty).unwrap();
        Self::send(&self.vm, &mut self.sent, &dirty);
        for (i, sent) in self.sent.iter().enumerate() {
            let page = PageIndex(DATA.0 + i as u64);
            assert_eq!(*sent, self.vm.word(page).unwrap(), "page {i} was sent in an old version");
        }
    }

    /// With known lists: what is harvested is what was written, no page less and none more.
    fn check_exactness(&mut self) {
        // What was handed out unprotected in the pause comes once more.
        self.session.harvest(&mut PageSet::new(self.vm.memory().end())).unwrap();
        let lists: Vec<Vec<PageIndex>> =
            (0..VCPUS).map(|vcpu| (0..700).map(|i| page(vcpu, i * (vcpu as u64 + 1))).collect()).collect();
        thread::scope(|scope| {
            for ((vcpu, handle), list) in self.vcpus.iter_mut().zip(&lists) {
                scope.spawn(move || {
                    vcpu.set_work(&Work::List(list.clone()), u64::MAX).unwrap();
                    vcpu.run_to_end(Some(handle)).unwrap();
                });
            }
        });
        let mut dirty = PageSet::new(self.vm.memory().end());
        self.session.harvest(&mut dirty).unwrap();
        assert_eq!(pages(&dirty), lists.into_iter().flatten().collect());
    }
}

#[test]
fn eight_vcpus_harvested_live_under_a_rain_of_signals_lose_nothing() {
    let Some(kvm) = kvm() else { return };
    let _alone = ALONE.lock();
    install_kick_handler();
    for entries in [256, 1024, 65_536] {
        let mut rig = Rig::new(&kvm, entries);
        rig.storm(duration(9) / 3);
        rig.check_nothing_is_lost();
        rig.check_exactness();
        let figures = rig.tracker.snapshot();
        assert_eq!(figures.rearms, 0, "{figures:?}");
        assert!(entries > 1024 || figures.vcpus.iter().all(|vcpu| vcpu.ring_full_exits > 0), "{figures:?}");
        eprintln!("{entries} entries: {figures:?}");
    }
}

/// A stop cannot be blocked. It interrupts a reset between two entries, and KVM then forgets to protect up to 64
/// pages whose entries it has counted. (With `Pending::insert_unsure` made empty, this test fails within a second.)
#[test]
fn resets_that_a_stop_signal_interrupts_lose_nothing() {
    let Some(kvm) = kvm() else { return };
    let _alone = ALONE.lock();
    let pages = 16_384;
    let vm = BareVm::new(&kvm, &[pages]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::default()).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let mut vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
    let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
    let session = tracker.start().unwrap();
    let mut sent = vec![0; usize::try_from(pages).unwrap()];
    let mut dirty = PageSet::new(vm.memory().end());
    let mut stopper = Stopper::stop_this_process_for(duration(3));
    for value in 1.. {
        // Dense and sparse: batches of 64 pages and of one.
        let step = if value % 2 == 0 { 1 } else { 67 };
        let list = (0..pages).step_by(step).map(|i| PageIndex(DATA.0 + i)).collect();
        vcpu.set_work(&Work::List(list), value).unwrap();
        vcpu.run_to_end(Some(&handle)).unwrap();
        dirty.clear();
        session.harvest(&mut dirty).unwrap();
        Rig::send(&vm, &mut sent, &dirty);
        for (i, sent) in sent.iter().enumerate() {
            let page = PageIndex(DATA.0 + i as u64);
            assert_eq!(*sent, vm.word(page).unwrap(), "page {i} was sent in an old version, pass {value}");
        }
        if stopper.has_ended() {
            break;
        }
    }
    eprintln!("interrupted resets: {}", tracker.snapshot().short_resets);
}
