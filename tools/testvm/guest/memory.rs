//! Page tables: all RAM that the workload uses, one to one, in pages of 2 MiB.

use crate::cpu::Bare;
use crate::workload::Machine;
use crate::workload::mailbox::{DIRECTORIES_ADDRESS, PAGE_BYTES, RESERVED_END};
use crate::workload::ranges::Extents;

unsafe extern "C" {
    /// The directory of directories: entry i covers the i-th GiB.
    static directories: u8;
}

/// Present, writable, open to user mode.
const TABLE: u64 = 7;
/// The same, of 2 MiB.
const LARGE: u64 = 0x87;
const GIB: u64 = 1 << 30;
/// How many directories fit before the workload's RAM: what lies beyond so many GiB is not mapped.
pub const DIRECTORIES: u64 = (RESERVED_END - DIRECTORIES_ADDRESS) / PAGE_BYTES;

/// Maps every GiB in which `pool` has a page; boot has mapped the first.
pub fn map(pool: &Extents) {
    let mut machine = Bare;
    let mut free = DIRECTORIES_ADDRESS;
    let mut mapped_until = 1;
    for extent in pool.as_slice() {
        let start = extent.first * PAGE_BYTES;
        let end = start + extent.pages * PAGE_BYTES;
        for gib in (start / GIB).max(mapped_until)..end.div_ceil(GIB).min(DIRECTORIES) {
            machine.store_words(free, (0..512).map(|entry| (gib * GIB + (entry << 21)) | LARGE));
            // Last: no processor ever sees a directory half filled.
            machine.store(&raw const directories as u64 + gib * 8, free | TABLE);
            free += PAGE_BYTES;
            mapped_until = gib + 1;
        }
    }
}
