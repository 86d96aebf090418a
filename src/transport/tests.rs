//! Sender and receiver over loopback: what arrives is what was sent, whatever the channels do meanwhile.
#![expect(unsafe_code, reason = "guest RAM of the tests is anonymous memory behind raw pointers")]

mod arrival;
mod discards;
mod faults;
mod hostile;
mod recorded;
mod zero_copy;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;

use super::*;
use crate::layout::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use crate::page_set::PageSet;

const TOKEN: MigrationToken = MigrationToken(*b"the right token!");

/// A bound on every wait of these tests: nothing of what they prove may hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Guest RAM of a test, with the mapping behind it.
struct Ram {
    mappings: Vec<MmapRaw>,
    memory: GuestMemory,
}

const REGIONS: &[(u64, u64)] = &[(0, 160), (0x100, 1500), (0x10_0000, 3000)];

impl Ram {
    /// RAM in regions of (first page, pages).
    fn new(regions: &[(u64, u64)]) -> Self {
        let map = |(_, pages): &(u64, u64)| {
            let length = usize::try_from(*pages).unwrap() * PAGE_SIZE;
            MmapRaw::from(memmap2::MmapMut::map_anon(length).unwrap())
        };
        let mappings: Vec<_> = regions.iter().map(map).collect();
        let region = |(index, (first, pages)): (usize, &(u64, u64))| {
            let pages = PageRun { first: PageIndex(*first), pages: *pages };
            Region::new(SlotId(u32::try_from(index).unwrap()), pages, mappings[index].as_mut_ptr())
        };
        let regions = regions.iter().enumerate().map(region).collect();
        // SAFETY: the mappings live in the same value, and no reference to their bytes is ever made.
        let memory = unsafe { GuestMemory::new(regions) }.unwrap();
        Self { mappings, memory }
    }

    /// Fresh RAM of the same layout.
    fn like(&self) -> Self {
        let regions: Vec<_> =
            self.memory.regions().iter().map(|r| (r.pages.first.0, r.pages.pages)).collect();
        Self::new(&regions)
    }

    fn pages(&self) -> PageSet {
        let mut pages = PageSet::new(self.memory.end());
        self.memory.regions().iter().for_each(|region| pages.insert_run(region.pages));
        pages
    }

    fn host(&self, page: PageIndex) -> *mut u8 {
        self.memory.host_runs(PageRun { first: page, pages: 1 }).unwrap().next().unwrap().host
    }

    /// Writes something into a page that no other page and no other generation has; 0 clears it.
    fn write(&self, page: PageIndex, generation: u64) {
        let words = self.host(page).cast::<u64>();
        for word in 0..PAGE_SIZE as u64 / 8 {
            let value = if generation == 0 { 0 } else { page.0 << 32 | generation << 12 | word };
            // SAFETY: inside the page, aligned; the kernel may read it meanwhile, as it may a guest's.
            unsafe { words.add(usize::try_from(word).unwrap()).write_volatile(value) };
        }
    }

    fn fill(&self, generation: u64) {
        self.pages().runs().for_each(|run| {
            (run.first.0..run.end().0).for_each(|page| self.write(PageIndex(page), generation));
        });
    }

    /// A digest of each region.
    fn digest(&self) -> Vec<u64> {
        let of = |mapping: &MmapRaw| {
            let mut copy = vec![0_u8; mapping.len()];
            // SAFETY: the mapping is as long as the copy, and readable.
            unsafe { mapping.as_ptr().copy_to_nonoverlapping(copy.as_mut_ptr(), copy.len()) };
            xxhash_rust::xxh3::xxh3_64(&copy)
        };
        self.mappings.iter().map(of).collect()
    }

