//! The handing over under faults: whatever message is cut, and wherever, never do both sides run, and never is
//! the VM lost.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]
#![expect(unsafe_code, reason = "a test's guest RAM is a mapping of its own")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use memmap2::MmapMut;
use proptest::prelude::*;
use ringferry::destination::{Destination, DestinationError, DestinationOptions, DestinationReport};
use ringferry::layout::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceError, SourceOptions, SourceReport};
use ringferry::track::{Observed, TrackError};
use ringferry::vm::VmError;
use ringferry::wire::control::{HEAD_BYTES, Head, Hello, Message, PROTOCOL};
use ringferry::{DirtySource, PageSet, Paused, Quiesced, Settled, Vm};

const PAGES: u64 = 64;
const SHORT: Duration = Duration::from_secs(2);

/// RAM of a test, mapped for as long as it lives.
struct Ram {
    memory: GuestMemory,
    _mapping: MmapMut,
}

impl Ram {
    fn new(pages: u64) -> Self {
        let bytes = usize::try_from(pages).unwrap() * PAGE_SIZE;
        let mut mapping = MmapMut::map_anon(bytes).unwrap();
        let region = Region {
            slot: SlotId(0),
            pages: PageRun { first: PageIndex(0), pages },
            host: mapping.as_mut_ptr(),
        };
        // SAFETY:
        // * the mapping has exactly this length and lives as long as `memory`, in the same struct;
        // * nothing refers to it but through `memory`.
        let memory = unsafe { GuestMemory::new(vec![region]) }.unwrap();
        Self { memory, _mapping: mapping }
    }

    /// Writes a byte of a page, as a guest would.
    fn write(&self, page: usize, value: u8) {
        let host = self.memory.regions()[0].host;
        // SAFETY: inside the mapping, for `page` is below `PAGES`; no reference to it exists.
        unsafe { host.add(page * PAGE_SIZE).write_volatile(value) };
    }

    fn read(&self, page: usize) -> u8 {
        let host = self.memory.regions()[0].host;
        // SAFETY: as in `write`.
        unsafe { host.add(page * PAGE_SIZE).read_volatile() }
    }
}

/// A VM without a guest: it runs or it does not.
struct TestVm {
    running: Arc<AtomicBool>,
    fails: Option<&'static str>,
}

impl TestVm {
    fn new(running: bool) -> (Self, Arc<AtomicBool>) {
        let running = Arc::new(AtomicBool::new(running));
        (Self { running: running.clone(), fails: None }, running)
    }

    fn attempt(&self, what: &'static str) -> Result<(), VmError> {
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

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        self.attempt("save")?;
        Ok(b"state".to_vec())
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.attempt("restore")?;
        assert_eq!(state, b"state");
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, _: usize) {}
}

/// Dirty pages by decree: every harvest finds `dirty`, and the final one the last pages of RAM.
#[derive(Default)]
struct TestSource {
    tracking: bool,
    given_back: u64,
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
        Ok(Observed::PerVcpu(vec![2]))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError> {
        dirty.insert_run(PageRun { first: PageIndex(3), pages: 2 });
        Ok(())
    }

    fn harvest_final(&mut self, _: &Settled<'_>, dirty: &mut PageSet) -> Result<(), TrackError> {
        dirty.insert_run(PageRun { first: PageIndex(PAGES - 1), pages: 1 });
        Ok(())
    }

    fn give_back(&mut self, pages: &PageSet) {
        self.given_back += pages.len();
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.tracking = false;
        Ok(())
    }
}

struct Sides {
    source: Result<SourceReport, SourceError>,
    destination: Result<DestinationReport, DestinationError>,
    source_runs: bool,
    destination_runs: bool,
    given_back: u64,
    source_ram: Ram,
    destination_ram: Ram,
}

