//! The guest's command line: what each vCPU is to do.
//!
//! ```text
//! COMMAND LINE  IMAGE-NAME { WORD }        words are separated by spaces; the first is the image's name
//! WORD          vcpus=N                    how many vCPUs to start; default: as CPUID says
//!               tsc_khz=N                  frequency of the clock; default: as CPUID says, else measured
//!               fill=SIZE                  non-zero RAM outside the working sets, over all vCPUs
//!               stats=on | stats=off       a line of statistics on the serial port each second
//!               each=WORK                  for every vCPU; before the words for single ones
//!               vcpuN=WORK                 for vCPU N
//! WORK          KEY:VALUE { , KEY:VALUE }
//! KEY:VALUE     pattern:sequential | random | zipf | hot-cold | read-only | compute-only | idle
//!               ws:SIZE                    the working set
//!               bytes:N                    written per page, header included: 16 to 4096; less means 16
//!               pace:N                     steps per second; 0: as many as possible
//!               content:counter | random | text | zero
//!               lock:on | lock:off         every other turn takes the lock that all vCPUs share, in kernel mode
//! SIZE          N | NKiB | NMiB | NGiB     bytes
//! ```
//!
//! [`Config`] prints as such a line, without the image's name.

use core::fmt;

use super::mailbox::{MAX_VCPUS, PAGE_BYTES};

/// In which order pages are taken from the working set, or what is done instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// One after the other.
    Sequential = 0,
    /// Each page equally likely.
    Random = 1,
    /// Page of rank r in proportion to 1/r (Zipf's law with exponent 1), ranks scattered over the set.
    Zipf = 2,
    /// Nine writes in ten go to the first tenth of the pages.
    HotCold = 3,
    /// Reads, one page after the other; writes nothing.
    ReadOnly = 4,
    /// Neither reads nor writes.
    ComputeOnly = 5,
    /// Nothing, and gives its CPU away.
    Idle = 6,
}

/// What the bytes behind a page's header are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Numbers that go on from word to word.
    Counter = 0,
    /// Incompressible.
    Random = 1,
    /// Words of a language, as compressible as text is.
    Text = 2,
    /// Nothing but the header is written; a page that was zero stays nearly so.
    Zero = 3,
}

impl Pattern {
    /// All of them, and their names on the command line.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::Sequential, "sequential"),
        (Self::Random, "random"),
        (Self::Zipf, "zipf"),
        (Self::HotCold, "hot-cold"),
        (Self::ReadOnly, "read-only"),
        (Self::ComputeOnly, "compute-only"),
        (Self::Idle, "idle"),
    ];

    /// The pattern that a word of the mailbox means.
    pub fn from_word(word: u64) -> Option<Self> {
        Self::ALL.iter().map(|(pattern, _)| *pattern).find(|pattern| *pattern as u64 == word)
    }

    /// Whether it writes pages.
    pub fn writes(self) -> bool {
        matches!(self, Self::Sequential | Self::Random | Self::Zipf | Self::HotCold)
    }
}

impl Content {
    /// All of them, and their names on the command line.
    pub const ALL: [(Self, &'static str); 4] =
        [(Self::Counter, "counter"), (Self::Random, "random"), (Self::Text, "text"), (Self::Zero, "zero")];

    /// The content that a word of the mailbox means.
    pub fn from_word(word: u64) -> Option<Self> {
        Self::ALL.iter().map(|(content, _)| *content).find(|content| *content as u64 == word)
    }
}

/// What a vCPU does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Work {
    /// The order.
    pub pattern: Pattern,
    /// The bytes.
    pub content: Content,
    /// Pages of the working set.
    pub working_set_pages: u64,
    /// Bytes written per page, header included; less than 16 means 16, an odd rest is not written.
    pub bytes_per_page: u64,
    /// Steps per second; 0: as many as possible.
    pub pace_per_s: u64,
    /// Every other turn is done in kernel mode with the lock held that all vCPUs share, and time that was lost is not made
    /// up for.
    pub lock: bool,
}

impl Default for Work {
    /// 16 MiB, sequentially, as fast as possible, nothing but headers.
    fn default() -> Self {
        Self {
            pattern: Pattern::Sequential,
            content: Content::Counter,
            working_set_pages: 4096,
            bytes_per_page: 16,
            pace_per_s: 0,
            lock: false,
        }
    }
}

/// What the command line says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// vCPUs to start; `None`: as many as CPUID says.
    pub vcpus: Option<usize>,
    /// Frequency of the clock; `None`: find out.
    pub tsc_khz: Option<u64>,
    /// Pages to be filled once, over all vCPUs.
    pub fill_pages: u64,
    /// Whether statistics go to the serial port each second.
    pub stats: bool,
    /// Per vCPU.
    pub work: [Work; MAX_VCPUS],
}

impl Default for Config {
    fn default() -> Self {
        Self { vcpus: None, tsc_khz: None, fill_pages: 0, stats: false, work: [Work::default(); MAX_VCPUS] }
    }
}

