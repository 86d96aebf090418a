//! Small guests and their destinations, as tests start them.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use ringferry_testvm::skip;
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Outcome, Running, ringferry};

/// A guest that boots and moves in a moment.
pub const SMALL: [&str; 4] = ["--memory", "64MiB", "--vcpus", "1"];
pub const SMALL_WORK: [&str; 4] = ["--fill", "8MiB", "--work", "each=ws:4MiB"];

/// Whether guests can run here; if not, the test is skipped.
pub fn kvm() -> bool {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skip(&format!("/dev/kvm cannot be opened: {error}"));
    }
    opened.is_ok()
}

/// Exit code 1, and an error that says each of `parts`.
pub fn assert_failed(run: &Outcome, parts: &[&str]) {
    assert_eq!(run.code, Some(1), "{run:?}");
    for part in parts {
        assert!(run.stderr.contains(part), "{part:?} is not in: {}", run.stderr);
    }
}

/// Who migrates a guest, and how its writes are tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// Its VMM.
    Vmm,
    /// A process beside the VMM, which follows the dirty rings.
    Beside,
    /// The same, while the VMM keeps its rings.
    BesideAsking,
    /// The same on the bitmap.
    BesideOnBitmap,
}

impl By {
    pub fn is_beside(self) -> bool {
        self != Self::Vmm
    }

    /// What reports name as the backend.
    pub fn backend(self) -> &'static str {
        if self == Self::BesideOnBitmap { "bitmap" } else { "ring" }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Vmm | Self::Beside => &[],
            Self::BesideAsking => &["--keep-rings"],
            Self::BesideOnBitmap => &["--backend", "bitmap"],
        }
    }
}

