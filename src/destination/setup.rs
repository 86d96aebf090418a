//! The first phase: an offered VM, which the VMM accepts by receiving it, or refuses.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::door::Seat;
use super::error::DestinationError;
use super::receive::Receiving;
use super::report::DestinationReport;
use super::{DestinationOptions, prepare, receive};
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun};
use crate::transport::control::{ControlConnection, Wait};
use crate::transport::{DataListener, MigrationToken};
use crate::vm::Vm;
use crate::wire::CHANNELS_MAX;
use crate::wire::control::Message;
use crate::wire::features::{self, Feature};
use crate::wire::hello::{Accept, Block, Hello};
use crate::wire::reason::Reason;

/// How long a source is told why not.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A VM that a source offers.
#[derive(Debug)]
pub struct Incoming {
    pub(super) control: ControlConnection,
    pub(super) hello: Hello,
    data: Arc<DataListener>,
    /// Other sources hear that this side is busy as long as it is taken.
    _seat: Seat,
}

impl Incoming {
    pub(super) fn new(control: ControlConnection, hello: Hello, data: Arc<DataListener>, seat: Seat) -> Self {
        Self { control, hello, data, _seat: seat }
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
        if let Some(mismatch) = self.mismatch(vcpus, memory) {
            return Err(self.refuse(Reason::Layout, mismatch));
        }
        let started = Instant::now();
        let attempt = self.accept(memory, options, cancel).and_then(|receiving| {
            let arrived = receive::run(receiving, &self, vm, cancel)?;
            prepare::run(arrived, &self, vm, options, cancel)
        });
        let taken_over = attempt.and_then(|prepared| prepared.take_over(&self, vm, options, cancel, started));
        match taken_over {
            Ok(report) => {
                self.control.finish();
                Ok(report)
            }
            Err(error) => {
                vm.release();
                self.tell_of_the_end(&error);
                Err(error)
            }
        }
    }

    /// The source may be the one that ended it, or be gone; then nobody hears this.
    fn tell_of_the_end(self, error: &DestinationError) {
        if matches!(error, DestinationError::Aborted { .. }) {
            return;
        }
        let never = AtomicBool::new(false);
        let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel: &never };
        if self.control.send(&Message::Abort(error.reason(), error.to_string()), wait).is_ok() {
            self.control.finish();
        }
    }

    /// Begins to receive, and says so to the source.
    fn accept(
        &self,
        memory: &GuestMemory,
        options: &DestinationOptions,
        cancel: &AtomicBool,
    ) -> Result<Receiving, DestinationError> {
        let verify = self.hello.features.iter().any(|f| f.name == features::VERIFY && f.required);
        let receiver = self.data.receive(MigrationToken(self.hello.token), memory.clone())?;
        let receiving = Receiving::new(receiver, memory, verify, options)?;
        let accept = Accept {
            version: features::common_version(self.hello.oldest, self.hello.newest)
                .unwrap_or(features::NEWEST),
            data_port: self.data.addresses().first().map_or(0, std::net::SocketAddr::port),
            features: features::agree(&Feature::ours(&[]), &self.hello.features).unwrap_or_default(),
        };
        let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel };
        self.control.send(&Message::Accept(accept), wait)?;
        Ok(receiving)
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
}

/// Why a Hello is refused whatever the VMM can build.
pub(super) fn objection(hello: &Hello) -> Option<(Reason, String)> {
    let Hello { newest, oldest, page_bytes, channels, .. } = *hello;
    if features::common_version(oldest, newest).is_none() {
        let theirs = if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") };
        let ours = features::NEWEST;
        let text =
            format!("the source speaks protocol {theirs}, this destination {ours}: use the same version");
        return Some((Reason::Version, text));
    }
    if let Err(missing) = features::agree(&Feature::ours(&[]), &hello.features) {
        let text = format!("the source needs the feature `{missing}`, which this destination does not have");
        return Some((Reason::Feature, text));
    }
    if hello.resume.is_some() {
        return Some((Reason::Feature, "this destination keeps no session that could be resumed".to_owned()));
    }
    if usize::try_from(page_bytes) != Ok(PAGE_SIZE) {
        let text = format!("the source's pages have {page_bytes} bytes, this destination's {PAGE_SIZE}");
        return Some((Reason::Layout, text));
    }
    if channels == 0 || channels > u32::from(CHANNELS_MAX) {
        let text = format!("{channels} data connections asked for, 1 to {CHANNELS_MAX} are possible");
        return Some((Reason::Protocol, text));
    }
    None
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
