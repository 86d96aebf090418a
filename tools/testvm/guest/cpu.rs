//! The bare processor as the machine that the workload runs on, and what else takes an instruction.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::workload::Machine;
use crate::workload::mailbox::{IDLE_PORT, KERNEL_MODE_FLAG};

/// All of guest RAM, mapped where it lies, and the time stamp counter.
#[derive(Clone, Copy)]
pub struct Bare;

fn word(address: u64) -> &'static AtomicU64 {
    // SAFETY:
    // * the workload stays inside RAM, which is mapped one to one and never goes away;
    // * its addresses are multiples of 8, and words there are only ever accessed as atomics or by `store_pair`.
    unsafe { AtomicU64::from_ptr(core::ptr::with_exposed_provenance_mut(address as usize)) }
}

impl Machine for Bare {
    #[inline(always)]
    fn load(&self, address: u64) -> u64 {
        word(address).load(Ordering::Acquire)
    }

    #[inline(always)]
    fn store(&mut self, address: u64, value: u64) {
        // Each release keeps the stores before it before it; x86 does the same for nothing.
        word(address).store(value, Ordering::Release);
    }

    #[inline(always)]
    fn store_pair(&mut self, address: u64, first: u64, second: u64) {
        // SAFETY:
        // * as for `word`; the address is a multiple of 16;
        // * clobbers nothing but the register named; the compiler takes all of memory as read and written.
        unsafe {
            asm!(
                "movq {pair}, {first}",
                "movq {high}, {second}",
                "punpcklqdq {pair}, {high}",
                "movaps xmmword ptr [{address}], {pair}",
                address = in(reg) address,
                first = in(reg) first,
                second = in(reg) second,
                pair = out(xmm_reg) _,
                high = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn swap(&mut self, address: u64, value: u64) -> u64 {
        word(address).swap(value, Ordering::AcqRel)
    }

    /// All of this runs at CPL 3: what is kernel and what is program, a flag of the processor tells, which means nothing
    /// else and which user mode may set.
    #[inline(always)]
    fn set_kernel_mode(&mut self, in_kernel: bool) {
        const _: () = assert!(KERNEL_MODE_FLAG == 0x20_0000);
        // SAFETY: pushes and pops a word of the stack, which the compiler knows of (no `nostack`), and changes one flag
        // that no other code reads.
        unsafe {
            if in_kernel {
                asm!("pushfq", "or qword ptr [rsp], 0x200000", "popfq");
            } else {
                asm!("pushfq", "and qword ptr [rsp], -0x200001", "popfq");
            }
        }
    }

    #[inline(always)]
    fn ticks(&self) -> u64 {
        let (low, high): (u64, u64);
        // SAFETY: reads a counter; CR4.TSD is clear. The compiler moves no memory access across it.
        unsafe {
            asm!("rdtsc", out("rax") low, out("rdx") high, options(nostack, preserves_flags));
        }
        high << 32 | low
    }

    fn wait(&mut self, microseconds: u32) {
        out32(IDLE_PORT, microseconds);
    }

    #[inline(always)]
    fn relax(&self) {
        core::hint::spin_loop();
    }
}

/// The guest takes no interrupts, and the timer that the firmware left running needs not try.
pub fn mask_interrupt_controllers() {
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: IOPL is 3; no port written here changes memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: IOPL is 3; reading these ports has no effect on memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

// What the compiler calls where it sees a copy or a fill; the C library is not here.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's ranges; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: nothing is overwritten before it is read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller's ranges, from their ends; the direction flag is set for the one instruction only.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rcx") bytes => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's range; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    for index in 0..bytes {
        // SAFETY: both of the caller's ranges have `bytes` bytes.
        let (x, y) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's ranges.
    unsafe { memcmp(a, b, bytes) }
}
