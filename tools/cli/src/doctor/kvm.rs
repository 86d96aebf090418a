//! The guest and its dirty pages: /dev/kvm, and what it says about dirty rings and their alternative.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::ensure;
use kvm_ioctls::{Cap, Kvm};
use ringferry::PageSet;
use ringferry::kvm::{Capabilities, RingSize};
use ringferry::track::{DirtyTracker, Figures, FullRings};
use ringferry_testvm::bare::{BareVm, DATA, Pages, Privilege, Work};

use super::Use::{Demo, Migration, Tracking};
use super::{Capability, Check};

const DEVICE: Capability = Capability {
    group: "KVM",
    name: "/dev/kvm",
    needed_for: "running and tracking a guest",
    uses: &[Tracking, Migration, Demo],
};

pub(super) fn checks() -> Vec<Check> {
    let device = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(device) => device,
        Err(error) => return vec![no_device(&error)],
    };
    let mut checks = vec![api()];
    match Capabilities::probe(device.as_fd()) {
        Ok(found) => {
            checks.extend([ring(found), bitmap(found), ring_with_bitmap(found)]);
            if found.ring_acq_rel_entries.max(found.ring_tso_entries) > 0 {
                checks.push(beyond_the_ring());
            }
        }
        Err(error) => checks.push(ring_capability().missing(error.to_string(), "see `dmesg | grep -i kvm`")),
    }
    checks.extend([write_tracking(), interrupt_controllers()]);
    checks
}

fn no_device(error: &std::io::Error) -> Check {
    match error.kind() {
        // The demo then runs a simulated guest: `memory` says whether it can.
        ErrorKind::NotFound => Capability { uses: &[Tracking, Migration], ..DEVICE }.missing(
            "does not exist",
            "switch virtualization on in the firmware (in a VM: nested virtualization), then \
             `modprobe kvm_intel` or `modprobe kvm_amd`",
        ),
        ErrorKind::PermissionDenied => DEVICE.missing(
            "exists, but this user may not open it",
            "run as root, or join the group that owns it (`ls -l /dev/kvm`; usually `usermod -aG kvm USER`) \
             and log in again",
        ),
        _ => DEVICE.missing(format!("cannot be opened: {error}"), "see `dmesg | grep -i kvm`"),
    }
}

/// The only version that there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

fn api() -> Check {
    let advice = "a Linux kernel with its own KVM";
    match Kvm::new().map(|kvm| kvm.get_api_version()) {
        Ok(API_VERSION) => DEVICE.ok(format!("API version {API_VERSION}")),
        Ok(other) => DEVICE.missing(format!("API version {other}, not {API_VERSION}"), advice),
        Err(error) => DEVICE.missing(format!("does not answer: {error}"), advice),
    }
}

/// Without it there is still the bitmap, which cannot say who dirtied a page.
fn ring_capability() -> Capability {
    Capability {
        name: "dirty ring",
        needed_for: "tracking per vCPU (backend ring)",
        uses: &[Tracking, Migration, Demo],
        ..DEVICE
    }
}

fn ring(found: Capabilities) -> Check {
    let capability = ring_capability();
    let largest = RingSize::MAX.entries();
    match (found.ring_acq_rel_entries, found.ring_tso_entries) {
        (0, 0) => {
            capability.limited("not in this kernel", "Linux 5.11 or newer; until then: --backend bitmap")
        }
        (0, entries) => capability.ok(format!("{entries} entries (KVM_CAP_DIRTY_LOG_RING)")),
        (entries, _) if entries < largest => capability.limited(
            format!("at most {entries} entries"),
            format!("larger rings, of {largest}, stop a vCPU less often"),
        ),
        (entries, _) => capability.ok(format!("{entries} entries, acquire-release")),
    }
}

