//! `ringferry bench send`: the transport alone, between two processes, against what plain send and receive reach
//! for the same bytes in the same run.
//!
//! This file owns the cases and what is printed. `send/memory.rs` is the RAM on both sides, `raw.rs` the
//! ceiling, `remote.rs` the receiving process and how it is told what comes.

mod memory;
mod raw;
mod remote;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::ValueEnum;
use ringferry::transport::{ChannelSpec, MaxBandwidth, SendOptions, Sender, ZeroCopy};
use ringferry_testvm::links::{Links, MTU};
use serde::Serialize;

use crate::interrupt;
use crate::output::Output;
use crate::sizes::{Rate, Size};
use memory::{BenchMemory, CHUNK_BYTES};
use remote::{Case, Cpu, Remote};

/// Measure the transport alone: throughput and CPU against plain send and receive
///
/// Starts a receiving process of its own on loopback, unless --to names one that runs elsewhere.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry bench send
  ringferry bench send --mode copy,zc,zc_fixed --channels 1,2 --run-pages 1,16,256
  ringferry bench send --link 1Gbit/s,500Mbit/s --mtu 9000           as root, with iproute2
  ringferry bench send --listen 192.0.2.9:4400                       on one host, then on the other:
  ringferry bench send --to 192.0.2.9:4400 --channel 192.0.2.1%eth1=192.0.2.9:4401")]
pub struct Args {
    /// How much to send in each measurement
    #[arg(long, default_value = "256MiB", value_name = "SIZE", value_parser = bytes)]
    bytes: Size,

    /// How to send, one measurement each
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mode::Auto, Mode::Copy, Mode::Zc, Mode::ZcFixed])]
    mode: Vec<Mode>,

    /// How many channels, one measurement each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2], value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: Vec<u16>,

    /// Length of runs in pages, each followed by a gap of the same length; 0 is one run without a gap
    #[arg(long, value_delimiter = ',', default_values_t = [0], value_name = "PAGES")]
    run_pages: Vec<u64>,

    /// Measurements of each case, of which the median is shown
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// Limit over all channels, such as 100MB/s
    #[arg(long, value_name = "RATE", value_parser = rate)]
    max_bandwidth: Option<Rate>,

    /// Pages in a frame, at most 1024, instead of what the measured bandwidth suggests
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "PAGES", value_parser = clap::value_parser!(u32).range(0..=1024))]
    frame_pages: u32,

    /// Send into memory that is populated already, as in every round of a migration but the first
    #[arg(long)]
    populated: bool,

    /// Send over links of these rates, one channel each, made of network namespaces, veth and tbf for the occasion
    #[arg(long, value_delimiter = ',', value_name = "RATE", value_parser = rate, conflicts_with_all = ["to", "listen", "channels"])]
    link: Vec<Rate>,

    /// Largest packet on these links
    #[arg(long, default_value_t = MTU, value_name = "BYTES", requires = "link", value_parser = clap::value_parser!(u32).range(576..=65_535))]
    mtu: u32,

    /// The control address of a receiving process that runs elsewhere with --listen
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "listen", requires = "channel")]
    to: Option<SocketAddr>,

    /// A channel to the receiving process, [LOCAL][%DEVICE]=REMOTE:PORT; several make several channels
    #[arg(long, value_name = "CHANNEL", requires = "to", conflicts_with = "channels")]
    channel: Vec<ChannelSpec>,

    /// Receive: serve measurements on this control address, one source after the other, until interrupted
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// Serve one source and end
    #[arg(long, requires = "listen", hide = true)]
    once: bool,
}

fn bytes(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::sizes::ParseError| error.to_string())?;
    let least = Size { bytes: CHUNK_BYTES as u64 };
    (size >= least).then_some(size).ok_or_else(|| format!("at least {least} is needed to measure anything"))
}

fn rate(text: &str) -> Result<Rate, String> {
    let rate: Rate = text.parse().map_err(|error: crate::sizes::ParseError| error.to_string())?;
    (rate.bytes_per_s > 0).then_some(rate).ok_or_else(|| "nothing would ever arrive".to_owned())
}

/// Of links made for the occasion, the one for control, and the port for data on the others.
const CONTROL_LINK: u8 = 200;
const DATA_PORT: u16 = 4401;

/// A way of sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    /// What a migration does
    Auto,
    /// Always copy
    Copy,
    /// Always SENDMSG_ZC, pages pinned for each send
    Zc,
    /// Always SENDMSG_ZC, out of registered memory
    #[value(name = "zc_fixed")]
    ZcFixed,
}

impl From<Mode> for ZeroCopy {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Copy => Self::Never,
            Mode::Zc => Self::Always,
            Mode::ZcFixed => Self::AlwaysRegistered,
        }
    }
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
struct BenchSend {
    kind: &'static str,
    mode: Mode,
    channels: usize,
    run_pages: u64,
    bytes: u64,
    destination: &'static str,
    duration_ms: f64,
    bytes_per_s: f64,
    raw_ceiling_bytes_per_s: f64,
    share_of_ceiling: f64,
    sender_cpu_s_per_gib: f64,
    receiver_cpu_s_per_gib: f64,
    raw_sender_cpu_s_per_gib: f64,
    raw_receiver_cpu_s_per_gib: f64,
    zero_copy_sends: u64,
    copied_sends: u64,
    registered_bytes: u64,
    fallback: Option<String>,
    estimated_bytes_per_s: f64,
    estimate_uncertainty_bytes_per_s: f64,
    per_channel_bytes: Vec<u64>,
    lost_channels: usize,
    in_flight_bytes_max: u64,
}

