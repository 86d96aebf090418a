//! A tiny guest for the tests of the VMM itself, assembled by rustc from the text below.
//!
//! It starts all vCPUs as on a PC (INIT, SIPI), brings each to 64-bit user mode, and there counts: vCPU i adds one
//! to its counter, writes the count to one of its 256 pages, and publishes it. On the way it checks what it can see of
//! its own state: a vector register, and a time stamp counter that never goes back. Two words that the host may set make
//! it wait before it starts the others, and sleep.
#![expect(unsafe_code, reason = "the image is bytes between two symbols of the assembler")]
#![allow(dead_code, reason = "each test binary uses a part")]

use std::arch::global_asm;
use std::time::{Duration, Instant};

use ringferry::{GuestAddress, PAGE_SIZE, PageRun};
use ringferry_testvm::{Boot, Config, Image, TestVm, TestVmError, VcpuStatus};

/// Page i belongs to vCPU i; its first word is the count.
pub const COUNTERS: u64 = 0x30_0000;
/// vCPU i has 256 pages from here plus i MiB.
pub const PAGES: u64 = 0x40_0000;
/// As long as this word is not zero, the first vCPU does not start the others.
pub const HOLD: u64 = 0x2f_0000;
/// Microseconds that each vCPU sleeps after each count.
pub const IDLE: u64 = 0x2f_0008;
/// Enough for 16 vCPUs.
pub const MEMORY_BYTES: u64 = 32 << 20;

