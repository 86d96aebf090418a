//! What `ringferry run` tells a destination about its VM, so that `ringferry receive` can build the same one: a few
//! hundred bytes of JSON that the migration carries without looking into them.
//!
//! Whoever reads them trusts nobody: the sender is whoever has connected.

use ringferry_testvm::{Backing, Config, HugePages, TestVmError};
use serde::{Deserialize, Serialize};

use crate::guest::{BackingArg, HostArgs, HugePagesArg, VmArgs};
use crate::machine::GuestKind;
use crate::printable::printable;

/// The format that is written and read here. A later one may add fields, which this one skips; it has another number
/// when a field changes its meaning.
const FORMAT: u32 = 1;
/// Longest description that is read.
const BYTES_MAX: usize = 4096;

/// What a VM is like.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmDescription {
    format: u32,
    /// What the guest runs on.
    pub guest: GuestKind,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// Memory slots that RAM is cut into.
    pub regions: usize,
    /// What is behind RAM at the source.
    pub backing: BackingArg,
    /// Whether RAM lies in huge pages at the source.
    pub huge_pages: HugePagesArg,
}

/// The part that every format has.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// Why bytes describe no VM that could be built here.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// More bytes than any description has.
    #[error("the source describes its VM with {0} bytes; {BYTES_MAX} is the most that is read")]
    TooLong(usize),
    /// Not JSON, or without a field that is needed.
    #[error("what the source says of its VM is no description of one: {0}")]
    Malformed(String),
    /// Another format.
    #[error(
        "the source describes its VM in format {0}, and this version reads format {FORMAT}: use the same version"
    )]
    Format(u32),
    /// A VM that nobody can build.
    #[error("the source describes a VM that cannot be built: {0}")]
    Impossible(#[from] TestVmError),
}

impl VmDescription {
    /// The VM that these options ask for.
    pub fn of(args: &VmArgs) -> Self {
        Self {
            format: FORMAT,
            guest: args.kind(),
            memory_bytes: args.memory.bytes,
            vcpus: args.vcpus as usize,
            regions: args.regions as usize,
            backing: args.host.backing.unwrap_or_default(),
            huge_pages: args.host.huge_pages.unwrap_or_default(),
        }
    }

    /// The VM, without anything to boot, on a host with these options.
    pub fn config(&self, host: &HostArgs) -> Config {
        Config {
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            regions: self.regions,
            backing: match host.backing.unwrap_or(self.backing) {
                BackingArg::Anonymous => Backing::Anonymous,
                BackingArg::Memfd => Backing::Memfd,
            },
            huge_pages: match host.huge_pages.unwrap_or(self.huge_pages) {
                HugePagesArg::None => HugePages::None,
                HugePagesArg::Transparent => HugePages::Transparent,
                HugePagesArg::Reserved => HugePages::Reserved,
            },
            pin_vcpus: host.pin_vcpus,
            ..Config::default()
        }
    }

    /// The bytes that the destination reads.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// Reads what a source says of its VM.
    ///
    /// # Errors
    ///
    /// [`DescriptionError`]: no description, of another format, or of a VM beyond the limits of the command line.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptionError> {
        if bytes.len() > BYTES_MAX {
            return Err(DescriptionError::TooLong(bytes.len()));
        }
        let malformed = |error: serde_json::Error| DescriptionError::Malformed(printable(&error.to_string()));
        let AnyFormat { format } = serde_json::from_slice(bytes).map_err(malformed)?;
        if format != FORMAT {
            return Err(DescriptionError::Format(format));
        }
        let description: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        description.config(&HostArgs::default()).check()?;
        Ok(description)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn described() -> Value {
        json!({
            "format": 1, "guest": "kvm", "memory_bytes": 1_u64 << 30, "vcpus": 2, "regions": 3,
            "backing": "memfd", "huge_pages": "transparent",
        })
    }

    /// The description with `field` set to `value`.
    fn with(field: &str, value: Value) -> Result<VmDescription, DescriptionError> {
        let mut described = described();
        described[field] = value;
        VmDescription::parse(described.to_string().as_bytes())
    }

    #[test]
    fn a_description_arrives_as_it_was_sent_and_becomes_the_same_vm() {
        let sent = VmDescription::parse(described().to_string().as_bytes()).unwrap();
        let arrived = VmDescription::parse(&sent.to_bytes().unwrap()).unwrap();
        assert_eq!(arrived, sent);
        let config = arrived.config(&HostArgs::default());
        assert_eq!((config.memory_bytes, config.vcpus, config.regions), (1 << 30, 2, 3));
        assert_eq!((config.backing, config.huge_pages), (Backing::Memfd, HugePages::Transparent));
    }

    #[test]
    fn the_format_is_pinned() {
        let parsed = VmDescription::parse(described().to_string().as_bytes()).unwrap();
        assert_eq!(serde_json::to_value(&parsed).unwrap(), described());
    }

    #[test]
    fn what_is_the_hosts_own_is_chosen_by_the_host() {
        let host = HostArgs {
            backing: Some(BackingArg::Anonymous),
            huge_pages: Some(HugePagesArg::None),
            pin_vcpus: true,
        };
        let config = with("regions", json!(1)).unwrap().config(&host);
        assert_eq!((config.backing, config.huge_pages), (Backing::Anonymous, HugePages::None));
        assert!(config.pin_vcpus);
    }

    #[test]
    fn a_field_of_a_later_version_is_skipped_and_another_format_is_refused_by_its_number() {
        assert!(with("balloon", json!(true)).is_ok());
        let refused = with("format", json!(2)).unwrap_err().to_string();
        assert!(refused.contains("format 2") && refused.contains("format 1"), "{refused}");
    }

    #[test]
    fn a_vm_beyond_the_limits_of_the_command_line_is_refused_with_what_is_possible() {
        for (field, value, part) in [
            ("vcpus", json!(0), "1 to 16"),
            ("vcpus", json!(1_000_000), "1 to 16"),
            ("regions", json!(0), "1 to 64"),
            ("regions", json!(65), "1 to 64"),
            ("memory_bytes", json!(0), "a multiple of 4096"),
            ("memory_bytes", json!((1_u64 << 30) + 1), "a multiple of 4096"),
            ("memory_bytes", json!(u64::MAX), "a multiple of 4096"),
        ] {
            let error = with(field, value).unwrap_err().to_string();
            assert!(error.contains(part), "{field}: {error}");
        }
    }

    #[test]
    fn bytes_that_describe_nothing_are_refused_and_shown_without_what_a_terminal_obeys() {
        for bytes in [&b""[..], b"{}", b"[1]", b"\xff\xfe", b"{\"format\":1}"] {
            assert!(matches!(VmDescription::parse(bytes), Err(DescriptionError::Malformed(_))), "{bytes:?}");
        }
        assert!(with("vcpus", json!(-1)).is_err());
        let error = with("guest", json!("\u{1b}[2J")).unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error}");
        let deep = vec![b'['; BYTES_MAX];
        assert!(matches!(VmDescription::parse(&deep), Err(DescriptionError::Malformed(_))));
        let long = vec![b' '; BYTES_MAX + 1];
        assert!(matches!(VmDescription::parse(&long), Err(DescriptionError::TooLong(_))));
    }
}
