//! In which order a vCPU takes the pages of its working set.

use super::command_line::Pattern;

/// Positions of a working set, one after the other, for ever.
#[derive(Clone, Debug)]
pub struct Positions {
    pattern: Pattern,
    /// Of the working set; at least 1.
    pages: u64,
    next: u64,
    random: Random,
    zipf: Zipf,
    /// Pages of the hot tenth.
    hot: u64,
}

impl Positions {
    /// Positions below `pages`, which is not zero, in the order of `pattern`. `seed` tells vCPUs apart.
    pub fn new(pattern: Pattern, pages: u64, seed: u64) -> Self {
        Self {
            pattern,
            pages,
            next: 0,
            random: Random(seed),
            zipf: Zipf::new(pages),
            hot: pages.div_ceil(10),
        }
    }

    /// The next position, below `pages`.
    #[inline]
    pub fn take(&mut self) -> u64 {
        match self.pattern {
            Pattern::Random => self.random.below(self.pages),
            Pattern::Zipf => self.zipf.position(&mut self.random),
            Pattern::HotCold => {
                let hot = self.random.word() >> 32 < HOT_SHARE;
                if hot || self.hot == self.pages {
                    self.random.below(self.hot)
                } else {
                    self.hot + self.random.below(self.pages - self.hot)
                }
            }
            _ => {
                let position = self.next;
                self.next = if position + 1 == self.pages { 0 } else { position + 1 };
                position
            }
        }
    }
}

/// Nine tenths, of 2³².
const HOT_SHARE: u64 = (1 << 32) / 10 * 9;

/// wyrand: one multiplication per number. Wang Yi, public domain.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    #[inline]
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0xa076_1d64_78bd_642f);
        let (low, high) = wide(self.0, self.0 ^ 0xe703_7ed1_a0b4_28db);
        low ^ high
    }

    /// Uniform below `bound`, up to a bias of bound/2⁶⁴.
    #[inline]
    fn below(&mut self, bound: u64) -> u64 {
        wide(self.word(), bound).1
    }
}

/// Low and high half of a product.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
fn wide(a: u64, b: u64) -> (u64, u64) {
    let product = u128::from(a) * u128::from(b);
    (product as u64, (product >> 64) as u64)
}

/// Zipf's law with exponent 1, without a table: the rank is ⌊(n+1)^u⌋ for a uniform u in [0, 1), so that rank r
/// has the probability log(1 + 1/r) / log(n + 1).
#[derive(Clone, Debug)]
struct Zipf {
    pages: u64,
    /// log₂(n + 1), with 32 binary places.
    log2: u64,
    /// Neighbouring ranks lie this many pages apart; prime to `pages`, so that ranks and pages are one to one.
    stride: u64,
}

impl Zipf {
    fn new(pages: u64) -> Self {
        // The golden section scatters best. Beyond 16 TiB ranks stay where they are: products would overflow.
        let mut stride = if pages >> 32 == 0 { (pages * 618 / 1000).max(1) } else { 1 };
        // Ends at pages - 1 at the latest, which is prime to pages.
        while greatest_common_divisor(stride, pages) != 1 {
            stride += 1;
        }
        Self { pages, log2: log2(pages + 1), stride }
    }

