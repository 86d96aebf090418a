//! The guest: user-mode code that writes the number of the pass to every page of a range, pass after pass.

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;

/// Bytes of RAM.
pub const RAM_BYTES: usize = 32 << 20;
/// The pages that the guest writes.
pub const FIRST_PAGE: usize = (16 << 20) / 4096;
/// How many.
pub const PAGES: usize = 1024;
const CODE: usize = 0x1000;
const PAGE_TABLES: usize = 0x10_000;

/// The words of RAM that are not zero: page tables that map RAM to itself for user mode, and a loop.
pub fn image() -> Vec<(usize, u64)> {
    let code = [
        0x48, 0x89, 0xf7, // mov rdi, rsi
        0x48, 0x89, 0xd1, // mov rcx, rdx
        0x48, 0x89, 0x07, // mov [rdi], rax
        0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
        0x48, 0xff, 0xc9, // dec rcx
        0x75, 0xf1, // jnz to mov [rdi]
        0x48, 0xff, 0xc0, // inc rax
        0xe6, 0x10, // out 0x10, al: back to the VMM after each pass
        0xeb, 0xe4, // jmp to the first line
        0, 0, 0, 0,
    ];
    const USER: u64 = 7;
    let table = |level: usize| PAGE_TABLES + level * 0x1000;
    let mut words = vec![(table(0), table(1) as u64 + USER), (table(1), table(2) as u64 + USER)];
    words
        .extend((0..RAM_BYTES >> 21).map(|entry| (table(2) + entry * 8, (entry as u64) << 21 | 0x80 | USER)));
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    words.extend(code.chunks_exact(8).enumerate().map(|(at, bytes)| (CODE + at * 8, word(bytes))));
    words
}

/// 64-bit user mode, which runs natively under every KVM, at the first instruction.
pub fn enter(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 0x2b, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PAGE_TABLES as u64, 0x620, 0xd01);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags, regs.rax) = (CODE as u64, 0x3002, 1);
    (regs.rsi, regs.rdx) = ((FIRST_PAGE * 4096) as u64, PAGES as u64);
    vcpu.set_regs(&regs)
}
