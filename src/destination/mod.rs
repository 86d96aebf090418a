//! The incoming side: from an offered VM to one that runs here, or to nothing at all.
//!
//! [`Destination`] listens, [`Incoming`] is a VM that a source has offered and nobody has accepted yet. The VMM
//! looks at what is offered, builds a VM of that shape, and calls [`Incoming::receive`], which mirrors
//! [`source`](crate::source) phase by phase. Until `Commit` arrives, every failure means that the VM stays with
//! the source and what was received is worthless; from `Commit` on the VM is ours.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::layout::{GuestMemory, PAGE_SIZE, PageRun};
use crate::page::ram_digest;
use crate::transport::control::{ControlConnection, ControlError};
use crate::transport::{DataListener, MigrationToken, Receiver, TransportError};
use crate::vm::{Paused, Vm, VmError};
use crate::wire::CHANNELS_MAX;
use crate::wire::control::{Hello, Message, PROTOCOL};

/// How often a waiting destination looks whether it has been cancelled.
const ACCEPT_POLL: Duration = Duration::from_millis(20);
/// A peer that has connected says who it is within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; is the port in use, and the address this host's?")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// No source in the time that there was.
    #[error("nobody connected to {address} within {} s: let the source send to this address", waited.as_secs_f32())]
    NobodyCame {
        /// Where we waited.
        address: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// A non-loopback address without the user's word that the network is trusted.
    #[error(
        "{0} can be reached from other machines, and this connection is neither encrypted nor authenticated: \
         listen on a loopback address (and tunnel), or say --insecure on a network that you trust"
    )]
    Exposed(SocketAddr),
    /// The control connection failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The data connections failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The peer said something that its phase does not allow.
    #[error("expected {expected} from the source, got {got}")]
    Unexpected {
        /// What the phase allows.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
    /// This side will not take the VM.
    #[error("refused the migration: {0}")]
    Refused(String),
    /// The source gave up; the VM runs there.
    #[error("the source ended the migration: {0}")]
    Aborted(String),
    /// RAM differs from the source's: nothing was taken over.
    #[error("RAM differs from the source's (digest {ours:032x} here, {theirs:032x} there): not taken over")]
    DigestMismatch {
        /// Digest here.
        ours: u128,
        /// Digest at the source.
        theirs: u128,
    },
    /// The VMM could not restore or resume.
    #[error("the VMM could not {action}: {source}")]
    Vm {
        /// What it was asked.
        action: &'static str,
        /// Its own error.
        source: VmError,
    },
    /// Somebody asked this side to stop.
    #[error("cancelled")]
    Cancelled,
}

/// What the user of a destination chooses.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// Longest time without a page and without a word.
    pub silence: Duration,
    /// Longest time from `Prepared` to `Commit`.
    pub commit: Duration,
    /// Where data connections are awaited, for dedicated NICs; if empty, on a free port of the address at which
    /// the source reached the control connection.
    pub data_addresses: Vec<SocketAddr>,
}

impl Default for DestinationOptions {
    /// A minute for either, data on the control connection's address.
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self { silence: minute, commit: minute, data_addresses: Vec::new() }
    }
}

/// Waits for a migration.
#[derive(Debug)]
pub struct Destination {
    listener: TcpListener,
    insecure: bool,
}

impl Destination {
    /// Listens for the control connection of a source.
    ///
    /// # Errors
    ///
    /// [`DestinationError::Exposed`] for a non-loopback address unless `insecure`, [`DestinationError::Listen`]
    /// if the address is in use or not ours.
    pub fn bind(address: SocketAddr, insecure: bool) -> Result<Self, DestinationError> {
        if !address.ip().is_loopback() && !insecure {
            return Err(DestinationError::Exposed(address));
        }
        let listen = |source| DestinationError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        Ok(Self { listener, insecure })
    }

    /// Where it listens; with the port that the kernel chose, if none was asked for.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for a source to offer a VM, for `limit` if there is one. After an error the next source may be
    /// waited for.
    ///
    /// # Errors
    ///
    /// [`DestinationError`]: nobody came, a peer that is not a Ringferry source, or of another version, or
    /// cancelled.
    pub fn accept(&self, limit: Option<Duration>, cancel: &AtomicBool) -> Result<Incoming, DestinationError> {
        let since = Instant::now();
        let address = self.listener.local_addr().map_err(|source| DestinationError::Listen {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            source,
        })?;
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(ACCEPT_POLL),
                Err(source) => return Err(DestinationError::Listen { address, source }),
            }
            // Relaxed: a flag without data, read again at the next poll.
            if cancel.load(Ordering::Relaxed) {
                return Err(DestinationError::Cancelled);
            }
            if let Some(waited) = limit.filter(|limit| since.elapsed() > *limit) {
                return Err(DestinationError::NobodyCame { address, waited });
            }
        };
        let local = stream
            .set_nonblocking(false)
            .and_then(|()| stream.local_addr())
            .map_err(|source| DestinationError::Listen { address, source })?;
        let mut control = ControlConnection::from_stream(stream)
            .map_err(|source| DestinationError::Listen { address, source })?;
        let hello = match control.receive("Hello", HELLO_TIMEOUT, cancel)? {
            Message::Hello(hello) => hello,
            other => return Err(DestinationError::Unexpected { expected: "Hello", got: other.name() }),
        };
        let mut incoming = Incoming { control, hello, local, insecure: self.insecure };
        match incoming.objection() {
            Some(objection) => Err(incoming.refuse(objection)),
            None => Ok(incoming),
        }
    }
}

