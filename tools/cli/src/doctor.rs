//! `ringferry doctor`: every capability that the product uses, whether this machine has it, and what to do.
//!
//! A check says which uses suffer when its capability is absent; the verdict on a use is its worst check. What
//! is looked at, and how, is in the files of `doctor/`, one per area; this file owns the form of the answer.

use std::fmt::Write;
use std::io;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::output::Output;

mod ebpf;
pub mod host;
mod kvm;
mod memory;
mod uring;

/// Check what this machine offers: KVM, io_uring, userfaultfd, eBPF, memory
///
/// Ends with a verdict for each use of Ringferry; the exit code is 0 if `ringferry demo` can run here, else 1.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry doctor
  ringferry doctor --json | jq 'select(.status != \"ok\")'")]
pub struct Args {}

/// How well a capability serves, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// There.
    Ok,
    /// Absent or restricted, and what needs it does without: slower, or with less to show.
    Limited,
    /// Absent, and what needs it cannot run.
    Missing,
}

/// What Ringferry is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    Tracking,
    Migration,
    Profiling,
    Demo,
}

/// One capability, looked at.
#[derive(Debug, Serialize)]
struct Check {
    kind: &'static str,
    group: &'static str,
    name: &'static str,
    status: Status,
    found: String,
    needed_for: &'static str,
    what_to_do: Option<String>,
    #[serde(skip)]
    uses: &'static [Use],
}

/// A capability's constant half; [`ok`](Self::ok), [`limited`](Self::limited) or [`missing`](Self::missing)
/// adds what was found.
#[derive(Clone, Copy)]
struct Capability {
    group: &'static str,
    name: &'static str,
    needed_for: &'static str,
    uses: &'static [Use],
}

impl Capability {
    fn ok(self, found: impl Into<String>) -> Check {
        self.check(Status::Ok, found.into(), None)
    }

    fn limited(self, found: impl Into<String>, what_to_do: impl Into<String>) -> Check {
        self.check(Status::Limited, found.into(), Some(what_to_do.into()))
    }

    fn missing(self, found: impl Into<String>, what_to_do: impl Into<String>) -> Check {
        self.check(Status::Missing, found.into(), Some(what_to_do.into()))
    }

    fn check(self, status: Status, found: String, what_to_do: Option<String>) -> Check {
        let Self { group, name, needed_for, uses } = self;
        Check { kind: "doctor_check", group, name, status, found, needed_for, what_to_do, uses }
    }
}

/// The last word on each use.
#[derive(Debug, Serialize)]
struct Verdict {
    kind: &'static str,
    tracking: Status,
    migration: Status,
    profiling: Status,
    demo: Status,
}

impl Verdict {
    fn on(checks: &[Check]) -> Self {
        let worst = |of: Use| {
            let affected = checks.iter().filter(|check| check.uses.contains(&of));
            affected.map(|check| check.status).max().unwrap_or(Status::Ok)
        };
        Self {
            kind: "doctor_verdict",
            tracking: worst(Use::Tracking),
            migration: worst(Use::Migration),
            profiling: worst(Use::Profiling),
            demo: worst(Use::Demo),
        }
    }

