//! Runs the binary `ringferry`, as this user or one with less, and keeps what it said.

use std::fs;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, Signal, geteuid, kill_process};

/// What a run of the program came to.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The objects that a command with `--json` printed.
    pub fn objects(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ringferry");

/// Runs it as this user, in this environment.
pub fn ringferry(args: &[&str]) -> Outcome {
    outcome(Command::new(PROGRAM).args(args))
}

/// Runs it where no device exists but /dev/null; `None` if this user may not arrange that.
pub fn ringferry_without_devices(args: &[&str]) -> Option<Outcome> {
    let mut command = Command::new("unshare");
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$0\" \"$@\"";
    command.args(["--mount", "sh", "-c", script, PROGRAM]).args(args);
    geteuid().is_root().then(|| outcome(&mut command))
}

/// Runs it as the user nobody; `None` if this user may not become that one.
pub fn ringferry_as_nobody(args: &[&str]) -> Option<Outcome> {
    const NOBODY: u32 = 65_534;
    // A copy that any user can reach: the build directory may be below a private home.
    let for_all = fs::Permissions::from_mode(0o755);
    let directory = tempfile::Builder::new().permissions(for_all).tempdir().unwrap();
    let program = directory.path().join("ringferry");
    // Not copied by this process: a child that another test forks meanwhile would hold the copy open for writing,
    // and a program that is being written cannot be run.
    let installed = Command::new("install").args(["-m", "755", PROGRAM]).arg(&program).status().unwrap();
    assert!(installed.success());
    let mut command = Command::new(program);
    // Without supplementary groups and capabilities, too.
    command.args(args).uid(NOBODY).gid(NOBODY).current_dir("/");
    geteuid().is_root().then(|| outcome(&mut command))
}

/// Runs it with `stdout` as its standard output, of which the outcome then knows nothing.
pub fn ringferry_writing_to(args: &[&str], stdout: impl Into<Stdio>) -> Outcome {
    outcome(Command::new(PROGRAM).args(args).stdout(stdout))
}

/// Runs it as root with 256 KiB that may be locked, enough for rings and not for frames, and without the capability
/// to lock more; `None` if this user is not root.
pub fn ringferry_with_little_locked_memory(args: &[&str]) -> Option<Outcome> {
    let mut command = Command::new("sh");
    let script = "ulimit -l 256 && exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$0\" \"$@\"";
    command.args(["-c", script, PROGRAM]).args(args);
    geteuid().is_root().then(|| outcome(&mut command))
}

/// A run of it that goes on while the test does other things; it is killed if the test ends before it.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    stdout: String,
    stderr: JoinHandle<String>,
}

/// Nothing that a test waits for takes this long, on however busy a machine.
const LIMIT: Duration = Duration::from_secs(120);

impl Running {
    /// Starts it.
    pub fn start(args: &[&str]) -> Self {
        Self::start_as(Command::new(PROGRAM).args(args))
    }

    /// Starts it with `inherited` as its descriptor 40, beyond those that starting it takes.
    #[expect(unsafe_code, reason = "what a child inherits is arranged between fork and exec")]
    pub fn start_inheriting(args: &[&str], inherited: &impl AsRawFd) -> Self {
        let mut command = Command::new(PROGRAM);
        let fd = inherited.as_raw_fd();
        // SAFETY: one system call with numbers, of which each is an open descriptor or an error.
        let arrange = move || match unsafe { libc::dup2(fd, 40) } {
            40 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        // SAFETY: the call above is all that happens between fork and exec. The descriptor is open as long as the caller has it, which is longer.
        unsafe { command.pre_exec(arrange) };
        Self::start_as(command.args(args))
    }

    /// Starts it in a network namespace.
    pub fn start_in(namespace: &str, args: &[&str]) -> Self {
        Self::start_as(Command::new("ip").args(["netns", "exec", namespace, PROGRAM]).args(args))
    }

    /// Starts it with `stdout` as its standard output, of which this side then knows nothing.
    pub fn start_writing_to(args: &[&str], stdout: impl Into<Stdio>) -> Self {
        Self::spawn(Command::new(PROGRAM).args(args).stdout(stdout))
    }

    /// Starts it as `nohup` would.
    pub fn start_without_hangup(args: &[&str]) -> Self {
        let script = "trap '' HUP && exec \"$0\" \"$@\"";
        Self::start_as(Command::new("sh").args(["-c", script, PROGRAM]).args(args))
    }

    fn start_as(command: &mut Command) -> Self {
        Self::spawn(command.stdout(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, mut stderr) = (child.stdout.take(), child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // Ends with the program, or when nobody wants to know any more.
            let mut lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines());
            lines.by_ref().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        Self { child, lines, stdout: String::new(), stderr }
    }

    /// Waits for a further line on standard output that contains `part`.
    pub fn line_with(&mut self, part: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                panic!("no {part:?} in:\n{}", self.stdout);
            };
            self.stdout.push_str(&line);
            self.stdout.push('\n');
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it has ended.
    pub fn end(mut self) -> Outcome {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => panic!("it does not end; it said:\n{}", self.stdout),
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut stdout = std::mem::take(&mut self.stdout);
        self.lines.iter().for_each(|line| stdout.extend([line.as_str(), "\n"]));
        let stderr = std::mem::replace(&mut self.stderr, thread::spawn(String::new)).join().unwrap();
        Outcome { code: status.code(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs it with what `arrange` makes of its standard output and standard error.
pub fn ringferry_arranged(args: &[&str], arrange: impl FnOnce(&mut Command) -> &mut Command) -> Outcome {
    outcome(arrange(Command::new(PROGRAM).args(args)))
}

/// A file that is always full.
pub fn full_disk() -> fs::File {
    fs::File::options().write(true).open("/dev/full").unwrap()
}

/// A pipe that is full, and its reader, who sleeps.
pub fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'.'; 512]).is_ok() {}
    ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}
