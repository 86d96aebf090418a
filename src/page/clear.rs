//! Guest RAM made zero.
#![expect(unsafe_code, reason = "guest RAM is written through raw pointers")]

use super::populated::populated;
use super::read::is_zero;
use crate::layout::{GuestMemory, HostRun, LayoutError, PAGE_SIZE, PageIndex, PageRun};

/// Fills pages with zeros. For RAM of which no guest runs.
///
/// # Errors
///
/// [`LayoutError`] for a page outside RAM; nothing is written then.
pub fn clear(memory: &GuestMemory, run: PageRun) -> Result<(), LayoutError> {
    memory.host_runs(run)?.for_each(clear_part);
    Ok(())
}

fn clear_part(part: HostRun) {
    // SAFETY: the part is guest RAM, mapped writable as long as the caller's `GuestMemory` lives; whoever else writes it
    // meanwhile is outside the program, by the contract of `GuestMemory::new`.
    unsafe { part.host.write_bytes(0, part.len_bytes()) };
}

/// Makes RAM zero that was used before; how many pages were not. RAM that was never touched stays untouched.
pub fn clear_used(memory: &GuestMemory) -> u64 {
    let mut cleared = 0;
    for run in populated(memory).pages.runs() {
        // What is populated is RAM.
        for part in memory.host_runs(run).into_iter().flatten() {
            for offset in 0..part.run.pages {
                let bytes = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
                let host = part.host.wrapping_add(bytes);
                // SAFETY: a page of the part, which `host_runs` gave out: mapped RAM, page-aligned.
                if unsafe { is_zero(host) } {
                    continue;
                }
                let run = PageRun { first: PageIndex(part.run.first.0 + offset), pages: 1 };
                clear_part(HostRun { run, host, ..part });
                cleared += 1;
            }
        }
    }
    cleared
}
