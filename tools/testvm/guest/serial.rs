//! The first serial port: boot messages, and a line of statistics per second if it was asked for.

use core::fmt::{self, Write};
use core::mem::offset_of;

use crate::cpu::{Bare, in8, out8};
use crate::workload::Machine;
use crate::workload::mailbox::{Header, Stats, header_field, stats_address};
use crate::workload::vcpu::Vcpu;

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;

pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // A port that never gets ready loses the byte, not the guest.
            for _ in 0..10_000 {
                if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            out8(PORT, byte);
        }
        Ok(())
    }
}

#[macro_export]
macro_rules! println {
    ($($arguments:tt)*) => {{
        use core::fmt::Write;
        // The port takes everything.
        let _ = writeln!($crate::serial::Serial, $($arguments)*);
    }};
}

/// The first vCPU's work, when it is also to report: what the vCPUs have done, every second of its clock.
///
/// A report is some hundred port writes, each an exit; the time it takes counts as asked for.
pub fn work_and_report(mut vcpu: Vcpu<Bare>) -> ! {
    let header = |offset| Bare.load(header_field(offset));
    let khz = header(offset_of!(Header, tsc_khz)).max(1);
    let start = Bare.ticks();
    let mut next = start + khz * 1000;
    loop {
        let now = vcpu.turn();
        if now < next {
            continue;
        }
        next = now + khz * 1000;
        let _ = write!(Serial, "stats ms={}", (now - start) / khz);
        for index in 0..usize::try_from(header(offset_of!(Header, vcpus))).unwrap_or(0) {
            let stat = |offset| Bare.load(stats_address(index) + offset as u64);
            let _ = write!(
                Serial,
                " vcpu{index}=writes:{},reads:{},compute:{},longest_gap_us:{}",
                stat(offset_of!(Stats, writes)),
                stat(offset_of!(Stats, reads)),
                stat(offset_of!(Stats, compute_steps)),
                stat(offset_of!(Stats, longest_gap_ticks)) / (khz / 1000).max(1),
            );
        }
        let _ = Serial.write_str("\n");
        vcpu.forget_time();
    }
}
