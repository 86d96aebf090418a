//! One migration between two processes, a fault in it, and the question where the VM is afterwards.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::fault::{Fault, Link, Moment, Process};
use super::random::Random;
use super::side::{Side, wait_for};
use super::wire::Wire;
use crate::guest::closed_port;
use crate::support::ringferry;

/// Nothing takes longer, on however busy a machine.
const LIMIT: Duration = Duration::from_secs(60);
/// What a fault of the wire takes to be noticed, and a message to be written.
const NOTICED: Duration = Duration::from_secs(20);

/// Where the VM was found to be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Found {
    /// It runs at the source.
    AtSource,
    /// It runs at the destination.
    AtDestination,
    /// Nobody knew; it was not at the destination, and was kept.
    Kept,
    /// Nobody knew; it was at the destination, and was dropped.
    Dropped,
    /// With the process that held it, which was asked to end.
    Ended,
}

impl Found {
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::AtSource, "source"),
        (Self::AtDestination, "destination"),
        (Self::Kept, "kept"),
        (Self::Dropped, "dropped"),
        (Self::Ended, "ended"),
    ];
}

/// The processes of one migration, and what connects them.
pub struct Trial {
    run: Side,
    receive: Side,
    send: Side,
    control: Wire,
    data: Wire,
    monitor: PathBuf,
    started: Instant,
    /// What should not have happened.
    wrong: BTreeSet<String>,
    _directory: tempfile::TempDir,
}

