//! The VM as the offload process has it: memory that it maps, rings that it follows, and a VMM that it asks.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::channel::{Channel, VMM, Watch};
use super::error::OffloadError;
use super::kernel::{RemoteKernel, RemoteWriters};
use super::mapping::{Mapped, Passed, guest_memory};
use super::protocol::{End, Message, Offer, Role, VERSION};
use super::remote_vm::RemoteVm;
use crate::kvm::RingSize;
use crate::layout::GuestMemory;
use crate::track::{BorrowedVcpu, DirtyTracker, LentPage, Session, VcpuHandle, serve_full_rings};

/// How long the VMM may take for each message of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to build a VM that is offered to it.
const BUILD_LIMIT: Duration = Duration::from_secs(30);

/// A VM that its VMM lends to this process, for it to be migrated from here.
#[derive(Debug)]
pub struct BorrowedVm {
    /// What the VMM does.
    pub vm: RemoteVm,
    /// Its dirty pages: a session of the tracker.
    pub session: Session,
    /// The tracker in this process: for figures.
    pub tracker: DirtyTracker,
    /// Its memory, as this process maps it.
    pub memory: GuestMemory,
    /// vCPUs.
    pub vcpus: u32,
    /// Its name; may be empty.
    pub vm_id: String,
    /// What the destination's VMM has to know.
    pub description: Vec<u8>,
    rings: RingThread,
}

/// A VM that its VMM has built in this process's stead, for it to be received into.
#[derive(Debug)]
pub struct ArrivingVm {
    /// What the VMM does.
    pub vm: RemoteVm,
    /// Its memory, as this process maps it.
    pub memory: GuestMemory,
    rings: RingThread,
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
        let Message::Lent { ring_entries, vcpus, regions, vm_id, description, .. } = message else {
            return Err(channel.unexpected("Lent", &message));
        };
        let [page, kernel] = descriptors_of(descriptors)?;
        let page = LentPage::open(&File::from(page), usize_of(vcpus).max(1)).map_err(OffloadError::Page)?;
        let mapped = map_memory(&mut channel, regions)?;
        let (memory, tracked) = (guest_memory(&mapped, false)?, guest_memory(&mapped, true)?);
        let mut borrowed = Vec::with_capacity(usize_of(vcpus));
        for _ in 0..vcpus {
            let (message, descriptors) = answer(&mut channel, "lend a vCPU", HANDSHAKE_LIMIT)?;
            let Message::Vcpu { index, position } = message else {
                return Err(channel.unexpected("Vcpu", &message));
            };
            let [fd] = descriptors_of(descriptors)?;
            borrowed.push(BorrowedVcpu { index: usize_of(index), fd, position });
        }
        let size = RingSize::from_entries(ring_entries).map_err(|error| OffloadError::Track(error.into()))?;
        let kernel = RemoteKernel::new(Channel::new(kernel, VMM)?);
        let page = Arc::new(page);
        let tracker = DirtyTracker::borrowed(Box::new(kernel.clone()), size, &tracked, &borrowed, &page)?;
        let all = memory.regions().iter().map(|region| region.pages).collect();
        tracker.add_external(Box::new(RemoteWriters { kernel, memory: all }))?;
        let rings = RingThread::start(page, tracker.handles(), channel.watch()?)?;
        let vm = RemoteVm::new(channel);
        let session = tracker.session();
        Ok(Self { vm, session, tracker, memory, vcpus, vm_id, description, rings })
    }

    /// Does something once, soon after the VMM has ended: to give up a migration that has no VM any more.
    pub fn when_vmm_ends(&self, act: impl FnOnce() + Send + 'static) {
        self.rings.vmm.when_it_ends(act);
    }

    /// Whether the VMM has ended.
    pub fn has_vmm_ended(&self) -> bool {
        self.rings.vmm.has_ended()
    }

    /// Tells the VMM how the migration ended. Nothing of the VM is touched from here on.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: the VMM has not heard it. It then goes by what it knows: a VM that was handed over may run at the
    /// destination, any other runs on.
    pub fn end(self, end: End, text: &str) -> Result<(), OffloadError> {
        drop(self.rings);
        drop(self.session);
        drop(self.tracker);
        self.vm.done(&Message::Ended { end, text: text.to_owned() }, "end the migration")
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
        let page = LentPage::open(&File::from(page), 1).map_err(OffloadError::Page)?;
        let memory = guest_memory(&map_memory(&mut channel, regions)?, false)?;
        let rings = RingThread::start(Arc::new(page), Vec::new(), channel.watch()?)?;
        Ok(ArrivingVm { vm: RemoteVm::new(channel), memory, rings })
    }
}

impl ArrivingVm {
    /// Does something once, soon after the VMM has ended.
    pub fn when_vmm_ends(&self, act: impl FnOnce() + Send + 'static) {
        self.rings.vmm.when_it_ends(act);
    }

    /// Whether the VMM has ended.
    pub fn has_vmm_ended(&self) -> bool {
        self.rings.vmm.has_ended()
    }

    /// Tells the VMM how the migration ended.
    ///
    /// # Errors
    ///
    /// [`OffloadError`]: the VMM has not heard it, and goes by what it knows.
    pub fn end(self, end: End, text: &str) -> Result<(), OffloadError> {
        drop(self.rings);
        self.vm.done(&Message::Ended { end, text: text.to_owned() }, "end the migration")
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

/// Whether the VMM lives, and who wants to know if not.
struct WatchedVmm {
    watch: Watch,
    act: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl WatchedVmm {
    fn act(&self) -> MutexGuard<'_, Option<Box<dyn FnOnce() + Send>>> {
        self.act.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn when_it_ends(&self, act: impl FnOnce() + Send + 'static) {
        *self.act() = Some(Box::new(act));
    }

    fn has_ended(&self) -> bool {
        self.watch.has_gone()
    }

    fn look(&self) {
        if self.has_ended() {
            let act = self.act().take();
            if let Some(act) = act {
                act();
            }
        }
    }
}

impl fmt::Debug for WatchedVmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchedVmm").field("watch", &self.watch).finish_non_exhaustive()
    }
}

/// The thread that recycles full rings, looks whether the VMM lives, and shows the VMM that this process lives. It ends with the value.
#[derive(Debug)]
struct RingThread {
    ends: Arc<AtomicBool>,
    page: Arc<LentPage>,
    vmm: Arc<WatchedVmm>,
    thread: Option<JoinHandle<()>>,
}

impl RingThread {
    fn start(page: Arc<LentPage>, vcpus: Vec<VcpuHandle>, watch: Watch) -> Result<Self, OffloadError> {
        let ends = Arc::new(AtomicBool::new(false));
        let vmm = Arc::new(WatchedVmm { watch, act: Mutex::default() });
        let (of_thread, its_page, its_vmm) = (Arc::clone(&ends), Arc::clone(&page), Arc::clone(&vmm));
        let thread = std::thread::Builder::new()
            .name("ringferry-rings".to_owned())
            .spawn(move || serve_full_rings(&its_page, &vcpus, &of_thread, || its_vmm.look()))
            .map_err(OffloadError::Thread)?;
        Ok(Self { ends, page, vmm, thread: Some(thread) })
    }
}

impl Drop for RingThread {
    fn drop(&mut self) {
        // Relaxed: a flag without data, read within 100 ms.
        self.ends.store(true, Ordering::Relaxed);
        crate::track::ring_bell(&self.page);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}
