//! The incoming side: from an offered VM to one that runs here, or to nothing at all.
//!
//! ```text
//! door       strangers are greeted side by side, briefly; sources wait for a seat or hear "busy"
//! setup      an offered VM is accepted or refused; data connections are awaited
//! receive    pages and device state arrive; the guest runs at the source
//! prepare    all has arrived: verify, restore, take what can fail; PREPARED
//! take_over  COMMIT: the VM runs here, or the source hears a definite no
//! ```
//!
//! A VMM calls [`Destination::accept`], looks at what is offered, builds a VM of that shape, and calls
//! [`Incoming::receive`], which mirrors [`source`](crate::source) phase by phase. Until `Commit` arrives, every failure
//! means that the VM stays with the source and what was received is worthless; from `Commit` on the VM is ours, unless we
//! say that it is not.

mod door;
mod error;
mod incoming;
mod options;
mod prepare;
mod receive;
mod report;
mod seats;
mod setup;
mod take_over;
mod verification;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

pub use error::DestinationError;
pub use incoming::Incoming;
pub use options::{DestinationOptions, ListenOptions};
pub use report::DestinationReport;

use self::door::Door;
use self::receive::Receiving;
use crate::layout::GuestMemory;
use crate::vm::Vm;
use crate::wire::reason::Reason;

/// Waits for migrations.
#[derive(Debug)]
pub struct Destination {
    door: Door,
}

impl Destination {
    /// Listens for sources.
    ///
    /// # Errors
    ///
    /// [`DestinationError::Exposed`] for a non-loopback address unless `insecure`, [`DestinationError::Listen`]
    /// or [`DestinationError::Transport`] if an address is in use or not ours.
    pub fn bind(options: ListenOptions) -> Result<Self, DestinationError> {
        Door::open(options).map(|door| Self { door })
    }

    /// Where it listens; with the port that the kernel chose, if none was asked for.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.door.local_addr()
    }

    /// Waits for a source to offer a VM, for `limit` if there is one. Whoever is no source of ours is turned away and not
    /// told of here.
    ///
    /// # Errors
    ///
    /// [`DestinationError::NobodyCame`] or [`DestinationError::Cancelled`].
    pub fn accept(&self, limit: Option<Duration>, cancel: &AtomicBool) -> Result<Incoming, DestinationError> {
        self.door.accept(limit, cancel)
    }
}

impl Incoming {
    /// Takes the VM: returns when it runs here.
    ///
    /// `vm` has been built with the offered shape and has not run; `memory` is its RAM. What is in it is overwritten or
    /// cleared.
    ///
    /// # Errors
    ///
    /// [`DestinationError`]; the VM is then the source's, and `vm` must never run.
    pub fn receive(
        self,
        vm: &mut dyn Vm,
        vcpus: u32,
        memory: &GuestMemory,
        options: &DestinationOptions,
        cancel: &AtomicBool,
    ) -> Result<DestinationReport, DestinationError> {
        if let Some(mismatch) = setup::mismatch(self.hello(), vcpus, memory) {
            return Err(self.refuse(Reason::Layout, mismatch));
        }
        let started = Instant::now();
        let mut receiving = match setup::run(&self, memory, options, cancel) {
            Ok(receiving) => receiving,
            Err(error) => {
                self.tell_of_the_end(&error);
                return Err(error);
            }
        };
        match take(&mut receiving, &self, vm, options, cancel) {
            Ok(report) => {
                let total_ms = started.elapsed().as_secs_f64() * 1e3;
                self.finish();
                Ok(DestinationReport { total_ms, ..report })
            }
            Err(error) => {
                // First what the source needs to run the VM again, then the word that it may, and only then the
                // connections, whose threads take a while to end.
                vm.release();
                self.tell_of_the_end(&error);
                drop(receiving);
                Err(error)
            }
        }
    }
}

/// The phases after setup, in their order. The receiver outlives them all.
fn take(
    receiving: &mut Receiving,
    incoming: &Incoming,
    vm: &mut dyn Vm,
    options: &DestinationOptions,
    cancel: &AtomicBool,
) -> Result<DestinationReport, DestinationError> {
    let arrived = receive::run(receiving, incoming, vm, cancel)?;
    let prepared = prepare::run(receiving, &arrived, incoming, vm, options, cancel)?;
    take_over::run(prepared, incoming, vm, options, cancel)
}
