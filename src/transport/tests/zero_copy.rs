//! A positive control for zero-copy that needs no NIC.
//!
//! On loopback, veth and tun the receiving side copies, so the kernel's report is always "copied". What never
//! copies is a packet that nobody receives: here a TCP connection is made over a bridge whose only port is then
//! taken away. What is sent from then on goes the whole way of zero-copy sends, down to the device's transmit
//! function, and is dropped there. When the connection is aborted, the kernel lets go of the pages and reports
//! how it had held them. The code under test is the one that migrations send with.

use std::process::{Command, Stdio};

use super::*;
use crate::layout::HostRun;
use crate::transport::socket;
use crate::transport::uring::{Completion, RegisteredBuffers, SendMethod, SendOutcome, SendRing};

const PAGES: u64 = 16;

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("ip {arguments}: {error}")),
    }
}

/// Two namespaces: a bridge in the near one, whose only port leads to the far one.
struct Bridge {
    near: String,
    far: String,
}

impl Bridge {
    fn new() -> Result<Self, String> {
        let of = |side: &str| format!("ringferry-bridge-{side}-{}", std::process::id());
        let bridge = Self { near: of("near"), far: of("far") };
        let Self { near, far } = &bridge;
        for command in [
            format!("netns add {near}"),
            format!("netns add {far}"),
            format!("link add port netns {near} type veth peer name eth netns {far}"),
            format!("-n {near} link add bridge address 02:00:00:00:00:01 type bridge"),
            format!("-n {near} link set port master bridge"),
            format!("-n {near} address add 10.78.0.1/24 dev bridge"),
            format!("-n {far} link set eth address 02:00:00:00:00:02"),
            format!("-n {far} address add 10.78.0.2/24 dev eth"),
            format!("-n {near} link set port up"),
            format!("-n {near} link set bridge up"),
            format!("-n {far} link set eth up"),
            format!(
                "-n {near} neighbour replace 10.78.0.2 lladdr 02:00:00:00:00:02 nud permanent dev bridge"
            ),
        ] {
            ip(&command)?;
        }
        Ok(bridge)
    }

    fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let network = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), network)
                    .unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = (ip(&format!("netns delete {}", self.near)), ip(&format!("netns delete {}", self.far)));
    }
}

/// Sends a frame of 16 pages and aborts the connection; whether the kernel says that it copied.
fn copied(stream: &Arc<TcpStream>, ram: &Ram, registered: bool) -> bool {
    let mut ring = SendRing::new(Arc::clone(stream), &ram.memory).unwrap();
    let all = PageRun { first: PageIndex(0), pages: PAGES };
    let payload: Vec<HostRun> = ram.memory.host_runs(all).unwrap().collect();
    // Kept until the end: the ring's table is a clone of it.
    let buffers = RegisteredBuffers::new(&ram.memory, &payload).unwrap();
    let method = if registered {
        SendMethod::ZeroCopyFixed(ring.register(&buffers).unwrap().buffer_of(&payload).unwrap())
    } else {
        SendMethod::ZeroCopy
    };
    ring.load(&payload, |header| header.extend_from_slice(b"header"));
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
                }
                Completion::Notified { copied } => {
                    assert!(aborted || copied, "nobody acknowledged, and yet the pages are free");
                    return copied;
                }
                Completion::Received(_) => {}
            }
        }
    }
    panic!("no notification within {PATIENCE:?}");
}

#[test]
fn sends_into_a_bridge_without_ports_are_reported_as_zero_copied_and_the_same_on_loopback_as_copied() {
    let ram = Ram::new(&[(0, PAGES)]);
    ram.fill(1);
    for registered in [false, true] {
        let listener = TcpListener::bind(loopback()).unwrap();
        let stream = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let _peer = listener.accept().unwrap();
        assert!(copied(&stream, &ram, registered), "loopback, registered: {registered}");
    }
    for registered in [false, true] {
        let bridge = match Bridge::new() {
            Ok(bridge) => bridge,
            Err(reason) => {
                return eprintln!("SKIPPED: a bridge between namespaces cannot be made here: {reason}");
            }
        };
        let listener = Bridge::inside(&bridge.far, || TcpListener::bind("10.78.0.2:4400")).unwrap();
        let connect =
            || TcpStream::connect_timeout(&"10.78.0.2:4400".parse().unwrap(), Duration::from_secs(10));
        let stream = Arc::new(Bridge::inside(&bridge.near, connect).unwrap());
        let _peer = listener.accept().unwrap();
        ip(&format!("-n {} link set port nomaster", bridge.near)).unwrap();
        assert!(!copied(&stream, &ram, registered), "bridge without ports, registered: {registered}");
    }
}