/// What a test does to one migration.
#[derive(Default)]
struct Fault {
    /// Cut the control connection at this message from the source (or the destination).
    cut: Option<Cut>,
    source_fails: Option<&'static str>,
    destination_fails: Option<&'static str>,
    destination_pages: Option<u64>,
    cancel: bool,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Cut {
    message: &'static str,
    /// Forward the first half of it.
    half: bool,
}

/// One whole migration over loopback, both sides in this process.
fn migrate(fault: Fault) -> Sides {
    let destination = Destination::bind(SocketAddr::from(([127, 0, 0, 1], 0)), false).unwrap();
    let address = cutting_proxy(destination.local_addr().unwrap(), fault.cut);
    let (source_ram, destination_ram) = (Ram::new(PAGES), Ram::new(fault.destination_pages.unwrap_or(PAGES)));
    (0..60).for_each(|page| source_ram.write(page, u8::try_from(page).unwrap()));
    let (mut source_vm, source_runs) = TestVm::new(true);
    let (mut destination_vm, destination_runs) = TestVm::new(false);
    (source_vm.fails, destination_vm.fails) = (fault.source_fails, fault.destination_fails);
    let mut tracker = TestSource::default();
    let options = SourceOptions {
        destination: address.to_string(),
        channels: 2,
        verify: true,
        vcpus: 1,
        answer_timeout: SHORT,
        ..SourceOptions::default()
    };
    let progress = Progress::new(Parameters::default());
    if fault.cancel {
        progress.parameters().cancel();
    }
    let never = AtomicBool::new(false);
    let (source, destination) = thread::scope(|scope| {
        let (vm, memory) = (&mut destination_vm, &destination_ram.memory);
        let receiving = scope.spawn(|| {
            let options =
                DestinationOptions { silence: SHORT, commit: SHORT, ..DestinationOptions::default() };
            destination.accept(None, &never)?.receive(vm, 1, memory, &options, &never)
        });
        let source = Source::new(&mut source_vm, &mut tracker, &source_ram.memory, options, progress).run();
        // Nobody may wait for a source that never came.
        let _ = TcpStream::connect(address);
        (source, receiving.join().unwrap())
    });
    assert!(
        !tracker.tracking || matches!(source, Err(SourceError::Unconfirmed { .. })),
        "tracking was left on"
    );
    Sides {
        source,
        destination,
        source_runs: source_runs.load(Ordering::SeqCst),
        destination_runs: destination_runs.load(Ordering::SeqCst),
        given_back: tracker.given_back,
        source_ram,
        destination_ram,
    }
}

/// Forwards whole control messages both ways, and closes both connections at the one to cut.
fn cutting_proxy(to: SocketAddr, cut: Option<Cut>) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(to).unwrap();
        let back = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        thread::spawn(move || forward(back.0, back.1, cut));
        forward(source, destination, cut);
    });
    address
}

fn forward(mut from: TcpStream, mut to: TcpStream, cut: Option<Cut>) {
    let mut one = || -> Option<()> {
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head).ok()?;
        let parsed = Head::parse(head).unwrap();
        let mut body = vec![0; parsed.body_bytes()];
        from.read_exact(&mut body).ok()?;
        let name = Message::decode(&parsed, &body).unwrap().name();
        let bytes = [head.as_slice(), &body].concat();
        match cut {
            Some(cut) if cut.message == name => {
                let _ = to.write_all(&bytes[..if cut.half { bytes.len() / 2 } else { 0 }]);
                None
            }
            _ => to.write_all(&bytes).ok(),
        }
    };
    while one().is_some() {}
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn a_migration_without_a_fault_moves_every_page_and_one_side_runs() {
    let sides = migrate(Fault::default());
    let report = sides.source.unwrap();
    assert_eq!(sides.destination.unwrap().ram_digest_match, Some(true));
    assert_eq!(report.ram_digest_match, Some(true));
    assert!(!sides.source_runs && sides.destination_runs);
    let pages = usize::try_from(PAGES).unwrap();
    for page in 0..pages {
        assert_eq!(sides.destination_ram.read(page), sides.source_ram.read(page), "page {page}");
    }
    assert_eq!(report.rounds.iter().map(|round| round.pages_sent + round.zero_pages).sum::<u64>(), {
        report.pages_sent + report.zero_pages
    });
}

#[test]
fn wherever_the_control_connection_is_cut_one_side_has_the_vm_and_never_both_run() {
    for message in ["Hello", "Accept", "State", "Prepare", "Prepared", "Commit", "Running"] {
        for half in [false, true] {
            let cut = Cut { message, half };
            let sides = migrate(Fault { cut: Some(cut), ..Fault::default() });
            assert!(!(sides.source_runs && sides.destination_runs), "{cut:?}: both run");
            let error = sides.source.expect_err("a cut connection is no success");
            match message {
                // The unavoidable window: the source keeps the VM, paused, until an operator decides.
                "Commit" | "Running" => {
                    assert!(matches!(error, SourceError::Unconfirmed { .. }), "{cut:?}: {error}");
                    assert!(!sides.source_runs, "{cut:?}: the source resumed by itself");
                    assert_eq!(sides.destination_runs, message == "Running", "{cut:?}");
                }
                _ => {
                    assert!(sides.source_runs, "{cut:?}: nobody runs the VM: {error}");
                    assert!(sides.destination.is_err(), "{cut:?}");
                }
            }
        }
    }
}

#[test]
fn whatever_either_vmm_cannot_do_the_vm_is_not_lost() {
    for fails in ["pause", "save"] {
        let sides = migrate(Fault { source_fails: Some(fails), ..Fault::default() });
        assert!(sides.source.unwrap_err().to_string().contains(fails));
        assert!(sides.source_runs && !sides.destination_runs, "{fails}");
    }
    let sides = migrate(Fault { destination_fails: Some("restore"), ..Fault::default() });
    assert!(
        matches!(sides.source, Err(SourceError::Aborted(why)) if why.contains("restore fails in this test"))
    );
    assert!(sides.source_runs && !sides.destination_runs);
    // After Commit a destination that cannot resume still has the VM, and the source does not touch it.
    let sides = migrate(Fault { destination_fails: Some("resume"), ..Fault::default() });
    assert!(matches!(sides.source, Err(SourceError::Unconfirmed { .. })));
    assert!(!sides.source_runs && !sides.destination_runs);
}

