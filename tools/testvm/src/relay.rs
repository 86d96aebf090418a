//! A link made of a relay in this process: what goes through it to a destination is slowed to a rate that may change at any
//! time, and delayed. It needs no privilege, and no kernel module for delays.
//!
//! It is no wire: its kernel acknowledges what it has not passed on yet. That is little, because it takes no more than it
//! passes on, and small buffers hold the rest.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

/// Bytes that are passed on at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces that are under way at most: 64 MiB.
const PIECES_MAX: usize = 4096;
/// What the kernel holds of each connection before it is taken. Loopback sends segments of 64 KiB: where no two of them fit,
/// the sender waits for its timer of 200 ms.
const BUFFER_BYTES: usize = 192 << 10;
/// Sleeps shorter than this are not worth their inaccuracy.
const SLEEP_MIN: Duration = Duration::from_micros(200);

/// The next message from the destination, with data connections awaited where the function says that is told where the destination
/// awaits them: `ringferry::wire::relay::next_message`, which this crate does without for the tracking layer's sake.
pub type NextMessage = fn(&mut TcpStream, &mut dyn FnMut(u16) -> io::Result<u16>) -> io::Result<Vec<u8>>;

/// A link to one destination.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    link: Arc<Link>,
}

#[derive(Debug)]
struct Link {
    /// Towards the destination, over all connections.
    bytes_per_s: AtomicU64,
    /// Each way.
    delay: Duration,
    /// When the link is free again.
    free: Mutex<Instant>,
    next_message: NextMessage,
}

impl Link {
    /// Waits for the turn of so many bytes.
    fn carry(&self, bytes: usize) {
        let bytes_per_s = self.bytes_per_s.load(Ordering::Relaxed).max(1);
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_s as f64);
        let turn = {
            let mut free = self.free.lock();
            *free = (*free).max(Instant::now()) + takes;
            *free
        };
        let wait = turn.saturating_duration_since(Instant::now());
        if wait >= SLEEP_MIN {
            thread::sleep(wait);
        }
    }
}

impl Relay {
    /// A link to the destination whose control connection is awaited at `to`, of so many bytes per second towards it, and of
    /// `delay` each way.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn new(
        to: SocketAddr,
        bytes_per_s: u64,
        delay: Duration,
        next_message: NextMessage,
    ) -> io::Result<Self> {
        let link = Arc::new(Link {
            bytes_per_s: AtomicU64::new(bytes_per_s),
            delay,
            free: Mutex::new(Instant::now()),
            next_message,
        });
        let address = listen(to, &link, true)?;
        Ok(Self { address, link })
    }

    /// Where it takes connections.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on it carries so many bytes per second.
    pub fn set_rate(&self, bytes_per_s: u64) {
        // Relaxed: a figure of its own.
        self.link.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }
}

/// Takes connections as long as this process lives, and passes them on to `to`.
fn listen(to: SocketAddr, link: &Arc<Link>, control: bool) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    set_socket_recv_buffer_size(&listener, BUFFER_BYTES)?;
    let address = listener.local_addr()?;
    let link = Arc::clone(link);
    thread::Builder::new().name("relay".to_owned()).spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            if let Err(error) = pass_on(near, to, &link, control) {
                tracing::warn!(%error, "a relay could not pass a connection on");
            }
        }
    })?;
    Ok(address)
}

fn pass_on(near: TcpStream, to: SocketAddr, link: &Arc<Link>, control: bool) -> io::Result<()> {
    let far = TcpStream::connect(to)?;
    far.set_nodelay(true)?;
    near.set_nodelay(true)?;
    set_socket_send_buffer_size(&far, BUFFER_BYTES)?;
    let (near_back, far_back) = (near.try_clone()?, far.try_clone()?);
    let delay = link.delay;
    let there = Arc::clone(link);
    pipe(near, far, delay, move |from| take_piece(from).inspect(|piece| there.carry(piece.len())))?;
    let back = Arc::clone(link);
    pipe(
        far_back,
        near_back,
        delay,
        move |from| {
            if control { take_message(from, to, &back) } else { take_piece(from) }
        },
    )
}

fn take_piece(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; PIECE_BYTES];
    let read = from.read(&mut piece)?;
    piece.truncate(read);
    if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(piece) }
}

/// The next word of the destination; where it awaits data connections, it is told that they come through here.
fn take_message(from: &mut TcpStream, to: SocketAddr, link: &Arc<Link>) -> io::Result<Vec<u8>> {
    (link.next_message)(from, &mut |port| Ok(listen(SocketAddr::new(to.ip(), port), link, false)?.port()))
}

/// Passes on what `take` takes, `delay` later.
fn pipe(
    mut from: TcpStream,
    mut to: TcpStream,
    delay: Duration,
    mut take: impl FnMut(&mut TcpStream) -> io::Result<Vec<u8>> + Send + 'static,
) -> io::Result<()> {
    let (sender, pieces) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let ends = from.try_clone()?;
    thread::Builder::new().name("relay".to_owned()).spawn(move || {
        while let Ok(piece) = take(&mut from) {
            if sender.send((Instant::now() + delay, piece)).is_err() {
                break;
            }
        }
    })?;
    thread::Builder::new().name("relay".to_owned()).spawn(move || {
        for (due, piece) in pieces {
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                thread::sleep(wait);
            }
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        // Either may be gone already.
        let _ = to.shutdown(Shutdown::Write);
        let _ = ends.shutdown(Shutdown::Read);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_carries_what_it_is_told_to_and_delays_it() -> io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let link = Arc::new(Link {
            bytes_per_s: AtomicU64::new(20_000_000),
            delay: Duration::from_millis(30),
            free: Mutex::new(Instant::now()),
            next_message: |from, _| take_piece(from),
        });
        let mut near = TcpStream::connect(listen(listener.local_addr()?, &link, false)?)?;
        let (mut far, _) = listener.accept()?;
        let begun = Instant::now();
        near.write_all(b"x")?;
        far.read_exact(&mut [0])?;
        assert!(begun.elapsed() >= Duration::from_millis(30), "{:?}", begun.elapsed());
        let begun = Instant::now();
        let reading = thread::spawn(move || far.read_exact(&mut vec![0; 4_000_000]));
        near.write_all(&vec![1; 4_000_000])?;
        reading.join().map_err(|_| io::Error::other("the reader panicked"))??;
        assert!((0.2..1.0).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());
        Ok(())
    }
}