/// What is wrong with a command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConfigError<'a> {
    /// The part that is wrong.
    pub found: &'a str,
    /// What would be right.
    pub expected: &'static str,
}

impl fmt::Display for ConfigError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command line: `{}`: expected {}", self.found, self.expected)
    }
}

const WORD: &str =
    "vcpus=N, tsc_khz=N, fill=SIZE, stats=on, stats=off, each=WORK or vcpuN=WORK, N from 0 to 15";
const KEY: &str = "pattern:NAME, ws:SIZE, bytes:N, pace:N, content:NAME or lock:on, separated by commas";
const NUMBER: &str = "a whole number";
const SIZE: &str = "a size such as 600MiB (units: none for bytes, KiB, MiB, GiB), a multiple of 4 KiB";
const PATTERN: &str = "sequential, random, zipf, hot-cold, read-only, compute-only or idle";
const CONTENT: &str = "counter, random, text or zero";

impl Config {
    /// Reads a command line whose first word is the image's name.
    ///
    /// # Errors
    ///
    /// The first part that means nothing, and what could be there.
    pub fn parse(line: &str) -> Result<Self, ConfigError<'_>> {
        let mut config = Self::default();
        for word in line.split_ascii_whitespace().skip(1) {
            let fail = |expected| ConfigError { found: word, expected };
            let (key, value) = word.split_once('=').ok_or_else(|| fail(WORD))?;
            match key {
                "vcpus" => {
                    let vcpus = value.parse().ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
                    config.vcpus = Some(vcpus.ok_or_else(|| fail("1 to 16 vCPUs"))?);
                }
                "tsc_khz" => {
                    let khz = number(value)?;
                    // 1 MHz to 100 GHz: products with times in microseconds stay far from 64 bits.
                    if !(1_000..=100_000_000).contains(&khz) {
                        return Err(fail("a frequency in kHz, 1000 to 100000000"));
                    }
                    config.tsc_khz = Some(khz);
                }
                "fill" => config.fill_pages = pages(value)?,
                "stats" => {
                    config.stats = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(fail("stats=on or stats=off")),
                    }
                }
                "each" => {
                    for work in &mut config.work {
                        work.change(value)?;
                    }
                }
                _ => {
                    let index = key.strip_prefix("vcpu").and_then(|index| index.parse::<usize>().ok());
                    let work = index.and_then(|index| config.work.get_mut(index));
                    work.ok_or_else(|| fail(WORD))?.change(value)?;
                }
            }
        }
        Ok(config)
    }
}

impl Work {
    /// Takes over what `text` says (`WORK` of the grammar) and leaves the rest.
    ///
    /// # Errors
    ///
    /// The first part that means nothing.
    pub fn change<'a>(&mut self, text: &'a str) -> Result<(), ConfigError<'a>> {
        for part in text.split(',') {
            let fail = |expected| ConfigError { found: part, expected };
            let (key, value) = part.split_once(':').ok_or_else(|| fail(KEY))?;
            match key {
                "pattern" => self.pattern = named(&Pattern::ALL, value).ok_or_else(|| fail(PATTERN))?,
                "content" => self.content = named(&Content::ALL, value).ok_or_else(|| fail(CONTENT))?,
                "ws" => self.working_set_pages = pages(value)?,
                "bytes" => {
                    self.bytes_per_page = number(value)?;
                    if self.bytes_per_page > PAGE_BYTES {
                        return Err(fail("at most 4096 bytes per page"));
                    }
                }
                "pace" => self.pace_per_s = number(value)?,
                "lock" => {
                    self.lock = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(fail("lock:on or lock:off")),
                    }
                }
                _ => return Err(fail(KEY)),
            }
        }
        Ok(())
    }
}

fn named<T: Copy>(all: &[(T, &str)], name: &str) -> Option<T> {
    all.iter().find(|(_, known)| *known == name).map(|(value, _)| *value)
}

fn number(text: &str) -> Result<u64, ConfigError<'_>> {
    text.parse().map_err(|_| ConfigError { found: text, expected: NUMBER })
}

