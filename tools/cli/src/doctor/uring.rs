//! How guest RAM leaves the host: io_uring, its zero-copy sends, and the right to pin memory for them.

use std::fs;

use ringferry::transport::{TransportError, UringSupport};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::Use::{Demo, Migration};
use super::{Capability, Check};
use crate::sizes::Size;

const GROUP: &str = "io_uring";

const RING: Capability = Capability {
    group: GROUP,
    name: "io_uring",
    needed_for: "sending and receiving guest RAM",
    uses: &[Migration, Demo],
};

pub(super) fn checks() -> Vec<Check> {
    let support = match UringSupport::probe() {
        Ok(support) => support,
        Err(error) => return vec![no_ring(&error), locked_memory()],
    };
    vec![RING.ok("rings can be set up"), zero_copy(support), usage(support), locked_memory()]
}

fn no_ring(error: &TransportError) -> Check {
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let (found, what_to_do) = match disabled.trim() {
        "2" => {
            ("switched off: kernel.io_uring_disabled is 2", "as root: `sysctl kernel.io_uring_disabled=0`")
        }
        "1" => (
            "switched off for this user: kernel.io_uring_disabled is 1",
            "join the group kernel.io_uring_group, or as root: `sysctl kernel.io_uring_disabled=0`",
        ),
        _ => {
            let advice = "Linux 6.1 or newer, and a container or seccomp profile that allows io_uring_setup";
            return match error {
                TransportError::Ring { what, source } => RING.missing(format!("{what}: {source}"), advice),
                other => RING.missing(other.to_string(), advice),
            };
        }
    };
    RING.missing(found, what_to_do)
}

fn zero_copy(support: UringSupport) -> Check {
    let capability =
        Capability { name: "SENDMSG_ZC", needed_for: "zero-copy sends of scattered pages", ..RING };
    match (support.sendmsg_zc, support.send_zc) {
        (true, true) => capability.ok("and SEND_ZC"),
        (true, false) => capability.ok("found"),
        (false, _) => capability.limited("not in this kernel: sends are copied", "Linux 6.1 or newer"),
    }
}

fn usage(support: UringSupport) -> Check {
    let needed_for = "telling zero-copied from copied sends";
    let capability = Capability { name: "usage reports", needed_for, ..RING };
    if support.reports_usage {
        // Never zero-copy on loopback, so what a network card does is seen only in a migration's report.
        return capability.ok("tried with SEND_ZC over loopback");
    }
    capability.limited("refused by this kernel", "Linux 6.2 or newer")
}

fn locked_memory() -> Check {
    let needed_for = "pinning guest RAM for zero-copy sends";
    let capability = Capability { name: "locked memory", needed_for, ..RING };
    if capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK)) {
        return capability.ok("unlimited: CAP_IPC_LOCK");
    }
    // The demo's guest.
    let needed = Size { bytes: 1 << 30 };
    match getrlimit(Resource::Memlock).current.map(|bytes| Size { bytes }) {
        None => capability.ok("unlimited"),
        Some(limit) if limit > needed => capability.ok(format!("{limit} (ulimit -l)")),
        Some(limit) => capability.limited(
            format!("{limit} (ulimit -l)"),
            "as much as the guest's RAM, or sends are copied: `ulimit -l unlimited` as root, or CAP_IPC_LOCK",
        ),
    }
}
