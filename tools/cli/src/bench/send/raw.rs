//! The ceiling: the same bytes between the same two memories by plain `send` and `recv`, nothing else.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Instant;

use anyhow::Context;
use ringferry::transport::ChannelSpec;

use super::Measured;
use super::memory::{BenchMemory, Piece};
use super::remote::{Case, Cpu, Remote};

/// Bytes of one plain `send` or `recv`.
const CALL_BYTES: usize = 1 << 20;

/// Sends all content over as many plain connections as the case has channels, one thread each.
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
    std::thread::scope(|scope| {
        let count = streams.len();
        let send = |(index, stream)| {
            let piece = memory.piece(index, count);
            scope.spawn(move || send_piece(stream, &piece))
        };
        let threads: Vec<_> = streams.iter().enumerate().map(send).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a sending thread panicked")))
        })
    })
    .context("sending plainly")?;
    let duration = begun.elapsed();
    let sender = Cpu::of_this_process().since(cpu);
    Ok(Measured { duration, bytes: memory.content_bytes(), sender, receiver: remote.end()? })
}

/// Sends it all and waits until the other side has read it all, as the transport does.
fn send_piece(mut stream: &TcpStream, piece: &Piece<'_>) -> std::io::Result<()> {
    for chunk in piece.bytes().chunks(CALL_BYTES) {
        stream.write_all(chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])
}

/// The other side: fills the memory from as many connections as there are listeners.
pub fn receive(listeners: &[TcpListener], memory: &BenchMemory) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let count = listeners.len();
        let receive = |(index, listener): (usize, &'_ TcpListener)| {
            let stream = listener.accept()?.0;
            let piece = memory.piece(index, count);
            Ok(scope.spawn(move || receive_piece(&stream, piece)))
        };
        let threads = listeners.iter().enumerate().map(receive).collect::<std::io::Result<Vec<_>>>()?;
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a receiving thread panicked")))
        })
    })
    .context("receiving plainly")
}

fn receive_piece(mut stream: &TcpStream, mut piece: Piece<'_>) -> std::io::Result<()> {
    for chunk in piece.bytes_mut().chunks_mut(CALL_BYTES) {
        stream.read_exact(chunk)?;
    }
    stream.write_all(&[1])
}