    #[inline]
    fn position(&self, random: &mut Random) -> u64 {
        // The high half is ⌊u × log₂(n + 1) × 2³²⌋.
        let rank = exp2(wide(random.word(), self.log2).1).clamp(1, self.pages);
        (rank - 1) * self.stride % self.pages
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// log₂ of `x`, which is not zero, rounded down to 32 binary places.
fn log2(x: u64) -> u64 {
    let whole = x.ilog2();
    // In [1, 2), with 63 binary places.
    let mut mantissa = x << (63 - whole);
    let mut log = u64::from(whole);
    for _ in 0..32 {
        let (_, square) = wide(mantissa, mantissa);
        // With 62 binary places now, in [1, 4).
        let carry = square >> 63;
        log = log << 1 | carry;
        mantissa = if carry == 1 { square } else { square << 1 };
    }
    log
}

/// ⌊2^x⌋ for x with 32 binary places below 2⁶; the fraction by a cubic that is exact at both ends and wrong by
/// less than 2 in 10,000 between them.
#[inline]
fn exp2(x: u64) -> u64 {
    const C1: u64 = 2_989_616_586; // 0.69607, with 32 binary places
    const C2: u64 = 964_177_171; // 0.22449
    const C3: u64 = (1 << 32) - C1 - C2;
    let fraction = x & 0xffff_ffff;
    let inner = C2 + ((C3 * fraction) >> 32);
    let middle = C1 + ((inner * fraction) >> 32);
    // In [1, 2), with 32 binary places.
    let mantissa = (1 << 32) + ((middle * fraction) >> 32);
    // Shifted by less than 64: a 33-bit number stays within 96 bits, and the result within 64.
    wide_shift(mantissa, x >> 32 & 63)
}

/// ⌊x × 2^(by − 32)⌋
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the caller's number fits")]
fn wide_shift(x: u64, by: u64) -> u64 {
    (u128::from(x) << by >> 32) as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn counts(pattern: Pattern, pages: usize, taken: usize) -> Vec<u64> {
        let mut counts = vec![0; pages];
        let mut positions = Positions::new(pattern, pages as u64, 1);
        for _ in 0..taken {
            counts[usize::try_from(positions.take()).unwrap()] += 1;
        }
        counts
    }

    proptest! {
        #[test]
        fn positions_stay_inside_the_working_set(pages in 1..1u64 << 34, seed in any::<u64>()) {
            for (pattern, _) in Pattern::ALL {
                let mut positions = Positions::new(pattern, pages, seed);
                for _ in 0..200 {
                    let position = positions.take();
                    prop_assert!(position < pages, "{:?}: {} of {}", pattern, position, pages);
                }
            }
        }

        #[test]
        fn ranks_and_pages_are_one_to_one(pages in 1..3_000u64) {
            let zipf = Zipf::new(pages);
            let seen: BTreeSet<u64> = (0..pages).map(|rank| rank * zipf.stride % pages).collect();
            prop_assert_eq!(seen.len() as u64, pages);
        }

        #[test]
        fn powers_and_logarithms_are_those_of_real_numbers(x in 1..1u64 << 40) {
            let scale = f64::from(1u32 << 16).powi(2);
            prop_assert!((log2(x) as f64 / scale - (x as f64).log2()).abs() < 1e-8);
            let back = exp2(log2(x)) as f64;
            prop_assert!((back / x as f64 - 1.0).abs() < 2e-4 || (back - x as f64).abs() <= 1.0, "{} {}", x, back);
        }
    }

    #[test]
    fn sequential_takes_every_page_once_per_pass() {
        assert_eq!(counts(Pattern::Sequential, 7, 21), [3; 7]);
        assert_eq!(counts(Pattern::ReadOnly, 7, 21), [3; 7]);
    }

    #[test]
    fn random_takes_every_page_equally_often() {
        let counts = counts(Pattern::Random, 100, 100_000);
        // Ten standard deviations.
        assert!(
            counts.iter().all(|count| (1000i64 - i64::try_from(*count).unwrap()).abs() < 320),
            "{counts:?}"
        );
    }

    #[test]
    fn nine_in_ten_go_to_the_hot_tenth() {
        let counts = counts(Pattern::HotCold, 1000, 100_000);
        let hot: u64 = counts[..100].iter().sum();
        assert!((89_000..91_000).contains(&hot), "{hot}");
        assert!(counts.iter().all(|count| *count > 0));
    }

    #[test]
    fn zipf_takes_the_page_of_rank_r_in_proportion_to_one_over_r() {
        const PAGES: usize = 1000;
        const TAKEN: usize = 1_000_000;
        let counts = counts(Pattern::Zipf, PAGES, TAKEN);
        let stride = usize::try_from(Zipf::new(PAGES as u64).stride).unwrap();
        for rank in [1, 2, 3, 5, 10, 30, 100, 300, 1000usize] {
            let count = counts[(rank - 1) * stride % PAGES] as f64;
            let expected = TAKEN as f64 * (1.0 + 1.0 / rank as f64).ln() / ((PAGES + 1) as f64).ln();
            // One percent for the cubic, and five standard deviations.
            let slack = expected * 0.01 + 5.0 * expected.sqrt();
            assert!((count - expected).abs() < slack, "rank {rank}: {count} of {expected}");
        }
    }
}
