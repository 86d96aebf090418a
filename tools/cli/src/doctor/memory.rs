//! Memory that ordinary threads write: userfaultfd and PAGEMAP_SCAN, on which the simulated guest stands; and huge
//! pages.

use std::path::Path;

use ringferry::track::{PagemapError, PagemapTracker, TrackError};

use super::Use::Demo;
use super::host::meminfo;
use super::{Capability, Check};
use crate::sizes::Size;

const USERFAULTFD: Capability = Capability {
    group: "Memory",
    name: "userfaultfd",
    needed_for: "tracking host threads (backend pagemap)",
    uses: &[],
};

pub(super) fn checks() -> Vec<Check> {
    let probed = PagemapTracker::probe();
    let mut checks = vec![userfaultfd(&probed), pagemap_scan(&probed)];
    // The demo prefers a real guest.
    if !Path::new("/dev/kvm").exists() {
        checks.push(simulated_guest(probed.is_ok()));
    }
    checks.push(huge_pages());
    checks
}

const NEWER_KERNEL: &str = "Linux 6.7 or newer, with CONFIG_PTE_MARKER_UFFD_WP";

fn userfaultfd(probed: &Result<(), TrackError>) -> Check {
    match probed {
        Err(TrackError::Pagemap(PagemapError::NoUserfaultfd(error))) => USERFAULTFD.limited(
            format!("not allowed: {error}"),
            "allow the system call in seccomp, or give access to /dev/userfaultfd",
        ),
        Err(TrackError::Pagemap(PagemapError::NoAsyncWriteProtection(_))) => {
            USERFAULTFD.limited("without asynchronous write protection", NEWER_KERNEL)
        }
        Err(TrackError::Pagemap(PagemapError::NotProtectable(_, error))) => {
            USERFAULTFD.limited(format!("does not protect: {error}"), NEWER_KERNEL)
        }
        _ => USERFAULTFD.ok("with asynchronous write protection"),
    }
}

fn pagemap_scan(probed: &Result<(), TrackError>) -> Check {
    let capability = Capability { name: "PAGEMAP_SCAN", ..USERFAULTFD };
    match probed {
        Ok(()) => capability.ok("sees a write"),
        Err(TrackError::Pagemap(PagemapError::NoPagemap(error))) => {
            capability.limited(format!("/proc/self/pagemap: {error}"), "mount /proc in this container")
        }
        Err(TrackError::Pagemap(PagemapError::Scan(error))) => {
            capability.limited(error.to_string(), NEWER_KERNEL)
        }
        Err(_) => capability.limited("not tried, for want of userfaultfd", NEWER_KERNEL),
    }
}

fn simulated_guest(possible: bool) -> Check {
    let capability = Capability {
        name: "simulated guest",
        needed_for: "the demo without /dev/kvm",
        uses: &[Demo],
        ..USERFAULTFD
    };
    let advice = "for a real guest: /dev/kvm, as above";
    if possible {
        return capability.limited("host threads instead of vCPUs", advice);
    }
    capability.missing("not possible either", advice)
}

fn huge_pages() -> Check {
    let capability =
        Capability { name: "huge pages", needed_for: "guests with --huge-pages reserved", ..USERFAULTFD };
    let free = meminfo("HugePages_Free").unwrap_or(0);
    let kib = meminfo("Hugepagesize").unwrap_or(0);
    if free == 0 {
        return capability
            .limited("none reserved", "as root, for 1 GiB of them: `sysctl vm.nr_hugepages=512`");
    }
    capability.ok(format!("{free} of {} free", Size { bytes: kib * 1024 }))
}