/// A VM that a source offers.
#[derive(Debug)]
pub struct Incoming {
    control: ControlConnection,
    hello: Hello,
    local: SocketAddr,
    insecure: bool,
}

impl Incoming {
    /// The offered VM's RAM in guest-physical order.
    pub fn ram(&self) -> &[PageRun] {
        &self.hello.ram
    }

    /// The offered VM's vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.hello.vcpus
    }

    /// Tells the source that this VM is not wanted, and why. Returns the error to report here.
    pub fn refuse(&mut self, why: String) -> DestinationError {
        if let Err(error) = self.control.send(&Message::Refuse(why.clone()), HELLO_TIMEOUT) {
            tracing::warn!(%error, "the source could not be told");
        }
        DestinationError::Refused(why)
    }

    fn objection(&self) -> Option<String> {
        let Hello { protocol, page_bytes, channels, .. } = self.hello;
        if protocol != PROTOCOL {
            Some(format!(
                "the source speaks protocol {protocol}, this destination {PROTOCOL}: use the same version"
            ))
        } else if usize::try_from(page_bytes) != Ok(PAGE_SIZE) {
            Some(format!("the source's pages have {page_bytes} bytes, this destination's {PAGE_SIZE}"))
        } else if channels == 0 || channels > u32::from(CHANNELS_MAX) {
            Some(format!("{channels} data connections asked for, 1 to {CHANNELS_MAX} are possible"))
        } else {
            None
        }
    }

    fn mismatch(&self, vcpus: u32, memory: &GuestMemory) -> Option<String> {
        let ours: Vec<PageRun> = memory.regions().iter().map(|region| region.pages).collect();
        let bytes = |runs: &[PageRun]| runs.iter().map(|r| u128::from(r.pages)).sum::<u128>() << 12;
        let (have, need) = (bytes(&ours), bytes(&self.hello.ram));
        if vcpus != self.hello.vcpus {
            Some(format!("the VM has {} vCPUs, the destination's {vcpus}", self.hello.vcpus))
        } else if have != need {
            Some(format!(
                "the VM has {} MiB of RAM, the destination's {} MiB: start the destination with the same size",
                need >> 20,
                have >> 20
            ))
        } else if merged(&ours) != merged(&self.hello.ram) {
            Some("the VM's RAM lies at other guest addresses than the destination's".to_owned())
        } else {
            None
        }
    }

    /// Takes the VM: returns when it runs here.
    ///
    /// `vm` has been built with the offered shape and has not run; `memory` is its RAM, all zero.
    ///
    /// # Errors
    ///
    /// [`DestinationError`]. With one exception the VM is then the source's: if the VMM fails to resume
    /// ([`DestinationError::Vm`] with action "resume"), the VM is here, complete and paused.
    pub fn receive(
        mut self,
        vm: &mut dyn Vm,
        vcpus: u32,
        memory: &GuestMemory,
        options: &DestinationOptions,
        cancel: &AtomicBool,
    ) -> Result<DestinationReport, DestinationError> {
        if let Some(mismatch) = self.mismatch(vcpus, memory) {
            return Err(self.refuse(mismatch));
        }
        let started = Instant::now();
        match self.precommit(vm, memory, options, cancel) {
            Ok((paused, report)) => self.take_over(vm, paused, report, started),
            Err(error) => {
                // The source may be the one who ended it, or be gone: then nobody hears this.
                if !matches!(error, DestinationError::Aborted(_)) {
                    let _ = self.control.send(&Message::Abort(error.to_string()), HELLO_TIMEOUT);
                }
                Err(error)
            }
        }
    }

    /// Everything up to and including `Commit`.
    fn precommit(
        &mut self,
        vm: &mut dyn Vm,
        memory: &GuestMemory,
        options: &DestinationOptions,
        cancel: &AtomicBool,
    ) -> Result<(Paused, DestinationReport), DestinationError> {
        let receiver = self.open_channels(memory, &options.data_addresses)?;
        let mut state = None;
        let (paused, theirs) = loop {
            self.wait_for_word(&receiver, options.silence, cancel)?;
            match self.control.receive("State or Prepare", options.silence, cancel)? {
                Message::State(bytes) => state = Some(bytes),
                Message::Prepare { ram_digest } => match state.take() {
                    Some(state) => {
                        let restored = vm.restore_state(&state);
                        let paused = restored
                            .map_err(|source| DestinationError::Vm { action: "restore the state", source })?;
                        break (paused, ram_digest);
                    }
                    None => return Err(DestinationError::Unexpected { expected: "State", got: "Prepare" }),
                },
                Message::Abort(why) => return Err(DestinationError::Aborted(why)),
                other => {
                    return Err(DestinationError::Unexpected {
                        expected: "State or Prepare",
                        got: other.name(),
                    });
                }
            }
        };
        // The source sends `Prepare` when every page has been acknowledged; from here on nobody writes RAM.
        let received = receiver.close();
        let mut report = DestinationReport {
            pages_received: received.pages,
            zero_pages: received.zero_pages,
            bytes_received: received.bytes,
            ..DestinationReport::default()
        };
        let ours = if self.hello.verify { ram_digest(memory, &paused).digest.0 } else { 0 };
        if ours != theirs {
            return Err(DestinationError::DigestMismatch { ours, theirs });
        }
        report.ram_digest_match = self.hello.verify.then_some(true);
        self.control.send(&Message::Prepared { ram_digest: ours }, options.commit)?;
        match self.control.receive("Commit", options.commit, cancel)? {
            Message::Commit => Ok((paused, report)),
            Message::Abort(why) => Err(DestinationError::Aborted(why)),
            other => Err(DestinationError::Unexpected { expected: "Commit", got: other.name() }),
        }
    }
}

