//! A VM without a guest, dirty pages by decree, and one whole migration of them in this process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ringferry::destination::{
    Destination, DestinationError, DestinationOptions, DestinationReport, ListenOptions,
};
use ringferry::layout::{PageIndex, PageRun};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Outcome, Source, SourceError, SourceOptions, SourceReport};
use ringferry::testing::AnonymousRam;
use ringferry::track::{Observed, TrackError};
use ringferry::transport::Discards;
use ringferry::vm::{Moment, VmError};
use ringferry::wire::relay::next_message;
use ringferry::{DirtySource, PageSet, Paused, Quiesced, Settled, Vm};
use ringferry_testvm::relay::Relay;

use crate::proxy::{Proxied, proxy};

pub const PAGES: u64 = 64;
/// What is in the first page of what a VM has discarded.
pub const NEW_CONTENT: u64 = 0xd15c;
pub const SHORT: Duration = Duration::from_secs(2);
pub static NEVER: AtomicBool = AtomicBool::new(false);

/// What happened, in order, and when.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<(Instant, &'static str)>>>);

impl Log {
    pub fn add(&self, what: &'static str) {
        self.0.lock().push((Instant::now(), what));
    }

    pub fn all(&self) -> Vec<&'static str> {
        self.0.lock().iter().map(|(_, what)| *what).collect()
    }

    pub fn at(&self, what: &str) -> Option<Instant> {
        self.0.lock().iter().find(|(_, logged)| *logged == what).map(|(at, _)| *at)
    }

    pub fn position(&self, what: &str) -> Option<usize> {
        self.all().iter().position(|logged| *logged == what)
    }
}

/// A VM without a guest: it runs or it does not.
pub struct TestVm {
    pub running: Arc<AtomicBool>,
    pub log: Log,
    pub ram: Arc<AnonymousRam>,
    pub fails: Option<&'static str>,
    /// Restoring state takes so long.
    pub restoring: Duration,
    /// The page that saving state writes at the source, and restoring it at the destination.
    pub writes: Option<PageIndex>,
    /// What it discards and writes anew, when it does what.
    pub discards: Option<(&'static str, PageRun, Discards)>,
    /// Bytes of device state in pieces: a tenth of it in each round, the rest at the end.
    pub device_bytes: u64,
    pub device: Pattern,
}

/// Bytes that follow from their place in the stream, so that nobody has to keep them: one block over and over. Its length
/// is a prime, so that a piece in the wrong place is wrong.
#[derive(Default)]
pub struct Pattern {
    pub at: u64,
}

impl Pattern {
    const BLOCK_BYTES: u64 = 65_521;

    fn block() -> &'static [u8] {
        static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
        BLOCK.get_or_init(|| (0..Self::BLOCK_BYTES).map(|at| u8::try_from(at * at % 251).unwrap()).collect())
    }

    /// The block from here on.
    fn rest(&self) -> &'static [u8] {
        &Self::block()[usize::try_from(self.at % Self::BLOCK_BYTES).unwrap()..]
    }

    pub fn write(&mut self, bytes: u64, out: &mut dyn Write) -> std::io::Result<()> {
        let end = self.at + bytes;
        while self.at < end {
            let rest = self.rest();
            let piece = rest.len().min(usize::try_from(end - self.at).unwrap());
            out.write_all(&rest[..piece])?;
            self.at += piece as u64;
        }
        Ok(())
    }

    pub fn check(&mut self, mut bytes: &[u8]) -> Result<(), VmError> {
        while !bytes.is_empty() {
            let rest = self.rest();
            let (piece, more) = bytes.split_at(rest.len().min(bytes.len()));
            if piece != &rest[..piece.len()] {
                return Err(format!("the device's state is wrong from byte {} on", self.at).into());
            }
            self.at += piece.len() as u64;
            bytes = more;
        }
        Ok(())
    }
}

impl TestVm {
    pub fn new(running: bool, ram: &Arc<AnonymousRam>) -> Self {
        Self {
            running: Arc::new(AtomicBool::new(running)),
            log: Log::default(),
            ram: Arc::clone(ram),
            fails: None,
            restoring: Duration::ZERO,
            writes: None,
            discards: None,
            device_bytes: 0,
            device: Pattern::default(),
        }
    }

