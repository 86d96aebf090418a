//! The test VMM boots multiboot images that are not its own, from files, and says why it does not boot others.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{build, echo_image};
use ringferry_testvm::{Boot, Config, Image, ImageError, TestVm, TestVmError, VcpuStatus};

/// A file that is removed at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringferry-image-{}-{number}", std::process::id()));
        fs::write(&path, bytes).expect("the temporary directory is writable");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn config(path: &Path, append: &str) -> Config {
    let boot = Boot::Image { image: Image::File(path.to_owned()), append: append.to_owned() };
    Config { boot, memory_bytes: 16 << 20, ..Config::default() }
}

/// The flat image as the one segment of an ELF32 file, linked to run at its physical address plus `high`.
fn as_elf(flat: &[u8], high: u32) -> Vec<u8> {
    let entry = u32::from_le_bytes(flat[28..32].try_into().expect("four bytes"));
    let length = u32::try_from(flat.len()).expect("a small image");
    let mut elf = vec![0; 4096];
    elf[..8].copy_from_slice(b"\x7fELF\x01\x01\x01\0");
    (elf[16], elf[18], elf[20]) = (2, 3, 1);
    elf[24..28].copy_from_slice(&(entry + high).to_le_bytes());
    elf[28] = 52;
    (elf[40], elf[42], elf[44]) = (52, 32, 1);
    let load = [1, 4096, 0x10_0000 + high, 0x10_0000, length, length, 7, 4096];
    for (place, word) in elf[52..].chunks_exact_mut(4).zip(load) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    elf.extend(flat);
    // The header's address fields are not for ELF: flags without bit 16, and the checksum for that.
    elf[4096 + 4..4096 + 8].copy_from_slice(&2u32.to_le_bytes());
    elf[4096 + 8..4096 + 12].copy_from_slice(&0u32.wrapping_sub(0x1BAD_B002 + 2).to_le_bytes());
    elf
}

#[test]
fn a_foreign_image_finds_its_command_line_and_the_size_of_ram() {
    let flat = echo_image();
    for image in [flat.to_vec(), as_elf(flat, 0), as_elf(flat, 0xC000_0000)] {
        let file = Scratch::new(&image);
        let Some(mut vm) = build(config(&file.0, "console=ttyS0 quiet")) else { return };
        vm.start().unwrap();
        let ended = vm.wait_for_end(Duration::from_secs(60));
        assert_eq!(ended, Some((0, VcpuStatus::Exited { code: 15 << 10 })), "mem_upper in KiB");
        assert_eq!(vm.console(), format!("{} console=ttyS0 quiet", file.0.display()));
    }
}

#[test]
fn images_that_cannot_be_booted_are_refused_with_the_reason() {
    let refusal = |bytes: &[u8], append: &str| {
        let file = Scratch::new(bytes);
        TestVm::new(config(&file.0, append)).map(|_| ()).unwrap_err()
    };
    let error = refusal(b"#!/bin/sh\n", "");
    if matches!(error, TestVmError::NoKvm | TestVmError::KvmPermission) {
        return ringferry_testvm::skip(&error.to_string());
    }
    assert!(matches!(error, TestVmError::Image(ImageError::NoHeader)), "{error}");
    let error = refusal(echo_image(), &"x".repeat(5000));
    assert!(matches!(error, TestVmError::Image(ImageError::CommandLine { .. })), "{error}");
    let error = refusal(&as_elf(echo_image(), 0)[..4150], "");
    assert!(matches!(error, TestVmError::Image(ImageError::Truncated { .. })), "{error}");
    let error = TestVm::new(config(Path::new("/nonexistent"), "")).map(|_| ()).unwrap_err();
    assert!(matches!(error, TestVmError::ImageFile { .. }), "{error}");
    let mut flat = echo_image().to_vec();
    // bss_end_addr at 64 MiB in a VM of 16 MiB.
    flat[24..28].copy_from_slice(&(64u32 << 20).to_le_bytes());
    let error = refusal(&flat, "");
    assert!(matches!(error, TestVmError::Image(ImageError::OutsideRam { .. })), "{error}");
}
