//! The boot information that a multiboot loader leaves.

use core::slice;

use crate::memory::DIRECTORIES;
use crate::workload::command_line::ConfigError;
use crate::workload::ranges::Extents;
use crate::workload::setup::SetupError;

/// Longest command line that is read.
const MAX_LINE_BYTES: usize = 4096;
/// Most entries of the memory map that are read.
const MAX_MAP_BYTES: u64 = 4096;

/// The information; the loader made it, and nothing writes there before the workload begins.
pub struct Information {
    at: u64,
}

impl Information {
    pub fn at(address: u64) -> Self {
        Self { at: address }
    }

    fn word(&self, offset: u64) -> u32 {
        read(self.at + offset)
    }

    /// The command line; a word if there is none.
    pub fn command_line(&self) -> Result<&'static str, SetupError<'static>> {
        const HAS_LINE: u32 = 1 << 2;
        if self.word(0) & HAS_LINE == 0 {
            return Ok("guest");
        }
        let start: *const u8 = core::ptr::with_exposed_provenance(self.word(16) as usize);
        let bad = |expected| SetupError::Config(ConfigError { found: "(all of it)", expected });
        let length = (0..MAX_LINE_BYTES)
            // SAFETY: the loader ends the line with a zero, in RAM below 4 GiB.
            .find(|offset| unsafe { start.add(*offset).read() } == 0)
            .ok_or_else(|| bad("at most 4095 bytes"))?;
        // SAFETY: those bytes were just read; nothing writes them again.
        let bytes = unsafe { slice::from_raw_parts(start, length) };
        str::from_utf8(bytes).map_err(|_| bad("UTF-8"))
    }

    /// The RAM that the workload can use.
    pub fn usable(&self) -> Extents {
        const HAS_MAP: u32 = 1 << 6;
        const USABLE: u32 = 1;
        let mut pool = Extents::default();
        if self.word(0) & HAS_MAP == 0 {
            // Only the size of what follows 1 MiB, in KiB.
            pool.add_bytes(1 << 20, (1 << 20) + (u64::from(self.word(8)) << 10));
            return pool;
        }
        let mut at = u64::from(self.word(48));
        let end = at + u64::from(self.word(44)).min(MAX_MAP_BYTES);
        while at < end {
            // An entry: its size without this word, start, length, type.
            let wide = |offset| u64::from(read(at + offset)) | u64::from(read(at + offset + 4)) << 32;
            let (start, bytes) = (wide(4), wide(12));
            if read(at + 20) == USABLE {
                pool.add_bytes(start, start.saturating_add(bytes).min(DIRECTORIES << 30));
            }
            at += u64::from(read(at)) + 4;
        }
        pool
    }
}

fn read(address: u64) -> u32 {
    let word: *const u32 = core::ptr::with_exposed_provenance(address as usize);
    // SAFETY: inside the information, which lies in mapped RAM; x86 reads unaligned words.
    unsafe { word.read_unaligned() }
}
