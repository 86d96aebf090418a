//! What the kernel pushed is what the library took, entry for entry: the profiler counts the one, once at each push and
//! once by the rings' indices, the tracker's figures the other, and they share nothing but the kernel.

#![expect(unsafe_code, reason = "signals to threads")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::bare::{BareVm, DATA, Pages, Privilege, Work, install_kick_handler, kvm};
use common::{Writer, harvest_for, my_counts, profiler};
use ringferry::PageIndex;
use ringferry::converge::Limits;
use ringferry::destination::{Destination, DestinationOptions, DestinationReport, ListenOptions};
use ringferry::kvm::RingSize;
use ringferry::progress::{Parameters, Progress, Terms};
use ringferry::source::{Source, SourceOptions, SourceReport};
use ringferry::track::DirtyTracker;
use ringferry::transport::MaxBandwidth;
use ringferry_bpf::{Counting, Options, Profiler, VcpuCounts};
use ringferry_testvm::{Boot, Config, Guest, TestVm, Tracking, guest_image};

const VCPU_COUNT: u32 = 4;
const VCPUS: usize = VCPU_COUNT as usize;

/// A VM in this process that dirties until it is told to stop.
struct Neighbour {
    stop: Arc<AtomicBool>,
    /// Returns the number of the thread that created the VM.
    thread: std::thread::JoinHandle<i32>,
}

impl Neighbour {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        Self { stop, thread: std::thread::spawn(move || dirty_until(&stopped)) }
    }

    fn stop_and_find_it_counted(self, profilers: &mut [Profiler]) {
        self.stop.store(true, Ordering::Release);
        let creator = self.thread.join().unwrap();
        for profiler in profilers {
            let counts = common::counts_of(profiler, creator);
            assert!(counts.iter().map(|vcpu| vcpu.pushes).sum::<u64>() > 0, "the neighbour wrote nothing");
        }
    }
}

fn dirty_until(stop: &AtomicBool) -> i32 {
    let kvm = kvm().unwrap();
    let vm = BareVm::new(&kvm, &[1024]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::MAX).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
    let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
    let session = tracker.start().unwrap();
    let work = Work::Loop(Pages { first: DATA, pages: 1024, stride: 1, passes: 1 });
    let writer = Writer::start(vcpu, handle, work);
    while !stop.load(Ordering::Acquire) {
        harvest_for(&session, &vm, 1, Duration::from_millis(5), || {});
    }
    writer.stop();
    session.stop().unwrap();
    nix::unistd::gettid().as_raw()
}

/// A profiler of each way of counting, in the order of [`Counted::pushed`].
fn profilers() -> Option<[Profiler; 2]> {
    let by = |counting| profiler(Options { counting, ..Options::default() });
    Some([by(Counting::EveryPush)?, by(Counting::Indices)?])
}

/// What was counted of one vCPU.
struct Counted {
    pushed: [u64; 2],
    taken: u64,
}

fn assert_equal(run: u32, vcpus: &[Counted], all: &mut [u64; VCPUS]) {
    assert_eq!(vcpus.len(), VCPUS);
    for (vcpu, counted) in vcpus.iter().enumerate() {
        assert_eq!(counted.pushed, [counted.taken; 2], "run {run}, vCPU {vcpu}");
        all[vcpu] += counted.taken;
    }
}

