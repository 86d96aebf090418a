//! What is done to a migration, and when.

use std::fmt;
use std::time::Duration;

use rustix::process::Signal;

use super::random::Random;

/// A process of the migration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Process {
    Run,
    Receive,
    Send,
}

/// Connections of the migration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Link {
    Control,
    Data,
}

/// What is done to one of them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    /// SIGKILL.
    Kill(Process),
    /// SIGSTOP, and SIGCONT after this time.
    Freeze(Process, Duration),
    /// SIGTERM or SIGINT.
    Signal(Process, Signal),
    /// What is connected is closed; a new connection is possible.
    Cut(Link),
    /// The way to the destination is closed, the way back is not.
    HalfCut(Link),
    /// Nothing goes through any more, and nothing is closed.
    BlackHole(Link),
}

/// When it is done.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Moment {
    /// So long after `ringferry send` was started, in units of what a migration takes undisturbed.
    Elapsed(f64),
    /// So long after the guest was stopped.
    Standstill(Duration),
}

/// Longest time that a process is frozen: longer than a peer may be silent.
const FROZEN_MAX: Duration = Duration::from_secs(3);
/// What a standstill takes, the waits for a delayed control connection included.
const STANDSTILL: Duration = Duration::from_millis(250);

impl Fault {
    /// Any of them.
    pub fn any(random: &mut Random) -> Self {
        let process = random.one_of(&[Process::Run, Process::Receive, Process::Send]);
        let link = random.one_of(&[Link::Control, Link::Data]);
        let frozen = random.up_to(FROZEN_MAX);
        random.one_of(&[
            Self::Kill(process),
            Self::Freeze(process, frozen),
            Self::Signal(process, Signal::TERM),
            Self::Signal(process, Signal::INT),
            Self::Cut(link),
            Self::HalfCut(link),
            Self::BlackHole(link),
        ])
    }

    /// Whether it asks this process to end.
    pub fn ends(self, process: Process) -> bool {
        matches!(self, Self::Kill(ended) | Self::Signal(ended, _) if ended == process)
    }
}

impl Moment {
    /// Any of them.
    pub fn any(random: &mut Random) -> Self {
        let part = random.up_to(Duration::from_millis(1500)).as_secs_f64();
        let standstill = Self::Standstill(random.up_to(STANDSTILL));
        random.one_of(&[Self::Elapsed(part), standstill])
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |what: &dyn fmt::Debug| format!("{what:?}").to_lowercase();
        match self {
            Self::Kill(process) => write!(f, "kill {}", name(process)),
            Self::Freeze(process, _) => write!(f, "freeze {}", name(process)),
            Self::Signal(process, Signal::TERM) => write!(f, "SIGTERM to {}", name(process)),
            Self::Signal(process, _) => write!(f, "SIGINT to {}", name(process)),
            Self::Cut(link) => write!(f, "cut {}", name(link)),
            Self::HalfCut(link) => write!(f, "half-cut {}", name(link)),
            Self::BlackHole(link) => write!(f, "black-hole {}", name(link)),
        }
    }
}
