//! The guest and its dirty pages: /dev/kvm and what it says about dirty rings.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use super::Use::{Demo, Migration, Tracking};
use super::{Capability, Check};

const GROUP: &str = "KVM";

pub(super) fn checks() -> Vec<Check> {
    vec![device(), module()]
}

fn device() -> Check {
    let capability = Capability {
        group: GROUP,
        name: "/dev/kvm",
        needed_for: "running and tracking a guest",
        uses: &[Tracking, Migration, Demo],
    };
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => capability.ok("opens for reading and writing"),
        Err(error) if error.kind() == ErrorKind::NotFound => capability.missing(
            "does not exist",
            "switch virtualization on in the firmware (in a VM: nested virtualization), then `modprobe kvm_intel` or `modprobe kvm_amd`",
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => capability.missing(
            "exists, but this user may not open it",
            "run as root, or join the group that owns it (`ls -l /dev/kvm`; usually `usermod -aG kvm USER`) and log in again",
        ),
        Err(error) => capability.missing(
            format!("cannot be opened: {error}"),
            "see `dmesg | grep -i kvm`",
        ),
    }
}

/// Which implementation of KVM, and how it notices that a page is written. Both are module parameters, or not
/// to be seen at all.
fn module() -> Check {
    let capability = Capability {
        group: GROUP,
        name: "write tracking",
        needed_for: "what a tracked write costs the guest",
        uses: &[Tracking],
    };
    let pml = |module: &str| fs::read_to_string(format!("/sys/module/{module}/parameters/pml")).ok();
    let loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
    let Some(module) = ["kvm_intel", "kvm_amd", "kvm_pvm"].into_iter().find(loaded) else {
        return capability.ok("cannot tell: no kvm_intel, kvm_amd or kvm_pvm in /sys/module");
    };
    match pml(module).as_deref().map(str::trim) {
        Some("Y" | "1") => capability.ok(format!("{module}: page-modification logging (PML)")),
        Some(_) => capability.limited(
            format!("{module}: write protection; PML is off"),
            format!("if the CPU has PML: reload {module} with pml=1"),
        ),
        None => capability.ok(format!("{module}: write protection")),
    }
}