/// Tests that hold whoever migrates the guest: each is run within the VMM, and beside it.
macro_rules! whoever_migrates {
    ($($test:ident),+ $(,)?) => {
        mod within_the_vmm {
            $(#[test] fn $test() { super::$test(crate::guest::By::Vmm); })+
        }
        mod beside_the_vmm {
            $(#[test] fn $test() { super::$test(crate::guest::By::Beside); })+
        }
    };
}

/// The same for those that are worth it in all ways: with the rings kept, and on the bitmap.
macro_rules! in_every_way {
    ($($test:ident),+ $(,)?) => {
        mod beside_the_vmm_that_keeps_its_rings {
            $(#[test] fn $test() { super::$test(crate::guest::By::BesideAsking); })+
        }
        mod beside_the_vmm_on_the_bitmap {
            $(#[test] fn $test() { super::$test(crate::guest::By::BesideOnBitmap); })+
        }
    };
}

pub(crate) use {in_every_way, whoever_migrates};

/// `ringferry run` with a guest, the path of its monitor, and the one where it waits for an offload process, if it does.
pub struct Guest {
    pub run: Running,
    pub monitor: String,
    pub socket: String,
    by: By,
    _directory: tempfile::TempDir,
}

impl Guest {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// One with further options.
    pub fn start_with(more: &[&str]) -> Self {
        Self::start_as(&SMALL, &[&SMALL_WORK, more].concat())
    }

    /// One of any size.
    pub fn start_as(vm: &[&str], more: &[&str]) -> Self {
        Self::start_for(By::Vmm, vm, more)
    }

    /// A small one, to be migrated in this way.
    pub fn small_for(by: By) -> Self {
        Self::start_for(by, &SMALL, &SMALL_WORK)
    }

    /// One of any size, to be migrated in this way.
    pub fn start_for(by: By, vm: &[&str], more: &[&str]) -> Self {
        Self::start_by(by, |run| Running::start(&[run, vm, more].concat()))
    }

    /// One that `start` starts with these arguments and more, to be migrated in this way.
    pub fn start_by(by: By, start: impl FnOnce(&[&str]) -> Running) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
        let (monitor, socket) = (path("monitor"), path("offload"));
        let offload: &[&str] = if by.is_beside() { &["--offload", &socket] } else { &[] };
        let run = start(&[&["run", "--monitor", &monitor], offload, by.options()].concat());
        let mut guest = Self { run, monitor, socket, by, _directory: directory };
        guest.assert_runs();
        guest
    }

    /// The arguments that move it to `to`.
    pub fn send<'a>(&'a self, to: &'a str) -> Vec<&'a str> {
        if self.by.is_beside() {
            vec!["offload", "send", "--socket", &self.socket, "--to", to]
        } else {
            vec!["send", "--monitor", &self.monitor, "--to", to]
        }
    }

    /// A migration to `to` that is under way, and would take a minute: 12 MiB at this rate.
    pub fn send_slowly(&self, to: &str) -> Running {
        let mut send = Running::start(&[&self.send(to)[..], &["--max-bandwidth", "200kB/s"]].concat());
        send.line_with("tracking is on");
        send
    }

    /// It moves whole, in one piece.
    pub fn assert_moves(self) {
        let (receive, to) = receive(&["--run-for", "100ms"]);
        let send = ringferry(&[&self.send(&to)[..], &["--verify", "--json"]].concat());
        assert_eq!(send.code, Some(0), "{send:?}");
        let report = send.objects().pop().unwrap();
        assert_eq!(
            (&report["ram_digest_match"], &report["backend"]),
            (&true.into(), &self.by.backend().into()),
            "{send:?}"
        );
        let run = self.run.end();
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(run.stdout.contains("the guest has moved away"), "{run:?}");
        assert_consistent(&receive.end());
    }

    /// It reports new progress.
    pub fn assert_runs(&mut self) {
        self.run.line_with("steps: ");
        let rates = self.run.line_with("steps: ");
        assert!(!rates.contains(" 0/s"), "{rates}");
    }

    /// It still runs, and ends when it is told to.
    pub fn assert_runs_on(mut self) {
        self.assert_runs();
        self.run.interrupt();
        assert_eq!(self.run.end().code, Some(0));
    }

    /// Two signals, of which the second ends it at once, with the number of either and without leaving its socket behind.
    pub fn end_by_two_signals(self) {
        // It is stopped meanwhile, so that both are there when it looks.
        for signal in [Signal::STOP, Signal::TERM, Signal::INT, Signal::CONT] {
            self.run.signal(signal);
        }
        let run = self.run.end();
        assert!(matches!(run.code, Some(130 | 143)), "{run:?}");
        assert!(!Path::new(&self.monitor).exists(), "the socket file is left behind");
    }
}

/// A destination whose guest has found every write of its own.
pub fn assert_consistent(received: &Outcome) {
    assert_eq!(received.code, Some(0), "{received:?}");
    assert_eq!(received.objects().last().unwrap()["guest_consistent"], true, "{received:?}");
}

/// `ringferry receive` as a VMM that waits for an offload process, that process, and the address that it waits at.
pub fn receive_beside(more: &[&str]) -> (Running, Running, String) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("arrival").to_str().unwrap().to_owned();
    let mut vmm = Running::start(&[&["receive", "--json", "--offload", &socket], more].concat());
    vmm.line_with("waiting");
    let bring = ["offload", "receive", "--json", "--socket", &socket, "--listen", "127.0.0.1:0"];
    let mut bring = Running::start(&bring);
    let address = address_of(&mut bring);
    (vmm, bring, address)
}

/// Where one that waits for a source says that it does.
fn address_of(listening: &mut Running) -> String {
    let listening: Value = serde_json::from_str(&listening.line_with("listening")).unwrap();
    listening["address"].as_str().unwrap().to_owned()
}

/// `ringferry receive`, and the address that it waits at.
pub fn receive(more: &[&str]) -> (Running, String) {
    let mut receive = Running::start(&[&["receive", "--json", "--listen", "127.0.0.1:0"], more].concat());
    let address = address_of(&mut receive);
    (receive, address)
}

pub fn closed_port() -> String {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().to_string()
}