/// What one transfer took.
struct Measured {
    duration: Duration,
    bytes: u64,
    sender: Cpu,
    receiver: Cpu,
}

impl Measured {
    fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.duration.as_secs_f64()
    }

    fn per_gib(&self, cpu: Cpu) -> f64 {
        cpu.0.as_secs_f64() * (1_u64 << 30) as f64 / self.bytes as f64
    }
}

pub fn run(mut args: Args, output: Output) -> anyhow::Result<ExitCode> {
    if let Some(address) = args.listen {
        remote::serve(address, args.once, output)?;
        return Ok(ExitCode::SUCCESS);
    }
    // Dropped after `remote`, whose process lives on them.
    let mut guarded = None;
    let mut remote = if !args.link.is_empty() {
        let interrupted = interrupt::flag()?;
        let (links, channels) = links(&args.link, args.mtu)?;
        let far = links.far().to_owned();
        args.channel = channels;
        guarded = Some(LinksGuard::new(links, interrupted, output));
        Remote::spawn_at(SocketAddr::from((Links::far_address(CONTROL_LINK), 0)), Some(&far))?
    } else if let Some(address) = args.to {
        Remote::connect(address)?
    } else {
        Remote::spawn_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)?
    };
    let channel_counts = match u16::try_from(args.channel.len())? {
        0 => args.channels.clone(),
        count => vec![count],
    };
    if !output.json() {
        output.line(format_args!(
            "{:>8} {:>8} {:>9} {:>10} {:>10} {:>7} {:>10} {:>10} {:>9} {:>7}",
            "mode",
            "channels",
            "run pages",
            "MB/s",
            "raw MB/s",
            "share",
            "send s/GiB",
            "recv s/GiB",
            "zero-copy",
            "copied"
        ))?;
    }
    for run_pages in &args.run_pages {
        for channels in &channel_counts {
            for mode in &args.mode {
                let case = measure(&args, &mut remote, *mode, *channels, *run_pages)?;
                print(&case, output)?;
            }
        }
    }
    drop((remote, guarded));
    Ok(ExitCode::SUCCESS)
}

/// Network namespaces do not go with the process that made them: Ctrl-C takes them down before it ends it.
struct LinksGuard(Arc<Mutex<Option<Links>>>);

impl LinksGuard {
    fn new(links: Links, interrupted: &'static AtomicBool, output: Output) -> Self {
        let links = Arc::new(Mutex::new(Some(links)));
        let watched = Arc::clone(&links);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(50));
                let mut links = watched.lock().unwrap_or_else(PoisonError::into_inner);
                if links.is_none() {
                    return;
                }
                // Relaxed: the flag carries no data.
                if interrupted.load(Ordering::Relaxed) {
                    links.take();
                    output.error(&anyhow!("interrupted"));
                    std::process::exit(1);
                }
            }
        });
        Self(links)
    }
}

