//! C programs for the tests: compiled against the libraries that cargo built for them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Where cargo puts the libraries that belong to this test.
pub fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Whether the test can run; it says what is missing.
pub fn can_run(tools: &[&str]) -> bool {
    let has = |tool: &&&str| Command::new(tool).arg("--version").output().is_ok();
    if let Some(missing) = tools.iter().find(|tool| !has(tool)) {
        ringferry_testvm::skip(&format!("{missing} is not installed (apt-get install {missing})"));
        return false;
    }
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            ringferry_testvm::skip(&format!("/dev/kvm: {error}"));
            false
        }
    }
}

pub fn succeeded(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Compiles a program with what `pkg-config` says of `package`, warnings being errors.
pub fn compiled(program: &str, package: &str, directory: &TempDir) -> PathBuf {
    let mut libdir = OsString::from("--define-variable=libdir=");
    libdir.push(libraries());
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", source("")).arg(libdir).args(["--cflags", "--libs", package]);
    let flags = succeeded(&mut pkg_config);
    let to = directory.path().join("program");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-o"]).arg(&to).arg(source(program));
    succeeded(gcc.args(flags.split_whitespace()));
    to
}

/// Memory errors, uninitialised bytes and leaks of the host side end in exit code 9. KVM runs the guest beside valgrind,
/// which knows nothing of what the guest does. `leaks` are the kinds that count.
pub fn under_valgrind(program: &Path, leaks: &str) -> Command {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--track-fds=no"]);
    let (show, count) = (format!("--show-leak-kinds={leaks}"), format!("--errors-for-leak-kinds={leaks}"));
    valgrind.args([&show, &count]).arg(program);
    valgrind
}
