//! The ceiling: the same bytes between the same two memories by plain `send` and `recv`, nothing else.
//!
//! Each connection has a thread at both ends and takes the next chunk when it has room, so unequal links are all
//! full here, too.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ringferry::transport::ChannelSpec;

use super::Measured;
use super::memory::BenchMemory;
use super::remote::{Case, Cpu, PATIENCE, Remote};

/// Sends all content over as many plain connections as the case has channels.
pub fn send(
    remote: &mut Remote,
    case: &Case,
    channels: &[ChannelSpec],
    memory: &BenchMemory,
) -> anyhow::Result<Measured> {
    let addresses = remote.begin(case)?;
    let streams = addresses
        .iter()
        .enumerate()
        .map(|(index, address)| {
            let spec = channels.get(index).cloned().unwrap_or_else(|| ChannelSpec::to(*address));
            spec.connect_plain().with_context(|| format!("connecting {spec}"))
        })
        .collect::<anyhow::Result<Vec<TcpStream>>>()?;
    let (begun, cpu) = (Instant::now(), Cpu::of_this_process());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            streams.iter().map(|stream| scope.spawn(|| send_chunks(stream, memory, &next))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a sending thread panicked")))
        })
    })
    .context("sending plainly")?;
    let duration = begun.elapsed();
    let sender = Cpu::of_this_process().since(cpu);
    Ok(Measured { duration, bytes: memory.content_bytes(), sender, receiver: remote.end()? })
}

/// Sends chunks and waits until the other side has read them all, as the transport does.
fn send_chunks(mut stream: &TcpStream, memory: &BenchMemory, next: &AtomicUsize) -> std::io::Result<()> {
    // Relaxed: the counter only gives out numbers.
    while let Some(chunk) = memory.chunk(next.fetch_add(1, Ordering::Relaxed)) {
        stream.write_all(chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])
}

/// The other side: fills the memory from one connection to each of `addresses`, two of which may be the same.
pub fn receive(
    listeners: &[TcpListener],
    addresses: &[SocketAddr],
    memory: &BenchMemory,
) -> anyhow::Result<()> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for address in addresses {
            let listener = listeners.iter().find(|l| l.local_addr().is_ok_and(|local| local == *address));
            let stream = accept(listener.context("no listener for an address")?)?;
            let next = &next;
            threads.push(scope.spawn(move || receive_chunks(&stream, memory, next)));
        }
        for thread in threads {
            let received = thread.join();
            ensure!(received.is_ok(), "a receiving thread panicked");
            received.unwrap_or(Ok(()))?;
        }
        Ok(())
    })
    .context("receiving plainly")
}

/// The next connection, unless whoever announced it does not come.
fn accept(listener: &TcpListener) -> anyhow::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!("the sending process announced a connection that did not come within {PATIENCE:?}")
}

fn receive_chunks(mut stream: &TcpStream, memory: &BenchMemory, next: &AtomicUsize) -> anyhow::Result<()> {
    let mut first = [0];
    while stream.read(&mut first)? == 1 {
        // Relaxed: the counter only gives out numbers.
        let index = next.fetch_add(1, Ordering::Relaxed);
        let chunk = memory.take_chunk(index).context("more chunks arrived than there are")?;
        chunk[0] = first[0];
        stream.read_exact(&mut chunk[1..])?;
    }
    Ok(stream.write_all(&[1])?)
}
