//! Compiles the test guest (`guest/`) with the same rustc, for the host's own target, and links it to a flat
//! multiboot image for `src/image.rs` to embed. No cargo, no crates, no assembler but rustc's own.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/workload");
    let image = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("guest.img");
    if env::var("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        // The guest is an x86 PC; elsewhere its image is empty and the test VMM says so.
        return Ok(std::fs::write(&image, [])?);
    }
    compile(&image)
}

fn compile(image: &Path) -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let guest = manifest.join("guest");
    let mut script = std::ffi::OsString::from("link-arg=-Wl,-T,");
    script.push(guest.join("link.ld"));
    let mut rustc = Command::new(env::var_os("RUSTC").ok_or("RUSTC is not set")?);
    rustc
        .arg(guest.join("main.rs"))
        .args(["--crate-name", "ringferry_guest", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "opt-level=3", "-C", "codegen-units=1"])
        .args(["-C", "relocation-model=static", "-C", "code-model=small"])
        // What the compiler driver would add for a program of the host.
        .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles", "-C", "link-arg=-static"])
        .args(["-C", "link-arg=-no-pie", "-C", "link-arg=-Wl,--build-id=none"])
        .args(["-C", "link-arg=-Wl,--oformat=binary", "-C"])
        .arg(script)
        .arg("-o")
        .arg(image);
    // What cargo was told for the host's programs (instrumentation, another linker) is not for the guest.
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        rustc.env_remove(variable);
    }
    let output = rustc.output().map_err(|error| format!("cannot run rustc for the guest: {error}"))?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the guest does not compile ({}):\n{told}", output.status).into());
    }
    Ok(())
}