global_asm!(
    r#"
    .pushsection .rodata.ringferry_test_image, "a"
    .balign 16
    .global ringferry_test_image_start
    .global ringferry_test_image_end
ringferry_test_image_start:
    .set origin, 0x100000
    .set base, ringferry_test_image_start
    .long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
    .long origin, origin, 0, 0, origin + (start32 - base)

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 64-bit code, ring 0
    .quad 0x00cf9b000000ffff        # 0x10 32-bit code
    .quad 0x00cf93000000ffff        # 0x18 data
    .quad 0                         # 0x20
    .quad 0x00cff3000000ffff        # 0x28 data, ring 3
    .quad 0x00affb000000ffff        # 0x30 64-bit code, ring 3
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long origin + (gdt - base)
next_id:
    .long 0

    .code32
start32:
    # One table of each level, at 2 MiB; 2 MiB pages over the first GiB, open to user mode.
    movl $0x201007, 0x200000
    movl $0x202007, 0x201000
    movl $0x87, %eax
    movl $0x202000, %edi
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    cmpl $0x203000, %edi
    jne 1b
    # The trampoline to 0x8000, then INIT and SIPI with vector 8 to all others.
    movl $(origin + (trampoline - base)), %esi
    movl $0x8000, %edi
    movl $(trampoline_end - trampoline), %ecx
    rep movsb
7:  cmpl $0, {hold}
    jne 7b
    movl $0x000c4500, 0xfee00300
    movl $20000, %ecx
2:  loop 2b
    movl $0x000c4608, 0xfee00300
    xorl %ebp, %ebp
    jmp common

    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + (trampoline_gdt - trampoline)
    movl $1, %eax
    movl %eax, %cr0
    ljmpl $0x10, $(origin + (ap32 - base))
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long origin + (gdt - base)
trampoline_end:

    .code32
ap32:
    movw $0x18, %ax
    movw %ax, %ds
    movl $1, %ebp
    lock xaddl %ebp, origin + (next_id - base)
    incl %ebp
common:
    # ebp is the number of this vCPU.
    lgdtl origin + (gdt_pointer - base)
    movw $0x18, %ax
    movw %ax, %ss
    movl $0x620, %eax
    movl %eax, %cr4
    movl $0x200000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl $0x901, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80050033, %eax
    movl %eax, %cr0
    ljmpl $0x08, $(origin + (start64 - base))

    .code64
start64:
    # A stack of 256 bytes at 0x280000 for one iretq.
    movl %ebp, %esp
    shll $8, %esp
    addl $0x280100, %esp
    pushq $0x2b
    pushq $0x300000
    pushq $0x3002                   # IOPL 3
    pushq $0x33
    pushq $(origin + (user - base))
    iretq

user:
    movl $0x2b, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %ebp, %ecx
    shlq $12, %rcx
    addq ${counters}, %rcx          # rcx: the counter
    movl %ebp, %ebx
    shlq $20, %rbx
    addq ${pages}, %rbx             # rbx: the pages
    xorl %esi, %esi                 # rsi: the count
    xorl %edi, %edi                 # rdi: the latest time
    movq $0x5eed5eed, %r8
    addq %rbp, %r8
    movq %r8, %xmm7
3:  incq %rsi
    movzbl %sil, %eax
    shlq $12, %rax
    movq %rsi, (%rbx, %rax)
    movq %rsi, (%rcx)
    movq %xmm7, %rax
    cmpq %rax, %r8
    jne 4f
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    cmpq %rdi, %rax
    jb 5f
    movq %rax, %rdi
    movl {idle}, %eax
    testl %eax, %eax
    jz 3b
    movw ${idle_port}, %dx
    outl %eax, %dx
    jmp 3b
4:  movl $1, %eax
    jmp 6f
5:  movl $2, %eax
6:  movw ${exit_port}, %dx
    outl %eax, %dx
    jmp 6b
ringferry_test_image_end:

    # Another guest: writes its command line to the serial port, then exits with mem_upper, in KiB.
    .balign 16
    .global ringferry_echo_image_start
    .global ringferry_echo_image_end
ringferry_echo_image_start:
    .set echo, ringferry_echo_image_start
    .long 0x1BADB002, 0x10002, -(0x1BADB002 + 0x10002)
    .long origin, origin, 0, 0, origin + (echo_start - echo)
    .code32
echo_start:
    cmpl $0x2BADB002, %eax
    jne 9f
    movl 16(%ebx), %esi
7:  movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz 7b
    movb (%esi), %al
    incl %esi
    testb %al, %al
    jz 8f
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 7b
8:  movl 8(%ebx), %eax
9:  movl $0xd0000000, %edi          # no RAM there: all ones
    cmpl $-1, (%edi)
    jne 9b
    movw ${exit_port}, %dx
    outl %eax, %dx
    jmp 9b
    .code64
ringferry_echo_image_end:

    # And one whose first exception finds no table: a triple fault.
    .balign 16
    .global ringferry_dying_image_start
    .global ringferry_dying_image_end
ringferry_dying_image_start:
    .set dying, ringferry_dying_image_start
    .long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
    .long origin, origin, 0, 0, origin + (dying_start - dying)
dying_table:
    .quad 0
    .code32
dying_start:
    lidtl origin + (dying_table - dying)
    ud2
    .code64
ringferry_dying_image_end:
    .popsection
    "#,
    counters = const COUNTERS,
    pages = const PAGES,
    hold = const HOLD,
    idle = const IDLE,
    idle_port = const ringferry_testvm::IDLE_PORT,
    exit_port = const ringferry_testvm::EXIT_PORT,
    options(att_syntax)
);

unsafe extern "C" {
    static ringferry_test_image_start: u8;
    static ringferry_test_image_end: u8;
    static ringferry_echo_image_start: u8;
    static ringferry_echo_image_end: u8;
    static ringferry_dying_image_start: u8;
    static ringferry_dying_image_end: u8;
}

/// The read-only data between two symbols of the assembler text above.
fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: only called with the two symbols around one image, which is data of this binary and never written.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The counting guest as a multiboot image.
pub fn counting_image() -> Image {
    let bytes = between(&raw const ringferry_test_image_start, &raw const ringferry_test_image_end);
    Image::Bytes { name: "counting", bytes }
}

/// A guest that writes its command line to the serial port and exits with `mem_upper`.
pub fn echo_image() -> &'static [u8] {
    between(&raw const ringferry_echo_image_start, &raw const ringferry_echo_image_end)
}

/// A guest that dies at once.
pub fn dying_image() -> &'static [u8] {
    between(&raw const ringferry_dying_image_start, &raw const ringferry_dying_image_end)
}

