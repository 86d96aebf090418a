//! What the tests share: a profiler or the reason to skip, and guests that write on their own threads.
#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

#[path = "../../../tests/bare/mod.rs"]
pub mod bare;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bare::{BareVcpu, BareVm, DATA, Kickable, Pages, Privilege, Work, kvm};
use ringferry::kvm::RingSize;
use ringferry::track::{DirtyTracker, Session, VcpuHandle};
use ringferry::{PageIndex, PageSet};
use ringferry_bpf::{Error, Options, Profiler, VcpuCounts};

/// A profiler of this process, or `None` where the machine does not allow one: noted as skipped.
pub fn profiler(options: Options) -> Option<Profiler> {
    match Profiler::attach_with(&Options { only_pid: Some(std::process::id()), ..options }) {
        Ok(profiler) => Some(profiler),
        Err(error @ (Error::MissingRights { .. } | Error::NoTypes { .. })) => {
            ringferry_testvm::skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The counts of the VM that this thread created, by vCPU.
pub fn my_counts(profiler: &mut Profiler) -> Vec<VcpuCounts> {
    counts_of(profiler, nix::unistd::gettid().as_raw())
}

pub fn counts_of(profiler: &mut Profiler, creator: i32) -> Vec<VcpuCounts> {
    let mut counts = profiler.counts().unwrap();
    counts.retain(|vcpu| i64::from(vcpu.creator_tid) == i64::from(creator));
    counts
}

/// A VM of one vCPU and 64 MiB, tracked by a ring of so many entries or by the bitmap.
pub struct Guest {
    pub vm: BareVm,
    pub tracker: DirtyTracker,
    pub session: Session,
    pub vcpu: BareVcpu,
    pub handle: VcpuHandle,
}

impl Guest {
    pub fn new(ring: Option<u32>, privilege: Privilege) -> Option<Self> {
        let vm = BareVm::new(&kvm()?, &[8192, 8192]).unwrap();
        let tracker = match ring {
            Some(entries) => DirtyTracker::enable(vm.fd(), RingSize::from_entries(entries).unwrap()),
            None => DirtyTracker::enable_bitmap(vm.fd()),
        };
        let tracker = tracker.unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        let vcpu = vm.create_vcpu(3, privilege).unwrap();
        let handle = tracker.attach_vcpu(3, vcpu.fd()).unwrap();
        Some(Self { vm, session: tracker.session(), tracker, vcpu, handle })
    }

    pub fn write(&mut self, first: u64, pages: u64, stride: u64) {
        self.work(&Work::Loop(Pages { first: PageIndex(DATA.0 + first), pages, stride, passes: 1 }), 1);
    }

    pub fn work(&mut self, work: &Work, value: u64) {
        self.vcpu.set_work(work, value).unwrap();
        self.vcpu.run_to_end(Some(&self.handle)).unwrap();
    }

    pub fn harvest(&mut self) -> u64 {
        let mut dirty = PageSet::new(self.vm.memory().end());
        self.session.harvest(&mut dirty).unwrap();
        dirty.runs().map(|run| run.pages).sum()
    }
}

/// A vCPU that repeats its work on a thread of its own until it is stopped.
pub struct Writer {
    kickable: Arc<Kickable>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    pub fn start(mut vcpu: BareVcpu, handle: VcpuHandle, work: Work) -> Self {
        let kickable = Arc::new(Kickable::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (kicked, stopped) = (kickable.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let _inside = kicked.enter();
            let mut value = 1;
            while !stopped.load(Ordering::Acquire) {
                vcpu.set_work(&work, value).unwrap();
                vcpu.run_until(Some(&handle), &stopped).unwrap();
                value += 1;
            }
        });
        Self { kickable, stop, thread }
    }

    pub fn kick(&self) {
        self.kickable.kick();
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Release);
        // A kick that comes before KVM_RUN is lost: again.
        while !self.thread.is_finished() {
            self.kickable.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().unwrap();
    }
}

/// Harvests for a while, as a migration does.
pub fn harvest_for(session: &Session, vm: &BareVm, rounds: u32, pause: Duration, mut between: impl FnMut()) {
    let mut dirty = PageSet::new(vm.memory().end());
    for _ in 0..rounds {
        std::thread::sleep(pause);
        between();
        session.harvest(&mut dirty).unwrap();
    }
}
