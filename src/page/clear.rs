//! Guest RAM made zero.
#![expect(unsafe_code, reason = "guest RAM is written through raw pointers")]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::digest::in_chunks;
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

/// Makes RAM zero that was used before, on all CPUs; how many pages were not, or `None` if `cancel` was raised meanwhile.
/// RAM that was never touched stays untouched.
pub fn clear_used(memory: &GuestMemory, cancel: &AtomicBool) -> Option<u64> {
    let chunks: Vec<PageRun> = populated(memory).pages.runs().flat_map(in_chunks).collect();
    let (next, cleared) = (AtomicUsize::new(0), AtomicU64::new(0));
    // Relaxed: the numbers stand for themselves, the flag carries no data, and joining the threads orders the rest.
    let work = || {
        while !cancel.load(Ordering::Relaxed)
            && let Some(run) = chunks.get(next.fetch_add(1, Ordering::Relaxed))
        {
            // What is populated is RAM.
            let parts = memory.host_runs(*run).into_iter().flatten();
            cleared.fetch_add(parts.map(clear_used_part).sum(), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        (1..threads.min(chunks.len())).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    (!cancel.load(Ordering::Relaxed)).then(|| cleared.into_inner())
}

fn clear_used_part(part: HostRun) -> u64 {
    let mut cleared = 0;
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
    cleared
}
