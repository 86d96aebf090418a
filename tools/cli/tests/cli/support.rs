//! Runs the binary `ringferry`, as this user or one with less, and keeps what it said.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::geteuid;

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

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringferry");

/// Runs it as this user, in this environment.
pub fn ringferry(args: &[&str]) -> Outcome {
    outcome(Command::new(PROGRAM).args(args))
}

/// Runs it where no device exists but /dev/null; `None` if this user may not arrange that.
pub fn ringferry_without_devices(args: &[&str]) -> Option<Outcome> {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\"", PROGRAM])
        .args(args);
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

fn outcome(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}
