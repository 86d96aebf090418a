//! C programs that link the library as the README says, compiled by gcc without a warning, run, and run under valgrind.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const EXAMPLE: &str = "example/vmm.c";
const MISUSE: &str = "tests/misuse.c";

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Where cargo puts the libraries that belong to this test.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Whether the test can run; it says what is missing.
fn can_run(tools: &[&str]) -> bool {
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

fn succeeded(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Compiles a program with what `pkg-config` says of `package`, warnings being errors.
fn compiled(program: &str, package: &str, directory: &TempDir) -> PathBuf {
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
/// which knows nothing of what the guest does.
fn under_valgrind(program: &Path) -> Command {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=all"]);
    valgrind.args(["--errors-for-leak-kinds=all", "--track-fds=no"]).arg(program);
    valgrind
}

/// What the Rust example says, too.
fn assert_found_every_page(said: &str) {
    for expected in [
        "the VMM's own write is in: true",
        "vCPU 0: every page of its working set is in: true",
        "vCPU 1: every page of its working set is in: true",
        "vCPU 0 was throttled: true",
    ] {
        assert!(said.contains(expected), "{expected:?} is missing in:\n{said}");
    }
    // Two working sets and the VMM's page; and the page tables, if KVM still sets accessed and dirty bits in them
    // when tracking begins.
    let harvested =
        said.split_once("harvested ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
    assert!(harvested.is_some_and(|pages| (2049..2060).contains(&pages)), "{said}");
    // By ring, each vCPU is observed to have dirtied its own working set, some pages perhaps twice.
    for index in 0..2 {
        let observed = said.split_once(&format!("observed of vCPU {index}: "));
        let pages = observed.and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        assert!(pages.is_some_and(|pages| pages >= 1024), "{said}");
    }
}

#[test]
fn the_example_finds_every_page_that_its_guest_and_itself_wrote() {
    if can_run(&["gcc", "pkg-config"]) {
        let directory = tempfile::tempdir().unwrap();
        let example = compiled(EXAMPLE, "ringferry-static", &directory);
        assert_found_every_page(&succeeded(&mut Command::new(example)));
    }
}

#[test]
fn the_example_runs_with_the_shared_library_of_its_abi_version() {
    if can_run(&["gcc", "pkg-config"]) {
        let directory = tempfile::tempdir().unwrap();
        let example = compiled(EXAMPLE, "ringferry", &directory);
        let mut run = Command::new(&example);
        run.env("LD_LIBRARY_PATH", directory.path());
        let refused = run.output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("libringferry_capi.so.0"), "{said}");
        symlink(libraries().join("libringferry_capi.so"), directory.path().join("libringferry_capi.so.0"))
            .unwrap();
        assert_found_every_page(&succeeded(&mut run));
    }
}

#[test]
fn valgrind_finds_no_error_and_no_leak_in_the_example() {
    if can_run(&["gcc", "pkg-config", "valgrind"]) {
        let directory = tempfile::tempdir().unwrap();
        let example = compiled(EXAMPLE, "ringferry-static", &directory);
        assert_found_every_page(&succeeded(&mut under_valgrind(&example)));
    }
}

#[test]
fn each_wrong_call_is_refused_with_a_text_and_none_crashes() {
    if can_run(&["gcc", "pkg-config"]) {
        let directory = tempfile::tempdir().unwrap();
        let misuse = compiled(MISUSE, "ringferry-static", &directory);
        assert_eq!(succeeded(&mut Command::new(misuse)), "every wrong call was refused\n");
    }
}

#[test]
fn valgrind_finds_no_error_and_no_leak_after_wrong_calls() {
    if can_run(&["gcc", "pkg-config", "valgrind"]) {
        let directory = tempfile::tempdir().unwrap();
        let misuse = compiled(MISUSE, "ringferry-static", &directory);
        assert_eq!(succeeded(&mut under_valgrind(&misuse)), "every wrong call was refused\n");
    }
}

#[test]
fn the_example_is_short() {
    assert!(fs::read_to_string(source(EXAMPLE)).unwrap().lines().count() <= 250);
}
