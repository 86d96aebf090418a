//! Compiles `src/bpf/profile.bpf.c` with clang into `$OUT_DIR/profile.bpf.o`, which `profiler.rs` embeds.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const PACKAGES: &str = "ringferry-bpf needs clang for its eBPF program, and libelf and zlib for libbpf. \
On Debian: apt-get install clang libelf-dev zlib1g-dev pkg-config";

fn main() {
    println!("cargo::rerun-if-changed=src/bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    if let Err(problem) = compile() {
        println!("cargo::error={problem}");
    }
}

fn compile() -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let headers =
        env::var("DEP_BPF_INCLUDE").map_err(|_| "libbpf-sys did not say where its headers are".to_owned())?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo set no OUT_DIR")?).join("profile.bpf.o");
    let output = Command::new(&clang)
        .args(["-g", "-O2", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror", "-I", &headers, "-c"])
        .arg("src/bpf/profile.bpf.c")
        .arg("-o")
        .arg(out)
        .output()
        .map_err(|error| format!("cannot run {clang}: {error}. {PACKAGES}"))?;
    if output.status.success() {
        return Ok(());
    }
    // One line each: that is all cargo::error can carry.
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::error={line}");
    }
    Err(format!("{clang} cannot compile src/bpf/profile.bpf.c ({}). {PACKAGES}", output.status))
}
