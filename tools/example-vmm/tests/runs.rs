//! The example that the README shows really runs, and finds every page.

use std::process::Command;

#[test]
fn the_example_finds_every_page_that_its_guest_and_itself_wrote() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return ringferry_testvm::skip(&format!("/dev/kvm: {error}"));
    }
    let output = Command::new(env!("CARGO_BIN_EXE_ringferry-example-vmm")).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for expected in [
        "the VMM's own write is in: true",
        "vCPU 0: every page of its working set is in: true",
        "vCPU 1: every page of its working set is in: true",
    ] {
        assert!(said.contains(expected), "{expected:?} is missing in:\n{said}");
    }
    // Two working sets and the VMM's page; and the page tables, if KVM still sets accessed and dirty bits in them
    // when tracking begins.
    for before in ["harvested ", "the dirty log, meanwhile: "] {
        let pages = said.split_once(before).and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        assert!(pages.is_some_and(|pages| (2049..2060).contains(&pages)), "{said}");
    }
}
