//! `http://ADDR:PORT/metrics` in Prometheus' text format: bytes, and `_total` where something counts.
//!
//! One thread answers one connection after the other, each within a second and from a text that is ready: a slow or
//! hostile client costs the profiler nothing but that client's own turn.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use ringferry_bpf::{Look, PAGE_BYTES, Session, Summary};

const TURN: Duration = Duration::from_secs(1);
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// The text that is served.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics(Arc<Mutex<String>>);

/// Listens on `address`, and serves until the process ends.
pub(crate) fn serve(address: SocketAddr) -> anyhow::Result<Metrics> {
    let listener =
        TcpListener::bind(address).with_context(|| format!("cannot serve metrics on {address}"))?;
    eprintln!("metrics on http://{}/metrics", listener.local_addr().unwrap_or(address));
    let metrics = Metrics::default();
    let served = metrics.clone();
    std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            for stream in listener.incoming() {
                // A client that hangs up is its own business; running out of descriptors passes.
                match stream {
                    Ok(stream) => drop(answer(stream, &served)),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        })
        .context("cannot start the thread that serves metrics")?;
    Ok(metrics)
}

fn answer(mut stream: TcpStream, metrics: &Metrics) -> io::Result<()> {
    let request = read_request(&mut stream)?;
    let (status, body) = match request.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["GET", "/metrics"] => ("200 OK", metrics.text()),
        ["GET", _] => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", String::new()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.set_write_timeout(Some(TURN))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// Reads until the blank line, the limit or the end of the turn.
fn read_request(stream: &mut TcpStream) -> io::Result<String> {
    let end = Instant::now() + TURN;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while request.len() < REQUEST_BYTES_MAX && !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => break,
            count => request.extend_from_slice(&part[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&request).into_owned())
}

impl Metrics {
    /// Replaces the text by what `look` and the session's counts say.
    pub(crate) fn set(&self, look: &Look, session: &Session) {
        let text = render(look, &session.summary().0);
        if let Ok(mut served) = self.0.lock() {
            *served = text;
        }
    }

    fn text(&self) -> String {
        self.0.lock().map(|text| text.clone()).unwrap_or_default()
    }
}

/// One metric family: its name, type and help, and the value for a vCPU that has it.
type Family = (&'static str, &'static str, &'static str, fn(&Summary) -> Option<u64>);

const PER_VCPU: [Family; 8] = [
    ("dirty_bytes_total", "counter", "Memory that became dirty, in bytes.", |vcpu| {
        vcpu.row.dirty_pages.map(|pages| pages * PAGE_BYTES)
    }),
    ("dirty_ring_full_exits_total", "counter", "Exits because the dirty ring was nearly full.", |vcpu| {
        vcpu.row.ring.map(|_| vcpu.row.ring_full_exits)
    }),
    ("dirty_ring_resets_total", "counter", "Recyclings of the dirty ring.", |vcpu| {
        vcpu.row.ring.map(|_| vcpu.row.resets)
    }),
    ("dirty_ring_overflows_total", "counter", "Times that the dirty ring began to be overwritten.", |vcpu| {
        vcpu.row.ring.map(|_| vcpu.row.overflows)
    }),
    ("dirty_ring_overwritten_entries_total", "counter", "Dirty-ring entries lost by overwriting.", |vcpu| {
        vcpu.row.ring.map(|_| vcpu.row.overwritten)
    }),
    ("dirty_ring_used_entries", "gauge", "Entries pushed and not yet recycled.", |vcpu| {
        vcpu.row.ring.map(|ring| ring.used.into())
    }),
    (
        "dirty_ring_high_water_entries",
        "gauge",
        "The most entries in use since the profiler started.",
        |vcpu| vcpu.row.ring.map(|ring| ring.high_water.into()),
    ),
    ("dirty_ring_size_entries", "gauge", "Size of the dirty ring.", |vcpu| {
        vcpu.row.ring.map(|ring| ring.size.into())
    }),
];

fn render(look: &Look, vcpus: &[Summary]) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
        let name = format!("ringferry_{name}");
        let head = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        text += &head;
        for (labels, value) in samples {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    for (name, kind, help, value) in PER_VCPU {
        let samples = vcpus.iter().filter(|vcpu| !vcpu.row.ended).filter_map(|vcpu| {
            let row = &vcpu.row;
            let labels =
                labels(row.pid, &row.vm, &[("vcpu", &row.vcpu.to_string()), ("source", row.source.name())]);
            Some((labels, value(vcpu)?.to_string()))
        });
        family(&format!("vcpu_{name}"), kind, help, samples.collect());
    }
    let per_vm = |value: fn(&ringferry_bpf::VmLook) -> Option<f64>| -> Vec<(String, String)> {
        let sample = |vm| Some((labels_of(vm), value(vm)?.to_string()));
        look.vms.iter().filter_map(sample).collect()
    };
    let help = "1 if the kernel logs none of the VM's writes, so that its rate is unknown.";
    let unobservable =
        |vm: &ringferry_bpf::VmLook| Some(f64::from(u8::from(vm.source.name() == "unobservable")));
    family("vm_unobservable", "gauge", help, per_vm(unobservable));
    let help = "Different memory written during the last interval, with --regions.";
    let working_set =
        |vm: &ringferry_bpf::VmLook| Some((vm.working_set.as_ref()?.unique_pages * PAGE_BYTES) as f64);
    family("vm_working_set_bytes", "gauge", help, per_vm(working_set));
    let help = "Dirty rate estimated by page sampling, with --sample.";
    let sampled = |vm: &ringferry_bpf::VmLook| estimate(vm, |estimate| estimate.dirty_pages);
    family("vm_sampled_dirty_bytes_per_second", "gauge", help, per_vm(sampled));
    let help = "Half width of the 95 % confidence interval of the estimate.";
    let error = |vm: &ringferry_bpf::VmLook| estimate(vm, ringferry_bpf::Estimate::error_pages);
    family("vm_sampled_dirty_error_bytes_per_second", "gauge", help, per_vm(error));
    for (name, help, count) in [
        ("pushes", "Pushes that were not counted because of too many vCPUs.", look.totals.dropped_pushes),
        ("ring_full_exits", "Full rings, likewise.", look.totals.dropped_ring_full_exits),
        ("region_pushes", "Pushes missing from the working set.", look.totals.dropped_region_pushes),
    ] {
        let sample = vec![(String::new(), count.to_string())];
        family(&format!("profiler_dropped_{name}_total"), "counter", help, sample);
    }
    text
}

fn estimate(vm: &ringferry_bpf::VmLook, pages: fn(&ringferry_bpf::Estimate) -> f64) -> Option<f64> {
    let estimate = vm.estimate.as_ref()?.as_ref().ok()?;
    Some(pages(estimate) * PAGE_BYTES as f64 / estimate.interval.as_secs_f64())
}

fn labels_of(vm: &ringferry_bpf::VmLook) -> String {
    labels(vm.vm.pid, &vm.name, &[])
}

fn labels(pid: u32, vm: &str, more: &[(&str, &str)]) -> String {
    let escaped = vm.replace('\\', "\\\\").replace('"', "\\\"");
    let mut labels = format!("{{pid=\"{pid}\",vm=\"{escaped}\"");
    for (name, value) in more {
        let _ = write!(labels, ",{name}=\"{value}\"");
    }
    labels + "}"
}
