//! What the profiler needs: type information and permission; and tracefs, for those who look beside it.

use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities};

use super::Use::Profiling;
use super::{Capability, Check};

const GROUP: &str = "eBPF";

pub(super) fn checks() -> Vec<Check> {
    vec![btf(), permission(), tracefs()]
}

fn btf() -> Check {
    let capability = Capability {
        group: GROUP,
        name: "BTF",
        needed_for: "programs that fit the running kernel",
        uses: &[Profiling],
    };
    let kernel = Path::new("/sys/kernel/btf/vmlinux");
    // KVM built as a module has type information of its own.
    let kvm = Path::new("/sys/kernel/btf/kvm");
    if !kernel.exists() {
        return capability.missing(
            format!("no {}", kernel.display()),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y (Debian's has it)",
        );
    }
    capability.ok(if kvm.exists() { "of the kernel and of the module kvm" } else { "of the kernel" })
}

fn permission() -> Check {
    let capability = Capability {
        group: GROUP,
        name: "permission",
        needed_for: "loading and attaching programs",
        uses: &[Profiling],
    };
    let advice = "run as root, or `setcap cap_bpf,cap_perfmon+ep` the binary ringferry-profile";
    let held = match capabilities(None) {
        Ok(sets) => sets.effective,
        Err(error) => return capability.missing(format!("cannot tell: capget: {error}"), advice),
    };
    if held.contains(CapabilitySet::SYS_ADMIN) {
        return capability.ok("CAP_SYS_ADMIN");
    }
    let lacking: Vec<_> = [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::PERFMON, "CAP_PERFMON")]
        .into_iter()
        .filter_map(|(needed, name)| (!held.contains(needed)).then_some(name))
        .collect();
    if lacking.is_empty() {
        return capability.ok("CAP_BPF and CAP_PERFMON");
    }
    capability.missing(format!("no {}", lacking.join(", no ")), advice)
}

/// The profiler attaches by type information and does without it.
fn tracefs() -> Check {
    let capability = Capability {
        group: GROUP,
        name: "tracefs",
        needed_for: "KVM's tracepoints in perf and trace-cmd",
        uses: &[],
    };
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // source, mount point, type, …
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == "tracefs").then(|| place.to_owned())
    });
    match mounted {
        Some(place) => capability.ok(format!("mounted on {place}")),
        None => capability.limited("not mounted", "as root: `mount -t tracefs tracefs /sys/kernel/tracing`"),
    }
}
