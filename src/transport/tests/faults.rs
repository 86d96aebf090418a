//! Links that are slow, silent or gone, and users who change their mind: what is lost, what is waited for, and for how
//! long.

use std::num::NonZeroU64;
use std::sync::Mutex;

use super::*;
use crate::transport::uring::{Completion, SendRing};

#[test]
fn sixty_four_silent_addresses_take_one_limit_and_not_sixty_four() {
    let (address, _open) = silent_address();
    let source = Ram::new(&[(0, 1)]);
    let options = SendOptions { connect_timeout: Duration::from_millis(300), ..options() };
    let begun = Instant::now();
    let error = connect(&vec![ChannelSpec::to(address); 64], TOKEN, &source, options).unwrap_err();
    assert!(matches!(error, TransportError::Connect { .. }), "{error}");
    // One after the other, they would take 19 s.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn connecting_can_be_cancelled_while_addresses_and_greeted_peers_keep_silent() {
    let (silent, _open) = silent_address();
    let mute = TcpListener::bind(loopback()).unwrap();
    let source = Ram::new(&[(0, 1)]);
    for address in [silent, mute.local_addr().unwrap()] {
        let cancel = AtomicBool::new(false);
        let options = SendOptions { connect_timeout: PATIENCE, ..options() };
        let begun = Instant::now();
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(50));
                cancel.store(true, Ordering::Relaxed);
            });
            let channels = vec![ChannelSpec::to(address); 3];
            Sender::connect(&channels, TOKEN, source.memory.clone(), options, &cancel).unwrap_err()
        });
        assert!(matches!(error, TransportError::Cancelled), "{error}");
        assert!(begun.elapsed() < PATIENCE / 2);
    }
}

#[test]
fn rounds_begin_one_after_the_other_and_are_awaited_as_long_as_one_likes() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (target, _receiver, address) = destination(&source);
    let slow = MaxBandwidth::new(NonZeroU64::new(4_000_000));
    let options = SendOptions { max_bandwidth: slow, ..options() };
    let mut sender = sender(&[address], &source, options);
    assert!(matches!(sender.wait_round(Duration::ZERO), Err(TransportError::NoRound)));
    sender.begin_round(1, source.pages()).unwrap();
    assert_eq!(sender.wait_round(Duration::from_millis(5)).unwrap(), None);
    let error = sender.begin_round(2, source.pages()).unwrap_err();
    assert!(matches!(error, TransportError::RoundUnfinished { round: 2, unfinished: 1 }), "{error}");
    // What no channel has goes with the last round.
    let recalled = sender.recall();
    let sent = sender.wait_round(PATIENCE).unwrap().unwrap();
    assert_eq!(sent.totals.pages_struck_off, recalled.len());
    assert_eq!(sent.totals.pages_sent + recalled.len(), 4000);
    sender.set_max_bandwidth(None);
    sender.send_round(2, recalled).unwrap();
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn a_limit_that_is_lifted_ends_every_nap_at_once() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (_target, _receiver, address) = destination(&source);
    let limit = MaxBandwidth::new(NonZeroU64::new(1000));
    let options = SendOptions { max_bandwidth: limit.clone(), ..options() };
    let mut sender = sender(&[address; 2], &source, options);
    sender.begin_round(1, source.pages()).unwrap();
    assert_eq!(sender.wait_round(Duration::from_millis(100)).unwrap(), None);
    limit.set(None);
    // At 1000 bytes/s it would take hours.
    assert!(sender.wait_round(PATIENCE).unwrap().is_some());
}

#[test]
fn a_new_limit_ends_the_wait_of_a_ring_that_waits_for_tokens() {
    let ram = Ram::new(&[(0, 1)]);
    let listener = TcpListener::bind(loopback()).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut ring = SendRing::new(Arc::new(stream), &ram.memory).unwrap();
    let limit = MaxBandwidth::default();
    limit.wake_on_change(ring.wake());
    for _ in 0..2 {
        ring.await_wake().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                limit.set(None);
            });
            ring.wait(PATIENCE).unwrap();
        });
        assert!(matches!(ring.completion(), Some(Completion::Woken)));
    }
}

#[test]
fn all_channels_lost_at_once_come_back_and_the_round_goes_on() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let relay = Relay::new(address, 65_536, |_| Duration::from_millis(1));
    let options = SendOptions { reconnect_grace: PATIENCE, ..options() };
    let mut sender = sender(&[relay.address; 2], &source, options);
    sender.begin_round(1, source.pages()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while relay.passed.load(Ordering::SeqCst) < 2_000_000 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    relay.cut.store(true, Ordering::SeqCst);
    while sender.counters().channels().iter().any(|channel| channel.connected) {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(sender.wait_round(Duration::from_millis(200)).unwrap(), None);
    relay.cut.store(false, Ordering::SeqCst);
    let sent = sender.wait_round(PATIENCE).unwrap().expect("the end of the round");
    assert_eq!(sent.totals.pages_sent, 4000);
    assert!(sent.losses.len() >= 2 && sent.totals.reconnects >= 1, "{sent:?}");
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn channels_that_share_a_slow_link_are_waited_for_and_not_killed_over_and_over() {
    const BYTES_PER_S: f64 = 400_000.0;
    let source = Ram::new(&[(0, 500)]);
    let (target, receiver, address) = destination(&source);
    // Whatever comes through either relay takes its time of the link.
    let free_from = Arc::new(Mutex::new(Instant::now()));
    let relays = [0, 1].map(|_| {
        let (free_from, before) = (Arc::clone(&free_from), AtomicU64::new(0));
        Relay::new(address, 4096, move |total| {
            let bytes = total - before.swap(total, Ordering::SeqCst);
            let mut free_from = free_from.lock().unwrap();
            *free_from = (*free_from).max(Instant::now())
                + Duration::from_secs_f64(f64::from(u32::try_from(bytes).unwrap()) / BYTES_PER_S);
            free_from.saturating_duration_since(Instant::now())
        })
    });
    let addresses = relays.map(|relay| relay.address);
    let options = SendOptions { stall_timeout: PATIENCE, ..options() };
    let mut sender = sender(&addresses, &source, options);
    for generation in 1..3 {
        source.fill(generation);
        let sent = sender.send_round(u32::try_from(generation).unwrap(), source.pages()).unwrap();
        // The connection that nothing depends on any more is the only one that is ever given up.
        assert!(sent.losses.len() <= 1, "{sent:?}");
        assert_eq!(sent.totals.pages_sent, 500);
        assert_eq!(source.digest(), target.digest(), "generation {generation}");
    }
    drop((sender, receiver));
    assert_eq!(source.digest(), target.digest());
}