impl Incoming {
    fn open_channels(
        &mut self,
        memory: &GuestMemory,
        addresses: &[SocketAddr],
    ) -> Result<Receiver, DestinationError> {
        let beside_control = [SocketAddr::new(self.local.ip(), 0)];
        let addresses = if addresses.is_empty() { &beside_control } else { addresses };
        let is_exposed = |address: &&SocketAddr| !self.insecure && !address.ip().is_loopback();
        if let Some(exposed) = addresses.iter().find(is_exposed) {
            return Err(DestinationError::Exposed(*exposed));
        }
        let listener = DataListener::bind(addresses)?;
        let data_port = listener.addresses().first().map_or(0, SocketAddr::port);
        let receiver = listener.receive(MigrationToken(self.hello.token), memory.clone())?;
        self.control.send(&Message::Accept { protocol: PROTOCOL, data_port }, HELLO_TIMEOUT)?;
        Ok(receiver)
    }

    /// Waits for the source's next word. It says nothing while pages flow, for hours if need be: only when no
    /// page has come for `silence` either is it gone.
    fn wait_for_word(
        &self,
        receiver: &Receiver,
        silence: Duration,
        cancel: &AtomicBool,
    ) -> Result<(), DestinationError> {
        let (mut bytes, mut since) = (receiver.received().bytes, Instant::now());
        while !self.control.is_readable() {
            // Relaxed: a flag without data, read again at the next poll.
            if cancel.load(Ordering::Relaxed) {
                return Err(DestinationError::Cancelled);
            }
            let now = receiver.received().bytes;
            if now != bytes {
                (bytes, since) = (now, Instant::now());
            } else if since.elapsed() > silence {
                let expected = "pages or word";
                return Err(ControlError::Timeout { expected, waited: silence }.into());
            }
        }
        Ok(())
    }

    /// After `Commit`: the VM is ours, and only the VMM itself can still fail.
    fn take_over(
        &mut self,
        vm: &mut dyn Vm,
        paused: Paused,
        mut report: DestinationReport,
        started: Instant,
    ) -> Result<DestinationReport, DestinationError> {
        vm.resume(paused).map_err(|source| DestinationError::Vm { action: "resume", source })?;
        if let Err(error) = self.control.send(&Message::Running, HELLO_TIMEOUT) {
            tracing::warn!(%error, "the VM runs here, but the source could not be told");
        }
        report.total_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(report)
    }
}

/// What arrived.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct DestinationReport {
    /// Pages whose contents arrived; those sent twice count twice.
    pub pages_received: u64,
    /// Pages that arrived as "zero".
    pub zero_pages: u64,
    /// Bytes on the data connections.
    pub bytes_received: u64,
    /// From the acceptance to the first vCPU running here.
    pub total_ms: f64,
    /// Whether RAM digests are equal; `None` if they were not compared.
    pub ram_digest_match: Option<bool>,
}

/// Adjacent runs joined, so that two hosts may cut the same RAM into slots differently.
fn merged(runs: &[PageRun]) -> Vec<PageRun> {
    let mut merged: Vec<PageRun> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.first.0.checked_add(last.pages) == Some(run.first.0) => {
                last.pages = last.pages.saturating_add(run.pages);
            }
            _ => merged.push(*run),
        }
    }
    merged
}
