//! Connecting: a name is resolved, its addresses are tried side by side, and every step ends within 20 ms of a
//! cancellation.
//!
//! Addresses are tried as RFC 8305 (happy eyeballs) says: the families take turns, each attempt begins 250 ms after
//! the one before it, or at once when that one failed, and the first connection that stands is taken.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::endpoint::Endpoint;

/// A wait polls this often whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(10);
/// The next address is tried this long after the one before it ("Connection Attempt Delay", RFC 8305).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// Names that are looked up at a time. A lookup that was given up goes on in its thread until the resolver answers.
const LOOKUPS_MAX: usize = 64;

/// The end of a connection that is this host's.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LocalEnd<'a> {
    /// The address to connect from; the routing table's choice if `None`.
    pub address: Option<IpAddr>,
    /// The device to connect through (`SO_BINDTODEVICE`).
    pub device: Option<&'a str>,
}

/// Connects to `host_port`, which is an [`Endpoint`] in words.
///
/// # Errors
///
/// `InvalidInput` if that is no endpoint, `TimedOut` after `timeout`, `Interrupted` once `cancel` was raised, else what
/// the last address that was tried said.
pub(crate) fn dial(host_port: &str, timeout: Duration, cancel: &AtomicBool) -> io::Result<TcpStream> {
    let endpoint: Endpoint =
        host_port.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    dial_from(LocalEnd::default(), &endpoint, timeout, &|| cancel.load(Ordering::Relaxed))
}

/// Connects `local` to `remote`, until `cancelled` says otherwise.
///
/// # Errors
///
/// As [`dial`].
pub(super) fn dial_from(
    local: LocalEnd<'_>,
    remote: &Endpoint,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<TcpStream> {
    let wait = Wait { deadline: Instant::now() + timeout, cancelled };
    let mut addresses = match remote {
        Endpoint::Address(address) => vec![*address],
        Endpoint::Named { host, port } => resolve(host, *port, &wait)?,
    };
    if let Some(from) = local.address {
        addresses.retain(|to| to.is_ipv4() == from.is_ipv4());
    }
    connect_first(local, &by_turns(addresses), &wait)
}

/// When a wait ends.
struct Wait<'a> {
    deadline: Instant,
    cancelled: &'a dyn Fn() -> bool,
}

impl Wait<'_> {
    /// How long to wait now, at most until `next`.
    fn step(&self, next: Option<Instant>) -> io::Result<Duration> {
        if (self.cancelled)() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
        }
        let now = Instant::now();
        if now >= self.deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        }
        let next = next.map_or(self.deadline, |next| next.min(self.deadline));
        Ok(next.saturating_duration_since(now).min(CANCEL_POLL))
    }
}

/// Looks a name up, in a thread of its own, because the resolver cannot be interrupted.
fn resolve(host: &str, port: u16, wait: &Wait<'_>) -> io::Result<Vec<SocketAddr>> {
    let lookup = Lookup::begin()?;
    let (found, answer) = mpsc::sync_channel(1);
    let name = host.to_owned();
    std::thread::Builder::new().name("ringferry-resolve".to_owned()).spawn(move || {
        let _lookup = lookup;
        let addresses = (name.as_str(), port).to_socket_addrs();
        // The thread that asked may have given up.
        let _ = found.send(addresses.map(|addresses| addresses.take(ADDRESSES_MAX).collect()));
    })?;
    loop {
        match answer.recv_timeout(wait.step(None)?) {
            Ok(addresses) => return addresses,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other(format!("the lookup of {host} ended without an answer")));
            }
        }
    }
}

/// One of the lookups that may go on at a time.
struct Lookup;

static LOOKUPS: AtomicUsize = AtomicUsize::new(0);

impl Lookup {
    fn begin() -> io::Result<Self> {
        // Relaxed: a count, from which nobody concludes about other memory.
        if LOOKUPS.fetch_add(1, Ordering::Relaxed) < LOOKUPS_MAX {
            return Ok(Self);
        }
        LOOKUPS.fetch_sub(1, Ordering::Relaxed);
        Err(io::Error::other(format!("{LOOKUPS_MAX} names are being looked up already")))
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        LOOKUPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The addresses in the resolver's order, but with the families taking turns.
fn by_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_ipv4 = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (one, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv4() == first_is_ipv4);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut ordered = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair == [None, None] {
            return ordered;
        }
        ordered.extend(pair.into_iter().flatten());
    }
}