/// Four vCPUs that each write their own 2048 pages, harvested as they run, all kicked all the time.
fn pushed_and_taken(profilers: &mut [Profiler; 2], entries: u32) -> Option<Vec<Counted>> {
    let kvm = kvm()?;
    let vm = BareVm::new(&kvm, &[4096, 4096]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::from_entries(entries).unwrap()).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let of_vcpu = |counts: &[VcpuCounts], vcpu: usize| {
        counts.iter().filter(|counts| counts.vcpu as usize == vcpu).map(|counts| counts.pushes).sum::<u64>()
    };
    let before = profilers.each_mut().map(my_counts);
    let writers: Vec<Writer> = (0..4_usize)
        .map(|index| {
            let vcpu = vm.create_vcpu(index, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(index, vcpu.fd()).unwrap();
            let first = PageIndex(DATA.0 + index as u64 * 2048);
            Writer::start(vcpu, handle, Work::Loop(Pages { first, pages: 2048, stride: 1, passes: 3 }))
        })
        .collect();
    let session = tracker.start().unwrap();
    harvest_for(&session, &vm, 10, Duration::from_millis(10), || writers.iter().for_each(Writer::kick));
    // Who has not been looked at while it was there is unknown to the indices.
    profilers.iter_mut().for_each(|profiler| drop(my_counts(profiler)));
    writers.into_iter().for_each(Writer::stop);
    session.stop().unwrap();
    let figures = tracker.snapshot();
    assert_eq!(figures.unknown_slot_entries, 0);
    let after = profilers.each_mut().map(my_counts);
    assert!(
        after.iter().flatten().all(|counts| (counts.overflows, counts.overwritten) == (0, 0)),
        "{after:?}"
    );
    let counted = figures.vcpus.iter().map(|taken| Counted {
        pushed: [0, 1].map(|way| of_vcpu(&after[way], taken.index) - of_vcpu(&before[way], taken.index)),
        taken: taken.pages + taken.duplicate_entries,
    });
    Some(counted.collect())
}

#[test]
fn in_20_of_20_runs_the_tracker_took_what_the_kernel_pushed_per_vcpu_beside_a_neighbour() {
    if kvm().is_none() {
        return;
    }
    let Some(mut profilers) = profilers() else { return };
    install_kick_handler();
    let neighbour = Neighbour::start();
    let mut all = [0; VCPUS];
    for run in 0..20 {
        // Rings that hold everything, and rings that are full all the time.
        let entries = if run % 2 == 0 { 16384 } else { 1024 };
        assert_equal(run, &pushed_and_taken(&mut profilers, entries).unwrap(), &mut all);
    }
    // In a single short run on a busy machine a vCPU may not get a turn.
    assert!(all.iter().all(|&pushed| pushed > 10_000), "{all:?}");
    neighbour.stop_and_find_it_counted(&mut profilers);
    assert_eq!(profilers[0].totals().unwrap().dropped_pushes, 0);
}

fn vm(boot: Boot) -> TestVm {
    // The destination has rings as well: they are in this process, and not the source's.
    let tracking = Tracking::Ring { entries: 2048 };
    TestVm::new(Config { vcpus: VCPUS, memory_bytes: 32 << 20, boot, tracking, ..Config::default() }).unwrap()
}

fn receive(destination: &Destination) -> DestinationReport {
    let go_on = AtomicBool::new(false);
    let mut vm = vm(Boot::Destination);
    let memory = vm.memory().clone();
    let incoming = destination.accept(Some(Duration::from_secs(60)), &go_on).unwrap();
    incoming.receive(&mut vm, VCPU_COUNT, &memory, &DestinationOptions::default(), &go_on).unwrap()
}

/// Boots four vCPUs that write 4 MiB each, and moves them to another VM while each vCPU thread is interrupted all the
/// time. Entries pushed by the kernel and taken by the library, per vCPU, and what the migration says.
fn over_a_migration(profilers: &mut [Profiler; 2]) -> (Vec<Counted>, SourceReport, DestinationReport) {
    let append = "vcpus=4 each=pattern:random,ws:4MiB,pace:20000".to_owned();
    let mut vm = vm(Boot::Image { image: guest_image(), append });
    vm.start().unwrap();
    Guest::new(vm.memory(), None).unwrap().wait_until_working(Duration::from_secs(60)).unwrap();
    let me = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
    let inventory = profilers[0].inventory().unwrap();
    let mine = inventory.vms.iter().find(|vm| vm.creator_tid == me).expect("the VM is in the inventory");
    let rings: Vec<_> = mine.vcpus.iter().map(|vcpu| vcpu.ring).collect();
    let threads: Vec<_> = mine.vcpus.iter().map(|vcpu| i32::try_from(vcpu.tid.unwrap()).unwrap()).collect();

    let destination = Destination::bind(ListenOptions::new("127.0.0.1:0".parse().unwrap())).unwrap();
    let address = destination.local_addr().unwrap().to_string();
    let options =
        SourceOptions { destination: address, vcpus: VCPU_COUNT, verify: true, ..SourceOptions::default() };
    let limits = Limits { downtime: Duration::from_millis(1), max_rounds: Some(5), ..Limits::default() };
    let terms = Terms { policy: "none".parse().expect("a policy"), limits, switchover_bandwidth: None };
    let progress = Progress::new(Parameters::new(terms, MaxBandwidth::default()));
    let tracker = vm.tracker().unwrap().clone();
    let mut session = tracker.session();
    let memory = vm.memory().clone();
    let moved = AtomicBool::new(false);
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&destination));
        scope.spawn(|| {
            while !moved.load(Ordering::Acquire) {
                for &thread in &threads {
                    // SAFETY: numbers only. This signal is what the test VMM kicks with, and harmless at any time.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGRTMIN() + 2) };
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let sent = Source::new(&mut vm, &mut session, &memory, options, progress).run();
        moved.store(true, Ordering::Release);
        (sent.unwrap().confirmed().unwrap(), receiver.join().unwrap())
    });
    let counts = profilers.each_mut().map(|profiler| profiler.counts().unwrap());
    let pushed = |ring| {
        let of_it = |vcpu: &&VcpuCounts| vcpu.ring == ring && !vcpu.ended;
        counts.each_ref().map(|counts| counts.iter().find(of_it).map_or(0, |vcpu| vcpu.pushes))
    };
    let figures = tracker.snapshot();
    assert_eq!(figures.unknown_slot_entries, 0);
    let taken = figures.vcpus.iter().map(|vcpu| vcpu.pages + vcpu.duplicate_entries);
    let counted = rings.into_iter().zip(taken).map(|(ring, taken)| Counted { pushed: pushed(ring), taken });
    (counted.collect(), sent, received)
}

#[test]
fn over_20_of_20_migrations_of_four_interrupted_vcpus_both_counts_are_equal() {
    if kvm().is_none() {
        return;
    }
    let Some(mut profilers) = profilers() else { return };
    install_kick_handler();
    let neighbour = Neighbour::start();
    let mut all = [0; VCPUS];
    for run in 0..20 {
        let (vcpus, sent, received) = over_a_migration(&mut profilers);
        assert_eq!((sent.ram_digest_match, received.ram_digest_match), (Some(true), Some(true)));
        assert_equal(run, &vcpus, &mut all);
    }
    assert!(all.iter().all(|&pushed| pushed > 10_000), "{all:?}");
    neighbour.stop_and_find_it_counted(&mut profilers);
}
