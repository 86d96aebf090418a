//! Where a data channel begins and ends: its local address or device, and the destination's address.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::Duration;

use super::dial::{LocalEnd, dial_from};
use super::endpoint::{Endpoint, EndpointError, is_device_name};
use super::socket;

/// One data channel of a migration, written `REMOTE:PORT`, `LOCAL=REMOTE:PORT`, `LOCAL%DEVICE=REMOTE:PORT` or
/// `%DEVICE=REMOTE:PORT`. A channel with a local address or device leaves through that NIC, whatever the routes
/// would choose. A remote is written as an [`Endpoint`]: an address, IPv6 in brackets, or a name.
///
/// ```
/// let channel: ringferry::transport::ChannelSpec = "192.0.2.1%eth1=192.0.2.9:4444".parse()?;
/// assert_eq!(channel.device.as_deref(), Some("eth1"));
/// # Ok::<(), ringferry::transport::ChannelSpecError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ChannelSpec {
    /// The local address to send from; the routing table's choice if `None`.
    pub local: Option<IpAddr>,
    /// The network device to send through (`SO_BINDTODEVICE`).
    pub device: Option<String>,
    /// Where the destination listens for data.
    pub remote: Endpoint,
}

/// Why a text is not a channel.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelSpecError {
    /// The part before `=` is not an address.
    #[error("`{0}` is not an IP address: a channel is written [LOCAL][%DEVICE]=REMOTE:PORT or REMOTE:PORT")]
    Local(String),
    /// What follows `%` cannot name a device.
    #[error("`{0}` cannot be the name of a network device (1 to 15 bytes, no slash, colon or space)")]
    Device(String),
    /// The part after `=` is not a host with a port.
    #[error(transparent)]
    Remote(#[from] EndpointError),
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
        let (timeout, stall) = (Duration::from_secs(5), Duration::from_secs(30));
        let stream = self.dial(timeout, &|| false)?;
        socket::prepare(&stream, stall)?;
        Ok(stream)
    }

    /// Connects by the way of this channel.
    pub(super) fn dial(&self, timeout: Duration, cancelled: &dyn Fn() -> bool) -> io::Result<TcpStream> {
        let local = LocalEnd { address: self.local, device: self.device.as_deref() };
        dial_from(local, &self.remote, timeout, cancelled)
    }

    /// A channel to `remote` by whatever way the routing table chooses.
    pub fn to(remote: SocketAddr) -> Self {
        Self { local: None, device: None, remote: remote.into() }
    }
}

impl FromStr for ChannelSpec {
    type Err = ChannelSpecError;

    fn from_str(text: &str) -> Result<Self, ChannelSpecError> {
        let (near, far) = match text.split_once('=') {
            Some((near, far)) => (Some(near), far),
            None => (None, text),
        };
        let remote: Endpoint = far.parse()?;
        let Some(near) = near else { return Ok(Self { local: None, device: None, remote }) };
        let (address, device) = match near.split_once('%') {
            Some((address, device)) => (address, Some(device)),
            None => (near, None),
        };
        if let Some(name) = device.filter(|name| !is_device_name(name)) {
            return Err(ChannelSpecError::Device(name.to_owned()));
        }
        let local = match (address, device) {
            ("", Some(_)) => None,
            _ => Some(address.parse::<IpAddr>().map_err(|_| ChannelSpecError::Local(address.to_owned()))?),
        };
        if let (Some(local), Some(remote)) = (local, remote.address())
            && local.is_ipv4() != remote.is_ipv4()
        {
            return Err(ChannelSpecError::Family { local, remote });
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
            "%eth1=host.example:4444",
            "fe80::1%eth1=[fe80::9%eth1]:4444",
        ] {
            let channel: ChannelSpec = text.parse().unwrap();
            assert_eq!(channel.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_channel_is_answered_with_what_is() {
        for (text, wrong) in [
            ("", ChannelSpecError::Remote(EndpointError(String::new()))),
            ("127.0.0.1", ChannelSpecError::Remote(EndpointError("127.0.0.1".into()))),
            ("eth1=127.0.0.1:1", ChannelSpecError::Local("eth1".into())),
            ("=127.0.0.1:1", ChannelSpecError::Local(String::new())),
            ("%=127.0.0.1:1", ChannelSpecError::Device(String::new())),
            ("%a/b=127.0.0.1:1", ChannelSpecError::Device("a/b".into())),
            ("%abcdefghijklmnop=127.0.0.1:1", ChannelSpecError::Device("abcdefghijklmnop".into())),
        ] {
            assert_eq!(text.parse::<ChannelSpec>(), Err(wrong), "{text}");
        }
        assert!(matches!("::1=127.0.0.1:1".parse::<ChannelSpec>(), Err(ChannelSpecError::Family { .. })));
    }
}
