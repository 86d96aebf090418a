//! The units in which convergence counts, and the only conversions between them.

use std::time::Duration;

/// A number of guest pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pages(pub u64);

impl Pages {
    /// For arithmetic with rates; exact below 2⁵³ pages.
    pub fn as_f64(self) -> f64 {
        self.0 as f64
    }

    /// The nearest number of pages below `pages`; NaN and negative numbers are none.
    pub fn floor(pages: f64) -> Self {
        Self(whole(pages))
    }
}

/// The whole part of `x`, saturating; NaN and negative numbers are 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "casts from floats saturate, which is meant here"
)]
pub(crate) fn whole(x: f64) -> u64 {
    x as u64
}

/// Seconds as a duration: NaN and negative numbers are none, what does not fit is the longest.
pub(crate) fn duration(seconds: f64) -> Duration {
    if seconds > 0.0 { Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX) } else { Duration::ZERO }
}

/// `x` if it is a number that can be computed with, else 0: the guard at every door where floats come in.
pub(crate) fn sane(x: f64) -> f64 {
    if x.is_finite() && x > 0.0 { x } else { 0.0 }
}
