//! A VM on real KVM moves by a process beside its VMM, while the VMM's own sessions run on: a backup that began before, and a
//! measurement that begins and ends meanwhile. None of the three misses a page.
//!
//! The process beside is a thread here, over the same socket: what is its own is shown by `tools/cli/tests/cli/offload.rs`.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod bare;

use std::fs::File;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::offload::{BorrowedVm, End, Ended, LentVm, RegionFile, Rings, lend};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceOptions, SourceReport};
use ringferry::track::{DirtyTracker, Observed, Session, TrackError};
use ringferry::{PAGE_SIZE, PageSet, SlotId, Vm};
use ringferry_testvm::check::check;
use ringferry_testvm::{Backing, Boot, Config, Guest, TestVm, Tracking, guest_image};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const VCPUS: usize = 2;
const LIMIT: Duration = Duration::from_secs(60);

fn config(boot: Boot, tracking: Tracking) -> Config {
    Config { vcpus: VCPUS, backing: Backing::Memfd, boot, tracking, ..Config::default() }
}

/// A VM whose guest is at work.
fn running(tracking: Tracking) -> TestVm {
    let append = format!("vcpus={VCPUS} fill={} each=pattern:random,ws:8MiB", 16 << 20);
    let mut vm = TestVm::new(config(Boot::Image { image: guest_image(), append }, tracking)).unwrap();
    let guest = Guest::new(vm.memory(), vm.tracker()).unwrap();
    vm.start().unwrap();
    guest.wait_until_working(LIMIT).unwrap();
    vm
}

/// What a session of the VMM's has copied.
struct Backup {
    session: Session,
    ram: File,
    copied: Vec<u8>,
}

impl Backup {
    fn new(tracker: &DirtyTracker, vm: &TestVm) -> Self {
        let session = tracker.start().unwrap();
        let ram = vm.ram_files().unwrap()[0].try_clone().unwrap();
        let mut copied = vec![0; usize::try_from(vm.memory().pages()).unwrap() * PAGE_SIZE];
        ram.read_exact_at(&mut copied, 0).unwrap();
        Self { session, ram, copied }
    }

    /// Copies what was dirtied; how many pages.
    fn go_on(&mut self) -> u64 {
        let mut dirty = PageSet::new(ringferry::PageIndex((self.copied.len() / PAGE_SIZE) as u64));
        self.session.harvest(&mut dirty).unwrap();
        for run in dirty.runs() {
            let first = usize::try_from(run.first.0).unwrap() * PAGE_SIZE;
            let bytes = usize::try_from(run.pages).unwrap() * PAGE_SIZE;
            self.ram.read_exact_at(&mut self.copied[first..first + bytes], first as u64).unwrap();
        }
        dirty.len()
    }

    /// The guest stands still: what was copied is what is there.
    fn assert_whole(&mut self) {
        self.go_on();
        let mut now = vec![0; self.copied.len()];
        self.ram.read_exact_at(&mut now, 0).unwrap();
        let pages = now.chunks(PAGE_SIZE).zip(self.copied.chunks(PAGE_SIZE));
        let old: Vec<_> = pages.enumerate().filter(|(_, (now, copied))| now != copied).collect();
        assert!(old.is_empty(), "{} pages of the backup are old, from page {} on", old.len(), old[0].0);
    }
}

/// Sends the VM that is lent at the other end of `connection`.
fn send(connection: OwnedFd, to: SocketAddr, progress: &Progress) -> SourceReport {
    let mut lent = BorrowedVm::borrow(connection).unwrap();
    let options = SourceOptions {
        destination: to.to_string(),
        verify: true,
        vcpus: lent.vcpus,
        ..SourceOptions::default()
    };
    let source = Source::new(&mut lent.vm, lent.session.as_mut(), &lent.memory, options, progress.clone());
    let report = source.run().unwrap().confirmed().unwrap();
    lent.end(End::Moved, "").unwrap();
    report
}

