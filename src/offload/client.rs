//! The VMM's end at the source: lends the VM to an offload process and serves it until the VM has moved, stays, or nobody
//! knows.
//!
//! Whatever becomes of the offload process, the guest runs on: a guest that stands still is resumed, unless the destination
//! may run it, and then tracking ends and the rings are the VMM's again. The vCPUs' threads notice nothing of all this: their
//! handles are the tracker's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::channel::{Channel, OFFLOAD_PROCESS};
use super::error::OffloadError;
use super::protocol::{DESCRIPTION_BYTES_MAX, End, Message, NAME_BYTES_MAX, Role, VERSION};
use super::serving::{Left, Serving, send_runs};
use crate::kvm::{KvmError, Until};
use crate::layout::{PageIndex, PageRun, SlotId};
use crate::os::sched::ShortSlice;
use crate::track::{DirtyTracker, Lending, signs_of_life};
use crate::vm::{Paused, Vm};

/// How long the handshake may take, message by message.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How often the wait for a request looks at everything else.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// An offload process that shows no sign of life for so long is frozen. It shows one ten times a second.
const SILENCE: Duration = Duration::from_secs(5);
/// The same while the guest stands still: no longer than a standstill may last by default.
const SILENCE_AT_STANDSTILL: Duration = Duration::from_secs(1);

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

/// What a VMM lends.
#[derive(Debug)]
pub struct LentVm<'a> {
    /// The tracker, on rings. It is lent, too, and does nothing else meanwhile.
    pub tracker: &'a DirtyTracker,
    /// All of guest memory.
    pub memory: &'a [RegionFile],
    /// Index and descriptor of each vCPU that is attached to the tracker.
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
    let lending = match lent.tracker.lend() {
        Ok(lending) => lending,
        Err(error) => return Err(refuse(&channel, error.into())),
    };
    let for_kernel = match pass(&channel, lent, &lending) {
        Ok(for_kernel) => for_kernel,
        Err(error) => return Err(refuse(&channel, error)),
    };
    let end = lent.memory.iter().map(|region| region.pages.end()).max().unwrap_or(PageIndex(0));
    let mut serving = Serving::of_source(channel, vm, end);
    let served = thread::scope(|scope| {
        let (kernel_socket, kernel) = for_kernel;
        let thread = thread::Builder::new().name("ringferry-reset".to_owned());
        let served = match thread.spawn_scoped(scope, || serve_kernel(kernel, &lending)) {
            Ok(_) => serve(&mut serving, &lending, cancel),
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
    match (served, left?) {
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

/// Passes everything that is lent. Returns our end of the connection for the kernel's requests, and a descriptor to end it by.
fn pass(channel: &Channel, lent: &LentVm<'_>, lending: &Lending) -> Result<(OwnedFd, Channel), OffloadError> {
    let terms = lending.terms();
    let fits = |what, bytes: usize, bytes_max| match bytes <= bytes_max {
        true => Ok(()),
        false => Err(OffloadError::TooLong { what, bytes, bytes_max }),
    };
    fits("the VM's description", lent.description.len(), DESCRIPTION_BYTES_MAX)?;
    fits("the VM's name", lent.vm_id.len(), NAME_BYTES_MAX)?;
    let (kernel, theirs) = Channel::pair(OFFLOAD_PROCESS)?;
    let again = kernel.as_fd().try_clone_to_owned().map_err(|source| OffloadError::Socket {
        peer: OFFLOAD_PROCESS,
        action: "duplicating the socket to",
        source,
    })?;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let message = Message::Lent {
        version: VERSION,
        ring_entries: terms.ring.entries(),
        vcpus: count(terms.vcpus.len()),
        regions: count(lent.memory.len()),
        vm_id: lent.vm_id.to_owned(),
        description: lent.description.to_vec(),
    };
    channel.send(&message, &[lending.page_file().as_fd(), theirs.as_fd()], HANDSHAKE_LIMIT)?;
    let has_file = |slot: &SlotId, pages: &PageRun| {
        lent.memory.iter().any(|region| region.slot == *slot && region.pages == *pages)
    };
    if let Some((slot, _)) = terms.slots.iter().find(|(slot, pages)| !has_file(slot, pages)) {
        return Err(OffloadError::NoFile(*slot));
    }
    pass_memory(channel, lent.memory, |slot| terms.slots.iter().any(|(tracked, _)| *tracked == slot))?;
    for (index, position) in &terms.vcpus {
        let given = lent.vcpus.iter().find(|(given, _)| given == index);
        let (_, vcpu) = given.ok_or(OffloadError::NoVcpu(*index))?;
        let message = Message::Vcpu { index: count(*index), position: *position };
        channel.send(&message, &[vcpu.as_fd()], HANDSHAKE_LIMIT)?;
    }
    Ok((again, kernel))
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

/// Serves the VM's requests until the migration has ended.
fn serve(
    serving: &mut Serving<'_>,
    lending: &Lending,
    cancel: &AtomicBool,
) -> Result<(End, String), OffloadError> {
    // The guest stands still while it waits for some of the answers.
    let _soon = ShortSlice::for_this_thread();
    let mut life = Life::default();
    loop {
        match serving.channel.receive_within("a request", POLL)? {
            Some((message, _)) => {
                if let Some(end) = serving.answer(message)? {
                    return Ok(end);
                }
            }
            None => life.check(signs_of_life(lending.page()), serving.stands_still())?,
        }
        // Relaxed: a flag without data, read again at the next turn.
        if cancel.load(Ordering::Relaxed) && !serving.is_handed_over() {
            return Err(OffloadError::Cancelled);
        }
    }
}

/// Since when the offload process has shown no sign of life.
#[derive(Debug)]
pub(super) struct Life {
    seen: u32,
    since: Instant,
}

impl Default for Life {
    fn default() -> Self {
        Self { seen: 0, since: Instant::now() }
    }
}

impl Life {
    /// `signs` so far; an error if there were no new ones for too long.
    pub(super) fn check(&mut self, signs: u32, stands_still: bool) -> Result<(), OffloadError> {
        let waited = if stands_still { SILENCE_AT_STANDSTILL } else { SILENCE };
        if signs != self.seen {
            *self = Self { seen: signs, since: Instant::now() };
        } else if self.since.elapsed() > waited {
            let waiting_for = "a sign of life";
            return Err(OffloadError::Silent { peer: OFFLOAD_PROCESS, waiting_for, waited });
        }
        Ok(())
    }
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
        Message::Protect { slot, pages, until_written } => {
            let until = if *until_written { Until::Written } else { Until::Touched };
            match lending.protect(*slot, *pages, until) {
                Ok(()) => Message::Done,
                Err(error) => failed(&error),
            }
        }
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
