//! Where a connection leads: a host, by address or by name, and a port.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// A host and a port, written `192.0.2.9:4444`, `[2001:db8::9]:4444`, `[fe80::9%eth1]:4444` or `host.example:4444`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Endpoint {
    /// A literal address.
    Address(SocketAddr),
    /// A name that the resolver knows, or an IPv6 address whose zone is the name of a device.
    Named {
        /// The name, or the address with its zone, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Bytes in a host name, at most (RFC 1035).
const NAME_BYTES_MAX: usize = 253;
/// Bytes in the name of a Linux network device, its terminator counted (`IFNAMSIZ`).
const DEVICE_NAME_BYTES_MAX: usize = 16;

/// A text that names no host and port.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "`{0}` is not a host with a port, such as 192.0.2.9:4444, [2001:db8::9]:4444, [fe80::9%eth1]:4444 or \
     host.example:4444"
)]
#[non_exhaustive]
pub struct EndpointError(pub String);

impl Endpoint {
    /// The literal address; `None` for a name.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Address(address) => Some(*address),
            Self::Named { .. } => None,
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let named = || {
            let (host, port) = text.rsplit_once(':')?;
            let port = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())??;
            let host = match host.strip_prefix('[') {
                Some(host) => host.strip_suffix(']').filter(|host| is_zoned_address(host))?,
                None => Some(host).filter(|host| is_host_name(host))?,
            };
            Some(Self::Named { host: host.to_owned(), port })
        };
        named().ok_or_else(|| EndpointError(text.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Named { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Named { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Letters, digits, hyphens, dots and, because operators use them, underscores.
fn is_host_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(legal)
}

fn is_zoned_address(text: &str) -> bool {
    let zoned = text.split_once('%');
    zoned.is_some_and(|(address, zone)| address.parse::<Ipv6Addr>().is_ok() && is_device_name(zone))
}

/// Whether the kernel could have a network device of this name.
pub(super) fn is_device_name(name: &str) -> bool {
    let illegal = |c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace();
    !name.is_empty() && name.len() < DEVICE_NAME_BYTES_MAX && !name.contains(illegal)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_written_is_refused_or_reads_back_as_itself(text in "[0-9a-f:.%\\[\\]eth-]{0,30}|.{0,40}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
            }
        }
    }

    #[test]
    fn addresses_names_and_zones_are_told_apart_and_print_as_they_are_written() {
        for (text, is_address) in [
            ("192.0.2.9:4444", true),
            ("[2001:db8::9]:4444", true),
            ("[fe80::9%3]:4444", true),
            ("[fe80::9%eth1]:4444", false),
            ("host.example:4444", false),
            ("node_7:1", false),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
            assert_eq!(endpoint.address().is_some(), is_address, "{text}");
        }
        for text in [
            "",
            ":1",
            "host",
            "host:",
            "host:70000",
            "host:+1",
            "a b:1",
            "[host]:1",
            "fe80::9%eth1:1",
            "[fe80::9%]:1",
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(EndpointError(text.to_owned())));
        }
    }
}