    fn uses(&self) -> [(&'static str, Status); 4] {
        [
            ("tracking", self.tracking),
            ("migration", self.migration),
            ("profiling", self.profiling),
            ("demo", self.demo),
        ]
    }
}

/// Looks, prints, judges.
pub fn run(Args {}: Args, output: Output) -> anyhow::Result<ExitCode> {
    let mut checks = kvm::checks();
    checks.extend(uring::checks());
    checks.extend(memory::checks());
    checks.extend(ebpf::checks());
    checks.extend(host::checks());
    let verdict = Verdict::on(&checks);
    if output.json() {
        print_objects(&checks, &verdict, output)?;
    } else {
        let columns = terminal_size::terminal_size().map_or(usize::MAX, |(width, _)| width.0.into());
        output.line(table(&checks, &verdict, columns))?;
    }
    Ok(if verdict.demo == Status::Missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print_objects(checks: &[Check], verdict: &Verdict, output: Output) -> io::Result<()> {
    for check in checks {
        output.object(check)?;
    }
    output.object(verdict)
}

const DIM: Style = Style::new().dimmed();
const BOLD: Style = Style::new().bold();

impl Status {
    /// The word, coloured and padded to the width of the longest.
    fn mark(self) -> String {
        let style = self.style();
        let word = self.word();
        format!("{style}{word:<7}{style:#}")
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Ok => AnsiColor::Green.on_default(),
            Self::Limited => AnsiColor::Yellow.on_default(),
            Self::Missing => AnsiColor::Red.on_default().bold(),
        }
    }
}

/// One row a check, under a heading per group. What it is needed for stands beside it where `columns` allow;
/// else below it, and only where something is wrong.
fn table(checks: &[Check], verdict: &Verdict, columns: usize) -> String {
    let width =
        |column: fn(&Check) -> &str| checks.iter().map(|c| column(c).chars().count()).max().unwrap_or(0);
    let name_width = width(|check| check.name);
    let found_width = width(|check| &check.found);
    let indent = 2 + 7 + 2 + name_width + 2;
    let beside = indent + found_width + 2 + width(|check| check.needed_for) <= columns;

    let mut text = String::new();
    let mut group = "";
    for check in checks {
        if check.group != group {
            let gap = if group.is_empty() { "" } else { "\n" };
            group = check.group;
            let _ = writeln!(text, "{gap}{BOLD}{group}{BOLD:#}");
        }
        let Check { name, found, needed_for, .. } = check;
        let _ = write!(text, "  {}  {name:name_width$}  ", check.status.mark());
        let _ = if beside {
            writeln!(text, "{found:found_width$}  {DIM}{needed_for}{DIM:#}")
        } else {
            writeln!(text, "{found}")
        };
        if let Some(what_to_do) = &check.what_to_do {
            if !beside {
                let _ = writeln!(text, "{}", below(&format!("needed for: {needed_for}"), indent, columns));
            }
            let _ = writeln!(text, "{}", below(&format!("-> {what_to_do}"), indent, columns));
        }
    }
    let words = verdict.uses().map(|(name, status)| {
        let style = status.style();
        format!("{name} {style}{}{style:#}", status.word())
    });
    let _ = write!(text, "\n{}", words.join(", "));
    text
}

/// `text` as lines that begin at `indent` and end before `columns`.
fn below(text: &str, indent: usize, columns: usize) -> String {
    let indent = " ".repeat(indent);
    let form = textwrap::Options::new(columns).initial_indent(&indent).subsequent_indent(&indent);
    textwrap::fill(text, form.word_splitter(textwrap::WordSplitter::NoHyphenation))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: Capability = Capability {
        group: "Group",
        name: "a capability",
        needed_for: "something that takes a good part of a line to say",
        uses: &[Use::Tracking, Use::Demo],
    };

    fn checks() -> Vec<Check> {
        let advice =
            "a long explanation of what is to be done, which goes on over several lines of a terminal";
        vec![RING.ok("found"), RING.limited("half of it", advice), RING.missing("nothing", advice)]
    }

    #[test]
    fn the_verdict_on_a_use_is_its_worst_check() {
        let checks = checks();
        assert_eq!(Verdict::on(&checks).demo, Status::Missing);
        assert_eq!(Verdict::on(&checks[..2]).tracking, Status::Limited);
        assert_eq!(Verdict::on(&checks[..1]).demo, Status::Ok);
        assert_eq!(Verdict::on(&checks).profiling, Status::Ok, "nothing is known against it");
    }

    #[test]
    fn the_table_fits_the_terminal_and_says_everything_where_something_is_wrong() {
        let checks = checks();
        let verdict = Verdict::on(&checks);
        for columns in [80, 100, usize::MAX] {
            let table = anstream::adapter::strip_str(&table(&checks, &verdict, columns)).to_string();
            assert!(table.lines().all(|line| line.chars().count() <= columns), "{columns}:\n{table}");
            let words = table.split_whitespace().collect::<Vec<_>>().join(" ");
            for check in &checks[1..] {
                assert!(words.contains(check.needed_for), "{table}");
                assert!(words.contains(check.what_to_do.as_deref().unwrap()), "{table}");
            }
            assert!(table.ends_with("tracking missing, migration ok, profiling ok, demo missing"), "{table}");
        }
    }
}