    fn attempt(&self, what: &'static str) -> Result<(), VmError> {
        self.log.add(what);
        if let Some((when, run, discards)) = &self.discards
            && *when == what
        {
            self.ram.discard(*run).unwrap();
            self.ram.write(run.first, NEW_CONTENT);
            discards.discarded(*run);
        }
        if self.fails == Some(what) { Err(format!("{what} fails in this test").into()) } else { Ok(()) }
    }
}

impl Vm for TestVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.attempt("pause")?;
        assert!(self.running.swap(false, Ordering::SeqCst), "paused twice");
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        self.attempt("resume")?;
        assert!(!self.running.swap(true, Ordering::SeqCst), "resumed twice");
        Ok(())
    }

    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        self.attempt("quiesce")?;
        Ok(Quiesced::declare_no_device_writes(paused))
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        self.attempt("save")?;
        if let Some(page) = self.writes {
            self.ram.write(page, 0xf1a5);
        }
        Ok(b"state".to_vec())
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.attempt("restore")?;
        assert_eq!(state, b"state");
        if let Some(page) = self.writes {
            self.ram.write(page, 0x1234);
        }
        thread::sleep(self.restoring);
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, _: usize) {}

    fn device_state_bytes_left(&mut self) -> u64 {
        self.device_bytes - self.device.at
    }

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        let left = self.device_bytes - self.device.at;
        let bytes = match moment {
            Moment::Running { .. } => left.min(self.device_bytes / 10),
            Moment::Stopped(_) => left,
        };
        Ok(self.device.write(bytes, out)?)
    }

    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        self.device.check(piece)
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        self.attempt("prepare")
    }

    fn release(&mut self) {
        self.log.add("release");
    }
}

/// Dirty pages by decree: every harvest finds pages 3 and 4, and the final one the last page of RAM too.
#[derive(Default)]
pub struct TestSource {
    pub tracking: bool,
    pub given_back: u64,
    pub log: Log,
    /// Pages that are dirty with every harvest.
    pub dirty_pages: Option<PageRun>,
    /// What the final harvest finds, if it comes after state was saved.
    pub dirtied_by_saving: Option<PageIndex>,
}

impl DirtySource for TestSource {
    fn backend(&self) -> &'static str {
        "test"
    }

    fn start(&mut self) -> Result<(), TrackError> {
        assert!(!std::mem::replace(&mut self.tracking, true));
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, TrackError> {
        Ok(Observed::per_vcpu(vec![2]))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        dirty.insert_run(self.dirty_pages.unwrap_or(PageRun { first: PageIndex(3), pages: 2 }));
        Ok(())
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        dirty.insert_run(PageRun { first: PageIndex(PAGES - 1), pages: 1 });
        if let Some(page) = self.dirtied_by_saving.filter(|_| self.log.position("save").is_some()) {
            dirty.insert(page);
        }
        Ok(())
    }

    fn give_back(&mut self, pages: &PageSet) {
        self.log.add("give back");
        self.given_back += pages.len();
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.log.add("stop tracking");
        self.tracking = false;
        Ok(())
    }
}

/// Both sides of one migration, and what a test does to them.
pub struct World {
    pub source_vm: TestVm,
    pub destination_vm: TestVm,
    pub tracker: TestSource,
    pub source_ram: Arc<AnonymousRam>,
    pub destination_ram: Arc<AnonymousRam>,
    pub options: SourceOptions,
    pub destination_options: DestinationOptions,
    pub progress: Progress,
    /// What the control connection goes through.
    pub proxied: Proxied,
    /// What all connections go through before that, if anything: bytes per second, and the delay each way.
    pub relayed: Option<(u64, Duration)>,
    /// That, while it migrates.
    pub relay: Arc<Mutex<Option<Relay>>>,
    /// What becomes of a VM that was handed over and never confirmed.
    pub resolution: Option<Resolution>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    Keep,
    Release,
}

/// How a migration ended.
pub struct Ended {
    /// The report, or why there is none.
    pub source: Result<SourceReport, SourceError>,
    /// Why no confirmation came, if that is how it ended.
    pub unconfirmed: Option<String>,
    pub destination: Result<DestinationReport, DestinationError>,
}

impl World {
    pub fn new() -> Self {
        Self::with_pages(PAGES)
    }