fn bitmap(found: Capabilities) -> Check {
    let capability = Capability {
        name: "dirty bitmap",
        needed_for: "the other backend (bitmap), to compare",
        uses: &[],
        ..DEVICE
    };
    if found.manual_protect {
        return capability.ok("with manual protection");
    }
    capability.limited("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "Linux 5.2 or newer")
}

/// Where KVM itself dirties pages with no vCPU loaded, as on arm64, it does so in a bitmap beside the rings.
fn ring_with_bitmap(found: Capabilities) -> Check {
    let capability = Capability {
        name: "ring with bitmap",
        needed_for: "pages dirtied by no vCPU (arm64)",
        uses: &[],
        ..DEVICE
    };
    match (found.ring_with_bitmap, cfg!(target_arch = "aarch64")) {
        (true, _) => capability.ok("offered"),
        (false, false) => capability.ok("not offered, not needed on x86"),
        (false, true) => capability.limited("not offered", "Linux 6.2 or newer"),
    }
}

/// A guest that writes more pages than its ring has entries: tried with one.
fn beyond_the_ring() -> Check {
    let capability = Capability {
        name: "beyond the ring",
        needed_for: "guests that write more pages than a ring has entries, at full speed",
        uses: &[Tracking, Migration],
        ..DEVICE
    };
    let advice =
        "the guest then pays a fault for every page each time that its ring is full; or use --backend bitmap";
    match try_beyond_the_ring() {
        Ok(()) => capability.ok("rings are recycled without protection (userfaultfd)"),
        Err(error) => capability.limited(format!("{error:#}"), advice),
    }
}

fn try_beyond_the_ring() -> anyhow::Result<()> {
    let kvm = Kvm::new()?;
    let vm = BareVm::new(&kvm, &[PROBE_PAGES])?;
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::from_entries(PROBE_ENTRIES)?)?;
    tracker.add_memory(vm.memory())?;
    let mut vcpu = vm.create_vcpu(0, Privilege::User)?;
    let handle = tracker.attach_vcpu(0, vcpu.fd())?;
    let session = tracker.start()?;
    tracker.recycles_without_protecting()?;
    let mut harvested = PageSet::new(vm.memory().end());
    let all = Pages { first: DATA, pages: PROBE_PAGES, stride: 1, passes: 2 };
    for value in 0..2 {
        vcpu.set_work(&Work::Loop(all), value)?;
        vcpu.run_to_end(Some(&handle))?;
        harvested.clear();
        session.harvest(&mut harvested)?;
        ensure!(
            harvested.len() == PROBE_PAGES,
            "a guest wrote {PROBE_PAGES} pages, {} were seen",
            harvested.len()
        );
    }
    // KVM may have shown only now that it does not play along.
    tracker.recycles_without_protecting()?;
    let Figures { entries_reset: entries, full_rings, .. } = tracker.snapshot();
    ensure!(full_rings == FullRings::LeftWritable, "a full ring of a guest was not seen: {full_rings:?}");
    // Two passes over memory, twice. The second pass finds every page writable.
    ensure!(entries < PROBE_PAGES * 3, "KVM protects the pages of entries that name no slot");
    Ok(())
}

/// More than a ring has entries, and enough of those for hosts with PML.
const PROBE_PAGES: u64 = 4096;
const PROBE_ENTRIES: u32 = 1024;

/// Which implementation of KVM, and how it notices that a page is written: module parameters tell, if any.
fn write_tracking() -> Check {
    let capability = Capability {
        name: "write tracking",
        needed_for: "what a tracked write costs the guest",
        uses: &[],
        ..DEVICE
    };
    let loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
    let Some(module) = ["kvm_intel", "kvm_amd", "kvm_pvm"].into_iter().find(loaded) else {
        return capability.ok("cannot tell: no kvm_intel, kvm_amd, kvm_pvm in /sys/module");
    };
    let pml = fs::read_to_string(format!("/sys/module/{module}/parameters/pml")).unwrap_or_default();
    match pml.trim() {
        "" => capability.ok(format!("{module}: write protection")),
        "N" | "0" => capability.ok(format!("{module}: write protection, PML is off")),
        _ => capability.ok(format!("{module}: page-modification logging (PML)")),
    }
}

fn interrupt_controllers() -> Check {
    let capability = Capability {
        name: "irqchip",
        needed_for: "the test guest's vCPUs and timer",
        uses: &[Demo],
        ..DEVICE
    };
    if Kvm::new().is_ok_and(|kvm| kvm.check_extension(Cap::Irqchip)) {
        return capability.ok("in the kernel");
    }
    capability.missing("not emulated by this KVM", "a kernel with KVM_CAP_IRQCHIP; every x86 one has it")
}
