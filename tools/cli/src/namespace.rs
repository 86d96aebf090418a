//! Two network namespaces with a shaped link between them: a wire whose rate holds for everything that crosses it,
//! the final phase of a migration included.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What tbf lets through at once: enough for the largest segment that TCP offloads, and little against a rate
/// that is measured over seconds.
const BURST: &str = "256kb";
/// Jumbo frames, as storage and migration networks have them: headers then take 1 % of the link.
const MTU: u32 = 9000;
/// How long packets may queue before the link; longer ones are dropped.
const LATENCY: &str = "50ms";

/// A link between two namespaces of its own, both gone when it is dropped. Needs root, `ip` and `tc`.
#[derive(Debug)]
pub struct ShapedLink {
    near: String,
    far: String,
}

impl ShapedLink {
    /// Address of the far end.
    pub const FAR: [u8; 4] = [10, 77, 1, 2];

    /// A link that carries `bytes_per_s`, Ethernet headers included.
    pub fn new(bytes_per_s: u64) -> Result<Self> {
        let of = |side: &str| format!("ringferry-{side}-{}", std::process::id());
        // Made first, so that what a failure leaves behind is removed.
        let link = Self { near: of("near"), far: of("far") };
        let Self { near, far } = &link;
        let rate = bytes_per_s.saturating_mul(8);
        for command in [
            format!("ip netns add {near}"),
            format!("ip netns add {far}"),
            format!("ip link add wire netns {near} type veth peer name wire netns {far}"),
            format!("ip -n {near} address add 10.77.1.1/24 dev wire"),
            format!("ip -n {far} address add 10.77.1.2/24 dev wire"),
            format!("ip -n {near} link set wire mtu {MTU} up"),
            format!("ip -n {far} link set wire mtu {MTU} up"),
            format!(
                "tc -n {near} qdisc add dev wire root tbf rate {rate}bit burst {BURST} latency {LATENCY}"
            ),
        ] {
            run(&command)
                .context("cannot make a link of its own for the measurement (as root, with iproute2?)")?;
        }
        Ok(link)
    }

    /// Moves this thread to the near end; threads that it starts are there, too.
    pub fn enter_near(&self) -> Result<()> {
        let namespace = File::open(format!("/run/netns/{}", self.near))?;
        Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Name of the namespace at the far end.
    pub fn far(&self) -> &str {
        &self.far
    }
}

impl Drop for ShapedLink {
    fn drop(&mut self) {
        for namespace in [&self.near, &self.far] {
            if let Err(error) = run(&format!("ip netns delete {namespace}")) {
                tracing::debug!(%error, "a namespace was not there any more");
            }
        }
    }
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("`{command}` cannot be started"))?;
    if !output.status.success() {
        bail!("`{command}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