impl Drop for LinksGuard {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Makes links, moves to their near end, and says which way channels over them go.
fn links(rates: &[Rate], mtu: u32) -> anyhow::Result<(Links, Vec<ChannelSpec>)> {
    ensure!(rates.len() < usize::from(CONTROL_LINK), "at most {} links", CONTROL_LINK - 1);
    let needs = "cannot make links for the measurement (as root, with iproute2?)";
    let links = Links::new("bench-send").context(needs)?;
    links.add(CONTROL_LINK, None, mtu).context(needs)?;
    let mut channels = Vec::new();
    for (n, rate) in (1..).zip(rates) {
        links.add(n, Some(rate.bytes_per_s), mtu).context(needs)?;
        let remote = SocketAddr::from((Links::far_address(n), DATA_PORT));
        channels.push(format!("{}%v{n}={remote}", Links::near_address(n)).parse()?);
    }
    links.enter_near()?;
    Ok((links, channels))
}

fn print(case: &BenchSend, output: Output) -> anyhow::Result<()> {
    if output.json() {
        output.object(case)?;
        return Ok(());
    }
    let mode = case.mode.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    output.line(format_args!(
        "{:>8} {:>8} {:>9} {:>10.0} {:>10.0} {:>6.1}% {:>10.3} {:>10.3} {:>9} {:>7}",
        mode,
        case.channels,
        case.run_pages,
        case.bytes_per_s / 1e6,
        case.raw_ceiling_bytes_per_s / 1e6,
        case.share_of_ceiling * 100.0,
        case.sender_cpu_s_per_gib,
        case.receiver_cpu_s_per_gib,
        case.zero_copy_sends,
        case.copied_sends
    ))?;
    if let Some(fallback) = &case.fallback {
        output.line(format_args!("         {fallback}"))?;
    }
    Ok(())
}

/// Measures one case: ceiling and transport by turns, so that both see the same noise.
fn measure(
    args: &Args,
    remote: &mut Remote,
    mode: Mode,
    channels: u16,
    run_pages: u64,
) -> anyhow::Result<BenchSend> {
    let memory = BenchMemory::filled(args.bytes.bytes, run_pages)?;
    let (mut raws, mut cases) = (Vec::new(), Vec::new());
    let address = |channel: &ChannelSpec| {
        channel.remote.address().with_context(|| format!("{channel}: an address is needed here, not a name"))
    };
    let addresses = args.channel.iter().map(address).collect::<anyhow::Result<Vec<_>>>()?;
    for _ in 0..args.repeat {
        let case = Case {
            raw: true,
            channels,
            bytes: args.bytes.bytes,
            run_pages,
            populated: args.populated,
            addresses: addresses.clone(),
        };
        raws.push(raw::send(remote, &case, &args.channel, &memory)?);
        cases.push(send(args, remote, &Case { raw: false, ..case }, mode, &memory)?);
    }
    // Each transfer has its own figures; the median one stands for all.
    raws.sort_by(|a, b| a.bytes_per_s().total_cmp(&b.bytes_per_s()));
    cases.sort_by(|a, b| a.0.bytes_per_s().total_cmp(&b.0.bytes_per_s()));
    let raw = &raws[raws.len() / 2];
    let (sent, case) = cases.swap_remove(cases.len() / 2);
    Ok(BenchSend {
        bytes_per_s: sent.bytes_per_s(),
        duration_ms: sent.duration.as_secs_f64() * 1e3,
        raw_ceiling_bytes_per_s: raw.bytes_per_s(),
        share_of_ceiling: sent.bytes_per_s() / raw.bytes_per_s(),
        sender_cpu_s_per_gib: sent.per_gib(sent.sender),
        receiver_cpu_s_per_gib: sent.per_gib(sent.receiver),
        raw_sender_cpu_s_per_gib: raw.per_gib(raw.sender),
        raw_receiver_cpu_s_per_gib: raw.per_gib(raw.receiver),
        ..case
    })
}

/// One transfer by the transport.
fn send(
    args: &Args,
    remote: &mut Remote,
    case: &Case,
    mode: Mode,
    memory: &BenchMemory,
) -> anyhow::Result<(Measured, BenchSend)> {
    let addresses = remote.begin(case)?;
    let channels: Vec<ChannelSpec> = if args.channel.is_empty() {
        addresses.iter().copied().map(ChannelSpec::to).collect()
    } else {
        args.channel.clone()
    };
    let limit = args.max_bandwidth.and_then(|rate| std::num::NonZeroU64::new(rate.bytes_per_s));
    let options = SendOptions {
        zero_copy: mode.into(),
        max_bandwidth: MaxBandwidth::new(limit),
        frame_pages_max: args.frame_pages,
        ..SendOptions::default()
    };
    let never = AtomicBool::new(false);
    let mut sender = Sender::connect(&channels, remote.token(), memory.guest().clone(), options, &never)
        .context("connecting the channels")?;
    let (pages, content_bytes) = (memory.pages(), memory.content_bytes());
    let (begun, cpu) = (Instant::now(), Cpu::of_this_process());
    let sent = sender.send_round(1, pages).context("sending")?;
    let duration = begun.elapsed();
    let sender_cpu = Cpu::of_this_process().since(cpu);
    let (bandwidth, channels) = (sender.counters().bandwidth(), sender.counters().channels());
    drop(sender);
    let receiver = remote.end()?;
    let sending = channels.first().map(|channel| channel.sending.clone()).unwrap_or_default();
    let result = BenchSend {
        kind: "bench_send",
        mode,
        channels: channels.len(),
        run_pages: case.run_pages,
        bytes: content_bytes,
        destination: if case.populated { "populated" } else { "fresh" },
        duration_ms: 0.0,
        bytes_per_s: 0.0,
        raw_ceiling_bytes_per_s: 0.0,
        share_of_ceiling: 0.0,
        sender_cpu_s_per_gib: 0.0,
        receiver_cpu_s_per_gib: 0.0,
        raw_sender_cpu_s_per_gib: 0.0,
        raw_receiver_cpu_s_per_gib: 0.0,
        zero_copy_sends: sent.totals.zero_copy_sends,
        copied_sends: sent.totals.copied_sends,
        registered_bytes: sending.registered_bytes,
        fallback: sending.fallback,
        estimated_bytes_per_s: bandwidth.bytes_per_s,
        estimate_uncertainty_bytes_per_s: bandwidth.uncertainty_bytes_per_s,
        per_channel_bytes: channels.iter().map(|channel| channel.totals.bytes_sent).collect(),
        lost_channels: sent.losses.len(),
        in_flight_bytes_max: channels.iter().map(|channel| channel.sending.window_bytes).sum(),
    };
    Ok((Measured { duration, bytes: content_bytes, sender: sender_cpu, receiver }, result))
}
