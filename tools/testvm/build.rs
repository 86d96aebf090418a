//! Compiles the test guest (`guest/`) with the same rustc, for the host's own target, and makes a flat multiboot
//! image of it for `src/image.rs` to embed. No cargo, no crates, no assembler but rustc's own.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/workload");
    let directory = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut image = Vec::new();
    // The guest is a program for an x86 PC; elsewhere its image is empty.
    if env::var("CARGO_CFG_TARGET_ARCH")? == "x86_64" {
        let program = directory.join("guest.elf");
        compile(&program)?;
        image = flatten(&fs::read(&program)?).ok_or("what was linked is no ELF64 file")?;
    }
    Ok(fs::write(directory.join("guest.img"), image)?)
}

/// The bytes of an ELF64 file as they lie in memory, from the first to the last that the file has: multiboot
/// loaders take no ELF64. (GNU ld cannot write flat output with unused sections left out, so no linker is asked to.)
fn flatten(elf: &[u8]) -> Option<Vec<u8>> {
    let number = |at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(elf.get(at..at + bytes)?);
        usize::try_from(u64::from_le_bytes(word)).ok()
    };
    elf.strip_prefix(b"\x7fELF\x02\x01")?;
    let (table, entry_bytes, entries) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut segments = Vec::new();
    for entry in (0..entries).map(|index| table + index * entry_bytes) {
        const PT_LOAD: usize = 1;
        let (offset, address, bytes) =
            (number(entry + 8, 8)?, number(entry + 24, 8)?, number(entry + 32, 8)?);
        if number(entry, 4)? == PT_LOAD && bytes > 0 {
            segments.push((address, elf.get(offset..offset + bytes)?));
        }
    }
    let start = segments.iter().map(|(address, _)| *address).min()?;
    let mut image = Vec::new();
    for (address, bytes) in segments {
        let at = address - start;
        image.resize(image.len().max(at + bytes.len()), 0);
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Some(image)
}

fn compile(program: &Path) -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let guest = manifest.join("guest");
    let with_path = |option: &str, path: &Path, rest: &str| {
        let mut argument = OsString::from(option);
        argument.push(path);
        argument.push(rest);
        argument
    };
    let mut rustc = Command::new(env::var_os("RUSTC").ok_or("RUSTC is not set")?);
    rustc
        .arg(guest.join("main.rs"))
        .args(["--crate-name", "ringferry_guest", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", &env::var("TARGET")?])
        .args(["-C", "panic=abort", "-C", "opt-level=3", "-C", "codegen-units=1"])
        .args(["-C", "relocation-model=static", "-C", "code-model=small"])
        // What the compiler driver would add for a program of the host.
        .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-nostartfiles", "-C", "link-arg=-static"])
        .args(["-C", "link-arg=-no-pie", "-C", "link-arg=-Wl,--build-id=none"])
        .args(["-C", "strip=symbols", "-C", "link-arg=-T", "-C"])
        .arg(with_path("link-arg=", &guest.join("link.ld"), ""))
        // The same image wherever it is built.
        .arg(with_path("--remap-path-prefix=", &manifest, "=testvm"))
        .arg("-o")
        .arg(program);
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
