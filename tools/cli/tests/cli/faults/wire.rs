//! A wire between the two sides that can be cut: forwards bytes until it is told otherwise.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// One address, forwarded to another one.
pub struct Wire {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Nothing goes through any more.
    swallows: bool,
    /// What is connected: to us, and from us to the destination.
    connected: Vec<(TcpStream, TcpStream)>,
}

impl Wire {
    /// A wire to `to`; each piece takes `delay`.
    pub fn to(to: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let of_thread = Arc::clone(&state);
        // It lives as long as the test's process: a few descriptors.
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(to) else { continue };
                let ends = || (near.try_clone().unwrap(), far.try_clone().unwrap());
                of_thread.lock().unwrap().connected.push(ends());
                for (from, into) in [ends(), (ends().1, ends().0)] {
                    let state = Arc::clone(&of_thread);
                    thread::spawn(move || forward(from, into, delay, &state));
                }
            }
        });
        Self { address, state }
    }

    /// Closes what is connected.
    pub fn cut(&self) {
        for (near, far) in self.state.lock().unwrap().connected.drain(..) {
            // Either may be closed.
            let _ = near.shutdown(Shutdown::Both);
            let _ = far.shutdown(Shutdown::Both);
        }
    }

    /// Closes the way to the destination.
    pub fn half_cut(&self) {
        for (near, far) in &self.state.lock().unwrap().connected {
            let _ = near.shutdown(Shutdown::Read);
            let _ = far.shutdown(Shutdown::Write);
        }
    }

    /// Swallows everything from here on.
    pub fn swallow(&self) {
        self.state.lock().unwrap().swallows = true;
    }
}

fn forward(mut from: TcpStream, mut into: TcpStream, delay: Duration, state: &Mutex<State>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        thread::sleep(delay);
        let swallows = state.lock().unwrap().swallows;
        if !swallows && into.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    if !state.lock().unwrap().swallows {
        // Either may be closed.
        let _ = into.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
    }
}
