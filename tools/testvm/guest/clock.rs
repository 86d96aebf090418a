//! The frequency of the time stamp counter, where neither the command line nor CPUID says.

use crate::cpu::{Bare, in8, out8};
use crate::workload::Machine;

/// Counts per second of the PC's timer.
const TIMER_HZ: u64 = 1_193_182;

/// How long to measure.
const MEASURED_COUNTS: u64 = TIMER_HZ / 40;
/// Between two looks the timer must not come round, which takes it 55 ms: 50 ms at 1 GHz, less at more.
const GAP_MAX_TICKS: u64 = 50_000_000;
/// Most looks: some seconds' worth, should the host be too busy, or the timer stand still.
const LOOKS: usize = 10_000;

/// In kHz, against channel 2 of the PC's timer, over 25 ms or a little more. Both clocks run on while the vCPU
/// does not.
pub fn measure_tsc_khz() -> u64 {
    // Gate on, speaker off; mode 2, from 65536 down, again and again.
    out8(0x61, in8(0x61) & !2 | 1);
    out8(0x43, 0xb4);
    out8(0x42, 0);
    out8(0x42, 0);
    let (mut start, mut counts) = (read_both(), 0);
    let mut last = start;
    for _ in 0..LOOKS {
        let now = read_both();
        if now.0 - last.0 > GAP_MAX_TICKS {
            (start, counts) = (now, 0);
        } else {
            // It counts down.
            counts += u64::from(last.1.wrapping_sub(now.1));
        }
        last = now;
        if counts >= MEASURED_COUNTS {
            break;
        }
    }
    ((last.0 - start.0) * TIMER_HZ / counts.max(1) / 1000).max(1)
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
