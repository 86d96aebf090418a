//! The memory of a set: zeroed words, in huge pages where it pays.
#![expect(unsafe_code, reason = "advice on memory is given by address")]

/// The unit in which the kernel can use huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// Words of zeroes that nobody has touched, so that the kernel gives them memory when they are used.
///
/// A large set is asked to lie in huge pages: a sparse guest of 256 GiB touches a page of the set for every other page
/// that it dirties, and half the time of adding one would be misses of the TLB. The price is 2 MiB for the first page in
/// each 64 GiB.
pub(super) fn zeroed(words: usize) -> Vec<u64> {
    let words = vec![0_u64; words];
    let bytes = std::mem::size_of_val(words.as_slice());
    let before = words.as_ptr().addr().next_multiple_of(HUGE_PAGE) - words.as_ptr().addr();
    let huge = bytes.saturating_sub(before) / HUGE_PAGE * HUGE_PAGE;
    // Miri does not know the call.
    if huge > 0 && !cfg!(miri) {
        // SAFETY:
        // * The range is inside our own allocation, by the computation above.
        // * The advice changes no content and no right; where the kernel does not follow it, nothing is lost.
        unsafe {
            libc::madvise(words.as_ptr().cast_mut().byte_add(before).cast(), huge, libc::MADV_HUGEPAGE);
        }
    }
    words
}

/// Fetches the cache line of a word, to be written soon. A hint: a word that does not exist is none.
#[inline]
pub(super) fn prefetch(words: &[u64], word: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(word) = words.get(word) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a prefetch reads and changes nothing, whatever the address; this one is a word of ours.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(std::ptr::from_ref(word).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (words, word);
}
