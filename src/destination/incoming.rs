//! A VM that a source offers, with a seat at this destination.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::DestinationError;
use super::seats::Seat;
use crate::layout::PageRun;
use crate::transport::DataListener;
use crate::transport::control::{ControlConnection, Wait};
use crate::wire::control::Message;
use crate::wire::hello::{Block, Hello};
use crate::wire::reason::Reason;

/// How long a source is told why not.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A VM that a source offers.
#[derive(Debug)]
pub struct Incoming {
    pub(super) control: ControlConnection,
    hello: Hello,
    pub(super) data: Arc<DataListener>,
    /// Other sources hear that this side is busy as long as it is taken.
    _seat: Seat,
}

impl Incoming {
    pub(super) fn new(control: ControlConnection, hello: Hello, data: Arc<DataListener>, seat: Seat) -> Self {
        Self { control, hello, data, _seat: seat }
    }

    pub(super) fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The offered VM's RAM in guest-physical order.
    pub fn ram(&self) -> &[PageRun] {
        &self.hello.ram
    }

    /// The offered VM's blocks of memory outside guest-physical space.
    pub fn blocks(&self) -> &[Block] {
        &self.hello.blocks
    }

    /// The offered VM's vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.hello.vcpus
    }

    /// The offered VM's name among those of its owner; may be empty.
    pub fn vm_id(&self) -> &str {
        &self.hello.vm_id
    }

    /// What the source's VMM says of the VM, in its own format. It comes from a peer.
    pub fn description(&self) -> &[u8] {
        &self.hello.description
    }

    /// Tells the source that this VM is not wanted, and why. Returns the error to report here.
    pub fn refuse(self, reason: Reason, text: String) -> DestinationError {
        let never = AtomicBool::new(false);
        let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel: &never };
        match self.control.send(&Message::Refuse(reason, text.clone()), wait) {
            Ok(()) => self.control.finish(),
            Err(error) => tracing::warn!(%error, "the source could not be told"),
        }
        DestinationError::Refused { reason, text }
    }

    /// The source may be the one that ended it, or be gone; then nobody hears this.
    pub(super) fn tell_of_the_end(self, error: &DestinationError) {
        if matches!(error, DestinationError::Aborted { .. }) {
            return;
        }
        let never = AtomicBool::new(false);
        let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel: &never };
        if self.control.send(&Message::Abort(error.reason(), error.to_string()), wait).is_ok() {
            self.control.finish();
        }
    }

    /// The last word has been said: waits a moment until the source has read it.
    pub(super) fn finish(self) {
        self.control.finish();
    }
}