/// Lends `vm` and has it moved, while `beside` does something else until it is told that the migration has ended.
fn migrate<T: Send>(
    vm: &mut TestVm,
    rings: Rings,
    beside: impl FnOnce(&DirtyTracker, &Progress, &AtomicBool) -> T + Send,
) -> (SourceReport, T) {
    let tracker = vm.tracker().unwrap().clone();
    let duplicate = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().unwrap();
    let regions = vm.memory().regions().iter().zip(vm.ram_files().unwrap());
    let memory: Vec<_> = regions
        .map(|(region, file)| RegionFile {
            slot: region.slot,
            pages: region.pages,
            file: duplicate(file),
            offset: 0,
            name: String::new(),
        })
        .collect();
    let vcpus: Vec<_> = vm.vcpu_fds().iter().map(|fd| duplicate(fd)).enumerate().collect();
    let mut target = TestVm::new(config(Boot::Destination, Tracking::None)).unwrap();
    let there = target.memory().clone();
    let destination = Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let to = destination.local_addr().unwrap();
    let parameters = Parameters::default();
    // RAM takes a second.
    parameters.max_bandwidth().set(NonZeroU64::new(50_000_000));
    parameters.change(|terms| terms.limits.downtime = Duration::from_millis(700));
    let progress = Progress::new(parameters);
    let (near, far) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let (never, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let lent =
        LentVm { tracker: &tracker, rings, memory: &memory, vcpus: &vcpus, vm_id: "", description: b"" };
    let (report, done) = thread::scope(|scope| {
        scope.spawn(|| {
            let incoming = destination.accept(None, &never).unwrap();
            let vcpus = u32::try_from(VCPUS).unwrap();
            incoming.receive(&mut target, vcpus, &there, &DestinationOptions::default(), &never).unwrap();
        });
        let beside = scope.spawn(|| beside(&tracker, &progress, &ended));
        let process = scope.spawn(|| send(far, to, &progress));
        assert!(matches!(lend(near, vm, &lent, &never).unwrap(), Ended::Moved));
        ended.store(true, Ordering::Release);
        (process.join().unwrap(), beside.join().unwrap())
    });
    let _paused = target.pause().unwrap();
    check(&there).unwrap();
    assert_eq!(report.ram_digest_match, Some(true), "{report:?}");
    (report, done)
}

fn wait_for_start(progress: &Progress) {
    let deadline = Instant::now() + LIMIT;
    while progress.status().ram_pages == 0 {
        assert!(Instant::now() < deadline, "the migration does not begin");
        thread::sleep(Duration::from_millis(1));
    }
}

fn moves_with_sessions_beside(tracking: Tracking, backend: &str) {
    if bare::kvm().is_none() {
        return;
    }
    let mut vm = running(tracking);
    let mut backup = Backup::new(&vm.tracker().unwrap().clone(), &vm);
    // It would lend its rings, and cannot.
    let (report, (mut backup, harvests)) = migrate(&mut vm, Rings::Lend, move |tracker, progress, ended| {
        wait_for_start(progress);
        let measurement = tracker.start().unwrap();
        let mut harvests = 0;
        while !ended.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(50));
            harvests += u32::from(backup.go_on() > 0);
            let observed = measurement.observe().unwrap();
            let sees = matches!(&observed, Observed::PerVcpu { vcpus, .. } if vcpus.len() == VCPUS);
            assert!(sees || observed == Observed::Unobservable, "{observed:?}");
        }
        (backup, harvests)
    });
    assert_eq!(report.backend, backend);
    assert!(harvests > 0, "no harvest beside: {report:?}");
    backup.assert_whole();
}

#[test]
fn a_backup_and_a_measurement_run_beside_a_migration_in_another_process() {
    moves_with_sessions_beside(Tracking::Ring { entries: 4096 }, "ring");
}

#[test]
fn they_do_on_the_bitmap() {
    moves_with_sessions_beside(Tracking::Bitmap, "bitmap");
}

#[test]
fn while_another_process_follows_the_rings_the_vmm_is_refused_and_the_migration_goes_on() {
    if bare::kvm().is_none() {
        return;
    }
    let mut vm = running(Tracking::Ring { entries: 4096 });
    let (_, ()) = migrate(&mut vm, Rings::Lend, |tracker, progress, _| {
        wait_for_start(progress);
        let refused = tracker.start().unwrap_err();
        assert!(refused.to_string().contains("keeps its rings"), "{refused}");
        assert!(matches!(tracker.remove_slot(SlotId(0)), Err(TrackError::Lent)));
        assert!(matches!(tracker.detach_vcpu(1), Err(TrackError::Lent)));
    });
    // They have come back.
    let mut backup = Backup::new(&vm.tracker().unwrap().clone(), &vm);
    backup.assert_whole();
}
