//! Two ends of a control connection, and peers that are none.

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::thread;

use super::*;
use crate::wire::reason::Reason;

const LONG: Duration = Duration::from_secs(20);
static NEVER: AtomicBool = AtomicBool::new(false);

fn within(time: Duration) -> Wait<'static> {
    Wait { deadline: Instant::now() + time, cancel: &NEVER }
}

fn pair(peer_timeout: Duration) -> (ControlConnection, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (ControlConnection::keep(Arc::new(near), peer_timeout).unwrap(), far)
}

fn write(far: &UnixStream, bytes: &[u8]) {
    send_bytes(far, "a message", bytes, within(LONG)).unwrap();
}

#[test]
fn messages_arrive_in_order_however_they_are_cut() {
    let (near, far) = pair(LONG);
    let abort = Message::Abort(Reason::Vmm, "because".into());
    let bytes = [Message::Commit.encode().unwrap(), abort.encode().unwrap()].concat();
    bytes.chunks(3).for_each(|piece| write(&far, piece));
    assert_eq!(near.receive("Commit", within(LONG)).unwrap(), Message::Commit);
    assert_eq!(near.receive("Abort", within(LONG)).unwrap(), abort);
    assert!(near.poll("more").unwrap().is_none());
}

#[test]
fn a_message_that_has_come_is_delivered_to_a_wait_that_is_cancelled() {
    let (near, far) = pair(LONG);
    let cancelled = AtomicBool::new(true);
    let wait = Wait { deadline: Instant::now() + LONG, cancel: &cancelled };
    assert!(matches!(near.receive("Commit", wait), Err(ControlError::Cancelled { .. })));
    write(&far, &Message::Commit.encode().unwrap());
    while near.shared.state.lock().inbox.is_empty() {
        thread::yield_now();
    }
    assert_eq!(near.receive("Commit", wait).unwrap(), Message::Commit);
}

#[test]
fn a_ping_is_answered_while_nobody_receives_and_shows_that_the_peer_is_alive() {
    let (near, far) = pair(LONG);
    let far = ControlConnection::keep(Arc::new(far), LONG).unwrap();
    let before = Instant::now();
    assert!(!near.answered_since(before));
    near.ping(within(LONG)).unwrap();
    while !near.answered_since(before) {
        thread::yield_now();
    }
    far.send(&Message::StateTaken(7), within(LONG)).unwrap();
    while near.state_taken() != 7 {
        thread::yield_now();
    }
}

#[test]
fn a_peer_that_keeps_its_connection_open_and_says_nothing_is_found_silent() {
    let (near, _far) = pair(Duration::from_millis(100));
    let error = near.receive("Prepared", within(LONG)).unwrap_err();
    assert!(matches!(error, ControlError::Silent { .. }), "{error}");
}

#[test]
fn a_sign_of_life_elsewhere_counts() {
    let (near, _far) = pair(Duration::from_millis(900));
    let bytes = AtomicU64::new(0);
    near.watch_elsewhere(move || bytes.fetch_add(1, Ordering::Relaxed));
    thread::sleep(Duration::from_secs(2));
    assert!(near.poll("anything").unwrap().is_none());
    near.watch_elsewhere(|| 1);
    let error = near.receive("a sign of life", within(LONG)).unwrap_err();
    assert!(matches!(error, ControlError::Silent { .. }), "{error}");
}

#[test]
fn what_a_peer_said_before_it_closed_is_read_although_it_cannot_be_answered() {
    let (near, far) = UnixStream::pair().unwrap();
    write(&far, &Message::Ping(1).encode().unwrap());
    write(&far, &Message::Running.encode().unwrap());
    // The answer to the ping cannot be written.
    drop(far);
    let near = ControlConnection::keep(Arc::new(near), LONG).unwrap();
    assert_eq!(near.receive("Running", within(LONG)).unwrap(), Message::Running);
}

#[test]
fn a_peer_that_asks_and_does_not_read_delays_no_wait_beyond_its_deadline() {
    let (near, far) = pair(LONG);
    let pings: Vec<u8> = (0..200_000).flat_map(|number| Message::Ping(number).encode().unwrap()).collect();
    let flooding = thread::spawn(move || {
        let _ = send_bytes(&far, "pings", &pings, within(Duration::from_secs(2)));
        far
    });
    thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    let _ = near.send(&Message::Commit, within(Duration::from_millis(100)));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    drop(near);
    drop(flooding.join().unwrap());
}

#[test]
fn a_peer_that_floods_is_cut_off() {
    let (near, far) = pair(LONG);
    let message = Message::Running.encode().unwrap();
    for _ in 0..=INBOX_MAX {
        let _ = far.write(&message, Instant::now() + LONG);
    }
    while near.shared.state.lock().end.is_none() {
        thread::yield_now();
    }
    for _ in 0..INBOX_MAX {
        near.receive("Running", within(LONG)).unwrap();
    }
    assert!(matches!(near.receive("Running", within(LONG)), Err(ControlError::Flooded)));
}

#[test]
fn a_stranger_that_drips_or_keeps_silent_is_given_up_at_the_deadline() {
    let (near, far) = UnixStream::pair().unwrap();
    let dripping = thread::spawn(move || {
        let hello = Message::Commit.encode().unwrap();
        for byte in &hello[..hello.len() - 1] {
            write(&far, &[*byte]);
            thread::sleep(Duration::from_millis(5));
        }
        far
    });
    let error = first_message(&near, "Hello", within(Duration::from_millis(60))).unwrap_err();
    assert!(matches!(error, ControlError::Timeout { expected: "Hello" }), "{error}");
    drop(dripping.join().unwrap());
}

#[test]
fn the_last_message_is_read_although_its_sender_has_ended() {
    let (near, far) = pair(LONG);
    let far = ControlConnection::keep(Arc::new(far), LONG).unwrap();
    near.send(&Message::Running, within(LONG)).unwrap();
    let ending = thread::spawn(move || near.finish());
    assert_eq!(far.receive("Running", within(LONG)).unwrap(), Message::Running);
    drop(far);
    ending.join().unwrap();
}
