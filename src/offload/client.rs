//! The VMM's end at the source: lends the VM to an offload process and serves it until the VM has moved, stays, or nobody
//! knows.
//!
//! Whatever becomes of the offload process, the guest runs on: a guest that stands still is resumed, unless the destination
//! may run it, and then tracking ends and the rings are the VMM's again. The vCPUs' threads notice nothing of all this: their
//! handles are the tracker's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use super::channel::{Channel, OFFLOAD_PROCESS};
use super::error::OffloadError;
use super::pages::send_runs;
use super::protocol::{DESCRIPTION_BYTES_MAX, End, Message, NAME_BYTES_MAX, Role, Taker, VCPUS_MAX, VERSION};
use super::serving::{Left, Serving};
use super::tracking::Tracking;
use crate::kvm::KvmError;
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::os::sched::ShortSlice;
use crate::track::{DirtyTracker, Lending};
use crate::vm::{Paused, Vm};

/// How long the handshake may take, message by message.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// A piece of guest memory in a file.
#[derive(Debug)]
pub struct RegionFile {
    /// The memory slot; for a block that is none, any number that no slot has.
    pub slot: SlotId,
    /// Its pages.
    pub pages: PageRun,
    /// A memfd (or a file on hugetlbfs), which is not cut short while it is lent.
    pub file: OwnedFd,
    /// Where in the file the first page is.
    pub offset: u64,
    /// The name of a block of memory outside guest-physical space; else empty.
    pub name: String,
}

/// What becomes of the dirty rings while a VM is lent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Rings {
    /// The offload process follows them. Meanwhile the tracker does nothing else: no session begins, no slot and no vCPU comes
    /// or goes. Where they cannot be lent, they are kept: there are none (the bitmap), there is a bitmap beside them (arm64), or
    /// a session runs.
    #[default]
    Lend,
    /// They stay here, and the offload process has a session of the tracker, asked message by message. Sessions of the VMM's own
    /// run beside it, and memory and vCPUs come and go, as in a migration within the VMM. Where CPUs are short it costs up to a
    /// third of the throughput (kernel-notes/offload.md).
    Keep,
}

/// What a VMM lends.
#[derive(Debug)]
pub struct LentVm<'a> {
    /// The tracker.
    pub tracker: &'a DirtyTracker,
    /// Whether its rings are lent, too.
    pub rings: Rings,
    /// All of guest memory.
    pub memory: &'a [RegionFile],
    /// Index and descriptor of each vCPU that is attached to the tracker; none is needed if its rings are kept.
    pub vcpus: &'a [(usize, OwnedFd)],
    /// The VM's name among those of its owner; may be empty.
    pub vm_id: &'a str,
    /// What the destination's VMM has to know to build it.
    pub description: &'a [u8],
}

/// Where a VM is when its offload process has done its work.
#[derive(Debug)]
#[must_use = "the VM may stand still here"]
pub enum Ended {
    /// The destination runs it. It stands still here, for good.
    Moved,
    /// It runs on here.
    StaysHere {
        /// Why, in the words of the offload process.
        why: String,
    },
    /// It was handed over, and nobody knows whether the destination runs it. It stands still here, until somebody has looked:
    /// hand the proof to [`Vm::resume`] if it does not run there, and drop the VM if it does.
    Unconfirmed {
        /// The proof that it stands still.
        paused: Paused,
        /// Why nobody knows.
        why: String,
    },
}

