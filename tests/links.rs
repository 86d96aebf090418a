//! The transport over real links: two network namespaces, two veth pairs shaped by tbf, one of which is cut.
//!
//! Needs root, `ip` and `tc`. Everything happens in namespaces that the test makes and removes.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use ringferry::testing::AnonymousRam;
use ringferry::transport::{ChannelSpec, DataListener, MigrationToken, Receiver, SendOptions, Sender};
use ringferry_testvm::links::{Links, MTU};
use ringferry_testvm::skip;

const TOKEN: MigrationToken = MigrationToken([42; 16]);
const PAGES: u64 = 24 * 1024;
const PATIENCE: Duration = Duration::from_secs(60);

/// Two links, of 1 Gbit/s and 500 Mbit/s.
fn unequal_links() -> io::Result<Links> {
    let links = Links::new("unequal")?;
    links.add(1, Some(125_000_000), MTU)?;
    links.add(2, Some(62_500_000), MTU)?;
    Ok(links)
}

/// A sender with a channel over each link, and its receiver.
fn connect(links: &Links, source: &AnonymousRam, target: &AnonymousRam) -> (Sender, Receiver) {
    let addresses = [1, 2].map(|n| SocketAddr::from((Links::far_address(n), 4400)));
    let receiver = links
        .at_far(|| {
            DataListener::bind(&addresses)
                .unwrap()
                .receive(TOKEN, target.memory().clone(), &AtomicBool::new(false))
                .unwrap()
        })
        .unwrap();
    let channels = addresses.map(|address| {
        let n = if address == addresses[0] { 1 } else { 2 };
        format!("{}%v{n}={address}", Links::near_address(n)).parse().unwrap()
    });
    let options = SendOptions { stall_timeout: Duration::from_secs(1), ..SendOptions::default() };
    let never = AtomicBool::new(false);
    let connect = || Sender::connect(&channels, TOKEN, source.memory().clone(), options, &never).unwrap();
    let sender = links.at_near(connect).unwrap();
    (sender, receiver)
}

#[test]
fn two_unequal_links_are_both_used_and_one_that_falls_silent_costs_its_share_and_comes_back() {
    let links = match unequal_links() {
        Ok(links) => links,
        Err(reason) => {
            return skip(&format!("namespaces with shaped links cannot be made here: {reason}"));
        }
    };
    let (source, target) = (AnonymousRam::new(PAGES).unwrap(), AnonymousRam::new(PAGES).unwrap());
    source.fill(1);
    let (mut sender, receiver) = connect(&links, &source, &target);
    let sent = sender.send_round(1, source.pages()).unwrap();
    assert!(sent.losses.is_empty(), "{sent:?}");
    let bytes: Vec<_> =
        sender.counters().channels().iter().map(|channel| channel.totals.bytes_sent).collect();
    assert!(bytes[0] > bytes[1] && bytes[1] > 0, "each by what it drains: {bytes:?}");
    assert!(source.is_equal(&target));

    // The first link falls silent in the middle of a round: no reset, nothing.
    source.fill(2);
    let counters = sender.counters();
    let sent = thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            let before = counters.channels()[0].totals.bytes_sent;
            while counters.channels()[0].totals.bytes_sent < before + (8 << 20) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            links.cut(1).unwrap();
        });
        sender.send_round(2, source.pages()).unwrap()
    });
    assert_eq!(sent.losses.len(), 1, "{sent:?}");
    let loss = &sent.losses[0];
    assert_eq!(loss.channel.device.as_deref(), Some("v1"), "{loss:?}");
    assert!(loss.round == 2 && loss.pages_returned > 0, "{loss:?}");
    assert!(source.is_equal(&target), "{:?}", receiver.failures());

    // It comes back, and is used again.
    links.mend(1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while sender.counters().totals().reconnects == 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let before = sender.counters().channels()[0].totals.pages_sent;
    source.fill(3);
    sender.send_round(3, source.pages()).unwrap();
    assert!(sender.counters().channels()[0].totals.pages_sent > before);
    assert!(source.is_equal(&target));
    drop(sender);
    receiver.close();
    assert!(source.is_equal(&target));
}

/// Both channels over one link of 500 kbit/s: whatever is under way takes seconds.
#[test]
fn a_link_on_which_everything_is_slow_keeps_its_channels() {
    let links = match Links::new("slow").and_then(|links| links.add(1, Some(62_500), MTU).map(|()| links)) {
        Ok(links) => links,
        Err(reason) => return skip(&format!("namespaces with shaped links cannot be made here: {reason}")),
    };
    let (source, target) = (AnonymousRam::new(150).unwrap(), AnonymousRam::new(150).unwrap());
    source.fill(1);
    let address = SocketAddr::from((Links::far_address(1), 4400));
    let listener = links.at_far(|| DataListener::bind(&[address]).unwrap()).unwrap();
    let receiver = listener.receive(TOKEN, target.memory().clone(), &AtomicBool::new(false)).unwrap();
    let never = AtomicBool::new(false);
    let channels = vec![ChannelSpec::to(address); 2];
    let options = SendOptions { connect_timeout: PATIENCE, ..SendOptions::default() };
    let connect = || Sender::connect(&channels, TOKEN, source.memory().clone(), options, &never).unwrap();
    let mut sender = links.at_near(connect).unwrap();
    for round in 1..4 {
        let sent = sender.send_round(round, source.pages()).unwrap();
        assert_eq!(sent.totals.pages_sent, 150);
        assert!(sent.losses.is_empty(), "{sent:?}, {:?}", receiver.failures());
    }
}

#[test]
fn a_source_that_falls_silent_is_noticed_by_an_idle_destination() {
    let links = match Links::new("silent").and_then(|links| links.add(1, None, MTU).map(|()| links)) {
        Ok(links) => links,
        Err(reason) => return skip(&format!("namespaces with links cannot be made here: {reason}")),
    };
    let (source, target) = (AnonymousRam::new(1).unwrap(), AnonymousRam::new(1).unwrap());
    let address = SocketAddr::from((Links::far_address(1), 4400));
    let bind = || DataListener::bind_with(&[address], Duration::from_secs(2)).unwrap();
    let receiver =
        links.at_far(bind).unwrap().receive(TOKEN, target.memory().clone(), &AtomicBool::new(false)).unwrap();
    let never = AtomicBool::new(false);
    let channels = [ChannelSpec::to(address)];
    let connect = || {
        let options = SendOptions::default();
        Sender::connect(&channels, TOKEN, source.memory().clone(), options, &never).unwrap()
    };
    let _sender = links.at_near(connect).unwrap();
    assert!(!receiver.is_abandoned());
    links.cut(1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !receiver.is_abandoned() {
        assert!(Instant::now() < deadline, "nobody noticed");
        thread::sleep(Duration::from_millis(10));
    }
}
