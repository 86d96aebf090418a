//! What the kernel says of mapped memory, and is told about it, without touching it.
#![expect(unsafe_code, reason = "mincore and madvise take memory by address")]

use std::io;
use std::ops::Range;

/// Bytes in a page of this kernel; `None` if it does not say.
pub(crate) fn page_bytes() -> Option<usize> {
    // SAFETY: a question with a number for an answer.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
}

/// Which pages from `host.start` on are in memory: bit 0 of a byte for each, for as many as `resident` has bytes and the
/// range has pages.
///
/// # Errors
///
/// The kernel's: ENOMEM where nothing is mapped.
pub(crate) fn mincore(host: Range<usize>, resident: &mut [u8]) -> io::Result<()> {
    let bytes = host.len().min(resident.len() * crate::layout::PAGE_SIZE);
    // SAFETY:
    // * `resident` has a byte for each page of the range, by the line above.
    // * The range is only looked at; if it is not mapped, the call fails.
    let result =
        unsafe { libc::mincore(std::ptr::without_provenance_mut(host.start), bytes, resident.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks for huge pages behind words that begin with a page. A wish: where the kernel does not follow it, nothing is lost.
pub(crate) fn advise_huge_pages(words: &[u64]) {
    // SAFETY:
    // * The range is the words, whole pages of one allocation but for the end of the last, which the kernel takes for a
    //   page of the same mapping.
    // * The advice changes no content and no right.
    unsafe {
        libc::madvise(words.as_ptr().cast_mut().cast(), size_of_val(words), libc::MADV_HUGEPAGE);
    }
}
