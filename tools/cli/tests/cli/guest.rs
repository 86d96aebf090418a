//! Small guests and their destinations, as tests start them.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use ringferry_testvm::skip;
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Outcome, Running};

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

/// `ringferry run` with a small guest, and the path of its monitor.
pub struct Guest {
    pub run: Running,
    pub monitor: String,
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
        let directory = tempfile::tempdir().unwrap();
        let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
        let run = Running::start(&[&["run", "--monitor", &monitor], vm, more].concat());
        let mut guest = Self { run, monitor, _directory: directory };
        guest.assert_runs();
        guest
    }

    /// The arguments that move it to `to`.
    pub fn send<'a>(&'a self, to: &'a str) -> Vec<&'a str> {
        vec!["send", "--monitor", &self.monitor, "--to", to]
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

/// `ringferry receive`, and the address that it waits at.
pub fn receive(more: &[&str]) -> (Running, String) {
    let mut receive = Running::start(&[&["receive", "--json", "--listen", "127.0.0.1:0"], more].concat());
    let listening: Value = serde_json::from_str(&receive.line_with("listening")).unwrap();
    (receive, listening["address"].as_str().unwrap().to_owned())
}

pub fn closed_port() -> String {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().to_string()
}
