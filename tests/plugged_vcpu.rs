//! vCPUs that are plugged in and unplugged while their VM migrates: one that comes is steered like those that were there before, one
//! that goes leaves its pages and holds nobody up.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod bare;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ringferry::converge::AtTimeout;
use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::kvm::RingSize;
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceOptions, SourceReport, StandstillLimit};
use ringferry::testing::{AnonymousRam, Backing};
use ringferry::track::{BeforeRun, DirtyTracker, VcpuHandle};
use ringferry::vm::VmError;
use ringferry::{PageIndex, Paused, Quiesced, Vm};

use bare::{BareVcpu, BareVm, DATA, Exit, Kickable, Pages, Privilege, Work};

/// The VMM's index of the vCPU that comes later: not its place in any list.
const PLUGGED: usize = 5;
const RAM_PAGES: u64 = 16_384;
const HOT_PAGES: u64 = 8_192;

/// Its vCPUs run on threads of their own until the test ends.
#[derive(Default)]
struct Runner {
    paused: AtomicBool,
    ended: AtomicBool,
    /// The vCPU that was plugged in leaves for good.
    unplugged: AtomicBool,
    threads: Mutex<Vec<(usize, Arc<Kickable>)>>,
    /// Kicks of the vCPU that was plugged in, other than to pause it.
    kicks: AtomicU64,
}

impl Runner {
    fn run(&self, mut vcpu: BareVcpu, tracked: &VcpuHandle) {
        let kickable = Arc::new(Kickable::default());
        self.threads.lock().push((tracked.index(), Arc::clone(&kickable)));
        let leaves = || tracked.index() == PLUGGED && self.unplugged.load(Ordering::SeqCst);
        while !self.ended.load(Ordering::SeqCst) && !leaves() {
            let inside = kickable.enter();
            if leaves() || self.paused.load(Ordering::SeqCst) || self.ended.load(Ordering::SeqCst) {
                drop(inside);
                thread::sleep(Duration::from_millis(1));
            } else if tracked.before_run() == BeforeRun::Run {
                match vcpu.run().unwrap() {
                    Exit::RingFull => tracked.ring_full().unwrap(),
                    Exit::Kicked => {}
                    Exit::Done => panic!("the loop has no end"),
                }
            }
        }
    }

    /// Returns when none is in its guest: they look before they enter.
    fn call_all_out(&self) {
        for index in [0, PLUGGED] {
            while self.kick(index) {
                thread::sleep(Duration::from_micros(100));
            }
        }
    }

    fn kick(&self, index: usize) -> bool {
        self.threads.lock().iter().any(|(known, thread)| *known == index && thread.kick())
    }
}

/// Ends the vCPUs' threads, also when the test fails.
struct EndOnDrop<'a>(&'a Runner);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.call_all_out();
    }
}

struct TestVm<'a>(&'a Runner);

impl Vm for TestVm<'_> {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.0.paused.store(true, Ordering::SeqCst);
        self.0.call_all_out();
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        self.0.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        Ok(Vec::new())
    }

    fn restore_state(&mut self, _: &[u8]) -> Result<Paused, VmError> {
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, index: usize) {
        self.0.kicks.fetch_add(u64::from(index == PLUGGED), Ordering::SeqCst);
        self.0.kick(index);
    }
}

fn create_vcpu(vm: &BareVm, tracker: &DirtyTracker, index: usize, pages: u64) -> (BareVcpu, VcpuHandle) {
    let mut vcpu = vm.create_vcpu(index, Privilege::User).unwrap();
    let handle = tracker.attach_vcpu(index, vcpu.fd()).unwrap();
    vcpu.set_work(&Work::Loop(Pages { first: DATA, pages, stride: 1, passes: u64::MAX }), 1).unwrap();
    (vcpu, handle)
}

/// Each of these tests takes what the machine has.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A VM of a quiet vCPU, and one that has filled all of its memory.
struct World {
    vm: BareVm,
    tracker: DirtyTracker,
    runner: Runner,
}

impl World {
    fn new(kvm: &kvm_ioctls::Kvm) -> Self {
        bare::install_kick_handler();
        let vm = BareVm::new(kvm, &[RAM_PAGES]).unwrap();
        let tracker = DirtyTracker::enable(vm.fd(), RingSize::MAX).unwrap();
        tracker.add_memory(vm.memory()).unwrap();
        Self { vm, tracker, runner: Runner::default() }
    }

