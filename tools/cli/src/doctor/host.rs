//! What any work takes: processors, memory, and the programs that tests and benches call.

use std::path::PathBuf;

use super::Use::Demo;
use super::{Capability, Check};
use crate::sizes::Size;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![processors(), memory()];
    checks.extend([
        program("ip", "iproute2", "tests of links in network namespaces"),
        program("tc", "iproute2", "tests and benches over shaped links"),
        program("qemu-system-x86_64", "qemu-system-x86", "the test guest in QEMU, and `bench peers`"),
        program("iperf3", "iperf3", "`bench send`: the link without us"),
    ]);
    checks
}

fn processors() -> Check {
    let capability = Capability {
        group: "Host",
        name: "processors",
        needed_for: "vCPUs and migration threads side by side",
        uses: &[Demo],
    };
    match std::thread::available_parallelism().map(usize::from) {
        Ok(1) => capability.limited(
            "1 for this process",
            "expect the guest to run at about half its speed while it migrates",
        ),
        Ok(count) => capability.ok(format!("{count} for this process")),
        Err(error) => capability.ok(format!("cannot tell: {error}")),
    }
}

/// A field of /proc/meminfo, in the unit it has there (KiB where there is one).
pub fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

fn memory() -> Check {
    let capability = Capability {
        group: "Host",
        name: "memory",
        needed_for: "the demo's guest, at source and destination",
        uses: &[Demo],
    };
    let Some(available) = meminfo("MemAvailable").map(|kib| Size { bytes: kib * 1024 }) else {
        return capability.ok("cannot tell: no MemAvailable in /proc/meminfo");
    };
    // 1 GiB twice, and room for page tables, buffers and processes.
    let needed = Size { bytes: 2304 << 20 };
    let mib = available.bytes >> 20;
    if available < needed {
        return capability.limited(
            format!("{mib} MiB available, {needed} needed"),
            "stop something, or run the demo with a smaller --memory",
        );
    }
    capability.ok(format!("{mib} MiB available"))
}

fn program(name: &'static str, package: &str, needed_for: &'static str) -> Check {
    let capability = Capability { group: "Programs", name, needed_for, uses: &[] };
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not in an ordinary user's PATH on Debian, and where `ip` and `tc` are.
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    match places.map(|place| place.join(name)).find(|file| file.is_file()) {
        Some(file) => capability.ok(file.display().to_string()),
        None => capability.limited("not found in PATH", format!("`apt-get install {package}`")),
    }
}