    /// The destination's RAM may be of another size.
    pub fn with_pages(destination_pages: u64) -> Self {
        let ram = |pages| Arc::new(AnonymousRam::new(pages).unwrap());
        let (source_ram, destination_ram) = (ram(PAGES), ram(destination_pages));
        (0..60).for_each(|page| source_ram.write(PageIndex(page), page));
        let source_vm = TestVm::new(true, &source_ram);
        let tracker = TestSource { log: source_vm.log.clone(), ..TestSource::default() };
        let options = SourceOptions { verify: true, answer_timeout: SHORT, ..SourceOptions::default() };
        Self {
            destination_vm: TestVm::new(false, &destination_ram),
            source_vm,
            tracker,
            source_ram,
            destination_ram,
            options,
            destination_options: DestinationOptions { commit: SHORT, ..DestinationOptions::default() },
            progress: Progress::new(Parameters::default()),
            proxied: Proxied::default(),
            relayed: None,
            relay: Arc::default(),
            resolution: None,
        }
    }

    pub fn source_runs(&self) -> bool {
        self.source_vm.running.load(Ordering::SeqCst)
    }

    pub fn destination_runs(&self) -> bool {
        self.destination_vm.running.load(Ordering::SeqCst)
    }

    /// One whole migration over loopback. `meanwhile` runs beside it.
    pub fn migrate_while(&mut self, meanwhile: impl FnOnce() + Send) -> Ended {
        let destination =
            Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
        let mut address = proxy(destination.local_addr().unwrap(), self.proxied);
        if let Some((bytes_per_s, delay)) = self.relayed {
            let relay = Relay::new(address, bytes_per_s, delay, next_message).unwrap();
            address = relay.address();
            *self.relay.lock() = Some(relay);
        }
        let mut options = self.options.clone();
        options.destination = address.to_string();
        let cancel_destination = AtomicBool::new(false);
        let (mut unconfirmed, resolution) = (None, self.resolution);
        let (source, destination) = thread::scope(|scope| {
            let (vm, memory) = (&mut self.destination_vm, self.destination_ram.memory());
            let (of_destination, cancel) = (&self.destination_options, &cancel_destination);
            let receiving = scope.spawn(move || {
                destination.accept(None, cancel)?.receive(vm, 1, memory, of_destination, cancel)
            });
            scope.spawn(meanwhile);
            let (tracker, progress) = (&mut self.tracker, self.progress.clone());
            let run =
                Source::new(&mut self.source_vm, tracker, self.source_ram.memory(), options, progress).run();
            let source = run.and_then(|outcome| match outcome {
                Outcome::HandedOver(report) => Ok(*report),
                Outcome::Unconfirmed(open) => {
                    unconfirmed = Some(open.to_string());
                    match resolution {
                        Some(Resolution::Keep) => match open.keep() {
                            Ok(()) => Ok(SourceReport::default()),
                            Err((_, error)) => Err(*error),
                        },
                        Some(Resolution::Release) => Ok(open.release()),
                        None => Ok(SourceReport::default()),
                    }
                }
            });
            // Nobody may wait for a source that never came.
            if source.is_err() {
                thread::sleep(Duration::from_millis(50));
                cancel_destination.store(true, Ordering::SeqCst);
            }
            (source, receiving.join().unwrap())
        });
        assert!(!(self.source_runs() && self.destination_runs()), "both run");
        assert!(!self.tracker.tracking || unconfirmed.is_some(), "tracking was left on");
        Ended { source, unconfirmed, destination }
    }

    pub fn migrate(&mut self) -> Ended {
        self.migrate_while(|| ())
    }

    /// The source alone, against whatever listens at `address`.
    pub fn send_to(&mut self, address: SocketAddr) -> Result<SourceReport, SourceError> {
        let options = SourceOptions { destination: address.to_string(), ..self.options.clone() };
        let (tracker, progress) = (&mut self.tracker, self.progress.clone());
        let run =
            Source::new(&mut self.source_vm, tracker, self.source_ram.memory(), options, progress).run();
        run.map(|outcome| outcome.confirmed().unwrap())
    }
}

/// Reads until the peer closes.
pub fn read_all(mut stream: TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

/// Waits until `done`, or fails.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "not in 20 s: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