/// A VM with the counting guest.
pub fn counting_config(vcpus: usize) -> Config {
    let boot = Boot::Image { image: counting_image(), append: String::new() };
    Config { vcpus, memory_bytes: MEMORY_BYTES, boot, ..Config::default() }
}

/// The VM, or the reason to skip: no KVM here. Everything else is a failure of the test.
pub fn build(config: Config) -> Option<TestVm> {
    match TestVm::new(config) {
        Ok(vm) => Some(vm),
        Err(error @ (TestVmError::NoKvm | TestVmError::KvmPermission)) => {
            ringferry_testvm::skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

pub fn word(vm: &TestVm, address: u64) -> u64 {
    let mut bytes = [0; 8];
    vm.read_ram(GuestAddress(address), &mut bytes).expect("inside RAM");
    u64::from_le_bytes(bytes)
}

pub fn count(vm: &TestVm, vcpu: usize) -> u64 {
    word(vm, COUNTERS + (vcpu * PAGE_SIZE) as u64)
}

/// Waits until every vCPU has counted on by `by` from what `from` says; fails with what went wrong instead.
pub fn wait_for_progress(vm: &TestVm, from: &[u64], by: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while (0..vm.vcpus()).any(|vcpu| count(vm, vcpu) < from[vcpu] + by) {
        let status = vm.status();
        assert!(
            !status.iter().any(|s| matches!(s, VcpuStatus::Failed(_) | VcpuStatus::Exited { .. })),
            "{status:?}"
        );
        let counts: Vec<u64> = (0..vm.vcpus()).map(|vcpu| count(vm, vcpu)).collect();
        assert!(Instant::now() < deadline, "no progress: {status:?} {counts:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn counts(vm: &TestVm) -> Vec<u64> {
    (0..vm.vcpus()).map(|vcpu| count(vm, vcpu)).collect()
}

/// Every page of a paused guest holds the last count that belongs to it.
pub fn assert_consistent(vm: &TestVm) {
    for vcpu in 0..vm.vcpus() {
        let published = count(vm, vcpu);
        for page in 0..256u64 {
            let found = word(vm, PAGES + ((vcpu as u64) << 20) + page * PAGE_SIZE as u64);
            // The page is written before the count is published.
            let last_until = |count: u64| if count < page { 0 } else { count - (count - page) % 256 };
            let allowed = [last_until(published), last_until(published + 1)];
            assert!(
                allowed.contains(&found),
                "vCPU {vcpu} page {page}: found {found}, published {published}, allowed {allowed:?}"
            );
        }
    }
}

/// Copies all of RAM page by page, whatever regions each side has.
pub fn copy_ram(from: &TestVm, to: &TestVm) {
    let mut page = vec![0; PAGE_SIZE];
    for region in from.memory().regions() {
        for index in 0..region.pages.pages {
            let address = GuestAddress(region.pages.first.address().0 + index * PAGE_SIZE as u64);
            from.read_ram(address, &mut page).expect("a page of the source's RAM");
            to.write_ram(address, &page).expect("the same page at the destination");
        }
    }
}

/// Copies some pages.
pub fn copy_run(from: &TestVm, to: &TestVm, run: PageRun) {
    let mut bytes = vec![0; usize::try_from(run.pages).expect("fits RAM") * PAGE_SIZE];
    from.read_ram(run.first.address(), &mut bytes).expect("pages of the source's RAM");
    to.write_ram(run.first.address(), &bytes).expect("the same pages at the destination");
}

/// Both have the same bytes everywhere.
pub fn assert_same_ram(one: &TestVm, other: &TestVm) {
    let (mut left, mut right) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
    for region in one.memory().regions() {
        for index in 0..region.pages.pages {
            let address = GuestAddress(region.pages.first.address().0 + index * PAGE_SIZE as u64);
            one.read_ram(address, &mut left).expect("a page of RAM");
            other.read_ram(address, &mut right).expect("a page of RAM");
            assert!(left == right, "the page at {address} differs");
        }
    }
}
