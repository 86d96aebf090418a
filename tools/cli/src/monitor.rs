//! The socket through which `ringferry send` steers a VM that `ringferry run` holds: one request, then updates
//! until the end, each a line of JSON.
//!
//! ```text
//! send                                run
//! {"migrate":{…}}             -->
//!                             <--     {"update":{…}}   (many)
//! {"cancel":null}             -->     (at any time)
//! {"adjust":{…}}              -->     (on a connection of its own, while a migration is under way)
//!                             <--     {"adjusted":null} or {"failed":"…"}
//!                             <--     {"report":{…}}, {"failed":"…"} or {"unconfirmed":"…"}
//! {"resolve":"keep"}          -->     (on a connection of its own, after an unconfirmed migration)
//!                             <--     {"resolved":"keep"} or {"failed":"…"}
//! ```
//!
//! It is a Unix socket that only its owner may open: who can write to it can move the VM. This file owns the socket and
//! what is said on it; `clients` owns those who have connected.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ringferry::progress::Update;
use rustix::process::geteuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::interrupt::{AtSuddenEnd, at_sudden_end};
use crate::migrate::{Decision, MigrateArgs};
use crate::printable::printable;
use crate::report::MigrationReport;
use crate::terms::TermsArgs;

/// Longest request: 64 channels of 256 bytes are a quarter of it.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Longest answer: a report of 16 vCPUs and ten thousand rounds has 4 MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long the other side may take nothing of what it is sent.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);

/// What `send` asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Migrate the VM.
    Migrate {
        /// `HOST:PORT` of the destination.
        to: String,
        /// How.
        args: MigrateArgs,
    },
    /// End the migration under way; the VM goes on where it is.
    Cancel,
    /// Change the terms of the migration under way.
    Adjust(TermsArgs),
    /// Decide where the VM is, after a migration that was not confirmed.
    Resolve(Decision),
}

/// What `run` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Progress.
    Update(Update),
    /// The terms are changed.
    Adjusted,
    /// The destination runs the VM.
    Report(Box<MigrationReport>),
    /// It failed, and why; the VM goes on where it is.
    Failed(String),
    /// Nobody knows whether the destination runs the VM, and what can be done.
    Unconfirmed(String),
    /// The VM is where it was decided to be.
    Resolved(Decision),
}

/// The listening end; its socket file goes when it does.
#[derive(Debug)]
pub struct Monitor {
    listener: UnixListener,
    path: PathBuf,
    _file: AtSuddenEnd,
}

impl Monitor {
    /// Listens at `path`. A socket file that nobody answers at is replaced.
    pub fn bind(path: &Path) -> Result<Self> {
        if UnixStream::connect(path).is_ok() {
            bail!(
                "another `ringferry run` answers at {}: end it, or choose another --monitor",
                path.display()
            );
        }
        match fs::symlink_metadata(path) {
            Ok(found) if std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
                fs::remove_file(path)?
            }
            Ok(_) => bail!("{} exists and is not a socket: choose another --monitor", path.display()),
            Err(_) => {}
        }
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot make the monitor socket {}", path.display()))?;
        let left_behind = path.to_owned();
        let file = at_sudden_end(move || remove(&left_behind));
        let monitor = Self { listener, path: path.to_owned(), _file: file };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        monitor.listener.set_nonblocking(true)?;
        Ok(monitor)
    }

    /// A client that has connected, if there is one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(socket: &Path) {
    // Somebody may have removed it already.
    let _ = fs::remove_file(socket);
}