/// Lends a running VM to the offload process at the other end of `connection`, a Unix socket of the type SEQPACKET, and serves
/// it on this thread and one more, until the migration has ended. `cancel` ends it from here, unless the VM is handed over.
///
/// # Errors
///
/// [`OffloadError`]: the VM runs on here, whatever state the offload process left it in. Only if the VMM itself cannot resume it
/// ([`OffloadError::Vm`]), it stands still.
pub fn lend(
    connection: OwnedFd,
    vm: &mut dyn Vm,
    lent: &LentVm<'_>,
    cancel: &AtomicBool,
) -> Result<Ended, OffloadError> {
    let mut channel = Channel::new(connection, OFFLOAD_PROCESS)?;
    greet(&mut channel, Role::Source)?;
    let lending = match lent.rings {
        Rings::Lend => lent.tracker.lend(),
        Rings::Keep => Ok(None),
    };
    let outcome = match lending {
        Ok(Some(lending)) => lend_rings(channel, vm, lent, lending, cancel)?,
        Ok(None) => keep_rings(channel, vm, lent, cancel)?,
        Err(error) => return Err(refuse(&channel, error.into())),
    };
    let handed_over = outcome.handed_over;
    match (outcome.served, outcome.left?) {
        (Ok((End::Moved, _)), Left::MayRunThere(_)) => Ok(Ended::Moved),
        (Ok((_, why)), Left::MayRunThere(paused)) => Ok(Ended::Unconfirmed { paused, why }),
        (Err(error), Left::MayRunThere(paused)) => Ok(Ended::Unconfirmed { paused, why: error.to_string() }),
        (Ok((End::Stays, why)), _) if !handed_over => Ok(Ended::StaysHere { why }),
        (Ok((_, why)), _) => {
            let text = format!("end as it says ({why}): the VM was not handed over");
            Err(OffloadError::Refused { peer: OFFLOAD_PROCESS, action: "be believed", text })
        }
        (Err(error), _) => Err(error),
    }
}

/// What serving came to.
struct Outcome {
    served: Result<(End, String), OffloadError>,
    left: Result<Left, OffloadError>,
    handed_over: bool,
}

/// The offload process follows the rings: it is told how far they are taken, and a second thread has them reset for it.
fn lend_rings(
    channel: Channel,
    vm: &mut dyn Vm,
    lent: &LentVm<'_>,
    lending: Lending,
    cancel: &AtomicBool,
) -> Result<Outcome, OffloadError> {
    let (kernel_socket, kernel) = match pass(&channel, lent, &lending) {
        Ok(for_kernel) => for_kernel,
        Err(error) => return Err(refuse(&channel, error)),
    };
    let mut serving = Serving::of_source(channel, vm, end_of(lent), None);
    let served = thread::scope(|scope| {
        let thread = thread::Builder::new().name("ringferry-reset".to_owned());
        let served = match thread.spawn_scoped(scope, || serve_kernel(kernel, &lending)) {
            Ok(_) => serving.serve(lending.page(), cancel),
            Err(error) => Err(OffloadError::Thread(error)),
        };
        // Ends the thread.
        let _ = rustix::net::shutdown(&kernel_socket, rustix::net::Shutdown::Both);
        served
    });
    // First of all the guest runs again, if it may; then the rings come back.
    let handed_over = serving.is_handed_over();
    let (left, channel) = serving.leave();
    match &served {
        Err(OffloadError::Silent { .. }) => lending.freeze(channel.into_socket()),
        _ => drop(lending),
    }
    Ok(Outcome { served, left, handed_over })
}

/// The rings stay with the tracker, of which the offload process has a session.
fn keep_rings(
    channel: Channel,
    vm: &mut dyn Vm,
    lent: &LentVm<'_>,
    cancel: &AtomicBool,
) -> Result<Outcome, OffloadError> {
    let keeping = match lent.tracker.lend_gates(VCPUS_MAX) {
        Ok(keeping) => keeping,
        Err(error) => return Err(refuse(&channel, error.into())),
    };
    let on_rings = lent.tracker.backend() == "ring";
    let taker = if on_rings { Taker::VmmOnRings } else { Taker::VmmOnBitmap };
    let passed = introduce(lent, taker, 0, keeping.vcpus().len()).and_then(|message| {
        channel.send(&message, &[keeping.page_file().as_fd()], HANDSHAKE_LIMIT)?;
        pass_tracked_memory(&channel, lent, &keeping.slots())
    });
    if let Err(error) = passed {
        return Err(refuse(&channel, error));
    }
    let tracking = Tracking::new(lent.tracker, &keeping);
    let mut serving = Serving::of_source(channel, vm, end_of(lent), Some(tracking));
    let served = serving.serve(keeping.page(), cancel);
    let handed_over = serving.is_handed_over();
    let (left, _) = serving.leave();
    Ok(Outcome { served, left, handed_over })
}