/// The first connection to any of `addresses` that stands.
fn connect_first(local: LocalEnd<'_>, addresses: &[SocketAddr], wait: &Wait<'_>) -> io::Result<TcpStream> {
    let mut untried = addresses.iter();
    let mut attempts: Vec<Socket> = Vec::new();
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the name has no usable address");
    let mut next_attempt = Instant::now();
    loop {
        if attempts.is_empty() || Instant::now() >= next_attempt {
            match untried.next().map(|address| begin_to_connect(local, address)) {
                Some(Ok(socket)) => attempts.push(socket),
                Some(Err(error)) => {
                    last_error = error;
                    continue;
                }
                None if attempts.is_empty() => return Err(last_error),
                None => {}
            }
            next_attempt = Instant::now() + ATTEMPT_DELAY;
        }
        let timeout = wait.step((untried.len() > 0).then_some(next_attempt))?;
        for ready in wait_for_any(&attempts, timeout)?.into_iter().rev() {
            let socket = attempts.remove(ready);
            match socket.take_error()? {
                None => {
                    socket.set_nonblocking(false)?;
                    return Ok(socket.into());
                }
                Some(error) => {
                    last_error = error;
                    next_attempt = Instant::now();
                }
            }
        }
    }
}

fn begin_to_connect(local: LocalEnd<'_>, remote: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*remote), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(device) = local.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(address) = local.address {
        socket.bind(&SockAddr::from(SocketAddr::new(address, 0)))?;
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::from(*remote)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Which of the attempts have ended, well or not, within `timeout`; ascending.
fn wait_for_any(attempts: &[Socket], timeout: Duration) -> io::Result<Vec<usize>> {
    let mut ended: Vec<_> = attempts.iter().map(|socket| PollFd::new(socket, PollFlags::OUT)).collect();
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match poll(&mut ended, Some(&timeout)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    }
    Ok((0..).zip(&ended).filter(|(_, fd)| !fd.revents().is_empty()).map(|(index, _)| index).collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::transport::tests::silent_address;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn after(delay: Duration) -> impl Fn() -> bool {
        let begun = Instant::now();
        move || begun.elapsed() >= delay
    }

    #[test]
    fn names_and_addresses_are_connected_and_what_is_neither_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let never = AtomicBool::new(false);
        for host in ["127.0.0.1", "localhost"] {
            let stream = dial(&format!("{host}:{port}"), PATIENCE, &never).unwrap();
            assert_eq!(stream.peer_addr().unwrap().port(), port);
        }
        let error = dial("nonsense", PATIENCE, &never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        drop(listener);
        let error = dial(&format!("127.0.0.1:{port}"), PATIENCE, &never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn an_address_that_does_not_answer_does_not_hold_up_the_next_one() {
        let (silent, _open) = silent_address();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let wait = Wait { deadline: Instant::now() + PATIENCE, cancelled: &|| false };
        let stream = connect_first(LocalEnd::default(), &[silent, address], &wait).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
    }

    #[test]
    fn a_wait_for_an_answer_ends_with_its_time_or_with_a_cancellation() {
        let (silent, _open) = silent_address();
        let to = Endpoint::from(silent);
        let error = dial_from(LocalEnd::default(), &to, Duration::from_millis(100), &|| false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let cancelled = after(Duration::from_millis(50));
        let error = dial_from(LocalEnd::default(), &to, PATIENCE, &cancelled).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn families_take_turns_and_the_resolvers_first_choice_stays_first() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (a, b, c) = (address("[::1]:1"), address("[::2]:1"), address("127.0.0.1:1"));
        assert_eq!(by_turns(vec![a, b, c]), [a, c, b]);
        assert_eq!(by_turns(vec![c, a, b]), [c, a, b]);
        assert_eq!(by_turns(Vec::new()), []);
    }
}
