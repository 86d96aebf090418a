//! A positive control for zero-copy that needs no NIC.
//!
//! On loopback, veth and tun the receiving side copies, so the kernel's report is always "copied". What never
//! copies is a packet that nobody receives: here a TCP connection is made over a bridge whose only port is then
//! taken away. What is sent from then on goes the whole way of zero-copy sends, down to the device's transmit
//! function, and is dropped there. When the connection is aborted, the kernel lets go of the pages and reports
//! how it had held them. The code under test is the one that migrations send with, and the same arrangement
//! measures what each way of sending costs the sender.

use std::io;

use ringferry_testvm::links::{Links, MTU};
use ringferry_testvm::skip;

use super::*;
use crate::page::Piece;
use crate::transport::socket;
use crate::transport::uring::{Completion, RegisteredBuffers, SendMethod, SendOutcome, SendRing};

const PAGES: u64 = 16;

/// A bridge in the near namespace, whose only port leads to the far one.
struct Bridge(Links);

impl Bridge {
    fn new(test: &str) -> io::Result<Self> {
        let links = Links::new(test)?;
        links.add(1, None, MTU)?;
        let (near, far) = (Links::near_address(1), Links::far_address(1));
        for command in [
            format!("address delete {near}/24 dev v1"),
            "link add bridge type bridge".to_owned(),
            "link set v1 master bridge".to_owned(),
            "link set bridge up".to_owned(),
            format!("address add {near}/24 dev bridge"),
        ] {
            links.ip_near(&command)?;
        }
        // Known for good, so that nobody is asked for it when there is nobody to ask.
        let neighbour = format!("neighbour replace {far} lladdr 02:00:00:00:00:02 nud permanent dev bridge");
        links.ip_near(&neighbour)?;
        links.ip_far("link set v1 address 02:00:00:00:00:02")?;
        Ok(Self(links))
    }

    /// A connection that leads nowhere from now on, and its other end.
    fn connect(&self) -> (Arc<TcpStream>, TcpListener) {
        let Self(links) = self;
        links.ip_near("link set v1 master bridge").unwrap();
        let listener = links.at_far(|| TcpListener::bind((Links::far_address(1), 0))).unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(10));
        let stream = Arc::new(links.at_near(connect).unwrap().unwrap());
        links.ip_near("link set v1 nomaster").unwrap();
        (stream, listener)
    }
}

/// Sends a frame with these pages, and aborts the connection once it is queued; whether the kernel says that it
/// copied them, where it says anything. Returns when it has let go of them.
fn copied(ring: &mut SendRing, stream: &TcpStream, payload: &[Piece], method: SendMethod) -> Option<bool> {
    ring.load(payload, &mut Vec::new(), |header| header.extend_from_slice(b"header"));
    ring.send(method).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut aborted = false;
    while Instant::now() < deadline {
        ring.wait(Duration::from_millis(20)).unwrap();
        while let Some(completion) = ring.completion() {
            match completion {
                Completion::Sent(outcome) => {
                    assert!(matches!(outcome, SendOutcome::Complete), "{outcome:?}");
                    socket::abort(stream);
                    aborted = true;
                    if method == SendMethod::Copy {
                        return None;
                    }
                }
                Completion::Notified { copied } => {
                    assert!(aborted || copied, "nobody acknowledged, and yet the pages are free");
                    return Some(copied);
                }
                Completion::Received(_) | Completion::Woken => {}
            }
        }
    }
    panic!("no notification within {PATIENCE:?}");
}

/// The two ways of zero-copy for `payload`.
fn methods(ring: &SendRing, ram: &Ram, payload: &[Piece]) -> [SendMethod; 2] {
    let whole = ram.pages().runs().flat_map(|run| ram.memory.host_runs(run).unwrap()).collect::<Vec<_>>();
    let buffers = RegisteredBuffers::new(&ram.memory, &whole).unwrap();
    let buffer = ring.register(&buffers).unwrap().buffer_of(payload).unwrap();
    [SendMethod::ZeroCopy, SendMethod::ZeroCopyFixed(buffer)]
}

