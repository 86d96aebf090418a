//! Reading guest pages that the guest may be writing at this moment: whether a page is zero, and a copy of it
//! that holds still.
//!
//! All reads are volatile: done exactly once, by plain loads, whatever else happens to the memory meanwhile. That
//! is how memory is read whose other users (the guest, the kernel, another process) are outside the program. What
//! is read may mix old and new bytes of the page. That is harmless where the page is tracked: a page that
//! changed while it was read is dirty again and will be sent again.
//!
//! Sixteen bytes a load, which every x86-64 can do. Wider ones gain nothing where it counts: on pages that come
//! from memory, this test, AVX2 and AVX-512 all reach the same 28 to 32 GB/s (`cargo bench --bench page`).
#![expect(
    unsafe_code,
    reason = "guest memory is read through raw pointers, as no Rust reference to it may exist"
)]

use std::ptr::read_volatile;

use crate::layout::{GuestMemory, LayoutError, PAGE_SIZE, PageIndex, PageRun};
use crate::page_set::PageSet;

/// Bytes looked at between two decisions to go on. Pages that hold something show it in the first block as a rule.
const BLOCK: usize = 256;

/// Whether all bytes of a page are zero. Returns at the first block of 256 bytes that is not.
///
/// # Safety
///
/// `page` is page-aligned and its [`PAGE_SIZE`] bytes are mapped readable. Anybody may write them meanwhile.
#[inline]
pub unsafe fn is_zero(page: *const u8) -> bool {
    (0..PAGE_SIZE).step_by(BLOCK).all(|at| {
        // SAFETY: the block lies inside the page, and is as aligned as the page up to 256 bytes.
        unsafe { block_is_zero(page.add(at)) }
    })
}

/// # Safety
///
/// [`BLOCK`] bytes from `block` on are readable, and `block` is 16-byte-aligned.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn block_is_zero(block: *const u8) -> bool {
    use std::arch::x86_64::{__m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128};
    let words = block.cast::<__m128i>();
    // SAFETY: SSE2 is part of x86-64.
    let mut any = unsafe { _mm_setzero_si128() };
    for i in 0..BLOCK / size_of::<__m128i>() {
        // SAFETY:
        // * Inside the block and aligned, by the caller's promise.
        // * Volatile, because the guest may write the bytes meanwhile; any value is an answer.
        // * SSE2 is part of x86-64.
        any = unsafe { _mm_or_si128(any, read_volatile(words.add(i))) };
    }
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff }
}

/// # Safety
///
/// [`BLOCK`] bytes from `block` on are readable, and `block` is 8-byte-aligned.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
unsafe fn block_is_zero(block: *const u8) -> bool {
    let words = block.cast::<u64>();
    let mut any = 0;
    for i in 0..BLOCK / size_of::<u64>() {
        // SAFETY:
        // * Inside the block and aligned, by the caller's promise.
        // * Volatile, because the guest may write the bytes meanwhile; any value is an answer.
        any |= unsafe { read_volatile(words.add(i)) };
    }
    any == 0
}

/// Copies a page out, so that whoever compresses, compares or hashes it sees bytes that hold still.
///
/// # Safety
///
/// `page` is page-aligned and its [`PAGE_SIZE`] bytes are mapped readable. Anybody may write them meanwhile.
#[inline]
pub unsafe fn copy_page(page: *const u8, copy: &mut [u8; PAGE_SIZE]) {
    let words = page.cast::<u64>();
    let (chunks, _) = copy.as_chunks_mut::<8>();
    for (i, chunk) in chunks.iter_mut().enumerate() {
        // SAFETY:
        // * There are PAGE_SIZE / 8 chunks, so the word is inside the page, and aligned as the page is.
        // * Volatile, because the guest may write the bytes meanwhile; any value is an answer.
        *chunk = unsafe { read_volatile(words.add(i)) }.to_ne_bytes();
    }
}

/// Adds to `zero` those pages of `run` that are all zero. Reading a page that was never populated populates it on
/// some mappings: offer only pages that [`populated`](super::populated) found.
///
/// # Errors
///
/// [`LayoutError`] if the run is not wholly inside RAM; nothing is read then.
pub fn zero_pages(memory: &GuestMemory, run: PageRun, zero: &mut PageSet) -> Result<(), LayoutError> {
    for host_run in memory.host_runs(run)? {
        let pages = (host_run.run.first.0..host_run.run.end().0).map(PageIndex);
        zero.extend(pages.zip((0..).step_by(PAGE_SIZE)).filter_map(|(page, offset)| {
            // SAFETY: `host_runs` gives out memory inside a region, mapped readable by the contract of
            // `GuestMemory::new`, page by page.
            unsafe { is_zero(host_run.host.add(offset)) }.then_some(page)
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Region, SlotId};

    #[repr(align(4096))]
    #[derive(Clone)]
    struct Page([u8; PAGE_SIZE]);

    #[test]
    fn one_set_bit_anywhere_makes_a_page_not_zero() {
        let mut page = Box::new(Page([0; PAGE_SIZE]));
        let is_zero = |page: &Page| {
            // SAFETY: a page of our own.
            unsafe { is_zero(page.0.as_ptr()) }
        };
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page.0[at] = 1 << (at % 8);
            assert!(!is_zero(&page), "byte {at}");
            page.0[at] = 0;
        }
        assert!(is_zero(&page));
    }

    #[test]
    fn a_copy_has_every_byte_of_its_page() {
        let mut page = Box::new(Page([0; PAGE_SIZE]));
        for (byte, value) in page.0.iter_mut().zip((0..=250).cycle()) {
            *byte = value;
        }
        let mut copy = [0xff; PAGE_SIZE];
        // SAFETY: a page of our own.
        unsafe { copy_page(page.0.as_ptr(), &mut copy) };
        assert_eq!(copy, page.0);
    }

    #[test]
    fn the_zero_pages_of_a_run_are_found_across_regions() {
        let mut pages = vec![Page([0; PAGE_SIZE]); 6];
        for used in [1, 2, 5] {
            pages[used].0[4095 - used] = 9;
        }
        let region = |slot: u32, first: u64, at: usize| Region {
            slot: SlotId(slot),
            pages: PageRun { first: PageIndex(first), pages: 3 },
            host: pages.as_ptr().wrapping_add(at).cast_mut().cast(),
        };
        // SAFETY: the pages outlive the value and are not written while it lives.
        let memory = unsafe { GuestMemory::new(vec![region(0, 103, 3), region(1, 100, 0)]) }.unwrap();
        let mut zero = PageSet::new(memory.end());
        zero_pages(&memory, PageRun { first: PageIndex(101), pages: 5 }, &mut zero).unwrap();
        let zero: Vec<u64> = zero.runs().flat_map(|run| run.first.0..run.end().0).collect();
        assert_eq!(zero, [103, 104]);
        let beyond = PageRun { first: PageIndex(101), pages: 6 };
        let refused = zero_pages(&memory, beyond, &mut PageSet::new(memory.end()));
        assert_eq!(refused, Err(LayoutError::NotRam(PageIndex(106))));
    }
}
