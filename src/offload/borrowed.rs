//! The VM as the offload process has it: memory that it maps, rings that it follows, and a VMM that it asks.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::channel::{Channel, VMM};
use super::error::OffloadError;
use super::kernel::{RemoteKernel, RemoteWriters};
use super::line::SharedLine;
use super::mapping::{Mapped, Passed, guest_memory};
use super::protocol::{End, Message, Offer, Role, Taker, VCPUS_MAX, VERSION};
use super::remote_session::{RemoteSession, figures};
use super::remote_vm::RemoteVm;
use super::vmm::Vmm;
use crate::kvm::RingSize;
use crate::layout::GuestMemory;
use crate::track::{BorrowedVcpu, DirtySource, DirtyTracker, LentPage, TrackError, VcpuFigures};

/// How long the VMM may take for each message of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to build a VM that is offered to it.
const BUILD_LIMIT: Duration = Duration::from_secs(30);

/// A VM that its VMM lends to this process, for it to be migrated from here.
pub struct BorrowedVm {
    /// What the VMM does.
    pub vm: RemoteVm,
    /// Its dirty pages.
    pub session: Box<dyn DirtySource>,
    /// Whether the VMM lives.
    pub vmm: Vmm,
    /// Its memory, as this process maps it.
    pub memory: GuestMemory,
    /// vCPUs.
    pub vcpus: u32,
    /// Its name; may be empty.
    pub vm_id: String,
    /// What the destination's VMM has to know.
    pub description: Vec<u8>,
    figures: Figures,
}

/// A VM that its VMM has built in this process's stead, for it to be received into.
#[derive(Debug)]
pub struct ArrivingVm {
    /// What the VMM does.
    pub vm: RemoteVm,
    /// Whether the VMM lives.
    pub vmm: Vmm,
    /// Its memory, as this process maps it.
    pub memory: GuestMemory,
}

/// Who knows what the vCPUs did.
enum Figures {
    /// The tracker of this process.
    Here(DirtyTracker),
    Vmm(SharedLine),
}

impl BorrowedVm {
    /// Takes what the VMM at the other end of `connection` lends.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: nothing is lent then, and the VM runs on.
    pub fn borrow(connection: OwnedFd) -> Result<Self, OffloadError> {
        let mut channel = Channel::new(connection, VMM)?;
        hello(&channel, Role::Source)?;
        let (message, descriptors) = answer(&mut channel, "lend the VM", HANDSHAKE_LIMIT)?;
        let Message::Lent { taker, ring_entries, vcpus, regions, vm_id, description, .. } = message else {
            return Err(channel.unexpected("Lent", &message));
        };
        let (line, vmm, memory);
        let (session, figures): (Box<dyn DirtySource>, _);
        if taker == Taker::OffloadProcess {
            let [page, kernel] = descriptors_of(descriptors)?;
            let page = open_page(page, usize_of(vcpus).max(1))?;
            let mapped = map_memory(&mut channel, regions)?;
            memory = guest_memory(&mapped, false)?;
            let kernel = RemoteKernel::new(Channel::new(kernel, VMM)?);
            let size = RingSize::from_entries(ring_entries).map_err(TrackError::from)?;
            let vcpus = borrow_vcpus(&mut channel, vcpus)?;
            let tracked = guest_memory(&mapped, true)?;
            let tracker = DirtyTracker::borrowed(Box::new(kernel.clone()), size, &tracked, &vcpus, &page)?;
            let all = memory.regions().iter().map(|region| region.pages).collect();
            tracker.add_external(Box::new(RemoteWriters { kernel, memory: all }))?;
            vmm = Vmm::watch(page, tracker.handles(), channel.watch()?)?;
            line = SharedLine::new(channel);
            (session, figures) = (Box::new(tracker.session()), Figures::Here(tracker));
        } else {
            let [page] = descriptors_of(descriptors)?;
            let page = open_page(page, VCPUS_MAX)?;
            memory = guest_memory(&map_memory(&mut channel, regions)?, false)?;
            vmm = Vmm::watch(Arc::clone(&page), Vec::new(), channel.watch()?)?;
            line = SharedLine::new(channel);
            session = Box::new(RemoteSession::new(line.clone(), taker, page, memory.end()));
            figures = Figures::Vmm(line.clone());
        }
        let vm = RemoteVm::new(line);
        Ok(Self { vm, session, vmm, memory, vcpus, vm_id, description, figures })
    }

    /// What its vCPUs did so far, while they were tracked.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: the VMM knows it, and did not tell.
    pub fn figures(&self) -> Result<Vec<VcpuFigures>, OffloadError> {
        match &self.figures {
            Figures::Here(tracker) => Ok(tracker.snapshot().vcpus),
            Figures::Vmm(line) => figures(line),
        }
    }

    /// Tells the VMM how the migration ended. Nothing of the VM is touched from here on.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: the VMM has not heard it. It then goes by what it knows: a VM that was handed over may run at the
    /// destination, any other runs on.
    pub fn end(self, end: End, text: &str) -> Result<(), OffloadError> {
        drop(self.vmm);
        drop(self.session);
        drop(self.figures);
        self.vm.end(end, text)
    }
}

