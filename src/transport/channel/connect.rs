//! How a channel gets a connection: dialled, greeted, welcomed.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use crate::transport::error::TransportError;
use crate::transport::session::Session;
use crate::transport::socket;
use crate::wire::data::{DataHello, DataWelcome, Role, Verdict};

/// A connection whose greeting was answered.
pub(super) struct Connected {
    pub stream: Arc<TcpStream>,
    pub number: u32,
}

/// Connects channel `index` and shakes hands, within `timeout` and only as long as the session does not end.
pub(super) fn connect(
    session: &Session,
    index: usize,
    timeout: Duration,
) -> Result<Connected, TransportError> {
    let spec = &session.counters.channels[index].spec;
    let cancelled = || session.is_ending();
    let failed = |source| match cancelled() {
        true => TransportError::Cancelled,
        false => TransportError::Connect { channel: spec.clone(), source },
    };
    let deadline = Instant::now() + timeout;
    let stream = spec.dial(timeout, &cancelled).map_err(failed)?;
    socket::prepare(&stream, session.options.stall_timeout).map_err(failed)?;
    let number = session.connection_number();
    let channel = u16::try_from(index).unwrap_or(u16::MAX);
    let hello = DataHello::new(session.token.0, channel, number, Role::Bulk);
    (&stream).write_all(hello.as_bytes()).map_err(failed)?;
    let mut answer = [0; DataWelcome::BYTES];
    socket::read_exact_before(&stream, &mut answer, deadline, &cancelled).map_err(failed)?;
    match DataWelcome::read(&answer) {
        Ok((Verdict::Welcome, _)) => Ok(Connected { stream: Arc::new(stream), number }),
        Ok((verdict, _)) => Err(TransportError::Refused { channel: spec.clone(), verdict }),
        Err(source) => Err(TransportError::Malformed { peer: spec.to_string(), source }),
    }
}
