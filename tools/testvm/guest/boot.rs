//! From where a multiboot loader leaves the first processor, and a SIPI the others, to 64-bit user mode.
//!
//! Everything here may be emulated, at some 0.4 µs per instruction on hosts whose KVM runs only 64-bit user mode
//! natively; so it does what must be done here and no more. `guest_main` gets the number of the processor, on
//! the first one the address of the boot information, how many processors there are, and how fast the clock is.

use core::arch::global_asm;

use crate::workload::mailbox::{KVMCLOCK_ADDRESS, KVMCLOCK_BYTES, MAX_VCPUS};

/// Where VMware put the frequency of the time stamp counter, and our test VMM and QEMU (vmware-cpuid-freq) too.
const TIMING_LEAF: u32 = 0x4000_0010;

/// `KVM_FEATURE_CLOCKSOURCE2`, in EAX of leaf 0x4000_0001: kvmclock, by the two MSRs below. From <asm/kvm_para.h>.
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Bytes of each processor's stack.
const STACK_BYTES: usize = 16 << 10;

global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 4
    # Memory information wanted; addresses given here.
    .set flags, 0x10002
header:
    .long 0x1BADB002, flags, -(0x1BADB002 + flags)
    .long header, image_start, image_end, image_zero_end, start32

    .section .boot, "ax"
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
    .long gdt

    .code32
    .global start32
start32:
    cli
    cld
    movl %ebx, %esi                 # the boot information
    lgdtl gdt_pointer
    ljmpl $0x10, $1f
1:  movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss

    # The first GiB, in pages of 2 MiB, open to user mode; guest_main maps the rest.
    movl $(directories + 7), page_map
    movl $(directory + 7), directories
    movl $0x87, %eax
    movl $directory, %edi
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    cmpl $(directory + 4096), %edi
    jne 2b

    # The trampoline to where a SIPI can point, then INIT and SIPI to all others, by the local APIC.
    movl %esi, %ebp
    movl $trampoline, %esi
    movl ${trampoline_at}, %edi
    movl $(trampoline_end - trampoline), %ecx
    rep movsb
    movl %ebp, %esi
    movl $0x000c4500, 0xfee00300
    movl $5000, %ecx
3:  loop 3b
    movl $(0x000c4600 + ({trampoline_at} >> 12)), 0xfee00300
    xorl %edi, %edi
    jmp common

    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl {trampoline_at} + (trampoline_gdt - trampoline)
    movl $1, %eax
    movl %eax, %cr0
    ljmpl $0x10, $other32
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
other32:
    cld
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    # Its number is that of its local APIC.
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %edi
    xorl %esi, %esi
    cmpl ${max_vcpus}, %edi
    jb common
4:  hlt
    jmp 4b

common:
    # edi: the processor's number, esi: the boot information.
    movl $0x620, %eax               # PAE, SSE
    movl %eax, %cr4
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl $0x901, %eax               # long mode, no-execute, syscall
    xorl %edx, %edx
    wrmsr
    movl $0x80050033, %eax
    movl %eax, %cr0
    ljmpl $0x08, $5f

    .code64
5:  # What the processor says of itself is asked here: where user mode is native, the bare CPU would answer there.
    movl $1, %eax
    cpuid
    shrl $16, %ebx
    movzbl %bl, %r10d               # how many processors
    xorl %r11d, %r11d               # TSC frequency in kHz, 0 if it does not say
    movl $0x40000000, %eax
    cpuid
    subl ${timing_leaf}, %eax
    cmpl $0xfff0, %eax
    jae 7f
    movl ${timing_leaf}, %eax
    cpuid
    movl %eax, %r11d
7:  # kvmclock, if KVM is there and shows it.
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx          # "KVMK"
    jne 8f
    movl $0x40000001, %eax
    cpuid
    testl ${clocksource2}, %eax
    jz 8f
    leal 1(%rdi), %eax
    imull ${kvmclock_bytes}, %eax, %eax
    addl $({kvmclock} + 1), %eax    # bit 0: on
    xorl %edx, %edx
    movl ${system_time_msr}, %ecx
    wrmsr
    testl %edi, %edi
    jnz 8f
    movl ${kvmclock}, %eax
    movl ${wall_clock_msr}, %ecx
    wrmsr
8:  leal 1(%rdi), %eax
    imull ${stack_bytes}, %eax, %eax
    leaq stacks(%rax), %rsp
    movq %rsp, %rcx
    pushq $0x2b
    pushq %rcx
    pushq $0x3002                   # IOPL 3, interrupts off
    pushq $0x33
    pushq $6f
    iretq
6:  movl $0x2b, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %r10d, %edx
    movl %r11d, %ecx
    call guest_main
    ud2

    .section .bss
    .balign 4096
page_map:
    .skip 4096
    .global directories
directories:
    .skip 4096
directory:
    .skip 4096
stacks:
    .skip {stack_bytes} * {max_vcpus}
    .text
    "#,
    trampoline_at = const 0x8000,
    timing_leaf = const TIMING_LEAF,
    clocksource2 = const KVM_FEATURE_CLOCKSOURCE2,
    wall_clock_msr = const MSR_KVM_WALL_CLOCK_NEW,
    system_time_msr = const MSR_KVM_SYSTEM_TIME_NEW,
    kvmclock = const KVMCLOCK_ADDRESS,
    kvmclock_bytes = const KVMCLOCK_BYTES,
    max_vcpus = const MAX_VCPUS,
    stack_bytes = const STACK_BYTES,
    options(att_syntax)
);