fn pages(text: &str) -> Result<u64, ConfigError<'_>> {
    let fail = || ConfigError { found: text, expected: SIZE };
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let unit = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (digits, shift) = unit.unwrap_or((text, 0));
    let count: u64 = digits.parse().map_err(|_| fail())?;
    let bytes = count.checked_mul(1 << shift).ok_or_else(fail)?;
    if bytes.is_multiple_of(PAGE_BYTES) { Ok(bytes / PAGE_BYTES) } else { Err(fail()) }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn name<T: Copy + PartialEq>(all: &[(T, &'static str)], value: T) -> &'static str {
            all.iter().find(|(known, _)| *known == value).map_or("", |(_, name)| name)
        }
        write!(
            f,
            "pattern:{},ws:{}KiB,bytes:{},pace:{},content:{}{}",
            name(&Pattern::ALL, self.pattern),
            self.working_set_pages * (PAGE_BYTES / 1024),
            self.bytes_per_page,
            self.pace_per_s,
            name(&Content::ALL, self.content),
            if self.lock { ",lock:on" } else { "" }
        )
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut word = |arguments: fmt::Arguments<'_>| {
            write!(f, "{separator}{arguments}")?;
            separator = " ";
            Ok(())
        };
        if let Some(vcpus) = self.vcpus {
            word(format_args!("vcpus={vcpus}"))?;
        }
        if let Some(khz) = self.tsc_khz {
            word(format_args!("tsc_khz={khz}"))?;
        }
        if self.fill_pages > 0 {
            word(format_args!("fill={}KiB", self.fill_pages * (PAGE_BYTES / 1024)))?;
        }
        if self.stats {
            word(format_args!("stats=on"))?;
        }
        for (index, work) in self.work.iter().enumerate() {
            if *work != Work::default() {
                word(format_args!("vcpu{index}={work}"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::{String, ToString};

    use proptest::prelude::*;

    use super::*;

    fn works() -> impl Strategy<Value = Work> {
        let pattern = prop::sample::select(&Pattern::ALL[..]).prop_map(|(pattern, _)| pattern);
        let content = prop::sample::select(&Content::ALL[..]).prop_map(|(content, _)| content);
        (pattern, content, 0..1u64 << 40, 0..=PAGE_BYTES, any::<u64>(), any::<bool>()).prop_map(
            |(pattern, content, working_set_pages, bytes_per_page, pace_per_s, lock)| Work {
                pattern,
                content,
                working_set_pages,
                bytes_per_page,
                pace_per_s,
                lock,
            },
        )
    }

    fn configs() -> impl Strategy<Value = Config> {
        let numbers =
            (prop::option::of(1..=MAX_VCPUS), prop::option::of(1_000..100_000_000u64), 0..1u64 << 40);
        let work = prop::collection::vec(works(), MAX_VCPUS);
        (numbers, any::<bool>(), work).prop_map(|((vcpus, tsc_khz, fill_pages), stats, work)| Config {
            vcpus,
            tsc_khz,
            fill_pages,
            stats,
            work: work.try_into().unwrap(),
        })
    }

    proptest! {
        #[test]
        fn a_configuration_is_read_back_from_the_line_that_it_prints(config in configs()) {
            let line = format!("guest {config}");
            prop_assert_eq!(Config::parse(&line), Ok(config));
        }

        #[test]
        fn no_line_makes_the_parser_panic(line in "( ?[a-z0-9]{0,6}[=:,]?){0,12}.{0,20}") {
            let _ = Config::parse(&line);
        }
    }

    #[test]
    fn a_line_says_what_each_vcpu_does() {
        let line = "/boot/image tsc_khz=3000000 vcpus=2 fill=600MiB stats=on each=content:text,bytes:8 \
                    vcpu1=pattern:hot-cold,ws:60MiB,pace:20480";
        let config = Config::parse(line).unwrap();
        assert_eq!((config.vcpus, config.tsc_khz, config.fill_pages), (Some(2), Some(3_000_000), 600 << 8));
        assert!(config.stats);
        let each = Work { content: Content::Text, bytes_per_page: 8, ..Work::default() };
        assert_eq!(config.work[0], each);
        let hot_cold =
            Work { pattern: Pattern::HotCold, working_set_pages: 60 << 8, pace_per_s: 20_480, ..each };
        assert_eq!(config.work[1], hot_cold);
        assert_eq!(Config::parse(""), Ok(Config::default()));
        assert_eq!(Config::parse("image"), Ok(Config::default()));
    }

    #[test]
    fn what_means_nothing_is_named_with_what_could_be_there() {
        for (word, found, expected) in [
            ("quiet", "quiet", "vcpus=N"),
            ("vcpus=0", "vcpus=0", "1 to 16 vCPUs"),
            ("vcpus=17", "vcpus=17", "1 to 16 vCPUs"),
            ("vcpu16=ws:4KiB", "vcpu16=ws:4KiB", "N from 0 to 15"),
            ("tsc_khz=0", "tsc_khz=0", "1000 to"),
            ("fill=3KiB", "3KiB", "multiple of 4 KiB"),
            ("fill=1MB", "1MB", "MiB"),
            ("fill=99999999999GiB", "99999999999GiB", "a size"),
            ("stats=yes", "stats=yes", "stats=on"),
            ("each=pattern:fast", "pattern:fast", "hot-cold"),
            ("each=content:", "content:", "counter"),
            ("each=bytes:4097", "bytes:4097", "at most 4096"),
            ("each=pace:-1", "-1", "whole number"),
            ("each=ws", "ws", "ws:SIZE"),
            ("each=lock:1", "lock:1", "lock:on"),
            ("each=speed:1", "speed:1", "pace:N"),
            ("each=", "", "ws:SIZE"),
        ] {
            let line = String::from("image ") + word;
            let error = Config::parse(&line).unwrap_err();
            assert_eq!(error.found, found, "{word}");
            assert!(error.expected.contains(expected), "{word}: {}", error.expected);
            assert!(error.to_string().contains(found));
        }
    }
}
