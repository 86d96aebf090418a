//! Reading guest pages that the guest may be writing at this moment: whether a page is zero, and a copy of it
//! that holds still.
//!
//! All reads are volatile: done exactly once, by plain loads, whatever else happens to the memory meanwhile. That
//! is how memory is read whose other users (the guest, the kernel, another process) are outside the program. What
//! is read may mix old and new bytes of the page. That is harmless where the page is tracked: a page that
//! changed while it was read is dirty again and will be sent again.
//!
//! Whether a page is zero is asked with the widest loads that the CPU at hand has: AVX-512, AVX2, or 8 bytes. What
//! memory gives is the limit for pages that come from there (`cargo bench --bench page`).
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
    // The CPU is asked once; what it said is a load and a test from then on.
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the caller's promise; the CPU has AVX-512F.
            return unsafe { is_zero_avx512(page) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the caller's promise; the CPU has AVX2.
            return unsafe { is_zero_avx2(page) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { is_zero_portable(page) }
}

/// # Safety
///
/// As [`is_zero`], and the CPU has AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn is_zero_avx512(page: *const u8) -> bool {
    use std::arch::x86_64::{__m512i, _mm512_or_si512, _mm512_setzero_si512, _mm512_test_epi64_mask};
    let words = page.cast::<__m512i>();
    for block in (0..PAGE_SIZE / size_of::<__m512i>()).step_by(BLOCK / size_of::<__m512i>()) {
        let mut any = _mm512_setzero_si512();
        for i in block..block + BLOCK / size_of::<__m512i>() {
            // SAFETY: inside the page and aligned; volatile, because any value is an answer.
            any = _mm512_or_si512(any, unsafe { read_volatile(words.add(i)) });
        }
        if _mm512_test_epi64_mask(any, any) != 0 {
            return false;
        }
    }
    true
}

/// # Safety
///
/// As [`is_zero`], and the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(page: *const u8) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256};
    let words = page.cast::<__m256i>();
    for block in (0..PAGE_SIZE / size_of::<__m256i>()).step_by(BLOCK / size_of::<__m256i>()) {
        let mut any = _mm256_setzero_si256();
        for i in block..block + BLOCK / size_of::<__m256i>() {
            // SAFETY: inside the page and aligned; volatile, because any value is an answer.
            any = _mm256_or_si256(any, unsafe { read_volatile(words.add(i)) });
        }
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
    }
    true
}

/// # Safety
///
/// As [`is_zero`].
unsafe fn is_zero_portable(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..PAGE_SIZE / size_of::<u64>()).step_by(BLOCK / size_of::<u64>()).all(|block| {
        // SAFETY: inside the page and aligned; volatile, because any value is an answer.
        let word = |i| unsafe { read_volatile(words.add(i)) };
        (block..block + BLOCK / size_of::<u64>()).fold(0, |any, i| any | word(i)) == 0
    })
}

/// Copies a page out, so that code that compresses, compares or hashes it sees bytes that hold still.
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
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::layout::SlotId;
    use crate::testing::{AnonymousRam, Backing};

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);

    /// A way to test a page for zeroes, by name.
    type Width = (&'static str, unsafe fn(*const u8) -> bool);

    /// Every width that this CPU has.
    fn widths() -> Vec<Width> {
        let mut widths: Vec<Width> = vec![("widest", is_zero), ("portable", is_zero_portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                widths.push(("AVX2", is_zero_avx2));
            }
            if is_x86_feature_detected!("avx512f") {
                widths.push(("AVX-512", is_zero_avx512));
            }
        }
        widths
    }

    #[test]
    fn one_set_bit_anywhere_makes_a_page_not_zero_at_every_width() {
        let mut page = Box::new(Page([0; PAGE_SIZE]));
        for (width, test) in widths() {
            let is_zero = |page: &Page| {
                // SAFETY: a page of our own; the CPU has this width.
                unsafe { test(page.0.as_ptr()) }
            };
            assert!(is_zero(&page), "{width}");
            for at in 0..PAGE_SIZE {
                page.0[at] = 1 << (at % 8);
                assert!(!is_zero(&page), "{width}, byte {at}");
                page.0[at] = 0;
            }
        }
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
        let run = |first| PageRun { first: PageIndex(first), pages: 3 };
        let slots = [(SlotId(0), run(103)), (SlotId(1), run(100))];
        let ram = AnonymousRam::with_slots(&slots, Backing::SmallPages).unwrap();
        for used in [101, 102, 105] {
            ram.words(PageIndex(used)).last().unwrap().store(9, Ordering::Relaxed);
        }
        let memory = ram.memory();
        let mut zero = PageSet::new(memory.end());
        zero_pages(memory, PageRun { first: PageIndex(101), pages: 5 }, &mut zero).unwrap();
        let zero: Vec<u64> = zero.runs().flat_map(|run| run.first.0..run.end().0).collect();
        assert_eq!(zero, [103, 104]);
        let beyond = PageRun { first: PageIndex(101), pages: 6 };
        let refused = zero_pages(memory, beyond, &mut PageSet::new(memory.end()));
        assert_eq!(refused, Err(LayoutError::NotRam(PageIndex(106))));
    }
}
