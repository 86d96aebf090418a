//! One outgoing channel: its thread, its connection, and the connection after that one.
//!
//! How a connection is made is in `channel/connect.rs`, what happens while it lives in `channel/connection.rs`; how
//! much its link is given in `channel/link.rs`; how pages leave in `channel/method.rs`.

mod connect;
mod connection;
mod link;
mod method;

use std::sync::atomic::Ordering;
use std::time::Duration;

use self::connect::{Connected, connect};
use self::connection::Connection;
use super::counters::ChannelLoss;
use super::error::TransportError;
use super::scheduler::Unacknowledged;
use super::session::Session;

/// Pauses between attempts to reconnect. The longest is well below the time for which a round waits for a channel.
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// An attempt may take this long.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The channel's thread: one connection after the other until the sender ends. `connected` hears how the first attempt
/// went; after a failure that is all.
pub(super) fn run(session: &Session, index: usize, connected: impl FnOnce(Result<(), TransportError>)) {
    let counters = &session.counters.channels[index];
    let mut connection = match connect(session, index, session.options.connect_timeout) {
        Ok(connection) => connection,
        Err(error) => return connected(Err(error)),
    };
    session.scheduler.joined();
    connected(Ok(()));
    let mut pause = RECONNECT_FIRST;
    loop {
        let (carried_anything, end) = serve(session, index, connection);
        if end.map_or_else(|error| error.is_final(), |()| true) {
            return;
        }
        if carried_anything {
            pause = RECONNECT_FIRST;
        }
        match reconnect(session, index, &mut pause) {
            Some(again) => connection = again,
            None => return,
        }
        counters.reconnects.add(1);
        session.scheduler.joined();
        tracing::info!(channel = %counters.spec, "channel reconnected");
    }
}

/// Lets a connection live, and hands what it leaves unacknowledged to the others. Whether it carried anything, and how
/// it ended: well only when the sender ends.
fn serve(session: &Session, index: usize, connected: Connected) -> (bool, Result<(), TransportError>) {
    let counters = &session.counters.channels[index];
    let number = connected.number;
    counters.connected.store(true, Ordering::Relaxed);
    let (carried_anything, end, unacknowledged) = match Connection::new(session, counters, connected) {
        Ok(mut connection) => {
            let end = connection.serve();
            (connection.carried_anything(), end, connection.unacknowledged())
        }
        Err(error) => (false, Err(error), Unacknowledged::default()),
    };
    counters.connected.store(false, Ordering::Relaxed);
    if let Err(error) = &end {
        let pages_returned = unacknowledged.runs.iter().map(|run| run.pages).sum();
        counters.pages_returned.add(pages_returned);
        tracing::warn!(channel = %counters.spec, pages_returned, %error, "channel lost");
        session.counters.lost(ChannelLoss {
            index,
            channel: counters.spec.clone(),
            at: session.begun.elapsed(),
            round: session.scheduler.round(),
            pages_returned,
            reason: error.to_string(),
        });
    }
    // This comes last: it wakes the thread that waits for the round, which then finds the loss on record.
    session.scheduler.lost(number, unacknowledged);
    (carried_anything, end)
}

fn reconnect(session: &Session, index: usize, pause: &mut Duration) -> Option<Connected> {
    while session.options.reconnect && session.scheduler.sleep(*pause) {
        *pause = (*pause * 2).min(RECONNECT_MAX);
        match connect(session, index, session.options.connect_timeout.min(RECONNECT_TIMEOUT)) {
            Ok(connected) => return Some(connected),
            // The destination has decided; asking again will not change its mind.
            Err(error) if error.is_final() => return None,
            Err(error) => tracing::debug!(index, %error, "cannot reconnect yet"),
        }
    }
    None
}