/// Where guest memory ends.
fn end_of(lent: &LentVm<'_>) -> PageIndex {
    lent.memory.iter().map(|region| region.pages.end()).max().unwrap_or(PageIndex(0))
}

/// Hears which version the offload process speaks, and what it is for.
pub(super) fn greet(channel: &mut Channel, expected: Role) -> Result<(), OffloadError> {
    match channel.receive("Hello", HANDSHAKE_LIMIT)?.0 {
        Message::Hello { newest, oldest, role } if role == expected => {
            if (oldest..=newest).contains(&VERSION) {
                return Ok(());
            }
            let error = OffloadError::Version { peer: channel.peer(), oldest, newest, ours: VERSION };
            Err(refuse(channel, error))
        }
        Message::Hello { .. } => {
            let (expected, got) = match expected {
                Role::Source => ("one that sends", "one that receives"),
                Role::Destination => ("one that receives", "one that sends"),
            };
            Err(refuse(channel, OffloadError::Unexpected { peer: channel.peer(), expected, got }))
        }
        other => Err(channel.unexpected("Hello", &other)),
    }
}

/// Tells the offload process why not. Returns the error to report here.
pub(super) fn refuse(channel: &Channel, error: OffloadError) -> OffloadError {
    if let Err(untold) = channel.send(&Message::Refuse { text: error.to_string() }, &[], HANDSHAKE_LIMIT) {
        tracing::debug!(error = %untold, "the offload process could not be told");
    }
    error
}