#[test]
fn a_failed_migration_gives_back_every_page_that_it_harvested() {
    let cut = Cut { message: "Prepare", half: false };
    let sides = migrate(Fault { cut: Some(cut), ..Fault::default() });
    assert!(sides.source.is_err());
    assert_eq!(sides.given_back, 3, "two pages of a round, one of the final harvest");
}

#[test]
fn a_destination_with_less_ram_says_so_on_both_sides() {
    let sides = migrate(Fault { destination_pages: Some(PAGES / 2), ..Fault::default() });
    let (source, destination) = (sides.source.unwrap_err(), sides.destination.unwrap_err());
    assert!(matches!(&source, SourceError::Refused(why) if why.contains("RAM")), "{source}");
    assert!(matches!(&destination, DestinationError::Refused(why) if why.contains("RAM")), "{destination}");
    assert!(sides.source_runs && !sides.destination_runs);
}

#[test]
fn a_cancelled_migration_leaves_the_vm_running_at_the_source() {
    let sides = migrate(Fault { cancel: true, ..Fault::default() });
    assert!(matches!(sides.source, Err(SourceError::Cancelled)), "{:?}", sides.source);
    assert!(sides.source_runs && !sides.destination_runs);
}

#[test]
fn a_peer_that_does_not_speak_the_protocol_is_named() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read(&mut [0; 1024]);
    });
    let ram = Ram::new(PAGES);
    let (mut vm, running) = TestVm::new(true);
    let options = SourceOptions { destination: address, answer_timeout: SHORT, ..SourceOptions::default() };
    let mut tracker = TestSource::default();
    let progress = Progress::new(Parameters::default());
    let error = Source::new(&mut vm, &mut tracker, &ram.memory, options, progress).run().unwrap_err();
    assert!(error.to_string().contains("does not speak Ringferry"), "{error}");
    assert!(running.load(Ordering::SeqCst));
}

/// One side's messages in their order, with one byte of them changed or the rest of them missing.
fn damaged(messages: Vec<Message>) -> impl Strategy<Value = Vec<u8>> {
    let bytes: Vec<u8> = messages.iter().flat_map(|message| message.encode().unwrap()).collect();
    (any::<prop::sample::Index>(), 0..=8_u32).prop_map(move |(at, bit)| {
        let (mut bytes, at) = (bytes.clone(), at.index(bytes.len()));
        if bit == 8 {
            bytes.truncate(at)
        } else {
            bytes[at] ^= 1 << bit
        }
        bytes
    })
}

fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..300)
}

/// What a source says from beginning to end.
fn of_a_source() -> Vec<Message> {
    let hello = Hello {
        protocol: PROTOCOL,
        page_bytes: u32::try_from(PAGE_SIZE).unwrap(),
        vcpus: 1,
        channels: 1,
        ram: vec![PageRun { first: PageIndex(0), pages: PAGES }],
        ..Hello::default()
    };
    let state = Message::State(b"state".to_vec());
    vec![Message::Hello(hello), state, Message::Prepare { ram_digest: 0 }, Message::Commit]
}

fn of_a_destination() -> Vec<Message> {
    let accept = Message::Accept { protocol: PROTOCOL, data_port: 1 };
    vec![accept, Message::Prepared { ram_digest: 0 }, Message::Running]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_a_destination_says_the_vm_runs_on_at_the_source(bytes in prop_oneof![damaged(of_a_destination()), noise()]) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let destination = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&bytes).and_then(|()| stream.shutdown(std::net::Shutdown::Write));
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let ram = Ram::new(PAGES);
        let (mut vm, running) = TestVm::new(true);
        let options = SourceOptions { destination, answer_timeout: SHORT, ..SourceOptions::default() };
        let (mut tracker, progress) = (TestSource::default(), Progress::new(Parameters::default()));
        let result = Source::new(&mut vm, &mut tracker, &ram.memory, options, progress).run();
        prop_assert!(result.is_err());
        prop_assert!(running.load(Ordering::SeqCst) && !tracker.tracking);
    }

    #[test]
    fn whatever_a_source_says_the_vm_does_not_run_at_the_destination(bytes in prop_oneof![damaged(of_a_source()), noise()]) {
        let destination = Destination::bind(SocketAddr::from(([127, 0, 0, 1], 0)), false).unwrap();
        let mut source = TcpStream::connect(destination.local_addr().unwrap()).unwrap();
        source.write_all(&bytes).unwrap();
        source.shutdown(std::net::Shutdown::Write).unwrap();
        let ram = Ram::new(PAGES);
        let (mut vm, running) = TestVm::new(false);
        let options = DestinationOptions { silence: SHORT, commit: SHORT, ..DestinationOptions::default() };
        let never = AtomicBool::new(false);
        let result = destination
            .accept(None, &never)
            .and_then(|incoming| incoming.receive(&mut vm, 1, &ram.memory, &options, &never));
        prop_assert!(result.is_err(), "{:?}", result);
        prop_assert!(!running.load(Ordering::SeqCst));
    }
}
