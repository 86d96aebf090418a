//! How a test says that this machine cannot run it.
//!
//! A test that returns early counts as passed, and cargo hides what it printed. So a skip is also appended to
//! the file that `RINGFERRY_SKIP_LOG` names; `tools/check` sets it, counts its lines, and fails in CI if there
//! is one.

use std::fs::OpenOptions;
use std::io::Write;

/// Says on stderr, and in the file named by `RINGFERRY_SKIP_LOG`, that the calling test does not run here and
/// why; the test then returns.
///
/// `reason` names what is missing and, if a user can do something about it, what: `no /dev/kvm`,
/// `qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)`.
pub fn skip(reason: &str) {
    // The test harness names each test's thread after the test.
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    eprintln!("SKIPPED: {reason} ({test})");
    let Some(path) = std::env::var_os("RINGFERRY_SKIP_LOG") else { return };
    let line = format!("SKIPPED: {reason} ({test})\n");
    let log = OpenOptions::new().append(true).create(true).open(&path);
    // One write per line: tests of several processes append at the same time.
    if let Err(error) = log.and_then(|mut log| log.write_all(line.as_bytes())) {
        panic!("cannot note a skipped test in {}: {error}", path.display());
    }
}
