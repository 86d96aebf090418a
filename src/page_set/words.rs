//! The memory of a set: zeroed words, in huge pages where it pays.
#![expect(
    unsafe_code,
    reason = "the first word is looked up once, not at each access; a prefetch takes an address"
)]

use std::ops::{Deref, DerefMut};

use crate::os::memory::advise_huge_pages;

/// The unit in which the kernel can use huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// The largest words that lie in huge pages: those of a set that covers a terabyte.
const HUGE_MAX: usize = 32 << 20;

/// Words, of which there is memory only where they were written.
#[derive(Default)]
pub(super) struct Words {
    memory: Vec<u64>,
    /// Where the words begin in it.
    first: usize,
}

/// Words of zeroes that nobody has touched, so that the kernel gives them memory when they are used.
///
/// A large set begins with a huge page and is asked to lie in such: a sparse guest of 256 GiB touches a page of the
/// set for every other page that it dirties, and half the time of adding one would be misses of the TLB. The price
/// is 2 MiB for the first page in each 64 GiB. A guest of 12 TiB that writes everywhere would pay that 192 times for each of a
/// dozen sets, in the first look at it: seconds, with the tracker's lock held. So sets of more than a terabyte do without.
pub(super) fn zeroed(words: usize) -> Words {
    let bytes = words * size_of::<u64>();
    // Miri does not know the call.
    if bytes < HUGE_PAGE || cfg!(miri) {
        return Words { memory: vec![0; words], first: 0 };
    }
    let mut memory = vec![0_u64; words + HUGE_PAGE / size_of::<u64>()];
    let at = memory.as_ptr().addr();
    let first = (at.next_multiple_of(HUGE_PAGE) - at) / size_of::<u64>();
    memory.truncate(first + words);
    let words = Words { memory, first };
    if bytes <= HUGE_MAX {
        advise_huge_pages(&words);
    }
    words
}

impl Deref for Words {
    type Target = [u64];

    #[inline]
    fn deref(&self) -> &[u64] {
        // SAFETY: `zeroed` makes the memory at least `first` long, and nobody shortens it.
        unsafe { self.memory.get_unchecked(self.first..) }
    }
}

impl DerefMut for Words {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above.
        unsafe { self.memory.get_unchecked_mut(self.first..) }
    }
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