/// One connection, read and written in lines of JSON.
#[derive(Debug)]
pub struct Line {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Line {
    /// Connects to the monitor of a running VM.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| {
            format!("no `ringferry run` answers at {}: start one, or name its --monitor", path.display())
        })?;
        Ok(Self::new(stream)?)
    }

    /// A connection that is there.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(TAKEN_WITHIN))?;
        Ok(Self { reader: BufReader::new(stream.try_clone()?), writer: stream })
    }

    /// The half that writes, for another thread.
    pub fn writer(&self) -> io::Result<UnixStream> {
        self.writer.try_clone()
    }

    /// Sends a request.
    pub fn ask(&mut self, request: &Request) -> io::Result<()> {
        self.writer.write_all(&line_of(request)?)
    }

    /// Waits for a request, for `time` if there is a limit; `None` when the client has closed the connection.
    pub fn request(&mut self, time: Option<Duration>) -> Result<Option<Request>> {
        self.receive(REQUEST_BYTES_MAX, time)
    }

    /// Waits for an answer, for `time` if there is a limit; `None` when `run` has closed the connection.
    pub fn answer(&mut self, time: Option<Duration>) -> Result<Option<Answer>> {
        self.receive(ANSWER_BYTES_MAX, time)
    }

    fn receive<T: DeserializeOwned>(&mut self, most: usize, time: Option<Duration>) -> Result<Option<T>> {
        let deadline = time.map(|time| Instant::now() + time);
        let line = self.read_line(most, deadline).context("reading the monitor socket")?;
        let nonsense = |error: serde_json::Error| {
            anyhow!("the other side of the monitor socket sent nonsense: {}", printable(&error.to_string()))
        };
        line.map(|line| serde_json::from_slice(&line).map_err(nonsense)).transpose()
    }

    /// The next line, of `most` bytes at most, complete by `deadline`.
    fn read_line(&mut self, most: usize, deadline: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        loop {
            if let Some(deadline) = deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the other side said nothing in time",
                    ));
                }
                self.writer.set_read_timeout(Some(left))?;
            } else {
                self.writer.set_read_timeout(None)?;
            }
            let read = match self.reader.fill_buf() {
                Ok(read) => read,
                // The deadline decides.
                Err(error) if is_no_answer_yet(&error) => continue,
                Err(error) => return Err(error),
            };
            if read.is_empty() {
                let within = io::Error::new(io::ErrorKind::UnexpectedEof, "it ended within a line");
                return if line.is_empty() { Ok(None) } else { Err(within) };
            }
            let end = read.iter().position(|byte| *byte == b'\n');
            let part = end.unwrap_or(read.len());
            if line.len() + part > most {
                return Err(io::Error::other(format!("a line has more than {most} bytes")));
            }
            line.extend_from_slice(&read[..part]);
            self.reader.consume(part + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(Some(line));
            }
        }
    }
}

fn is_no_answer_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A value as it is sent.
pub fn line_of(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Where the monitor of a VM is.
#[derive(clap::Args, Clone, Debug)]
pub struct MonitorArg {
    /// Monitor socket of the VM, where `send`, `adjust` and `resolve` find it [default: ringferry.sock in $XDG_RUNTIME_DIR, else
    /// ringferry-UID.sock in the temporary directory]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
}

impl MonitorArg {
    /// The socket's path.
    pub fn path(&self) -> PathBuf {
        self.monitor.clone().unwrap_or_else(default_path)
    }

    /// As a command has to be told it: nothing, where it finds the socket by itself.
    pub fn option(&self) -> String {
        self.monitor.as_ref().map_or_else(String::new, |path| format!(" --monitor {}", path.display()))
    }
}

/// Where the monitor is when nobody says otherwise: one running VM per user.
fn default_path() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => PathBuf::from(directory).join("ringferry.sock"),
        // All users share this one.
        None => std::env::temp_dir().join(format!("ringferry-{}.sock", geteuid().as_raw())),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Two ends of one connection.
    fn pair() -> (UnixStream, Line) {
        let (one, other) = UnixStream::pair().unwrap();
        (one, Line::new(other).unwrap())
    }

    #[test]
    fn a_request_has_a_bound() {
        let (mut client, mut run) = pair();
        let sending = thread::spawn(move || client.write_all(&vec![b' '; REQUEST_BYTES_MAX + 1]));
        let error = format!("{:#}", run.request(None).unwrap_err());
        assert!(error.contains("more than 65536 bytes"), "{error}");
        sending.join().unwrap().unwrap();
    }

    #[test]
    fn a_client_that_sends_byte_after_byte_has_no_more_time_than_a_silent_one() {
        let (mut client, mut run) = pair();
        let sending = thread::spawn(move || {
            while client.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let error = format!("{:#}", run.request(Some(Duration::from_millis(100))).unwrap_err());
        assert!(error.contains("nothing in time"), "{error}");
        drop(run);
        sending.join().unwrap();
    }

    #[test]
    fn nonsense_is_shown_without_what_a_terminal_obeys() {
        let (mut client, mut run) = pair();
        client.write_all(b"{\"\\u001b[2J\":null}\n").unwrap();
        let error = run.request(None).unwrap_err().to_string();
        assert!(error.contains("nonsense") && !error.contains('\u{1b}'), "{error}");
    }

    #[test]
    fn a_connection_that_ends_within_a_line_is_no_end() {
        let (mut client, mut run) = pair();
        client.write_all(b"{\"cancel\"").unwrap();
        drop(client);
        assert!(format!("{:#}", run.request(None).unwrap_err()).contains("within a line"));
    }
}