#[test]
fn sends_into_a_bridge_without_ports_are_reported_as_zero_copied_and_the_same_on_loopback_as_copied() {
    let ram = Ram::new(&[(0, PAGES)]);
    ram.fill(1);
    let runs = ram.pages().runs().flat_map(|run| ram.memory.host_runs(run).unwrap()).collect::<Vec<_>>();
    let payload: Vec<Piece> = runs.into_iter().map(Piece::Ram).collect();
    for which in [0, 1] {
        let listener = TcpListener::bind(loopback()).unwrap();
        let stream = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let _peer = listener.accept().unwrap();
        let mut ring = SendRing::new(Arc::clone(&stream), &ram.memory).unwrap();
        let method = methods(&ring, &ram, &payload)[which];
        assert_eq!(copied(&mut ring, &stream, &payload, method), Some(true), "loopback, {method:?}");
    }
    let bridge = match Bridge::new("control") {
        Ok(bridge) => bridge,
        Err(reason) => {
            return skip(&format!("a bridge between namespaces cannot be made here: {reason}"));
        }
    };
    for which in [0, 1] {
        let (stream, _listener) = bridge.connect();
        let mut ring = SendRing::new(Arc::clone(&stream), &ram.memory).unwrap();
        let method = methods(&ring, &ram, &payload)[which];
        assert_eq!(copied(&mut ring, &stream, &payload, method), Some(false), "no ports, {method:?}");
    }
}

/// Frames of 4 MiB in runs of every length, into a bridge whose port is gone. What the sending thread paid is printed
/// for `kernel-notes/zero-copy.md`, and believed only from a release build on a quiet machine; the kernel's reports
/// are what is proven.
#[test]
fn frames_of_every_run_length_are_zero_copied_out_of_plain_and_registered_memory() {
    const CONTENT_PAGES: u64 = 1024;
    const SAMPLES: usize = 3;
    let bridge = match Bridge::new("costs") {
        Ok(bridge) => bridge,
        Err(reason) => {
            return skip(&format!("a bridge between namespaces cannot be made here: {reason}"));
        }
    };
    let ram = Ram::new(&[(0, 2 * CONTENT_PAGES)]);
    ram.fill(1);
    eprintln!("CPU of the sending thread, ns per page");
    eprintln!("{:>9} {:>12} {:>12} {:>12}", "run pages", "copy", "zc", "zc_fixed");
    for run_pages in [1, 4, 16, 256, 1024] {
        let runs = (0..CONTENT_PAGES / run_pages).map(|n| n * run_pages * 2);
        let run = |first| PageRun { first: PageIndex(first), pages: run_pages };
        let payload: Vec<Piece> =
            runs.flat_map(|first| ram.memory.host_runs(run(first)).unwrap()).map(Piece::Ram).collect();
        let costs = [None, Some(0), Some(1)].map(|zero_copy| {
            let sample = |_| {
                let (stream, _listener) = bridge.connect();
                socket::make_room(&stream, socket::Buffer::Send, 32 << 20).unwrap();
                let mut ring = SendRing::new(Arc::clone(&stream), &ram.memory).unwrap();
                let method = zero_copy.map(|which| methods(&ring, &ram, &payload)[which]);
                let before = thread_cpu_ns();
                let report = copied(&mut ring, &stream, &payload, method.unwrap_or(SendMethod::Copy));
                let cost = (thread_cpu_ns() - before) / CONTENT_PAGES;
                assert_eq!(report, method.map(|_| false), "runs of {run_pages}, {method:?}");
                cost
            };
            let mut costs: Vec<u64> = (0..SAMPLES).map(sample).collect();
            costs.sort_unstable();
            costs[SAMPLES / 2]
        });
        eprintln!("{run_pages:>9} {:>12} {:>12} {:>12}", costs[0], costs[1], costs[2]);
    }
}

fn thread_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap()
}
