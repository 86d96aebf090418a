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
//!                             <--     {"report":{…}} or {"failed":"…"}
//! ```
//!
//! It is a Unix socket that only its owner may open: who can write to it can move the VM.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ringferry::progress::Update;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use crate::migrate::MigrateArgs;
use crate::report::MigrationReport;
use crate::terms::TermsArgs;

/// Longest line that either side reads: a report of 16 vCPUs and a thousand rounds has 0.2 MiB.
const MAX_LINE_BYTES: u64 = 1 << 20;

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
}

/// The listening end; its socket file goes when it does.
#[derive(Debug)]
pub struct Monitor {
    listener: UnixListener,
    path: PathBuf,
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
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// A client that has connected, if there is one.
    pub fn accept(&self) -> io::Result<Option<Line>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(Line::new(stream)?))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = fs::remove_file(&self.path);
    }
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

    fn new(stream: UnixStream) -> io::Result<Self> {
        Ok(Self { reader: BufReader::new(stream.try_clone()?), writer: stream })
    }

    /// A second handle, for the thread that writes while this one reads.
    pub fn try_clone(&self) -> io::Result<Self> {
        Self::new(self.writer.try_clone()?)
    }

    /// Ends the connection, for every handle of it.
    pub fn close(&self) {
        // Closed by the other side already: as good.
        let _ = self.writer.shutdown(std::net::Shutdown::Both);
    }

    /// Sends one value.
    pub fn send(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.writer.write_all(&line)
    }

    /// [`receive`](Self::receive), but no longer than this.
    pub fn receive_within<T: for<'de> Deserialize<'de>>(&mut self, time: Duration) -> Result<Option<T>> {
        self.writer.set_read_timeout(Some(time))?;
        self.receive()
    }

    /// Waits for one value; `None` when the other side has closed the connection.
    pub fn receive<T: for<'de> Deserialize<'de>>(&mut self) -> Result<Option<T>> {
        let mut line = Vec::new();
        (&mut self.reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).context("the other side of the monitor socket sent nonsense")
    }
}

/// Where the monitor of a VM is.
#[derive(clap::Args, Clone, Debug)]
pub struct MonitorArg {
    /// Monitor socket of the VM, where `send` and `adjust` find it [default: ringferry.sock in $XDG_RUNTIME_DIR, else
    /// ringferry-UID.sock in the temporary directory]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
}

impl MonitorArg {
    /// The socket's path.
    pub fn path(self) -> PathBuf {
        self.monitor.unwrap_or_else(default_path)
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
