//! Sizes, rates and times as a user writes them: `512MiB`, `10Gbit/s`, `500ms`.
//!
//! A unit is always spelled out: `2G` would be two things, and a bare number any of them. All three types parse
//! what they print, so that clap can show a default.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes of memory or of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size {
    /// How many.
    pub bytes: u64,
}

/// What a link carries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate {
    /// Bytes, not bits.
    pub bytes_per_s: u64,
}

/// A limit or an interval, with a resolution of a nanosecond.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Time(pub Duration);

/// A unit's name, and how many of the base unit it is.
type Unit = (&'static str, u64);

const SIZE_UNITS: &[Unit] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

/// In bits: the smallest unit that all of them are whole multiples of.
const RATE_UNITS: &[Unit] = &[
    ("Gbit/s", 1_000_000_000),
    ("Mbit/s", 1_000_000),
    ("kbit/s", 1_000),
    ("GiB/s", 8 << 30),
    ("MiB/s", 8 << 20),
    ("KiB/s", 8 << 10),
    ("GB/s", 8_000_000_000),
    ("MB/s", 8_000_000),
    ("kB/s", 8_000),
    ("B/s", 8),
];

const TIME_UNITS: &[Unit] = &[
    ("h", 3_600_000_000_000),
    ("min", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Why a text is not a quantity, worded to follow clap's `invalid value '…' for '…':`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParseError {
    /// No number, no unit, or a unit that is not in the table.
    Form {
        /// What a right one looks like.
        examples: &'static str,
        /// The units there are.
        units: &'static [Unit],
    },
    /// More than the type can hold.
    TooLarge,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form { examples, units } => {
                write!(f, "write a number and a unit, such as {examples} (units: ")?;
                for (i, (name, _)) in units.iter().enumerate() {
                    write!(f, "{}{name}", if i == 0 { "" } else { ", " })?;
                }
                write!(f, ")")
            }
            Self::TooLarge => write!(f, "too large"),
        }
    }
}

impl std::error::Error for ParseError {}

/// `text` in the base unit of `units`, what is below one of it cut off.
fn parse(text: &str, units: &'static [Unit], examples: &'static str) -> Result<u64, ParseError> {
    let form = ParseError::Form { examples, units };
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(form)?;
    let (number, unit) = text.split_at(digits_end);
    let unit = unit.trim_start();
    let &(_, unit) = units.iter().find(|(name, _)| *name == unit).ok_or(form)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(form);
    }
    // Both parts are digits only, so all that can go wrong is too many of them.
    let whole: u64 = whole.parse().map_err(|_| ParseError::TooLarge)?;
    let scale = u32::try_from(fraction.len()).ok().and_then(|digits| 10_u128.checked_pow(digits));
    let (Some(scale), Ok(fraction)) = (scale, fraction.parse::<u128>()) else {
        return Err(ParseError::TooLarge);
    };
    let of_fraction = fraction.checked_mul(unit.into()).ok_or(ParseError::TooLarge)? / scale;
    let total = (u128::from(whole) * u128::from(unit)).checked_add(of_fraction);
    total.and_then(|total| u64::try_from(total).ok()).ok_or(ParseError::TooLarge)
}

/// `value` in the largest unit of which it is a whole multiple.
fn print(value: u64, units: &[Unit], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let whole = units.iter().filter(|(_, unit)| value != 0 && value.is_multiple_of(*unit));
    let (name, unit) = whole.max_by_key(|(_, unit)| *unit).or(units.last()).unwrap_or(&("", 1));
    write!(f, "{}{name}", value / unit)
}

/// In files and messages they are what a user writes.
macro_rules! as_text {
    ($($quantity:ty),*) => {$(
        impl TryFrom<String> for $quantity {
            type Error = ParseError;

            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }

        impl From<$quantity> for String {
            fn from(quantity: $quantity) -> Self {
                quantity.to_string()
            }
        }
    )*};
}

as_text!(Size, Rate, Time);

impl FromStr for Size {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(Self { bytes: parse(text, SIZE_UNITS, "512MiB or 2GiB")? })
    }
}

impl FromStr for Rate {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(Self { bytes_per_s: parse(text, RATE_UNITS, "100MB/s or 10Gbit/s")? / 8 })
    }
}

impl FromStr for Time {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(Self(Duration::from_nanos(parse(text, TIME_UNITS, "500ms or 30s")?)))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(self.bytes, SIZE_UNITS, f)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A rate that was parsed is below the limit by a factor of eight.
        print(self.bytes_per_s.saturating_mul(8), RATE_UNITS, f)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX), TIME_UNITS, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Result<u64, ParseError> {
        text.parse::<Size>().map(|size| size.bytes)
    }

    fn rate(text: &str) -> Result<u64, ParseError> {
        text.parse::<Rate>().map(|rate| rate.bytes_per_s)
    }

    fn time(text: &str) -> Result<Duration, ParseError> {
        text.parse::<Time>().map(|time| time.0)
    }

    #[test]
    fn every_form_that_the_documentation_shows_is_read() {
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("4kB"), Ok(4000));
        assert_eq!(rate("100MB/s"), Ok(100_000_000));
        assert_eq!(rate("10Gbit/s"), Ok(1_250_000_000));
        assert_eq!(rate("0.5Mbit/s"), Ok(62_500));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(time("0.25s"), Ok(Duration::from_millis(250)));
        assert_eq!(time("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn anything_else_is_refused_with_the_forms_that_are_allowed() {
        for text in
            ["", "2", "2G", "2gib", "GiB", ".5GiB", "1.GiB", "1.2.3GiB", "-1GiB", "1e3MiB", "１MiB", "2GiB "]
        {
            let message = size(text).unwrap_err().to_string();
            assert!(message.contains("512MiB") && message.contains("TiB"), "{text}: {message}");
        }
        assert!(rate("100MB").unwrap_err().to_string().contains("10Gbit/s"));
        assert!(time("5m").unwrap_err().to_string().contains("min"));
    }

    #[test]
    fn a_quantity_beyond_the_type_is_refused_not_wrapped() {
        assert_eq!(size("16777216TiB"), Err(ParseError::TooLarge));
        assert_eq!(size("16777215.9TiB"), Ok(18_446_743_963_758_388_838));
        assert_eq!(size(&format!("{}GiB", "9".repeat(30))), Err(ParseError::TooLarge));
        assert_eq!(size(&format!("0.{}GiB", "9".repeat(60))), Err(ParseError::TooLarge));
        assert_eq!(time("18446744074s"), Err(ParseError::TooLarge));
    }

    #[test]
    fn what_is_printed_is_read_back_as_the_same_quantity() {
        for bytes in [0, 1, 1000, 1024, 1536, 512 << 20, 3 << 29, 1_000_000, u64::MAX] {
            let size = Size { bytes };
            assert_eq!(size.to_string().parse(), Ok(size), "{size}");
        }
        for bytes_per_s in [0, 1, 62_500, 125_000_000, 8 << 20] {
            let rate = Rate { bytes_per_s };
            assert_eq!(rate.to_string().parse(), Ok(rate), "{rate}");
        }
        for time in [0, 1, 500_000_000, 90_000_000_000].map(|ns| Time(Duration::from_nanos(ns))) {
            assert_eq!(time.to_string().parse(), Ok(time), "{time}");
        }
        assert_eq!(Size { bytes: 512 << 20 }.to_string(), "512MiB");
        assert_eq!(Rate { bytes_per_s: 1_250_000_000 }.to_string(), "10Gbit/s");
        assert_eq!(Time(Duration::from_millis(1500)).to_string(), "1500ms");
    }
}