    fn resident_bytes(&self) -> usize {
        let of = |mapping: &MmapRaw| {
            let mut pages = vec![0_u8; mapping.len() / PAGE_SIZE];
            // SAFETY: the mapping and the vector are as long as stated.
            unsafe { libc::mincore(mapping.as_mut_ptr().cast(), mapping.len(), pages.as_mut_ptr()) };
            pages.iter().filter(|page| **page & 1 != 0).count() * PAGE_SIZE
        };
        self.mappings.iter().map(of).sum()
    }
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A destination with memory like `source`, listening.
fn destination(source: &Ram) -> (Ram, Receiver, SocketAddr) {
    let (ram, receiver, listener) = destination_with_door(source);
    (ram, receiver, listener.addresses()[0])
}

/// The same, with the listener that knows why strangers were turned away.
fn destination_with_door(source: &Ram) -> (Ram, Receiver, DataListener) {
    let ram = source.like();
    let listener = DataListener::bind(&[loopback()]).unwrap();
    let receiver = listener.receive(TOKEN, ram.memory.clone(), &AtomicBool::new(false)).unwrap();
    (ram, receiver, listener)
}

/// An address that answers nothing: the backlog of its listener is full as long as the sockets live.
pub(super) fn silent_address() -> (SocketAddr, Vec<socket2::Socket>) {
    let socket = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let listener = socket();
    listener.bind(&loopback().into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let caller = socket();
        caller.set_nonblocking(true).unwrap();
        // In progress, for ever.
        let _ = caller.connect(&address);
        sockets.push(caller);
    }
    (address.as_socket().unwrap(), sockets)
}

fn options() -> SendOptions {
    SendOptions {
        stall_timeout: Duration::from_secs(2),
        reconnect_grace: Duration::from_secs(2),
        ..SendOptions::default()
    }
}

fn sender(to: &[SocketAddr], source: &Ram, options: SendOptions) -> Sender {
    let channels: Vec<_> = to.iter().copied().map(ChannelSpec::to).collect();
    connect(&channels, TOKEN, source, options).unwrap()
}

fn connect(
    channels: &[ChannelSpec],
    token: MigrationToken,
    source: &Ram,
    options: SendOptions,
) -> Result<Sender, TransportError> {
    Sender::connect(channels, token, source.memory.clone(), options, &AtomicBool::new(false))
}

/// A relay in front of `to` that a test can slow down, count and cut.
struct Relay {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
}

impl Relay {
    /// Passes `chunk` bytes at a time, with a pause that `pause` gives after each.
    fn new(to: SocketAddr, chunk: usize, pause: impl Fn(u64) -> Duration + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(loopback()).unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_cut, count, pause) = (Arc::clone(&cut), Arc::clone(&passed), Arc::new(pause));
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(to) else { continue };
                if is_cut.load(Ordering::SeqCst) {
                    continue;
                }
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                thread::spawn(move || io::copy(&mut &back.0, &mut &back.1));
                let (is_cut, count, pause) = (Arc::clone(&is_cut), Arc::clone(&count), Arc::clone(&pause));
                thread::spawn(move || {
                    let mut bytes = vec![0; chunk];
                    while let Ok(read @ 1..) = (&near).read(&mut bytes) {
                        if is_cut.load(Ordering::SeqCst) || (&far).write_all(&bytes[..read]).is_err() {
                            break;
                        }
                        let total = count.fetch_add(read as u64, Ordering::SeqCst);
                        thread::sleep(pause(total));
                    }
                    let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
                });
            }
        });
        Self { address, cut, passed }
    }
}

#[test]
fn every_page_arrives_over_one_two_and_four_channels_in_every_mode() {
    for channels in [1, 2, 4] {
        for zero_copy in [ZeroCopy::Auto, ZeroCopy::Never, ZeroCopy::Always, ZeroCopy::AlwaysRegistered] {
            let source = Ram::new(REGIONS);
            source.fill(1);
            let (target, receiver, address) = destination(&source);
            let options = SendOptions { zero_copy, ..options() };
            let mut sender = sender(&vec![address; channels], &source, options);
            let sent = sender.send_round(1, source.pages()).unwrap();
            assert_eq!((sent.totals.pages_sent, sent.totals.zero_pages), (4660, 0));
            assert!(sent.losses.is_empty(), "{sent:?}");
            drop(sender);
            let received = receiver.close();
            assert_eq!((received.pages, received.bytes), (4660, sent.totals.bytes_sent));
            assert_eq!(source.digest(), target.digest(), "{channels} channels, {zero_copy:?}");
        }
    }
}