    /// Migrates the VM, with `meanwhile` on a thread beside.
    fn migrate(&self, meanwhile: impl FnOnce(&Progress) + Send) -> SourceReport {
        let Self { vm, tracker, runner } = self;
        let (quiet, quiet_handle) = create_vcpu(vm, tracker, 0, 16);
        let (mut filler, _) = create_vcpu(vm, tracker, 1, 16);
        filler.set_work(&Work::List((DATA.0..DATA.0 + RAM_PAGES).map(PageIndex).collect()), 7).unwrap();
        filler.run_to_end(None).unwrap();

        let ram = vm.memory().regions();
        let slots: Vec<_> = ram.iter().map(|region| (region.slot, region.pages)).collect();
        let arriving = AnonymousRam::with_slots(&slots, Backing::SmallPages).unwrap();
        let destination =
            Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
        let options = SourceOptions {
            destination: destination.local_addr().unwrap().to_string(),
            verify: true,
            // Unoptimized, on a host that is busy with other tests, digests take longer than a guest may stand still.
            standstill: StandstillLimit { floor: Duration::from_secs(20), ..StandstillLimit::default() },
            ..SourceOptions::default()
        };
        let parameters = Parameters::default();
        // All of RAM in 0.6 s; what the plugged vCPU writes, four times more than the downtime limit allows.
        parameters.max_bandwidth().set(NonZeroU64::new(100_000_000));
        parameters.change(|terms| {
            terms.limits.downtime = Duration::from_millis(100);
            terms.switchover_bandwidth = Some(1e8);
            terms.limits.timeout = Some((Duration::from_secs(60), AtTimeout::Cancel));
        });
        let progress = Progress::new(parameters);
        let never = AtomicBool::new(false);
        thread::scope(|scope| {
            let ended = EndOnDrop(runner);
            scope.spawn(|| runner.run(quiet, &quiet_handle));
            scope.spawn(|| {
                let elsewhere = Runner::default();
                let mut vm = TestVm(&elsewhere);
                let incoming = destination.accept(None, &never).unwrap();
                let options = DestinationOptions::default();
                incoming.receive(&mut vm, 1, arriving.memory(), &options, &never).unwrap();
            });
            scope.spawn(|| meanwhile(&progress));
            let (mut source_vm, mut source) = (TestVm(runner), tracker.session());
            let migration =
                Source::new(&mut source_vm, &mut source, vm.memory(), options, progress.clone()).run();
            let report = migration.unwrap().confirmed().unwrap();
            drop(ended);
            report
        })
    }
}

#[test]
fn a_vcpu_that_is_plugged_in_during_a_migration_is_held_back_if_it_writes_too_much() {
    let Some(kvm) = bare::kvm() else { return };
    let _turn = ONE_AT_A_TIME.lock();
    let world = World::new(&kvm);
    let World { vm, tracker, runner } = &world;
    let report = world.migrate(|progress| {
        wait_for(|| progress.status().ram_pages > 0, "the migration does not begin");
        let (vcpu, handle) = create_vcpu(vm, tracker, PLUGGED, HOT_PAGES);
        runner.run(vcpu, &handle);
    });
    let throttled = |index| tracker.vcpu(index).unwrap().throttled();
    assert!(throttled(PLUGGED) > Duration::ZERO, "{report:?}");
    assert_eq!(throttled(0), Duration::ZERO, "the quiet one is not touched");
    assert!(runner.kicks.load(Ordering::SeqCst) > 0, "it was called out by its VMM's index");
    assert!(report.rounds.iter().any(|round| round.vcpu_pages_dirtied.len() == 3), "{report:?}");
    assert_eq!(report.ram_digest_match, Some(true), "{report:?}");
}

#[test]
fn a_vcpu_that_is_unplugged_during_a_migration_leaves_its_pages_and_the_migration_goes_on() {
    let Some(kvm) = bare::kvm() else { return };
    let _turn = ONE_AT_A_TIME.lock();
    let world = World::new(&kvm);
    let World { vm, tracker, runner } = &world;
    let (vcpu, handle) = create_vcpu(vm, tracker, PLUGGED, HOT_PAGES);
    let report = world.migrate(|progress| {
        thread::scope(|scope| {
            let running = scope.spawn(|| runner.run(vcpu, &handle));
            wait_for(|| progress.status().round >= 2, "no second round begins");
            runner.unplugged.store(true, Ordering::SeqCst);
            tracker.vcpu(PLUGGED).unwrap().open();
            wait_for(|| !runner.kick(PLUGGED) && running.is_finished(), "the vCPU does not leave");
        });
        tracker.detach_vcpu(PLUGGED).unwrap();
    });
    assert!(tracker.vcpu(PLUGGED).is_none());
    let by_vcpu: Vec<_> = report.rounds.iter().map(|round| round.vcpu_pages_dirtied.len()).collect();
    assert!(by_vcpu.contains(&3), "it was there: {by_vcpu:?}");
    assert_eq!(tracker.snapshot().vcpus.len(), 2, "it is gone");
    // What it wrote before it went has arrived.
    assert_eq!(report.ram_digest_match, Some(true), "{report:?}");
}

/// Returns when it is so.
fn wait_for(is_so: impl Fn() -> bool, else_what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{else_what}");
        thread::sleep(Duration::from_millis(1));
    }
}
