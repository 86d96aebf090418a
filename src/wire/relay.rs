//! What a relay between both sides has to know of the wire: on which port the destination awaits data connections.

use std::io::{self, Read};

use super::control::{HEAD_BYTES, Head, Message};

/// The next message from the destination, as the source is to see it: data connections are awaited where `port` says, which is
/// told where the destination awaits them.
///
/// # Errors
///
/// What reading or `port` said, or that this is no message.
pub fn next_message(
    from: &mut (impl Read + ?Sized),
    port: &mut dyn FnMut(u16) -> io::Result<u16>,
) -> io::Result<Vec<u8>> {
    let mut head = [0; HEAD_BYTES];
    from.read_exact(&mut head)?;
    let parsed = Head::parse(head).map_err(io::Error::other)?;
    // `parse` has bounded it.
    let mut body = vec![0; parsed.body_bytes()];
    from.read_exact(&mut body)?;
    if let Ok(Some(Message::Accept(mut accept))) = Message::decode(&parsed, &body) {
        accept.data_port = port(accept.data_port)?;
        return Message::Accept(accept).encode().map_err(io::Error::other);
    }
    Ok([head.as_slice(), &body].concat())
}
