//! The transport over real links: two network namespaces, two veth pairs shaped by tbf, one of which is cut.
//!
//! Needs root, `ip` and `tc`. Everything happens in namespaces that the test makes and removes.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]
#![expect(unsafe_code, reason = "guest RAM of the test is anonymous memory behind raw pointers")]

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapRaw};
use ringferry::transport::{DataListener, MigrationToken, Receiver, SendOptions, Sender};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId};
use ringferry_testvm::skip;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const TOKEN: MigrationToken = MigrationToken([42; 16]);
const PAGES: u64 = 24 * 1024;
const PATIENCE: Duration = Duration::from_secs(60);

/// Two namespaces with two links between them; removed when dropped.
struct Links {
    near: String,
    far: String,
}

fn run(command: &str) -> Result<(), String> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("`{command}`: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("`{command}`: {error}")),
    }
}

impl Links {
    /// Links of these rates, numbered from 1, with addresses 10.77.N.1 and 10.77.N.2 on devices vN.
    fn new(test: &str, rates: &[&str]) -> Result<Self, String> {
        let of = |side: &str| format!("ringferry-{test}-{side}-{}", std::process::id());
        let links = Self { near: of("near"), far: of("far") };
        let Self { near, far } = &links;
        run(&format!("ip netns add {near}"))?;
        run(&format!("ip netns add {far}"))?;
        for (n, rate) in (1..).zip(rates) {
            run(&format!("ip link add v{n} netns {near} type veth peer name v{n} netns {far}"))?;
            run(&format!("ip -n {near} address add 10.77.{n}.1/24 dev v{n}"))?;
            run(&format!("ip -n {far} address add 10.77.{n}.2/24 dev v{n}"))?;
            run(&format!("ip -n {near} link set v{n} up"))?;
            run(&format!("ip -n {far} link set v{n} up"))?;
            run(&format!("tc -n {near} qdisc add dev v{n} root tbf rate {rate} burst 256kb latency 50ms"))?;
        }
        Ok(links)
    }

    /// Runs `work` inside a namespace. Sockets stay in the namespace that they were made in, and threads started
    /// by `work` are in it, too.
    fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{name}")).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        let _ =
            (run(&format!("ip netns delete {}", self.near)), run(&format!("ip netns delete {}", self.far)));
    }
}

struct Ram {
    mapping: Arc<MmapRaw>,
    memory: GuestMemory,
}

impl Ram {
    fn new() -> Self {
        let mapping = MmapMut::map_anon(usize::try_from(PAGES).unwrap() * PAGE_SIZE).unwrap();
        let mapping = Arc::new(MmapRaw::from(mapping));
        let pages = PageRun { first: PageIndex(0), pages: PAGES };
        let region = Region { slot: SlotId(0), pages, host: mapping.as_mut_ptr() };
        // SAFETY: kept by the value; no reference to its bytes is ever made.
        let memory = unsafe { GuestMemory::new(vec![region]) }.unwrap().kept_by(Arc::clone(&mapping) as _);
        Self { mapping, memory }
    }

    fn fill(&self, generation: u64) {
        let words = self.mapping.as_mut_ptr().cast::<u64>();
        for word in 0..self.mapping.len() / 8 {
            // SAFETY: inside the mapping, aligned.
            unsafe { words.add(word).write_volatile((word as u64) << 8 | generation) };
        }
    }

    fn is_equal(&self, other: &Self) -> bool {
        let words = |ram: &Self, word| {
            // SAFETY: inside the mapping, aligned.
            unsafe { ram.mapping.as_ptr().cast::<u64>().add(word).read_volatile() }
        };
        (0..self.mapping.len() / 8).all(|word| words(self, word) == words(other, word))
    }
}

fn all() -> Arc<PageSet> {
    let mut pages = PageSet::new(PageIndex(PAGES));
    pages.insert_run(PageRun { first: PageIndex(0), pages: PAGES });
    Arc::new(pages)
}

/// A sender with a channel over each link, and its receiver.
fn connect(links: &Links, source: &Ram, target: &Ram, count: usize) -> (Sender, Receiver) {
    let addresses: Vec<SocketAddr> =
        (1..=count).map(|n| format!("10.77.{n}.2:4400").parse().unwrap()).collect();
    let receiver = links.inside(&links.far, || {
        DataListener::bind(&addresses).unwrap().receive(TOKEN, target.memory.clone()).unwrap()
    });
    let channels: Vec<_> =
        (1..=count).map(|n| format!("10.77.{n}.1%v{n}=10.77.{n}.2:4400").parse().unwrap()).collect();
    let options = SendOptions { stall_timeout: Duration::from_secs(1), ..SendOptions::default() };
    let sender = links
        .inside(&links.near, || Sender::connect(&channels, TOKEN, source.memory.clone(), options).unwrap());
    (sender, receiver)
}

#[test]
fn two_unequal_links_are_both_used_and_one_that_falls_silent_costs_its_share_and_comes_back() {
    let links = match Links::new("cut", &["1gbit", "500mbit"]) {
        Ok(links) => links,
        Err(reason) => {
            return skip(&format!("namespaces with shaped links cannot be made here: {reason}"));
        }
    };
    let (source, target) = (Ram::new(), Ram::new());
    source.fill(1);
    let (mut sender, receiver) = connect(&links, &source, &target, 2);
    let sent = sender.send_round(1, all()).unwrap();
    assert!(sent.losses.is_empty(), "{sent:?}");
    let bytes: Vec<_> =
        sender.counters().channels().iter().map(|channel| channel.totals.bytes_sent).collect();
    assert!(bytes[0] > bytes[1] && bytes[1] > 0, "each by what it drains: {bytes:?}");
    assert!(source.is_equal(&target));

    // The first link falls silent in the middle of a round: no reset, nothing.
    source.fill(2);
    let near = links.near.clone();
    let counters = sender.counters();
    let cutter = thread::spawn(move || {
        let deadline = Instant::now() + PATIENCE;
        let before = counters.channels()[0].totals.bytes_sent;
        while counters.channels()[0].totals.bytes_sent < before + (8 << 20) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        run(&format!("ip -n {near} link set v1 down")).unwrap();
    });
    let sent = sender.send_round(2, all()).unwrap();
    cutter.join().unwrap();
    assert_eq!(sent.losses.len(), 1, "{sent:?}");
    let loss = &sent.losses[0];
    assert_eq!(loss.channel.device.as_deref(), Some("v1"), "{loss:?}");
    assert!(loss.round == 2 && loss.pages_returned > 0, "{loss:?}");
    assert!(source.is_equal(&target), "{:?}", receiver.failures());

    // It comes back, and is used again.
    run(&format!("ip -n {} link set v1 up", links.near)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while sender.counters().totals().reconnects == 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let before = sender.counters().channels()[0].totals.pages_sent;
    source.fill(3);
    sender.send_round(3, all()).unwrap();
    assert!(sender.counters().channels()[0].totals.pages_sent > before);
    assert!(source.is_equal(&target));
    drop(sender);
    receiver.close();
    assert!(source.is_equal(&target));
}
