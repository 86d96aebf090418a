//! Where a data channel begins and ends: its local address or device, and the destination's address.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::Duration;

use super::socket;

/// One data channel of a migration, written `REMOTE:PORT`, `LOCAL=REMOTE:PORT`, `LOCAL%DEVICE=REMOTE:PORT` or
/// `%DEVICE=REMOTE:PORT`. A channel with a local address or device leaves through that NIC, whatever the routes
/// would choose. IPv6 remotes are written in brackets.
///
/// ```
/// let channel: ringferry::transport::ChannelSpec = "192.0.2.1%eth1=192.0.2.9:4444".parse()?;
/// assert_eq!(channel.device.as_deref(), Some("eth1"));
/// # Ok::<(), ringferry::transport::SpecError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ChannelSpec {
    /// The local address to send from; the routing table's choice if `None`.
    pub local: Option<IpAddr>,
    /// The network device to send through (`SO_BINDTODEVICE`).
    pub device: Option<String>,
    /// Where the destination listens for data.
    pub remote: SocketAddr,
}

/// Bytes in the name of a Linux network device, its terminator counted (`IFNAMSIZ`).
const DEVICE_NAME_BYTES_MAX: usize = 16;

/// Why a text is not a channel.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    /// The part before `=` is not an address.
    #[error("`{0}` is not an IP address: a channel is written [LOCAL][%DEVICE]=REMOTE:PORT or REMOTE:PORT")]
    Local(String),
    /// What follows `%` cannot name a device.
    #[error("`{0}` cannot be the name of a network device (1 to 15 bytes, no slash, no space)")]
    Device(String),
    /// The part after `=` is not an address with a port.
    #[error("`{0}` is not an IP address with a port, such as 192.0.2.9:4444 or [2001:db8::9]:4444")]
    Remote(String),
    /// Local and remote address are of different families.
    #[error("{local} and {remote} are not of one address family")]
    Family {
        /// The local address.
        local: IpAddr,
        /// The remote one.
        remote: SocketAddr,
    },
}

impl ChannelSpec {
    /// A plain TCP connection by the way of this channel: what a measurement compares the transport with.
    ///
    /// # Errors
    ///
    /// What the kernel says: no route, no such device, nobody listening.
    pub fn connect_plain(&self) -> io::Result<TcpStream> {
        socket::connect(self, Duration::from_secs(5), Duration::from_secs(30))
    }

    /// A channel to `remote` by whatever way the routing table chooses.
    pub fn to(remote: SocketAddr) -> Self {
        Self { local: None, device: None, remote }
    }
}

impl FromStr for ChannelSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (near, far) = match text.split_once('=') {
            Some((near, far)) => (Some(near), far),
            None => (None, text),
        };
        let remote: SocketAddr = far.parse().map_err(|_| SpecError::Remote(far.to_owned()))?;
        let Some(near) = near else { return Ok(Self::to(remote)) };
        let (address, device) = match near.split_once('%') {
            Some((address, device)) => (address, Some(device)),
            None => (near, None),
        };
        if let Some(name) = device {
            let legal = !name.is_empty()
                && name.len() < DEVICE_NAME_BYTES_MAX
                && !name.contains(|c: char| c == '/' || c.is_whitespace() || c == '\0');
            if !legal {
                return Err(SpecError::Device(name.to_owned()));
            }
        }
        let local = match (address, device) {
            ("", Some(_)) => None,
            _ => Some(address.parse::<IpAddr>().map_err(|_| SpecError::Local(address.to_owned()))?),
        };
        if let Some(local) = local.filter(|local| local.is_ipv4() != remote.is_ipv4()) {
            return Err(SpecError::Family { local, remote });
        }
        Ok(Self { local, device: device.map(str::to_owned), remote })
    }
}

impl fmt::Display for ChannelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(local) = self.local {
            write!(f, "{local}")?;
        }
        if let Some(device) = &self.device {
            write!(f, "%{device}")?;
        }
        if self.local.is_some() || self.device.is_some() {
            write!(f, "=")?;
        }
        write!(f, "{}", self.remote)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_written_is_refused_or_reads_back_as_itself(text in "[0-9a-f:.%=\\[\\]eth/ ]{0,40}|.{0,40}") {
            if let Ok(channel) = text.parse::<ChannelSpec>() {
                prop_assert_eq!(channel.to_string().parse(), Ok(channel));
            }
        }
    }

    #[test]
    fn every_way_to_write_a_channel_reads_back_as_itself() {
        for text in [
            "127.0.0.1:4444",
            "192.0.2.1=192.0.2.9:4444",
            "192.0.2.1%eth1=192.0.2.9:4444",
            "%eth1=192.0.2.9:4444",
            "2001:db8::1%eth1=[2001:db8::9]:4444",
        ] {
            let channel: ChannelSpec = text.parse().unwrap();
            assert_eq!(channel.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_channel_is_answered_with_what_is() {
        for (text, wrong) in [
            ("", SpecError::Remote(String::new())),
            ("127.0.0.1", SpecError::Remote("127.0.0.1".into())),
            ("eth1=127.0.0.1:1", SpecError::Local("eth1".into())),
            ("=127.0.0.1:1", SpecError::Local(String::new())),
            ("%=127.0.0.1:1", SpecError::Device(String::new())),
            ("%a/b=127.0.0.1:1", SpecError::Device("a/b".into())),
            ("%abcdefghijklmnop=127.0.0.1:1", SpecError::Device("abcdefghijklmnop".into())),
        ] {
            assert_eq!(text.parse::<ChannelSpec>(), Err(wrong), "{text}");
        }
        assert!(matches!("::1=127.0.0.1:1".parse::<ChannelSpec>(), Err(SpecError::Family { .. })));
    }
}
