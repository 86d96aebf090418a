//! The list of waits in kernel-notes/handover.md is walked: what it names exists, and nothing blocks that it does not name.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const LIST: &str = include_str!("../kernel-notes/handover.md");

/// What blocks a thread, as the code writes it.
const BLOCKING: [&str; 11] = [
    ".wait(&mut",
    "wait_until(&mut",
    "wait_for(&mut",
    "thread::sleep(",
    ".join()",
    ".enter(",
    "recv_timeout(",
    ".recv()",
    "try_lock_until(",
    ".wait_round(",
    " poll(&mut ",
];

struct Row<'l> {
    file: &'l str,
    name: &'l str,
    test: &'l str,
}

fn rows() -> Vec<Row<'static>> {
    let is_row = |line: &&str| line.starts_with("| ") && line.contains("| src/");
    let row = |line: &'static str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        Row { file: cells[3], name: cells[4], test: cells[6] }
    };
    LIST.lines().filter(is_row).map(row).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The code outside of tests.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    text.split("#[cfg(test)]").next().unwrap_or_default().to_owned()
}

#[test]
fn every_wait_of_the_list_is_in_the_code_and_has_a_test() {
    let mut tests = Vec::new();
    for directory in ["src", "tests", "tools"] {
        rust_files(&root().join(directory), &mut tests);
    }
    let all: String = tests.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let rows = rows();
    assert!(rows.len() > 20, "the list was not found");
    for Row { file, name, test } in rows {
        assert!(code(&root().join(file)).contains(name), "{file} has no {name}");
        assert!(all.contains(&format!("fn {test}()")), "no test is called {test}");
    }
}

#[test]
fn no_file_blocks_that_the_list_does_not_name() {
    let named: BTreeSet<&str> = rows().iter().map(|row| row.file).collect();
    let mut files = Vec::new();
    for floor in ["source", "destination", "transport", "page", "offload"] {
        rust_files(&root().join("src").join(floor), &mut files);
    }
    for file in files {
        let relative = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let is_test = relative.contains("/tests/") || relative.ends_with("/tests.rs");
        let blocks = BLOCKING.iter().find(|call| code(&file).contains(**call));
        if let (false, Some(call)) = (is_test, blocks) {
            assert!(
                named.contains(relative.as_str()),
                "{relative} has `{call}`, and no row of the list is about it"
            );
        }
    }
}
