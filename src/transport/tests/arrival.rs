//! What the destination promises its VMM: clean RAM, nothing written after the seal, state in order.

use super::*;

#[test]
fn a_second_migration_into_the_same_ram_ends_equal_although_zero_pages_are_not_sent() {
    let (first, second) = (Ram::new(REGIONS), Ram::new(REGIONS));
    first.fill(1);
    let target = first.like();
    let listener = DataListener::bind(&[loopback()]).unwrap();
    let channel = [ChannelSpec::to(listener.addresses()[0])];
    let receiver = listener.receive(TOKEN, target.memory.clone(), &AtomicBool::new(false)).unwrap();
    let mut sender = connect(&channel, TOKEN, &first, options()).unwrap();
    sender.send_round(1, first.pages()).unwrap();
    drop(sender);
    assert_eq!(receiver.close().cleared_pages, 0);
    assert_eq!(first.digest(), target.digest());
    // The second VM has three pages, one of which is zero by the time that it is sent.
    let mut pages = PageSet::new(second.memory.end());
    pages.extend([3, 0x107, 0x10_0001].map(PageIndex));
    [3, 0x107].into_iter().for_each(|page| second.write(PageIndex(page), 2));
    let receiver = listener.receive(TOKEN, target.memory.clone(), &AtomicBool::new(false)).unwrap();
    let mut sender = connect(&channel, TOKEN, &second, options()).unwrap();
    let sent = sender.send_round(1, pages).unwrap();
    assert_eq!((sent.totals.pages_sent, sent.totals.zero_pages), (2, 1));
    drop(sender);
    assert_eq!(receiver.close().cleared_pages, 4660);
    assert_eq!(second.digest(), target.digest());
}

#[test]
fn pages_that_arrived_are_handed_out_once_and_untouched_zeros_never() {
    let source = Ram::new(REGIONS);
    let (_target, receiver, address) = destination(&source);
    let mut sender = sender(&[address; 2], &source, options());
    let arrived = || {
        let mut pages = PageSet::new(source.memory.end());
        receiver.arrived().drain_into(&mut pages);
        pages
    };
    (0..100).for_each(|page| source.write(PageIndex(page), 1));
    sender.send_round(1, source.pages()).unwrap();
    assert_eq!(arrived().runs().collect::<Vec<_>>(), [PageRun { first: PageIndex(0), pages: 100 }]);
    assert!(arrived().is_empty());
    // A page that becomes zero has arrived, too.
    source.write(PageIndex(7), 0);
    sender.send_round(2, source.pages()).unwrap();
    assert_eq!(arrived().len(), 100);
}

#[test]
fn after_the_seal_pages_are_refused_and_state_still_comes() {
    let source = Ram::new(REGIONS);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let options = SendOptions { reconnect: false, ..options() };
    let mut sender = sender(&[address; 2], &source, options);
    sender.send_round(1, source.pages()).unwrap();
    receiver.seal(Instant::now() + PATIENCE).unwrap();
    let sealed = target.digest();
    assert_eq!(receiver.received().connections, 2);
    sender.send_state(0, vec![7; 1000]).unwrap();
    assert_eq!(receiver.next_state(PATIENCE), Some(vec![7; 1000]));
    source.fill(2);
    let error = sender.send_round(2, source.pages()).unwrap_err();
    assert!(matches!(error, TransportError::NoChannelLeft { .. }), "{error}");
    assert!(receiver.failures().iter().all(|failure| failure.contains("declared complete")));
    assert_eq!(target.digest(), sealed);
}

#[test]
fn the_seal_ends_connections_in_the_middle_of_a_frame_and_nothing_of_it_lands_later() {
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let relay = Relay::new(address, 5_000, |_| Duration::from_millis(5));
    let options = SendOptions { reconnect: false, frame_pages_max: 1000, ..options() };
    let mut sender = sender(&[relay.address], &source, options);
    sender.begin_round(1, source.pages()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while relay.passed.load(Ordering::SeqCst) < 100_000 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    receiver.seal(deadline).unwrap();
    let sealed = target.digest();
    assert!(matches!(sender.wait_round(PATIENCE), Err(TransportError::NoChannelLeft { .. })));
    assert_eq!(target.digest(), sealed);
}

#[test]
fn device_state_arrives_whole_and_in_order_over_channels_that_die() {
    const CHUNK: usize = 60_000;
    let source = Ram::new(&[(0, 4000)]);
    source.fill(1);
    let (target, receiver, address) = destination(&source);
    let relay = Relay::new(address, 65_536, |_| Duration::from_millis(1));
    let mut sender = sender(&[relay.address, address], &source, options());
    let state: Vec<u8> = (0..100 * CHUNK).map(|n| u8::try_from(n % 249).unwrap()).collect();
    sender.begin_round(1, source.pages()).unwrap();
    for (n, chunk) in (0_u64..).zip(state.chunks(CHUNK)) {
        sender.send_state(n * CHUNK as u64, chunk.to_vec()).unwrap();
        relay.cut.store(n % 20 == 19, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(2));
    }
    relay.cut.store(false, Ordering::SeqCst);
    let mut received = Vec::new();
    while received.len() < state.len() {
        received.extend(receiver.next_state(PATIENCE).expect("more state"));
    }
    assert!(received == state);
    assert_eq!(receiver.received().state_bytes, state.len() as u64);
    assert!(sender.wait_round(PATIENCE).unwrap().is_some());
    assert_eq!(source.digest(), target.digest());
    assert_eq!(receiver.next_state(Duration::ZERO), None);
}

#[test]
fn chunks_of_state_that_fit_no_frame_are_refused() {
    let source = Ram::new(&[(0, 1)]);
    let (_target, _receiver, address) = destination(&source);
    let sender = sender(&[address], &source, options());
    let limit = crate::wire::STATE_CHUNK_BYTES_MAX;
    for bytes in [0, limit as usize + 1] {
        let error = sender.send_state(0, vec![0; bytes]).unwrap_err();
        assert!(
            matches!(error, TransportError::StateChunk { bytes: found, .. } if found == bytes),
            "{error}"
        );
    }
}
