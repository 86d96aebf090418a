//! Why a profile cannot be had: each message says what was tried, what was found and what to do.

use std::io;

/// An error of the profiler.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process may not load tracing programs.
    #[error(
        "no right to load eBPF tracing programs: {} missing. Run as root, or: setcap cap_bpf,cap_perfmon+ep <this binary>",
        missing.join(" and ")
    )]
    MissingRights {
        /// Names of the capabilities, as in capabilities(7).
        missing: Vec<&'static str>,
    },

    /// The kernel does not describe its types.
    #[error(
        "cannot read the kernel's type information, {path}: {error}. \
         The eBPF programs need it to find fields: a kernel with CONFIG_DEBUG_INFO_BTF=y, and /sys mounted"
    )]
    NoTypes {
        /// The BTF file.
        path: String,
        /// What reading or parsing it gave.
        error: io::Error,
    },

    /// The kernel has no dirty ring, or its tracepoints have another shape.
    #[error(
        "tracepoint {tracepoint}: {found}. It is needed with {expected} arguments, as in Linux 5.11 and later with KVM \
         loaded (modprobe kvm_intel or kvm_amd)"
    )]
    Tracepoint {
        /// Name within the kernel.
        tracepoint: &'static str,
        /// Arguments that the programs expect.
        expected: usize,
        /// What the running kernel has.
        found: String,
    },

    /// A field that the programs read is not there, or is something else.
    #[error(
        "kernel field {record}.{field}: {found}. This kernel is laid out in a way that this version does not know, \
         and a wrong number is worse than none"
    )]
    Field {
        /// The struct.
        record: &'static str,
        /// Its member.
        field: &'static str,
        /// What the running kernel has.
        found: String,
    },

    /// The kernel or libbpf refused.
    #[error("cannot {doing}: {error}{}{messages}", if messages.is_empty() { "" } else { "\n" })]
    Bpf {
        /// The step, as an infinitive.
        doing: &'static str,
        /// The error of libbpf.
        error: libbpf_rs::Error,
        /// What libbpf and the kernel's verifier printed.
        messages: String,
    },

    /// A file that tells about processes or memory could not be read.
    #[error("cannot {doing}: {error}")]
    Read {
        /// The step, as an infinitive.
        doing: String,
        /// The error of the kernel.
        error: io::Error,
    },

    /// The object compiled into this binary is not what this binary expects: a defect of the build.
    #[error("the built-in eBPF object has no usable {what}: build ringferry-bpf again")]
    Object {
        /// Map or program.
        what: String,
    },
}

impl Error {
    pub(crate) fn bpf(doing: &'static str) -> impl FnOnce(libbpf_rs::Error) -> Self {
        move |error| Self::Bpf { doing, error, messages: String::new() }
    }
}
