//! What stands between the two control connections: forwards whole messages, and does to one of them what a test wants.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use ringferry::wire::control::{HEAD_BYTES, Head, Message};

/// What becomes of a message.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    /// Both connections are closed instead of forwarding it.
    Cut,
    /// The first half of it is forwarded, then both are closed.
    Half,
    /// From here on nothing is forwarded in either direction, and nothing is closed.
    Stall,
}

/// The fault of one migration, if it has one.
#[derive(Clone, Copy, Default, Debug)]
pub struct Proxied {
    pub fault: Option<(&'static str, Fault)>,
    /// What the source is told besides, before the first word of the destination.
    pub inserted: Option<&'static [u8]>,
}

/// A proxy for one connection to `to`.
pub fn proxy(to: SocketAddr, proxied: Proxied) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(to).unwrap();
        let mut back = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        if let Some(bytes) = proxied.inserted {
            let _ = back.1.write_all(bytes);
        }
        thread::spawn(move || forward(back.0, back.1, proxied));
        forward(source, destination, proxied);
    });
    address
}

fn forward(mut from: TcpStream, mut to: TcpStream, proxied: Proxied) {
    let mut one = || -> Option<()> {
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head).ok()?;
        let parsed = Head::parse(head).unwrap();
        let mut body = vec![0; parsed.body_bytes()];
        from.read_exact(&mut body).ok()?;
        let message = Message::decode(&parsed, &body).unwrap().unwrap();
        let bytes = [head.as_slice(), &body].concat();
        match proxied.fault.filter(|(name, _)| *name == message.name()) {
            Some((_, Fault::Cut)) => None,
            Some((_, Fault::Half)) => {
                let _ = to.write_all(&bytes[..bytes.len() / 2]);
                None
            }
            Some((_, Fault::Stall)) => {
                // Whatever comes is swallowed until the source has had enough.
                while from.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {}
                None
            }
            None => to.write_all(&bytes).ok(),
        }
    };
    while one().is_some() {}
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