#[test]
fn loopback_is_reported_as_copied_and_registered_memory_as_registered() {
    let source = Ram::new(REGIONS);
    source.fill(1);
    let (_target, _receiver, address) = destination(&source);
    let options = SendOptions { zero_copy: ZeroCopy::AlwaysRegistered, ..options() };
    let mut sender = sender(&[address; 2], &source, options);
    let sent = sender.send_round(1, source.pages()).unwrap();
    assert_eq!(sent.totals.zero_copy_sends, 0, "{sent:?}");
    for channel in sender.counters().channels().into_iter().filter(|channel| channel.totals.pages_sent > 0) {
        assert_eq!(channel.sending.registered_bytes, 4660 * 4096, "{channel:?}");
        assert_eq!(channel.sending.fallback, None);
    }
}

#[test]
fn zero_pages_cost_no_bytes_and_no_memory_and_clear_what_was_there() {
    let source = Ram::new(REGIONS);
    let (target, receiver, address) = destination(&source);
    let mut sender = sender(&[address; 2], &source, options());
    let all = source.pages();
    let sent = sender.send_round(1, all.clone()).unwrap();
    assert_eq!((sent.totals.pages_sent, sent.totals.zero_pages), (0, 4660));
    // A header and a run for every four pages, at worst.
    assert!(sent.totals.bytes_sent < 100_000, "{sent:?}");
    assert_eq!(target.resident_bytes(), 0);
    source.fill(1);
    sender.send_round(2, all.clone()).unwrap();
    assert_eq!(source.digest(), target.digest());
    (0..100).for_each(|page| source.write(PageIndex(0x100 + page * 7), 0));
    let sent = sender.send_round(3, all).unwrap();
    assert_eq!(sent.totals.zero_pages, 100);
    drop(sender);
    drop(receiver);
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn no_older_page_overwrites_a_newer_one_however_the_channels_lag() {
    let source = Ram::new(&[(0, 700)]);
    let (target, receiver, address) = destination(&source);
    let seeds: [u64; 3] = [7919, 104_729, 1_299_709];
    let relays = seeds.map(|seed| {
        Relay::new(address, 20_000, move |total| Duration::from_micros(total.wrapping_mul(seed) % 3000))
    });
    let addresses: Vec<_> = relays.iter().map(|relay| relay.address).collect();
    let mut sender = sender(&addresses, &source, SendOptions { frame_pages_max: 8, ..options() });
    let all = source.pages();
    for generation in 1..12 {
        source.fill(generation);
        sender.send_round(u32::try_from(generation).unwrap(), all.clone()).unwrap();
        // The round has ended: all of it is there, and stays.
        assert_eq!(source.digest(), target.digest(), "generation {generation}");
    }
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn a_channel_cut_in_mid_flight_costs_its_share_and_its_late_bytes_never_land() {
    let source = Ram::new(&[(0, 4000)]);
    let (target, receiver, address) = destination(&source);
    // The first relay holds back what it took, so that old pages are under way when it is cut.
    let slow = Relay::new(address, 65_536, |_| Duration::from_millis(4));
    let fast = Relay::new(address, 65_536, |_| Duration::from_micros(200));
    let options = SendOptions { reconnect: false, ..options() };
    let mut sender = sender(&[slow.address, fast.address], &source, options);
    let all = source.pages();
    source.fill(1);
    let (passed, cut) = (Arc::clone(&slow.passed), Arc::clone(&slow.cut));
    let cutter = thread::spawn(move || {
        let deadline = Instant::now() + PATIENCE;
        while passed.load(Ordering::SeqCst) < 1_000_000 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        cut.store(true, Ordering::SeqCst);
    });
    let sent = sender.send_round(1, all.clone()).unwrap();
    cutter.join().unwrap();
    assert_eq!(sent.totals.pages_sent, 4000);
    assert_eq!(sent.losses.len(), 1, "{sent:?}");
    let loss = &sent.losses[0];
    assert_eq!((&loss.channel, loss.round), (&ChannelSpec::to(slow.address), 1));
    assert!(loss.pages_returned > 0 && loss.pages_returned == sent.totals.pages_returned, "{loss:?}");
    for generation in 2..6 {
        source.fill(generation);
        sender.send_round(u32::try_from(generation).unwrap(), all.clone()).unwrap();
        assert_eq!(source.digest(), target.digest(), "generation {generation}");
    }
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn a_channel_that_was_lost_comes_back_and_sends_again() {
    let source = Ram::new(&[(0, 2000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let relay = Relay::new(address, 65_536, |_| Duration::from_micros(100));
    let mut sender = sender(&[relay.address, address], &source, options());
    let all = source.pages();
    relay.cut.store(true, Ordering::SeqCst);
    sender.send_round(1, all.clone()).unwrap();
    relay.cut.store(false, Ordering::SeqCst);
    let deadline = Instant::now() + PATIENCE;
    while sender.counters().totals().reconnects == 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let of_channel = |sender: &Sender| sender.counters().channels()[0].totals.pages_sent;
    let before = of_channel(&sender);
    let mut round = 1;
    while of_channel(&sender) == before && Instant::now() < deadline {
        round += 1;
        source.fill(round);
        sender.send_round(u32::try_from(round).unwrap(), all.clone()).unwrap();
    }
    assert!(of_channel(&sender) > before);
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn when_the_last_channel_is_gone_the_round_fails_and_says_why() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (_target, receiver, address) = destination(&source);
    let relay = Relay::new(address, 65_536, |_| Duration::from_millis(2));
    let mut sender = sender(&[relay.address], &source, options());
    let cut = Arc::clone(&relay.cut);
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        cut.store(true, Ordering::SeqCst);
    });
    let error = sender.send_round(1, source.pages()).unwrap_err();
    assert!(matches!(&error, TransportError::NoChannelLeft { losses } if losses.len() == 1), "{error}");
    drop(sender);
    drop(receiver);
}

#[test]
fn a_destination_that_takes_nothing_any_more_is_given_up_after_the_stall_timeout() {
    let source = Ram::new(&[(0, 20_000)]);
    source.fill(1);
    let (_target, _receiver, address) = destination(&source);
    // After 200 kB it sleeps for an hour, with the connection open.
    let relay =
        Relay::new(address, 65_536, |total| Duration::from_secs(if total > 200_000 { 3600 } else { 0 }));
    let mut sender = sender(&[relay.address], &source, options());
    let begun = Instant::now();
    let error = sender.send_round(1, source.pages()).unwrap_err();
    assert!(matches!(&error, TransportError::NoChannelLeft { .. }), "{error}");
    assert!(error.to_string().contains("nothing for"), "{error}");
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_channel_that_slows_to_a_trickle_holds_up_the_round_for_seconds_not_for_minutes() {
    let source = Ram::new(&[(0, 3000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    // After 300 kB, 200 bytes every 20 ms: never silent, never done.
    let trickle = |total| Duration::from_millis(if total > 300_000 { 20 } else { 0 });
    let relay = Relay::new(address, 200, trickle);
    let options = SendOptions { reconnect: false, stall_timeout: PATIENCE, ..options() };
    let mut sender = sender(&[relay.address, address], &source, options);
    let sent = sender.send_round(1, source.pages()).unwrap();
    assert_eq!(sent.totals.pages_sent, 3000);
    assert!(sent.losses.len() == 1 && sent.losses[0].reason.contains("all others wait"), "{sent:?}");
    assert!(sent.duration < PATIENCE, "{sent:?}");
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn cancelling_ends_a_round_that_would_take_minutes() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (_target, receiver, address) = destination(&source);
    let slow = MaxBandwidth::new(std::num::NonZeroU64::new(100_000));
    let mut sender = sender(&[address], &source, SendOptions { max_bandwidth: slow, ..options() });
    let cancel = sender.handle();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        cancel.cancel();
    });
    let error = sender.send_round(1, source.pages()).unwrap_err();
    assert!(matches!(error, TransportError::Cancelled), "{error}");
    assert!(matches!(sender.send_round(2, source.pages()), Err(TransportError::Cancelled)));
    drop((sender, receiver));
}

#[test]
fn pages_struck_off_a_round_are_not_sent_and_are_counted() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let slow = MaxBandwidth::new(std::num::NonZeroU64::new(4_000_000));
    let mut sender = sender(&[address], &source, SendOptions { max_bandwidth: slow.clone(), ..options() });
    let handle = sender.handle();
    let striking = thread::spawn(move || {
        let mut struck = PageSet::new(PageIndex(4000));
        while struck.is_empty() {
            thread::sleep(Duration::from_millis(1));
            // The pages that come last.
            let first = PageRun { first: PageIndex(0), pages: 1000 };
            handle.strike_off(|undealt| {
                undealt.runs_within(first).for_each(|run| struck.insert_run(run));
                undealt.remove_run(first);
            });
        }
        slow.set(None);
        struck
    });
    let sent = sender.send_round(1, source.pages()).unwrap();
    let struck = striking.join().unwrap();
    assert_eq!(sent.totals.pages_struck_off, struck.len());
    assert_eq!(sent.totals.pages_sent, 4000 - struck.len());
    assert_ne!(source.digest(), target.digest());
    let sent = sender.send_round(2, struck).unwrap();
    assert_eq!(sent.totals.pages_struck_off, 0);
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn a_page_outside_ram_fails_the_round_before_it_is_read() {
    let source = Ram::new(&[(0, 100), (200, 100)]);
    let (_target, _receiver, address) = destination(&source);
    let mut sender = sender(&[address], &source, options());
    let mut pages = source.pages();
    pages.insert(PageIndex(150));
    let error = sender.send_round(1, pages).unwrap_err();
    assert!(matches!(error, TransportError::Layout { .. }), "{error}");
}

#[test]
fn a_migration_that_nobody_expects_is_refused_and_the_expected_one_goes_on() {
    let source = Ram::new(REGIONS);
    source.fill(1);
    let (target, receiver, listener) = destination_with_door(&source);
    let address = listener.addresses()[0];
    let mut first = sender(&[address], &source, options());
    let other = MigrationToken([7; 16]);
    let error = connect(&[ChannelSpec::to(address)], other, &source, options()).unwrap_err();
    assert!(error.to_string().contains("another migration"), "{error}");
    first.send_round(1, source.pages()).unwrap();
    let failures = listener.failures();
    assert!(failures.len() == 1 && receiver.failures().is_empty(), "{failures:?}");
    drop((first, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn two_migrations_on_one_port_end_where_they_belong() {
    let sources = [Ram::new(REGIONS), Ram::new(REGIONS)];
    sources[0].fill(1);
    sources[1].fill(2);
    let (first, one, listener) = destination_with_door(&sources[0]);
    let (second, token) = (sources[1].like(), MigrationToken([7; 16]));
    let other = listener.receive(token, second.memory.clone(), &AtomicBool::new(false)).unwrap();
    let in_use =
        listener.receive(token, sources[1].like().memory.clone(), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(in_use, TransportError::TokenInUse), "{in_use}");
    let channels = vec![ChannelSpec::to(listener.addresses()[0]); 2];
    drop(listener);
    thread::scope(|scope| {
        for (source, token) in sources.iter().zip([TOKEN, token]) {
            let channels = &channels;
            scope.spawn(move || {
                let mut sender = connect(channels, token, source, options()).unwrap();
                sender.send_round(1, source.pages()).unwrap();
            });
        }
    });
    assert_eq!([one.close().pages, other.close().pages], [4660, 4660]);
    assert_eq!(sources[0].digest(), first.digest());
    assert_eq!(sources[1].digest(), second.digest());
}

#[test]
fn nobody_listening_is_said_with_what_to_do() {
    let address = TcpListener::bind(loopback()).unwrap().local_addr().unwrap();
    let ram = Ram::new(&[(0, 1)]);
    let error = connect(&[ChannelSpec::to(address)], TOKEN, &ram, options()).unwrap_err();
    assert!(error.to_string().contains("start the destination first"), "{error}");
    let error = connect(&[], TOKEN, &ram, options()).unwrap_err();
    assert!(matches!(error, TransportError::ChannelCount { found: 0, .. }));
    let channel = "%nosuchdevice=127.0.0.1:1".parse().unwrap();
    let error = connect(&[channel], TOKEN, &ram, options()).unwrap_err();
    assert!(error.to_string().contains("no such network device"), "{error}");
}
