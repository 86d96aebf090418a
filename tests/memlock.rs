//! Sending without the right to lock memory: the fallbacks, and what is said about them.
//!
//! A test binary of its own: `RLIMIT_MEMLOCK` is the process's, and is changed here.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::thread;

use ringferry::testing::AnonymousRam;
use ringferry::transport::{
    ChannelSnapshot, ChannelSpec, DataListener, MigrationToken, RoundSent, SendOptions, Sender,
    TransportError, ZeroCopy,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

const PAGES: u64 = 2000;

/// The limit is the process's: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Room for the rings, whose memory counts too, but not to pin a frame of 4 MiB, let alone to register 8 MiB.
const LIMIT_BYTES: u64 = 1 << 20;
const FRAME_PAGES: u32 = 1024;

/// Sends a round by a thread (and channel threads that inherit from it) without `CAP_IPC_LOCK`, with `locked_bytes`
/// of memory that it may lock all the same.
fn send_unprivileged(
    zero_copy: ZeroCopy,
    locked_bytes: u64,
) -> Result<(RoundSent, ChannelSnapshot), TransportError> {
    // The upper limit stays: whether it may be raised again depends on the machine.
    let limit = Rlimit { current: Some(locked_bytes), ..getrlimit(Resource::Memlock) };
    setrlimit(Resource::Memlock, limit).unwrap();
    let (source, target) = (AnonymousRam::new(PAGES).unwrap(), AnonymousRam::new(PAGES).unwrap());
    source.fill(7);
    let listener = DataListener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let channel = ChannelSpec::to(listener.addresses()[0]);
    let token = MigrationToken([3; 16]);
    let receiver = listener.receive(token, target.memory().clone(), &AtomicBool::new(false)).unwrap();
    let send = move || {
        let held = capabilities(None).unwrap();
        let effective = held.effective - CapabilitySet::IPC_LOCK;
        set_capabilities(None, CapabilitySets { effective, ..held }).unwrap();
        let options = SendOptions {
            zero_copy,
            frame_pages_max: FRAME_PAGES,
            reconnect: false,
            ..SendOptions::default()
        };
        let memory = source.memory().clone();
        let mut sender = Sender::connect(&[channel], token, memory, options, &AtomicBool::new(false))?;
        let sent = sender.send_round(1, source.pages())?;
        Ok((sent, sender.counters().channels().remove(0)))
    };
    let sent = thread::spawn(send).join().unwrap();
    assert_eq!(receiver.close().pages, if sent.is_ok() { PAGES } else { 0 });
    sent
}

#[test]
fn without_memlock_pages_are_copied_and_the_report_says_what_to_raise() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for zero_copy in [ZeroCopy::AlwaysRegistered, ZeroCopy::Always, ZeroCopy::Auto] {
        let (sent, channel) = send_unprivileged(zero_copy, LIMIT_BYTES).unwrap();
        assert_eq!((sent.totals.pages_sent, sent.totals.zero_copy_sends), (PAGES, 0));
        assert!(sent.losses.is_empty() && sent.totals.copied_sends > 0, "{sent:?}");
        assert_eq!(channel.sending.registered_bytes, 0);
        let fallback = channel.sending.fallback.unwrap_or_default();
        assert!(fallback.contains("RLIMIT_MEMLOCK"), "{zero_copy:?}: `{fallback}`");
        assert!(channel.sending.copies, "{zero_copy:?}");
    }
}

#[test]
fn where_not_even_a_ring_may_be_locked_the_error_says_what_to_raise() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let error = send_unprivileged(ZeroCopy::Never, 0).unwrap_err();
    assert!(matches!(error, TransportError::NoChannelLeft { .. }), "{error}");
    assert!(error.to_string().contains("raise it (ulimit -l) or give CAP_IPC_LOCK"), "{error}");
}
