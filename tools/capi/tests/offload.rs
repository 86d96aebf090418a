//! The offload example in C is a VMM that gcc has compiled. The test is the process beside it, as `ringferry offload` is.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod gcc;

use std::io::{BufRead, BufReader, Lines};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;

use gcc::{can_run, compiled, under_valgrind};
use ringferry::Vm as _;
use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::offload::{BorrowedVm, End, Offer, WaitingVmm, connect};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceOptions};
use tempfile::TempDir;

const EXAMPLE: &str = "example/offload.c";

/// The example at work, waiting for an offload process on `socket`.
struct Vmm {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    socket: PathBuf,
}

impl Vmm {
    fn start(mut command: Command, mode: &str, directory: &TempDir) -> Self {
        let socket = directory.path().join(mode);
        let mut child = command.arg(mode).arg(&socket).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut vmm = Self { child, lines, socket };
        assert_eq!(vmm.line(), "waiting");
        vmm
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("it said nothing more").unwrap()
    }

    fn ends_well(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A destination to send to, and where it listens.
fn destination() -> (Destination, SocketAddr) {
    let destination = Destination::bind(ListenOptions::new(([127, 0, 0, 1], 0).into())).unwrap();
    let address = destination.local_addr().unwrap();
    (destination, address)
}

/// What `ringferry offload send` does. Says how it ended.
fn send(socket: &Path, to: SocketAddr) -> Result<(), String> {
    let mut lent = BorrowedVm::borrow(connect(socket).unwrap()).unwrap();
    let options = SourceOptions {
        destination: to.to_string(),
        verify: true,
        vcpus: lent.vcpus,
        ..SourceOptions::default()
    };
    let progress = Progress::new(Parameters::default());
    let source = Source::new(&mut lent.vm, lent.session.as_mut(), &lent.memory, options, progress);
    let sent = source.run().map_err(|error| error.to_string());
    let sent = sent.and_then(|outcome| outcome.confirmed().map(drop).map_err(|who| who.to_string()));
    let (end, text) = match &sent {
        Ok(()) => (End::Moved, ""),
        Err(error) => (End::Stays, error.as_str()),
    };
    // A VMM that has cancelled does not wait for it.
    let _ = lent.end(end, text);
    sent
}

/// What `ringferry offload receive` does.
fn receive(socket: &Path, destination: &Destination) -> Result<(), String> {
    let never = AtomicBool::new(false);
    let vmm = WaitingVmm::greet(connect(socket).unwrap()).unwrap();
    let incoming = destination.accept(None, &never).unwrap();
    let (vcpus, ram) = (incoming.vcpus(), incoming.ram().to_vec());
    let mut arriving = vmm.offer(Offer { vcpus, ram, ..Offer::default() }).unwrap();
    let options = DestinationOptions::default();
    let received = incoming.receive(&mut arriving.vm, vcpus, &arriving.memory, &options, &never);
    match received.map(drop).map_err(|error| error.to_string()) {
        Ok(()) => arriving.end(End::Arrived, "").map_err(|error| error.to_string()),
        Err(error) => {
            // A VMM that has refused does not wait for it.
            let _ = arriving.end(End::Stays, &error);
            Err(error)
        }
    }
}

#[test]
fn a_guest_of_a_vmm_in_c_moves_to_another_by_the_processes_beside_them() {
    if !can_run(&["gcc", "pkg-config"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let example = compiled(EXAMPLE, "ringferry-static", &directory);
    let mut from = Vmm::start(Command::new(&example), "source", &directory);
    let mut to = Vmm::start(Command::new(&example), "destination", &directory);
    let (destination, address) = destination();
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(&to.socket, &destination));
        assert_eq!(send(&from.socket, address), Ok(()));
        assert_eq!(received.join().unwrap(), Ok(()));
    });
    assert_eq!(from.line(), "moved");
    assert_eq!(to.line(), "goes on: true; whole: true");
    from.ends_well();
    to.ends_well();
}

/// A migration that fails while the guest stands still: what the source's VMM says at its end.
fn said_after_failure(mode: &str, run: impl Fn(&Path) -> Command) -> String {
    let directory = tempfile::tempdir().unwrap();
    let example = compiled(EXAMPLE, "ringferry-static", &directory);
    let mut from = Vmm::start(run(&example), mode, &directory);
    let to = Vmm::start(Command::new(&example), "destination", &directory);
    let (destination, address) = destination();
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(&to.socket, &destination));
        assert!(send(&from.socket, address).is_err());
        assert!(received.join().unwrap().is_err());
    });
    let why = from.line();
    assert_eq!(from.line(), "goes on: true; whole: true");
    from.ends_well();
    why
}

#[test]
fn a_migration_that_the_vmm_in_c_cancels_leaves_its_guest_running() {
    if can_run(&["gcc", "pkg-config"]) {
        assert_eq!(said_after_failure("cancel", |example| Command::new(example)), "RF_CANCELLED: cancelled");
    }
}

#[test]
fn the_text_of_a_callback_that_fails_reaches_the_end_and_the_guest_runs_on() {
    if can_run(&["gcc", "pkg-config"]) {
        let why = said_after_failure("refuse", |example| Command::new(example));
        assert!(why.starts_with("stays: ") && why.contains("the example was told to refuse"), "{why}");
    }
}

#[test]
fn an_offload_process_that_is_gone_leaves_the_guest_of_a_vmm_in_c_running() {
    if !can_run(&["gcc", "pkg-config"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let example = compiled(EXAMPLE, "ringferry-static", &directory);
    let mut from = Vmm::start(Command::new(&example), "source", &directory);
    drop(BorrowedVm::borrow(connect(&from.socket).unwrap()).unwrap());
    let why = from.line();
    assert!(why.starts_with("RF_OFFLOAD: ") && why.contains("has ended"), "{why}");
    assert_eq!(from.line(), "goes on: true; whole: true");
    from.ends_well();
}

#[test]
fn an_offload_process_that_is_gone_after_the_handing_over_leaves_a_vm_that_somebody_has_to_decide_on() {
    if !can_run(&["gcc", "pkg-config"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let example = compiled(EXAMPLE, "ringferry-static", &directory);
    let mut from = Vmm::start(Command::new(&example), "source", &directory);
    let mut lent = BorrowedVm::borrow(connect(&from.socket).unwrap()).unwrap();
    let paused = lent.vm.pause().unwrap();
    let _ = lent.vm.quiesce(&paused).unwrap();
    lent.vm.hand_over().unwrap();
    drop(lent);
    let said = from.line();
    assert!(said.starts_with("somebody has to look: ") && said.contains("has ended"), "{said}");
    from.ends_well();
}

#[test]
fn valgrind_finds_no_error_and_no_leak_after_a_cancelled_migration() {
    if can_run(&["gcc", "pkg-config", "valgrind"]) {
        // Not "possible": Rust's standard library keeps what it knows of a thread of C's by a pointer into its middle.
        let run = |example: &Path| under_valgrind(example, "definite,indirect,reachable");
        assert_eq!(said_after_failure("cancel", run), "RF_CANCELLED: cancelled");
    }
}

#[test]
fn the_example_is_short() {
    assert!(std::fs::read_to_string(gcc::source(EXAMPLE)).unwrap().lines().count() <= 250);
}
