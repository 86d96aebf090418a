//! The second process of `demo` and `bench migrate`: a `ringferry receive` that this program starts, listens to, and does
//! not wait for without end.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Examined, HostArgs};
use crate::interrupt::{self, AtSuddenEnd, at_sudden_end};
use crate::printable::printable;
use crate::told::Told;

/// Longest line that the process may say.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Lines that are read before somebody listens.
const LINES_AHEAD: usize = 16;
/// How long it may take to build a VM and listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(60);
/// How long it may take to check the guest once it has run: a TiB is read in that time.
const CHECKED_WITHIN: Duration = Duration::from_secs(300);
/// How long a process that has closed its output may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// How often a signal and a deadline are looked at.
const POLL: Duration = Duration::from_millis(20);

/// Where the other process waits.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Its address.
    pub address: SocketAddr,
    /// The network namespace that it lives in, if it is not ours.
    pub namespace: Option<String>,
}

impl Default for Listen {
    /// Loopback, any free port.
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 0)), namespace: None }
    }
}

/// A second process of this program that waits for the VM. It ends with this value.
#[derive(Debug)]
pub struct ReceivingProcess {
    child: Child,
    /// Its lines, or why there will be no more.
    lines: Receiver<Result<String>>,
    address: String,
    _child: AtSuddenEnd,
}

impl ReceivingProcess {
    /// Starts it, and waits until it listens. Its guest runs for `run_for` before it is checked.
    pub fn start(host: &HostArgs, listen: &Listen, run_for: Duration) -> Result<Self> {
        let child = command(host, listen, run_for)?.spawn().context("cannot start the receiving process")?;
        Self::listening(child)
    }

    fn listening(mut child: Child) -> Result<Self> {
        let stdout = child.stdout.take().context("the receiving process has no output")?;
        let (sender, lines) = mpsc::sync_channel(LINES_AHEAD);
        let pid = Pid::from_child(&child);
        let left_behind = at_sudden_end(move || {
            // It may have ended.
            let _ = kill_process(pid, Signal::KILL);
        });
        let mut started = Self { child, lines, address: String::new(), _child: left_behind };
        thread::Builder::new()
            .name("receiving process".to_owned())
            .spawn(move || read_lines(stdout, &sender))?;
        match started.next(LISTENS_WITHIN)? {
            Told::Listening { address } => started.address = address.to_string(),
            told => bail!("the receiving process said {told:?} before it listened"),
        }
        Ok(started)
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest has run and been checked there.
    pub fn checked(&mut self) -> Result<Examined> {
        loop {
            if let Told::Checked { found: after, .. } = self.next(CHECKED_WITHIN)? {
                return Ok(after);
            }
        }
    }

    /// Ends it. What it runs is gone afterwards.
    pub fn end_now(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // It may have ended meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// What it says next, within `limit`; a signal ends the waiting.
    fn next(&mut self, limit: Duration) -> Result<Told> {
        let deadline = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(POLL) {
                Ok(line) => {
                    let line = line?;
                    return serde_json::from_str(&line)
                        .map_err(|_| anyhow!("the receiving process said {}", printable(&line)));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.end_status()?;
                    bail!("the receiving process ended early ({status})");
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            interrupt::check()?;
            if Instant::now() >= deadline {
                bail!("the receiving process said nothing for {} s", limit.as_secs_f32());
            }
        }
    }

    /// How it has ended. One that has closed its output and goes on is ended.
    fn end_status(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + ENDS_WITHIN;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for ReceivingProcess {
    fn drop(&mut self) {
        // It ends by itself after a migration; after a failed one there is nothing to wait for.
        self.end_now();
    }
}

fn command(host: &HostArgs, listen: &Listen, run_for: Duration) -> Result<Command> {
    let program = std::env::current_exe().context("cannot find the program that runs")?;
    let mut command = match &listen.namespace {
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", namespace]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .args(["receive", "--json", "--wait", "60s", "--listen", &listen.address.to_string()])
        .args(["--run-for", &format!("{}ms", run_for.as_millis())]);
    if let Some(backing) = &host.backing {
        command.args(["--backing", &value_name(backing)]);
    }
    if let Some(huge_pages) = &host.huge_pages {
        command.args(["--huge-pages", &value_name(huge_pages)]);
    }
    if host.pin_vcpus {
        command.arg("--pin-vcpus");
    }
    if !listen.address.ip().is_loopback() {
        command.arg("--insecure");
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A signal is for this process, which tells the other one.
        .process_group(0);
    Ok(command)
}

/// Hands over line after line until the process closes its output, or nobody listens any more.
fn read_lines(stdout: ChildStdout, lines: &SyncSender<Result<String>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let read = (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        let line = match read {
            Ok(0) => return,
            Ok(_) if !line.ends_with(b"\n") => Err(anyhow!("the receiving process said half a line")),
            Ok(_) => Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
            Err(error) => Err(error).context("reading what the receiving process says"),
        };
        let is_last = line.is_err();
        if lines.send(line).is_err() || is_last {
            return;
        }
    }
}

fn value_name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that says what it likes.
    fn process(script: &str) -> Result<ReceivingProcess> {
        let child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        ReceivingProcess::listening(child)
    }

    fn says(script: &str) -> String {
        process(script).unwrap_err().to_string()
    }

    #[test]
    fn a_receiving_process_that_dies_is_told_with_its_status() {
        assert_eq!(says("exit 3"), "the receiving process ended early (exit status: 3)");
        assert!(says("kill -9 $$").contains("signal: 9"));
    }

    #[test]
    fn a_receiving_process_that_says_nonsense_is_told_and_its_words_are_printable() {
        assert_eq!(says(r"printf '\033[2Jhello\n'"), r"the receiving process said \u{1b}[2Jhello");
        assert!(says("yes ab | tr -d '\\n'").contains("half a line"));
        assert!(says("printf '{\"kind\":\"listening\"'").contains("half a line"));
    }

    #[test]
    fn a_receiving_process_that_falls_silent_is_waited_for_no_longer_than_allowed() {
        let listening = r#"echo '{"kind":"listening","address":"127.0.0.1:1"}'; exec sleep 60"#;
        let mut silent = process(listening).unwrap();
        assert_eq!(silent.address(), "127.0.0.1:1");
        let error = silent.next(Duration::from_millis(50)).unwrap_err().to_string();
        assert_eq!(error, "the receiving process said nothing for 0.05 s");
    }

    #[test]
    fn a_receiving_process_that_closes_its_output_and_goes_on_is_ended() {
        let mut closed =
            process(r#"echo '{"kind":"listening","address":"127.0.0.1:1"}'; exec >&-; exec sleep 600"#)
                .unwrap();
        let error = closed.next(Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("signal: 9"), "{error}");
    }
}
