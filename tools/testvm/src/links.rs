//! Links between two network namespaces, for tests and measurements that need a wire: shaped, and cut at will.
//!
//! Everything is made by `ip` and `tc`, inside namespaces of its own, and goes with them.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What tbf lets through at once: enough for the largest segment that TCP offloads, and little against a rate
/// that is measured over seconds.
const BURST: &str = "256kb";
/// How long packets may queue before the link; longer ones are dropped.
const LATENCY: &str = "50ms";

/// What Ethernet has unless told otherwise.
pub const MTU: u32 = 1500;
/// Jumbo frames, as storage and migration networks have them: headers then take 1 % of the link.
pub const JUMBO_MTU: u32 = 9000;

/// Two network namespaces and the links between them; all of it is gone when this is dropped. Needs root,
/// iproute2, and a kernel with veth and tbf.
#[derive(Debug)]
pub struct Links {
    near: String,
    far: String,
}

impl Links {
    /// Two namespaces without a link, named after `purpose`, which is unique in this process.
    ///
    /// # Errors
    ///
    /// What `ip` said.
    pub fn new(purpose: &str) -> io::Result<Self> {
        let of = |side: &str| format!("ringferry-{purpose}-{side}-{}", std::process::id());
        // Made first, so that what a failure leaves behind is removed.
        let links = Self { near: of("near"), far: of("far") };
        run(&format!("ip netns add {}", links.near))?;
        run(&format!("ip netns add {}", links.far))?;
        Ok(links)
    }

    /// Adds link number `n`: a device `vN` at both ends, with the addresses [`near_address`](Self::near_address)
    /// and [`far_address`](Self::far_address). From near to far it carries `bytes_per_s`, Ethernet headers
    /// included, or whatever it can.
    ///
    /// # Errors
    ///
    /// What `ip` or `tc` said.
    pub fn add(&self, n: u8, bytes_per_s: Option<u64>, mtu: u32) -> io::Result<()> {
        let Self { near, far } = self;
        run(&format!("ip link add v{n} netns {near} type veth peer name v{n} netns {far}"))?;
        for (namespace, address) in [(near, Self::near_address(n)), (far, Self::far_address(n))] {
            run(&format!("ip -n {namespace} address add {address}/24 dev v{n}"))?;
            run(&format!("ip -n {namespace} link set v{n} mtu {mtu} up"))?;
        }
        if let Some(bytes_per_s) = bytes_per_s {
            let rate = bytes_per_s.saturating_mul(8);
            let shape = format!("rate {rate}bit burst {BURST} latency {LATENCY}");
            run(&format!("tc -n {near} qdisc add dev v{n} root tbf {shape}"))?;
        }
        Ok(())
    }

    /// The address of link `n` in the near namespace.
    pub fn near_address(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, n, 1)
    }

    /// The address of link `n` in the far namespace.
    pub fn far_address(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, n, 2)
    }

    /// Link `n` falls silent: nothing passes, and nobody is told.
    ///
    /// # Errors
    ///
    /// What `ip` said.
    pub fn cut(&self, n: u8) -> io::Result<()> {
        self.ip_near(&format!("link set v{n} down"))
    }

    /// Link `n` is back.
    ///
    /// # Errors
    ///
    /// What `ip` said.
    pub fn mend(&self, n: u8) -> io::Result<()> {
        self.ip_near(&format!("link set v{n} up"))
    }

    /// Runs `ip` in the near namespace.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn ip_near(&self, arguments: &str) -> io::Result<()> {
        run(&format!("ip -n {} {arguments}", self.near))
    }

    /// Runs `ip` in the far namespace.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn ip_far(&self, arguments: &str) -> io::Result<()> {
        run(&format!("ip -n {} {arguments}", self.far))
    }

    /// The near namespace's name, for `ip netns exec`.
    pub fn near(&self) -> &str {
        &self.near
    }

    /// The far namespace's name.
    pub fn far(&self) -> &str {
        &self.far
    }

    /// Moves this thread to the near end; sockets that it makes stay there, and threads that it starts are there.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn enter_near(&self) -> io::Result<()> {
        enter(&self.near)
    }

    /// Runs `work` on a thread at the near end.
    ///
    /// # Errors
    ///
    /// The thread could not enter the namespace; `work` was not run then.
    pub fn at_near<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        at(&self.near, work)
    }

    /// Runs `work` on a thread at the far end.
    ///
    /// # Errors
    ///
    /// The thread could not enter the namespace; `work` was not run then.
    pub fn at_far<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        at(&self.far, work)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for namespace in [&self.near, &self.far] {
            if let Err(error) = run(&format!("ip netns delete {namespace}")) {
                tracing::debug!(%error, "a namespace was not there any more");
            }
        }
    }
}

fn enter(namespace: &str) -> io::Result<()> {
    let namespace = File::open(format!("/run/netns/{namespace}"))?;
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn at<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| enter(namespace).map(|()| work()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run(command: &str) -> io::Result<()> {
    let mut words = command.split_whitespace();
    let output =
        Command::new(words.next().unwrap_or_default()).args(words).stdin(Stdio::null()).output().map_err(
            |error| io::Error::new(error.kind(), format!("`{command}` cannot be started: {error}")),
        )?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("`{command}`: {}", said.trim())));
    }
    Ok(())
}
