//! Booting: an image and its boot information into guest RAM, and the first vCPU at its entry.

use std::fs::File;
use std::io::Read;

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use ringferry::{GuestAddress, GuestMemory, PAGE_SIZE};

use crate::config::Image;
use crate::error::{TestVmError, kvm_error};
use crate::memory::Ram;
use crate::multiboot::{self, ENTRY_MAGIC, ImageError, LoadPlan, MapEntry};

/// Where the boot information goes: where QEMU puts it.
const INFORMATION: u32 = 0x9000;
/// What is kept free for it.
const INFORMATION_BYTES: u32 = 0x2000;
/// Longest command line.
pub const MAX_COMMAND_LINE: usize = 4096;
/// Conventional memory ends here; a PC's firmware keeps tables above it.
const CONVENTIONAL_END: u64 = 0x9_fc00;
const HIGH_START: u64 = 1 << 20;
/// Largest image file.
const MAX_IMAGE_BYTES: u64 = 256 << 20;

/// Loads `image` into RAM; its entry is returned.
pub(crate) fn load(ram: &Ram, image: &Image, append: &str) -> Result<u32, TestVmError> {
    let (name, bytes) = match image {
        Image::Bytes { name, bytes } => ((*name).to_owned(), bytes.to_vec()),
        Image::File(path) => {
            let failed = |error| TestVmError::ImageFile { path: path.clone(), error };
            let mut bytes = Vec::new();
            // One byte more than allowed tells a file that is too long from one that just fits.
            File::open(path)
                .map_err(failed)?
                .take(MAX_IMAGE_BYTES + 1)
                .read_to_end(&mut bytes)
                .map_err(failed)?;
            if bytes.len() as u64 > MAX_IMAGE_BYTES {
                return Err(failed(std::io::Error::other("the file is longer than 256 MiB")));
            }
            (path.to_string_lossy().into_owned(), bytes)
        }
    };
    // As QEMU: the image's name first.
    let command_line = if append.is_empty() { name } else { format!("{name} {append}") };
    if command_line.len() > MAX_COMMAND_LINE || command_line.contains('\0') {
        let found = command_line.len();
        return Err(ImageError::CommandLine { found, limit: MAX_COMMAND_LINE }.into());
    }
    let plan = multiboot::parse(&bytes)?;
    check(&plan, ram.memory())?;
    for segment in plan.segments {
        // Fresh RAM is zero, so what a segment has beyond the file needs no write.
        ram.write(GuestAddress(segment.address.into()), &bytes[segment.file])?;
    }
    let information = multiboot::information(INFORMATION, &memory_map(ram.memory()), &command_line);
    ram.write(GuestAddress(INFORMATION.into()), &information)?;
    Ok(plan.entry)
}

fn check(plan: &LoadPlan, memory: &GuestMemory) -> Result<(), ImageError> {
    for segment in &plan.segments {
        let start = u64::from(segment.address);
        let end = start + u64::from(segment.memory_bytes);
        if start < u64::from(INFORMATION + INFORMATION_BYTES) && end > u64::from(INFORMATION) {
            let other = "the boot information at 0x9000..0xb000";
            return Err(ImageError::Overlap { address: segment.address, other });
        }
        if !usable(memory).iter().any(|ram| ram.start <= start && end <= ram.start + ram.bytes) {
            return Err(ImageError::OutsideRam { start, end });
        }
    }
    Ok(())
}

/// RAM without gaps, adjoining regions joined.
fn usable(memory: &GuestMemory) -> Vec<MapEntry> {
    let mut map: Vec<MapEntry> = Vec::new();
    for region in memory.regions() {
        let (start, bytes) = (region.pages.first.address().0, region.pages.pages * PAGE_SIZE as u64);
        match map.last_mut() {
            Some(last) if last.start + last.bytes == start => last.bytes += bytes,
            _ => map.push(MapEntry { start, bytes, usable: true }),
        }
    }
    map
}

/// The memory map that the guest is told: RAM, less what a PC reserves below 1 MiB.
fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let mut map = Vec::new();
    for ram in usable(memory) {
        let end = ram.start + ram.bytes;
        if ram.start == 0 {
            map.push(MapEntry { start: 0, bytes: CONVENTIONAL_END, usable: true });
            map.push(MapEntry {
                start: CONVENTIONAL_END,
                bytes: HIGH_START - CONVENTIONAL_END,
                usable: false,
            });
            map.push(MapEntry { start: HIGH_START, bytes: end - HIGH_START, usable: true });
        } else {
            map.push(ram);
        }
    }
    map
}

/// Puts the first vCPU where multiboot wants it: 32-bit protected mode, flat segments, paging and interrupts off
/// (specification section 3.2).
pub(crate) fn enter(fd: &VcpuFd, entry: u32) -> Result<(), TestVmError> {
    let failed =
        |call| move |error| kvm_error(call, error, "the vCPU cannot be set to 32-bit protected mode");
    let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    sregs.cs = flat(0x10, CODE);
    let data = flat(0x18, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    const PROTECTED: u64 = 1;
    sregs.cr0 |= PROTECTED;
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;

    let mut regs = fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
    regs.rip = entry.into();
    regs.rax = ENTRY_MAGIC.into();
    regs.rbx = INFORMATION.into();
    // Only the bit that is always one.
    regs.rflags = 2;
    fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn map(memory_bytes: u64, regions: usize) -> Vec<(u64, u64, bool)> {
        let ram = Ram::new(&Config { memory_bytes, regions, ..Config::default() }, None).unwrap();
        memory_map(ram.memory()).iter().map(|e| (e.start, e.bytes, e.usable)).collect()
    }

    #[test]
    fn the_guest_is_told_of_its_ram_however_it_is_cut() {
        let low = [(0, 0x9_fc00, true), (0x9_fc00, 0x6_0400, false)];
        assert_eq!(map(64 << 20, 1), [low[0], low[1], (1 << 20, 63 << 20, true)]);
        assert_eq!(map(64 << 20, 7), map(64 << 20, 1));
        assert_eq!(
            map(4 << 30, 3),
            [low[0], low[1], (1 << 20, (3 << 30) - (1 << 20), true), (4 << 30, 1 << 30, true)]
        );
    }

    #[test]
    fn an_image_that_does_not_fit_the_vm_is_refused() {
        let config = Config { memory_bytes: 2 << 20, ..Config::default() };
        let ram = Ram::new(&config, None).unwrap();
        let plan = |address, memory_bytes| LoadPlan {
            segments: vec![multiboot::Segment { address, file: 0..0, memory_bytes }],
            entry: address,
        };
        assert!(matches!(check(&plan(0x10_0000, 1 << 21), ram.memory()), Err(ImageError::OutsideRam { .. })));
        assert!(matches!(check(&plan(0x8000, 0x1001), ram.memory()), Err(ImageError::Overlap { .. })));
        assert_eq!(check(&plan(0x10_0000, 1 << 20), ram.memory()), Ok(()));
    }

    #[test]
    fn a_file_that_is_not_there_and_a_command_line_that_does_not_fit_are_named() {
        let ram = Ram::new(&Config::default(), None).unwrap();
        let missing = Image::File("/nonexistent/image".into());
        assert!(load(&ram, &missing, "").unwrap_err().to_string().contains("/nonexistent/image"));
        let image = Image::Bytes { name: "x", bytes: b"" };
        let long = "a".repeat(MAX_COMMAND_LINE);
        assert!(matches!(load(&ram, &image, &long), Err(TestVmError::Image(ImageError::CommandLine { .. }))));
    }
}
