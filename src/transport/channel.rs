//! One outgoing channel: its thread, its connection, and the connection after that one.
//!
//! This file connects, greets and reconnects. What happens while a connection lives is in
//! `channel/connection.rs`; how much its link is given in `channel/link.rs`; how pages leave in
//! `channel/method.rs`.

mod connection;
mod link;
mod method;

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use self::connection::Connection;
pub(super) use self::method::SharedRegistration;
use super::counters::ChannelLoss;
use super::deal::Unacknowledged;
use super::send::Shared;
use super::{TransportError, socket};
use crate::wire::data::{DataHello, DataWelcome, Verdict};

/// Pauses between attempts to reconnect.
const RECONNECT_FIRST: Duration = Duration::from_millis(250);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// An attempt may take this long; nothing waits for it, but the end of the sender might.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection whose greeting was answered.
pub(super) struct Connected {
    stream: Arc<TcpStream>,
    number: u32,
}

/// Connects channel `index` and shakes hands.
pub(super) fn connect(shared: &Shared, index: usize, timeout: Duration) -> Result<Connected, TransportError> {
    let spec = &shared.counters.channels[index].spec;
    let failed = |source| TransportError::Connect { channel: spec.clone(), source };
    let stream = spec.dial(timeout, &|| shared.is_cancelled()).map_err(failed)?;
    socket::prepare(&stream, shared.options.stall_timeout).map_err(failed)?;
    let deadline = Instant::now() + timeout;
    let number = shared.connection_number();
    let channel = u16::try_from(index).unwrap_or(u16::MAX);
    let hello = DataHello::new(shared.token.0, channel, number);
    (&stream).write_all(hello.as_bytes()).map_err(failed)?;
    let mut answer = [0; DataWelcome::BYTES];
    socket::read_exact_before(&stream, &mut answer, deadline).map_err(failed)?;
    match DataWelcome::read(&answer) {
        Ok(Verdict::Welcome) => Ok(Connected { stream: Arc::new(stream), number }),
        Ok(verdict) => Err(TransportError::Refused { channel: spec.clone(), verdict }),
        Err(source) => Err(TransportError::Malformed { peer: spec.to_string(), source }),
    }
}

/// The channel's thread: one connection after the other until the sender ends.
pub(super) fn run(shared: &Shared, index: usize, first: Connected) {
    let counters = &shared.counters.channels[index];
    let mut connected = first;
    loop {
        counters.connected.store(true, Ordering::Relaxed);
        let number = connected.number;
        let (end, unacknowledged) = match Connection::new(shared, counters, connected) {
            Ok(mut connection) => {
                let end = connection.serve();
                (end, connection.unacknowledged())
            }
            Err(error) => (Err(error), Unacknowledged::default()),
        };
        counters.connected.store(false, Ordering::Relaxed);
        let Err(error) = end else {
            shared.dealer.lost(number, unacknowledged);
            return;
        };
        let pages_returned = unacknowledged.runs.iter().map(|run| run.pages).sum();
        counters.pages_returned.add(pages_returned);
        tracing::warn!(channel = %counters.spec, pages_returned, %error, "channel lost");
        let loss = ChannelLoss {
            index,
            channel: counters.spec.clone(),
            at: shared.begun.elapsed(),
            round: shared.dealer.round(),
            pages_returned,
            reason: error.to_string(),
        };
        shared.counters.lost(loss);
        // Last: it wakes whoever waits for the round, and finds the loss on record.
        shared.dealer.lost(number, unacknowledged);
        match reconnect(shared, index) {
            Some(again) => connected = again,
            None => return,
        }
        counters.reconnects.add(1);
        shared.dealer.joined();
        tracing::info!(channel = %counters.spec, "channel reconnected");
    }
}

fn reconnect(shared: &Shared, index: usize) -> Option<Connected> {
    let mut pause = RECONNECT_FIRST;
    while shared.options.reconnect && !shared.is_cancelled() && shared.dealer.sleep(pause) {
        match connect(shared, index, shared.options.connect_timeout.min(RECONNECT_TIMEOUT)) {
            Ok(connected) => return Some(connected),
            // The destination has decided; asking again will not change its mind.
            Err(TransportError::Refused { .. }) => return None,
            Err(error) => tracing::debug!(index, %error, "cannot reconnect yet"),
        }
        pause = (pause * 2).min(RECONNECT_MAX);
    }
    None
}
