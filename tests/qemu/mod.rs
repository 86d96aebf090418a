//! A QEMU of the test's own: the guest image of the test VMM, its serial port in a file, its monitor on two pipes.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ringferry_testvm::IMAGE;

/// The firmware takes most of it where KVM emulates it.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Ends with the value, and so does what it needs.
pub struct Qemu {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Where it runs: relative paths among its arguments lie here.
    pub directory: PathBuf,
}

impl Qemu {
    /// Starts it with the guest's command line and `args`; `None` where there is none: noted as skipped.
    pub fn start(name: &str, append: &str, args: &[&str]) -> Option<Self> {
        let directory =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("guest"), IMAGE).unwrap();
        let started = Command::new("qemu-system-x86_64")
            .current_dir(&directory)
            .args(["-kernel", "guest", "-append", append, "-serial", "file:serial", "-qmp", "stdio"])
            .args(["-nodefaults", "-display", "none"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                ringferry_testvm::skip(&format!(
                    "qemu-system-x86_64 cannot be started: {error} (apt-get install qemu-system-x86)"
                ));
                return None;
            }
        };
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut qemu = Self { child, input, output, directory };
        qemu.execute(r#"{"execute":"qmp_capabilities"}"#);
        Some(qemu)
    }

    /// Has QEMU do something, and returns its answer when it has. A line is bounded by the size of QEMU's answers.
    pub fn execute(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        loop {
            let mut line = String::new();
            let bytes = self.output.read_line(&mut line).unwrap();
            assert!(bytes > 0, "QEMU ended: {:?}\n{}", self.child.try_wait(), self.serial());
            assert!(!line.contains("\"error\""), "{line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }

    /// What the guest wrote to its serial port.
    pub fn serial(&self) -> String {
        fs::read_to_string(self.directory.join("serial")).unwrap_or_default()
    }

    pub fn wait_for(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU ended with {ended:?} before {what}\n{}", self.serial());
            assert!(Instant::now() < deadline, "no {what} in {LIMIT:?}\n{}", self.serial());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
