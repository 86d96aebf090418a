//! C programs that link the library as the README says, compiled by gcc without a warning, run, and run under valgrind.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod gcc;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use gcc::{can_run, compiled, libraries, source, succeeded, under_valgrind};

const EXAMPLE: &str = "example/vmm.c";
const MISUSE: &str = "tests/misuse.c";

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
        assert_found_every_page(&succeeded(&mut under_valgrind(&example, "all")));
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
        assert_eq!(succeeded(&mut under_valgrind(&misuse, "all")), "every wrong call was refused\n");
    }
}

#[test]
fn what_others_write_is_harvested_by_whatever_log_it_comes() {
    if can_run(&["gcc", "pkg-config", "valgrind"]) {
        let directory = tempfile::tempdir().unwrap();
        let sources = compiled("tests/sources.c", "ringferry-static", &directory);
        assert_eq!(succeeded(&mut Command::new(&sources)), "every page came once\n");
        // The Rust runtime keeps a handle of each thread that asks who it is: possibly lost, until the thread ends.
        assert_eq!(succeeded(&mut under_valgrind(&sources, "definite")), "every page came once\n");
    }
}

#[test]
fn the_example_is_short() {
    let lines = |name| fs::read_to_string(source(name)).unwrap().lines().count();
    assert!(lines(EXAMPLE) + lines("example/guest.h") <= 250);
}
