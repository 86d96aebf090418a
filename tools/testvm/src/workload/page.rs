//! What is in a page: a header that says which page it is, whose and of which generation, and a body that
//! follows from the header alone.
//!
//! | word | |
//! |---|---|
//! | 0 | the stamp: the number of the page write that made it; 0: filled once, or never written |
//! | 1 | the [`Tag`]; 0: never written |
//! | 2.. | the body, as many words as the tag says |
//!
//! Both words of the header are written in one instruction, so there is no moment at which a page's stamp and
//! tag disagree.

use super::command_line::Content;
use super::mailbox::{MAX_VCPUS, PAGE_BYTES};

/// Words of the header.
pub const HEADER_WORDS: u64 = 2;
/// Words of the longest body.
pub const MAX_BODY_WORDS: u64 = PAGE_BYTES / 8 - HEADER_WORDS;

/// Which page it is, by whom, and what follows the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag {
    /// Guest frame number.
    pub page: u64,
    /// The vCPU that writes it.
    pub vcpu: usize,
    /// What the body is.
    pub content: Content,
    /// How long the body is, in words.
    pub body_words: u64,
}

// A word, from its low end: page 34 bits, vCPU 6, content 2, body 9, magic 13.
const PAGE_BITS: u32 = 34;
const VCPU_SHIFT: u32 = PAGE_BITS;
const CONTENT_SHIFT: u32 = VCPU_SHIFT + 6;
const BODY_SHIFT: u32 = CONTENT_SHIFT + 2;
const MAGIC_SHIFT: u32 = BODY_SHIFT + 9;
const TAG_MAGIC: u64 = 0x1a6d;
const _: () = assert!(MAX_VCPUS <= 1 << 6 && MAX_BODY_WORDS < 1 << 9 && TAG_MAGIC < 1 << 13);

impl Tag {
    /// A tag for a page whose `bytes_per_page`, header included, are to be written.
    pub fn new(page: u64, vcpu: usize, content: Content, bytes_per_page: u64) -> Self {
        let body_words = match content {
            Content::Zero => 0,
            _ => (bytes_per_page / 8).saturating_sub(HEADER_WORDS).min(MAX_BODY_WORDS),
        };
        Self { page, vcpu, content, body_words }
    }

    /// As a page carries it.
    #[inline]
    pub fn word(self) -> u64 {
        self.page
            | (self.vcpu as u64) << VCPU_SHIFT
            | (self.content as u64) << CONTENT_SHIFT
            | self.body_words << BODY_SHIFT
            | TAG_MAGIC << MAGIC_SHIFT
    }

    /// What a page's second word says; `None` if it is no tag.
    pub fn from_word(word: u64) -> Option<Self> {
        let field = |shift: u32, bits: u32| word >> shift & ((1 << bits) - 1);
        let tag = Self {
            page: field(0, PAGE_BITS),
            vcpu: usize::try_from(field(VCPU_SHIFT, 6)).ok()?,
            content: Content::from_word(field(CONTENT_SHIFT, 2))?,
            body_words: field(BODY_SHIFT, 9),
        };
        let valid = word >> MAGIC_SHIFT == TAG_MAGIC && tag.body_words <= MAX_BODY_WORDS;
        valid.then_some(tag)
    }

    /// The body of a page with this tag and `stamp`, word by word.
    #[inline]
    pub fn body(self, stamp: u64) -> impl Iterator<Item = u64> {
        // One multiplication spreads neighbouring pages and stamps over all bits.
        let seed = (stamp ^ self.page.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let content = self.content;
        (0..self.body_words).map(move |index| match content {
            Content::Counter => stamp.wrapping_add(index),
            Content::Random => mix(seed.wrapping_add(index.wrapping_mul(0xd1b5_4a32_d192_ed03))),
            Content::Text => {
                let line = mix(seed.wrapping_add(index / 8));
                // Six bits of it per word.
                TEXT[(line >> (index % 8 * 6) & 63) as u8 as usize]
            }
            Content::Zero => 0,
        })
    }
}

/// A bijection whose results look random: the middle of splitmix64.
#[inline]
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ x >> 27
}

/// Eight letters each: what text is made of.
const TEXT: [u64; 64] = {
    let letters = b"the page migratewhile a guest isrunning,and the kernel tracks every write in a ring. \
        Entries are read, pages protected again, sent over the wire, and received into memory at once. \
        No byte is lost when the source pauses; the destination resumes where it stopped: same registers, \
        same clock, same memory. A throttled vCPU writes less, but never stalls long. Rounds shrink until \
        what remains fits the limit for downtime. Then the rest is sent, and control is handed over. Done!!! \
        Reports say how long it took and how many pages were sent.\n";
    let mut words = [0; 64];
    let mut index = 0;
    while index < 64 {
        let mut word = [0; 8];
        let mut at = 0;
        while at < 8 {
            word[at] = letters[index * 8 + at];
            at += 1;
        }
        words[index] = u64::from_le_bytes(word);
        index += 1;
    }
    words
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn tags() -> impl Strategy<Value = Tag> {
        let content = prop::sample::select(&Content::ALL[..]).prop_map(|(content, _)| content);
        (0..1u64 << PAGE_BITS, 0..MAX_VCPUS, content, 0..=PAGE_BYTES)
            .prop_map(|(page, vcpu, content, bytes)| Tag::new(page, vcpu, content, bytes))
    }

    proptest! {
        #[test]
        fn a_tag_is_read_back_from_its_word(tag in tags()) {
            prop_assert_eq!(Tag::from_word(tag.word()), Some(tag));
            prop_assert_eq!(tag.word(), Tag { page: 0, ..tag }.word() | tag.page);
            prop_assert!(tag.body(3).count() as u64 == tag.body_words);
        }

        #[test]
        fn a_word_that_is_read_as_a_tag_is_that_tags_word(word in any::<u64>(), magic in any::<bool>()) {
            let word = if magic { word >> 13 | TAG_MAGIC << MAGIC_SHIFT } else { word };
            if let Some(tag) = Tag::from_word(word) {
                prop_assert_eq!(tag.word(), word);
            }
        }

        #[test]
        fn another_generation_or_page_has_another_body(tag in tags(), stamp in any::<u64>(), later in 1..1_000_000u64) {
            prop_assume!(tag.body_words >= 16);
            let body: Vec<u64> = tag.body(stamp).collect();
            prop_assert!(body != tag.body(stamp.wrapping_add(later)).collect::<Vec<_>>());
            if tag.content != Content::Counter {
                let other = Tag { page: tag.page ^ 1, ..tag };
                prop_assert!(body != other.body(stamp).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn random_bodies_hold_no_word_twice_and_text_is_made_of_letters() {
        let tag = |content| Tag::new(7, 1, content, PAGE_BYTES);
        let random: BTreeSet<u64> =
            (1..100).flat_map(|stamp| tag(Content::Random).body(stamp).collect::<Vec<_>>()).collect();
        assert_eq!(random.len() as u64, 99 * MAX_BODY_WORDS);
        let text: Vec<u8> = tag(Content::Text).body(5).flat_map(u64::to_le_bytes).collect();
        assert!(text.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()));
    }

    #[test]
    fn zero_content_and_few_bytes_write_the_header_only() {
        assert_eq!(Tag::new(1, 0, Content::Zero, 4096).body_words, 0);
        assert_eq!(Tag::new(1, 0, Content::Random, 8).body_words, 0);
        assert_eq!(Tag::new(1, 0, Content::Random, 31).body_words, 1);
        assert_eq!(Tag::new(1, 0, Content::Random, u64::MAX).body_words, MAX_BODY_WORDS);
    }
}