/// What the offload process hears first, if it is not too long.
fn introduce(
    lent: &LentVm<'_>,
    taker: Taker,
    ring_entries: u32,
    vcpus: usize,
) -> Result<Message, OffloadError> {
    let fits = |what, bytes: usize, bytes_max| match bytes <= bytes_max {
        true => Ok(()),
        false => Err(OffloadError::TooLong { what, bytes, bytes_max }),
    };
    fits("the VM's description", lent.description.len(), DESCRIPTION_BYTES_MAX)?;
    fits("the VM's name", lent.vm_id.len(), NAME_BYTES_MAX)?;
    Ok(Message::Lent {
        version: VERSION,
        taker,
        ring_entries,
        vcpus: count(vcpus),
        regions: count(lent.memory.len()),
        vm_id: lent.vm_id.to_owned(),
        description: lent.description.to_vec(),
    })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Passes everything that is lent, rings included. Returns our end of the connection for the kernel's requests, and a
/// descriptor to end it by.
fn pass(channel: &Channel, lent: &LentVm<'_>, lending: &Lending) -> Result<(OwnedFd, Channel), OffloadError> {
    let terms = lending.terms();
    let message = introduce(lent, Taker::OffloadProcess, terms.ring.entries(), terms.vcpus.len())?;
    let (kernel, theirs) = Channel::pair(OFFLOAD_PROCESS)?;
    let again = kernel.as_fd().try_clone_to_owned().map_err(|source| OffloadError::Socket {
        peer: OFFLOAD_PROCESS,
        action: "duplicating the socket to",
        source,
    })?;
    channel.send(&message, &[lending.page_file().as_fd(), theirs.as_fd()], HANDSHAKE_LIMIT)?;
    pass_tracked_memory(channel, lent, &terms.slots)?;
    for (index, position) in &terms.vcpus {
        let given = lent.vcpus.iter().find(|(given, _)| given == index);
        let (_, vcpu) = given.ok_or(OffloadError::NoVcpu(*index))?;
        let message = Message::Vcpu { index: count(*index), position: *position };
        channel.send(&message, &[vcpu.as_fd()], HANDSHAKE_LIMIT)?;
    }
    Ok((again, kernel))
}

/// Passes guest memory, of which each of the slots `tracked` has to have its file.
fn pass_tracked_memory(
    channel: &Channel,
    lent: &LentVm<'_>,
    tracked: &[(SlotId, PageRun)],
) -> Result<(), OffloadError> {
    let has_file = |slot: &SlotId, pages: &PageRun| {
        lent.memory.iter().any(|region| region.slot == *slot && region.pages == *pages)
    };
    if let Some((slot, _)) = tracked.iter().find(|(slot, pages)| !has_file(slot, pages)) {
        return Err(OffloadError::NoFile(*slot));
    }
    pass_memory(channel, lent.memory, |slot| tracked.iter().any(|(tracked, _)| *tracked == slot))
}

/// Passes guest memory.
pub(super) fn pass_memory(
    channel: &Channel,
    memory: &[RegionFile],
    is_tracked: impl Fn(SlotId) -> bool,
) -> Result<(), OffloadError> {
    for region in memory {
        let RegionFile { slot, pages, offset, name, .. } = region;
        let tracked = is_tracked(*slot);
        let message =
            Message::Region { slot: *slot, pages: *pages, offset: *offset, tracked, name: name.clone() };
        channel.send(&message, &[region.file.as_fd()], HANDSHAKE_LIMIT)?;
    }
    Ok(())
}

/// Serves resets and logging until the connection ends. A thread of its own, because a vCPU with a full ring waits for them
/// while the VMM saves state.
fn serve_kernel(mut channel: Channel, lending: &Lending) {
    // Longer than any migration: the end of the connection ends the wait.
    const FOR_EVER: Duration = Duration::from_secs(3600);
    let _soon = ShortSlice::for_this_thread();
    loop {
        let served = channel.receive_within("a request of the kernel", FOR_EVER).and_then(|received| {
            received.map_or(Ok(()), |(request, _)| serve_kernel_request(&channel, lending, &request))
        });
        if let Err(error) = served {
            tracing::debug!(%error, "the kernel is asked no more");
            // Whoever waits for an answer hears at once that there will be none.
            return channel.close();
        }
    }
}

fn serve_kernel_request(channel: &Channel, lending: &Lending, request: &Message) -> Result<(), OffloadError> {
    let failed = |error: &dyn std::fmt::Display| Message::Failed { text: error.to_string() };
    let answer = match request {
        Message::ResetRings => match lending.reset_dirty_rings() {
            Ok(count) => Message::ResetCount { entries: count.entries, slept: count.slept },
            Err(error) => failed(&error),
        },
        Message::SetLogging { slot, enabled } => match lending.set_dirty_logging(*slot, *enabled) {
            Ok(()) => Message::Done,
            Err(KvmError::SlotGone(_)) => Message::SlotGone,
            Err(KvmError::SlotDiffers(_)) => Message::SlotDiffers,
            Err(error) => failed(&error),
        },
        Message::CanProtect { slot } => match lending.can_protect(*slot) {
            Ok(granule) => Message::Bytes(granule.get()),
            Err(error) => failed(&error),
        },
        Message::Protect { slot, ranges } => match lending.protect(*slot, ranges) {
            Ok(()) => Message::Done,
            Err(error) => failed(&error),
        },
        Message::StartWriters => match lending.start_writers() {
            Ok(()) => Message::Done,
            Err(error) => failed(&error),
        },
        Message::DrainWriters => return send_runs(channel, &lending.drain_writers()),
        Message::StopWriters => {
            lending.stop_writers();
            Message::Done
        }
        other => return Err(channel.unexpected("a request of the kernel", other)),
    };
    channel.send(&answer, &[], HANDSHAKE_LIMIT)
}
