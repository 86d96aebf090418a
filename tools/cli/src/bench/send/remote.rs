//! The receiving process: what it is told, what it answers, and how it is started.
//!
//! Both sides speak lines of JSON over a control connection: a case, the addresses that now listen for it, the
//! end, and the CPU time that it took.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use ringferry::transport::{DataListener, MigrationToken};
use rustix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::memory::BenchMemory;
use super::raw;
use crate::output::Output;

/// A line is never longer.
const LINE_BYTES_MAX: u64 = 16 * 1024;
/// Nothing that is waited for here takes longer, a transfer apart.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// A receiving process holds no more for a source.
const BYTES_MAX: u64 = 64 << 30;
/// Measurements belong together by address, not by secret.
const TOKEN: [u8; 16] = *b"ringferry bench.";

/// What comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// Plain sends, not the transport.
    pub raw: bool,
    pub channels: u16,
    pub bytes: u64,
    pub run_pages: u64,
    pub populated: bool,
    /// Where each channel ends; empty for a free port of the address of the control connection.
    pub addresses: Vec<SocketAddr>,
}

impl Case {
    /// The addresses to listen on, each once.
    fn listen_on(&self, control: IpAddr) -> Vec<SocketAddr> {
        let mut addresses = self.addresses.clone();
        addresses.sort();
        addresses.dedup();
        if addresses.is_empty() { vec![SocketAddr::new(control, 0)] } else { addresses }
    }

    /// The address of each channel, given what is listened on.
    fn connect_to(&self, bound: &[SocketAddr]) -> Vec<SocketAddr> {
        match (self.addresses.is_empty(), bound.first()) {
            (true, Some(bound)) => vec![*bound; usize::from(self.channels)],
            _ => self.addresses.clone(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Listening {
    addresses: Vec<SocketAddr>,
}

#[derive(Debug, Serialize, Deserialize)]
struct End {}

#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    cpu_s: f64,
}

/// CPU time, user and system, of a whole process.
#[derive(Clone, Copy, Debug)]
pub struct Cpu(pub Duration);

impl Cpu {
    pub fn of_this_process() -> Self {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Self(Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0)))
    }

    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

struct Lines {
    reader: BufReader<TcpStream>,
}

impl Lines {
    fn new(stream: TcpStream) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    fn send(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        Ok(self.reader.get_mut().write_all(&line)?)
    }

    /// The next line; `None` when the other side has closed.
    fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        let mut line = Vec::new();
        self.reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&line).context("the other side does not speak as this one does")?))
    }

    fn expect<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        self.next()?.ok_or_else(|| anyhow!("the receiving process ended; what did it say on its side?"))
    }
}

/// The receiving process as the source sees it.
pub struct Remote {
    lines: Lines,
    child: Option<Child>,
}

impl Remote {
    /// Starts one on this host, at this address, in this network namespace if not in ours.
    pub fn spawn_at(address: SocketAddr, namespace: Option<&str>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program, to start it as receiver")?;
        let mut command = match namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program);
                command
            }
            None => Command::new(program),
        };
        let mut child = command
            .args(["bench", "send", "--listen", &address.to_string(), "--once", "--json"])
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .context("starting the receiving process")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).take(LINE_BYTES_MAX).read_line(&mut line)?;
        }
        let ready: Ready = serde_json::from_str(&line).context("the receiving process did not start")?;
        let mut remote = Self::connect(ready.address)?;
        remote.child = Some(child);
        Ok(remote)
    }

    /// Connects to one that runs.
    pub fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(|| {
            format!("connecting to the receiving process at {address}: is it started there with --listen?")
        })?;
        Ok(Self { lines: Lines::new(stream)?, child: None })
    }

    pub fn token(&self) -> MigrationToken {
        MigrationToken(TOKEN)
    }

    /// Announces a case; where its connections are awaited.
    pub fn begin(&mut self, case: &Case) -> anyhow::Result<Vec<SocketAddr>> {
        self.lines.send(case)?;
        Ok(self.lines.expect::<Listening>()?.addresses)
    }

    /// Ends it; the CPU time that the receiving process spent on it.
    pub fn end(&mut self) -> anyhow::Result<Cpu> {
        self.lines.send(&End {})?;
        Ok(Cpu(Duration::try_from_secs_f64(self.lines.expect::<Ended>()?.cpu_s)?))
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // The closed connection ends it.
        let _ = self.lines.reader.get_ref().shutdown(std::net::Shutdown::Both);
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

/// What a receiving process says first.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    kind: String,
    address: SocketAddr,
}

/// The receiving process.
pub fn serve(address: SocketAddr, once: bool, output: Output) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("listening on {address}: is the port in use, the address this host's?"))?;
    let address = listener.local_addr()?;
    if output.json() {
        output.object(&Ready { kind: "bench_send_ready".to_owned(), address })?;
    } else {
        output.line(format_args!("receiving on {address}; end with Ctrl-C"))?;
    }
    loop {
        let (stream, peer) = listener.accept()?;
        let served = serve_source(stream);
        if once {
            return served;
        }
        if let Err(error) = served {
            output.error(&error.context(format!("serving {peer}")));
        }
    }
}

fn serve_source(stream: TcpStream) -> anyhow::Result<()> {
    let local = stream.local_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
    let mut lines = Lines::new(stream)?;
    while let Some(case) = lines.next::<Case>()? {
        ensure!(
            case.bytes <= BYTES_MAX,
            "{} bytes were announced, at most {BYTES_MAX} are taken",
            case.bytes
        );
        let memory = BenchMemory::fresh(case.bytes, case.run_pages)?;
        if case.populated {
            memory.populate();
        }
        let wanted = case.listen_on(local);
        let cpu;
        if case.raw {
            cpu = Cpu::of_this_process();
            let listeners = wanted.iter().map(TcpListener::bind).collect::<Result<Vec<_>, _>>()?;
            let bound = listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?;
            let addresses = case.connect_to(&bound);
            lines.send(&Listening { addresses: addresses.clone() })?;
            raw::receive(&listeners, &addresses, &memory)?;
            lines.expect::<End>()?;
        } else {
            let listener = DataListener::bind(&wanted)?;
            let addresses = case.connect_to(&listener.addresses());
            // Clears what `populate` wrote: the price of used memory, not of a transfer.
            let receiver = listener.receive(
                MigrationToken(TOKEN),
                memory.guest().clone(),
                &std::sync::atomic::AtomicBool::new(false),
            )?;
            cpu = Cpu::of_this_process();
            lines.send(&Listening { addresses })?;
            lines.expect::<End>()?;
            receiver.close();
        }
        lines.send(&Ended { cpu_s: Cpu::of_this_process().since(cpu).0.as_secs_f64() })?;
    }
    Ok(())
}