impl Trial {
    /// Starts a migration of a small guest.
    pub fn start(random: &mut Random) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let monitor = directory.path().join("monitor");
        let monitor_arg = monitor.to_str().unwrap().to_owned();
        let mut run = vec!["run", "--monitor", &monitor_arg, "--name", "trial", "--memory", "64MiB"];
        run.extend(["--vcpus", "2", "--fill", "8MiB", "--work", "each=ws:4MiB,pattern:random"]);
        run.extend(random.one_of(&[&[][..], &["--kvmclock"], &["--device-state", "4MiB"]]));
        let run = Side::start(&run);
        let data_address = closed_port();
        let listen = ["--listen", "127.0.0.1:0", "--data-listen", &data_address];
        let receive = Side::start(&[&["receive", "--peer-timeout", "2s"], &listen[..]].concat());
        assert!(wait_for(LIMIT, || run.has_said("progress")), "no guest:\n{}", run.transcript());
        assert!(wait_for(LIMIT, || receive.has_said("listening")), "no destination");
        let to: SocketAddr = receive.said("listening")[0]["address"].as_str().unwrap().parse().unwrap();
        let control = Wire::to(to, random.one_of(&[Duration::ZERO, Duration::from_millis(40)]));
        let data = Wire::to(data_address.parse().unwrap(), Duration::ZERO);
        let (to, channel) = (control.address.to_string(), data.address.to_string());
        let mut send = vec!["send", "--monitor", &monitor_arg, "--to", &to, "--peer-timeout", "2s"];
        send.extend(["--channel", &channel, "--channel", &channel, "--max-bandwidth", "50MB/s"]);
        let started = Instant::now();
        let send = Side::start(&send);
        Self {
            run,
            receive,
            send,
            control,
            data,
            monitor,
            started,
            wrong: BTreeSet::new(),
            _directory: directory,
        }
    }

    /// How long an undisturbed migration takes.
    pub fn undisturbed(mut self) -> Duration {
        let sent = self.send.wait(LIMIT);
        assert!(sent.is_some_and(|status| status.success()), "{}", self.transcript());
        self.started.elapsed()
    }

    /// Waits for the moment, and lets the fault happen.
    pub fn strike(&mut self, fault: Fault, moment: Moment, usual: Duration) {
        match moment {
            Moment::Elapsed(part) => {
                thread::sleep(usual.mul_f64(part).saturating_sub(self.started.elapsed()));
            }
            Moment::Standstill(after) => {
                let send = &mut self.send;
                let stopped = |send: &Side| {
                    send.said("migration_event").iter().any(|object| object["event"] == "switchover")
                };
                wait_for(LIMIT, || stopped(send) || send.ended().is_some());
                thread::sleep(after);
            }
        }
        match fault {
            Fault::Kill(process) => self.side(process).signal(Signal::KILL),
            Fault::Freeze(process, time) => {
                self.side(process).signal(Signal::STOP);
                thread::sleep(time);
                self.side(process).signal(Signal::CONT);
            }
            Fault::Signal(process, signal) => self.side(process).signal(signal),
            Fault::Cut(link) => self.wire(link).cut(),
            Fault::HalfCut(link) => self.wire(link).half_cut(),
            Fault::BlackHole(link) => self.wire(link).swallow(),
        }
    }

    /// Finds out where the VM is, ends everything, and says what was wrong.
    pub fn settle(mut self, fault: Fault) -> (Found, Vec<String>, String) {
        if self.send.wait(LIMIT).is_none() {
            self.wrong("send does not end");
        }
        self.wait_until_run_is_definite();
        let found = if self.is_undecided() {
            self.resolve(fault)
        } else {
            let run_ended = self.run.ended();
            let (moved, there) = (self.run.has_said("migration_report"), self.is_there(fault));
            let here = run_ended.is_none() || self.run.has_said("checked");
            match (here, moved || there) {
                (true, true) => {
                    self.wrong("the VM ran on both sides");
                    Found::AtSource
                }
                (true, false) if run_ended.is_none() => Found::AtSource,
                (true, false) if fault.ends(Process::Run) => Found::Ended,
                (false, true) if fault.ends(Process::Receive) => Found::Ended,
                (false, true) if there => Found::AtDestination,
                (false, false) if fault == Fault::Kill(Process::Run) => Found::Ended,
                _ => {
                    self.wrong("the VM is nowhere");
                    Found::Ended
                }
            }
        };
        self.end(fault, found);
        let transcript = self.transcript();
        (found, self.wrong.into_iter().collect(), transcript)
    }

    fn is_undecided(&mut self) -> bool {
        self.run.ended().is_none() && self.run.has_said("unconfirmed")
    }

    /// It has ended, or waits for a decision, or its guest makes progress again.
    fn wait_until_run_is_definite(&mut self) {
        let before = self.run.said("progress").len();
        let run = &mut self.run;
        let definite = wait_for(LIMIT, || {
            // The first line may have been written before the migration began.
            run.ended().is_some() || run.has_said("unconfirmed") || run.said("progress").len() > before + 1
        });
        if !definite {
            self.wrong("run neither ends nor goes on");
        }
    }

    /// Whether the destination runs the VM, or did until it was asked to end.
    fn is_there(&mut self, fault: Fault) -> bool {
        let run_ended = self.run.ended().is_some();
        let receive = &mut self.receive;
        if run_ended {
            wait_for(NOTICED, || receive.has_said("received") || receive.ended().is_some());
        }
        if receive.ended().is_some() {
            receive.wait(LIMIT);
            if receive.has_said("received") && !fault.ends(Process::Receive) {
                self.wrong("receive ended by itself although it had the VM");
            }
        }
        self.receive.has_said("received")
    }

    /// Decides as an operator would that has looked at the destination.
    fn resolve(&mut self, fault: Fault) -> Found {
        let receive = &mut self.receive;
        if !wait_for(NOTICED, || receive.has_said("received") || receive.ended().is_some()) {
            self.wrong("receive neither has the VM nor ends");
        }
        let there =
            self.is_there(fault) && self.receive.ended().is_none_or(|status| status.signal().is_none());
        let (decision, found) = if there { ("--drop", Found::Dropped) } else { ("--keep", Found::Kept) };
        let before = self.run.said("progress").len();
        let resolved = ringferry(&["resolve", decision, "--monitor", self.monitor.to_str().unwrap()]);
        if resolved.code != Some(0) {
            self.wrong("resolve failed");
        }
        let run = &mut self.run;
        let done = match found {
            Found::Dropped => run.wait(LIMIT).is_some_and(|status| status.success()),
            _ => wait_for(LIMIT, || run.said("progress").len() > before),
        };
        if !done {
            self.wrong("run does not do what was decided");
        }
        found
    }

    /// Ends both sides; who has the VM proves it.
    fn end(&mut self, fault: Fault, found: Found) {
        let here = matches!(found, Found::AtSource | Found::Kept);
        let there = matches!(found, Found::AtDestination | Found::Dropped);
        for process in [Process::Run, Process::Receive] {
            // A second signal would end it at once.
            if !fault.ends(process) {
                self.side(process).signal(Signal::INT);
            }
            let ended = self.side(process).wait(LIMIT);
            let holds = if process == Process::Run { here } else { there };
            let Some(status) = ended else {
                self.wrong("a side does not end");
                continue;
            };
            let killed = fault == Fault::Kill(process);
            if holds && !killed && !status.success() {
                self.wrong("the side that had the VM failed");
            }
            let checked = self.side(process).said("checked");
            if holds && !killed && checked.is_empty() {
                self.wrong("the side that had the VM did not check it");
            }
            if checked.iter().any(|object| object["guest_consistent"] != true) {
                self.wrong("the guest lost writes");
            }
        }
        if self.receive.has_said("received") && self.run.has_said("checked") && found != Found::Kept {
            self.wrong("the VM ran on both sides");
        }
        if fault != Fault::Kill(Process::Run) && Path::exists(&self.monitor) {
            self.wrong("the socket file is left behind");
        }
    }

    fn side(&mut self, process: Process) -> &mut Side {
        match process {
            Process::Run => &mut self.run,
            Process::Receive => &mut self.receive,
            Process::Send => &mut self.send,
        }
    }

    fn wire(&self, link: Link) -> &Wire {
        match link {
            Link::Control => &self.control,
            Link::Data => &self.data,
        }
    }

    fn wrong(&mut self, what: &str) {
        self.wrong.insert(what.to_owned());
    }

    fn transcript(&self) -> String {
        let mut text = String::new();
        for (name, side) in [("run", &self.run), ("receive", &self.receive), ("send", &self.send)] {
            writeln!(text, "  {name} said:\n{}", side.transcript()).unwrap();
        }
        text
    }
}
