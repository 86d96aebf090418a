//! The frequency of the time stamp counter, where neither the command line nor CPUID says.

use crate::cpu::{Bare, in8, out8};
use crate::workload::Machine;

/// Counts per second of the PC's timer.
const TIMER_HZ: u64 = 1_193_182;

/// In kHz, against channel 2 of the PC's timer, over 25 ms or a little more.
pub fn measure_tsc_khz() -> u64 {
    // Gate on, speaker off; mode 2, from 65536 down, again and again every 55 ms.
    out8(0x61, in8(0x61) & !2 | 1);
    out8(0x43, 0xb4);
    out8(0x42, 0);
    out8(0x42, 0);
    let (first, first_count) = read_both();
    while Bare.ticks() - first < 25_000_000 || first_count.wrapping_sub(read_both().1) < (TIMER_HZ / 40) as u16 {}
    let (second, second_count) = read_both();
    let counts = u64::from(first_count.wrapping_sub(second_count)).max(1);
    (second - first) * TIMER_HZ / counts / 1000
}

/// Time stamp counter and timer at one moment: of sixteen tries the one that was disturbed least.
fn read_both() -> (u64, u16) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = Bare.ticks();
        // Latch, then low and high byte.
        out8(0x43, 0x80);
        let latched = Bare.ticks();
        let count = u16::from(in8(0x42)) | u16::from(in8(0x42)) << 8;
        if latched - before < best.0 {
            best = (latched - before, before + (latched - before) / 2, count);
        }
    }
    (best.1, best.2)
}