/// A VMM that waits for a VM.
#[derive(Debug)]
pub struct WaitingVmm(Channel);

impl WaitingVmm {
    /// Greets the VMM at the other end of `connection`.
    ///
    /// # Errors
    ///
    /// [`OffloadError`].
    pub fn greet(connection: OwnedFd) -> Result<Self, OffloadError> {
        let mut channel = Channel::new(connection, VMM)?;
        hello(&channel, Role::Destination)?;
        match answer(&mut channel, "wait for a VM", HANDSHAKE_LIMIT)?.0 {
            Message::Done => Ok(Self(channel)),
            other => Err(channel.unexpected("Done", &other)),
        }
    }

    /// An error if the VMM waits no more.
    ///
    /// # Errors
    ///
    /// [`OffloadError::Gone`].
    pub fn check(&mut self) -> Result<(), OffloadError> {
        match self.0.receive_within("a VM", Duration::ZERO)? {
            None => Ok(()),
            Some((message, _)) => Err(self.0.unexpected("nothing", &message)),
        }
    }

    /// Has the VMM build the VM that a source offers.
    ///
    /// # Errors
    ///
    /// [`OffloadError::Refused`] if it cannot.
    pub fn offer(self, offer: Offer) -> Result<ArrivingVm, OffloadError> {
        let mut channel = self.0;
        channel.send(&Message::Offer(offer), &[], HANDSHAKE_LIMIT)?;
        let (message, descriptors) = answer(&mut channel, "build the VM", BUILD_LIMIT)?;
        let Message::Lent { regions, .. } = message else {
            return Err(channel.unexpected("Lent", &message));
        };
        let [page] = descriptors_of(descriptors)?;
        let page = open_page(page, 1)?;
        let memory = guest_memory(&map_memory(&mut channel, regions)?, false)?;
        let vmm = Vmm::watch(page, Vec::new(), channel.watch()?)?;
        Ok(ArrivingVm { vm: RemoteVm::new(SharedLine::new(channel)), vmm, memory })
    }
}

impl ArrivingVm {
    /// Tells the VMM how the migration ended.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: the VMM has not heard it, and goes by what it knows.
    pub fn end(self, end: End, text: &str) -> Result<(), OffloadError> {
        drop(self.vmm);
        self.vm.end(end, text)
    }
}

fn hello(channel: &Channel, role: Role) -> Result<(), OffloadError> {
    channel.send(&Message::Hello { newest: VERSION, oldest: VERSION, role }, &[], HANDSHAKE_LIMIT)
}

/// The VMM's next message, unless it refuses.
fn answer(
    channel: &mut Channel,
    action: &'static str,
    limit: Duration,
) -> Result<(Message, Vec<OwnedFd>), OffloadError> {
    match channel.receive(action, limit)? {
        (Message::Refuse { text }, _) => Err(OffloadError::Refused { peer: VMM, action, text }),
        (Message::Lent { version, .. }, _) if version != VERSION => {
            Err(OffloadError::Version { peer: VMM, oldest: version, newest: version, ours: VERSION })
        }
        received => Ok(received),
    }
}

fn descriptors_of<const N: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; N], OffloadError> {
    let wrong = |_| OffloadError::Malformed { peer: VMM, what: "too few descriptors, or too many" };
    descriptors.try_into().map_err(wrong)
}

fn usize_of(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Maps the regions that follow.
fn map_memory(channel: &mut Channel, regions: u32) -> Result<Vec<Mapped>, OffloadError> {
    let mut mapped = Vec::new();
    for _ in 0..regions {
        let (message, descriptors) = answer(channel, "lend its memory", HANDSHAKE_LIMIT)?;
        let Message::Region { slot, pages, offset, tracked, name } = message else {
            return Err(channel.unexpected("Region", &message));
        };
        let [file] = descriptors_of(descriptors)?;
        mapped.push(Mapped::new(Passed { slot, pages, offset, tracked, name, file: file.into() })?);
    }
    Ok(mapped)
}

fn open_page(page: OwnedFd, vcpus: usize) -> Result<Arc<LentPage>, OffloadError> {
    LentPage::open(&File::from(page), vcpus).map(Arc::new).map_err(OffloadError::Page)
}

/// The vCPUs that follow.
fn borrow_vcpus(channel: &mut Channel, vcpus: u32) -> Result<Vec<BorrowedVcpu>, OffloadError> {
    let mut borrowed = Vec::with_capacity(usize_of(vcpus));
    for _ in 0..vcpus {
        let (message, descriptors) = answer(channel, "lend a vCPU", HANDSHAKE_LIMIT)?;
        let Message::Vcpu { index, position } = message else {
            return Err(channel.unexpected("Vcpu", &message));
        };
        let [fd] = descriptors_of(descriptors)?;
        borrowed.push(BorrowedVcpu { index: usize_of(index), fd, position });
    }
    Ok(borrowed)
}

impl fmt::Debug for BorrowedVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BorrowedVm").field("vm_id", &self.vm_id).field("vm", &self.vm).finish_non_exhaustive()
    }
}
