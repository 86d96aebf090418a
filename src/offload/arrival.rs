//! The VMM's end at the destination: hears which VM comes, builds it, lends its memory, and is given its state.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::channel::{Channel, OFFLOAD_PROCESS};
use super::client::{HANDSHAKE_LIMIT, RegionFile, greet, pass_memory, refuse};
use super::error::OffloadError;
use super::protocol::{End, Message, Offer, REGIONS_MAX, Role, Taker, VERSION};
use super::serving::{Left, POLL, Serving};
use crate::layout::PageIndex;
use crate::track::LentPage;
use crate::vm::{Vm, VmError};

/// A VM that has arrived.
#[derive(Debug)]
pub struct Arrived<V> {
    /// It runs here.
    pub vm: V,
    /// Whether the offload process has said so to its end. If not, it has died since; the VM is none the worse for it.
    pub told: bool,
}

/// Waits until the offload process at the other end of `connection` has a VM, has it built by `build`, and serves it until the
/// VM runs here. `cancel` ends it; a VM that runs is not ended.
///
/// # Errors
///
/// [`OffloadError`]: the VM is the source's, and what was built has not run and must not.
pub fn receive<V: Vm>(
    connection: OwnedFd,
    build: impl FnOnce(&Offer) -> Result<(V, Vec<RegionFile>), VmError>,
    cancel: &AtomicBool,
) -> Result<Arrived<V>, OffloadError> {
    let mut channel = Channel::new(connection, OFFLOAD_PROCESS)?;
    greet(&mut channel, Role::Destination)?;
    channel.send(&Message::Done, &[], HANDSHAKE_LIMIT)?;
    let offer = loop {
        match channel.receive_within("an offer", POLL)? {
            Some((Message::Offer(offer), _)) => break offer,
            Some((Message::Ended { text, .. }, _)) => {
                let action = "bring a VM";
                return Err(OffloadError::Refused { peer: OFFLOAD_PROCESS, action, text });
            }
            Some((other, _)) => return Err(channel.unexpected("an offer", &other)),
            // Relaxed: a flag without data, read again at the next turn.
            None if cancel.load(Ordering::Relaxed) => return Err(OffloadError::Cancelled),
            None => {}
        }
    };
    let (mut vm, memory) = match build(&offer) {
        Ok(built) => built,
        Err(source) => return Err(refuse(&channel, OffloadError::Vm { action: "build the VM", source })),
    };
    let page = match lend_memory(&channel, &memory) {
        Ok(page) => page,
        Err(error) => return Err(refuse(&channel, error)),
    };
    let end = memory.iter().map(|region| region.pages.end()).max().unwrap_or(PageIndex(0));
    let mut serving = Serving::of_destination(channel, &mut vm, end);
    let served = serving.serve(&page, cancel);
    match (served, serving.leave().0?) {
        (Ok((End::Arrived, _)), Left::RunsHere) => Ok(Arrived { vm, told: true }),
        (served, Left::RunsHere) => {
            tracing::warn!(
                ?served,
                "the VM runs here, and its offload process ended otherwise than it should"
            );
            Ok(Arrived { vm, told: false })
        }
        (Ok((_, text)), _) => {
            Err(OffloadError::Refused { peer: OFFLOAD_PROCESS, action: "bring the VM", text })
        }
        (Err(error), _) => Err(error),
    }
}

/// Passes the memory of a VM that was built, and a page on which the offload process shows that it lives.
fn lend_memory(channel: &Channel, memory: &[RegionFile]) -> Result<LentPage, OffloadError> {
    if memory.len() > REGIONS_MAX {
        let what = "the list of the VM's regions";
        return Err(OffloadError::TooLong { what, bytes: memory.len(), bytes_max: REGIONS_MAX });
    }
    let (page, file) = LentPage::create(c"ringferry-offload", 1).map_err(OffloadError::Page)?;
    let message = Message::Lent {
        version: VERSION,
        taker: Taker::OffloadProcess,
        ring_entries: 0,
        vcpus: 0,
        regions: u32::try_from(memory.len()).unwrap_or(u32::MAX),
        vm_id: String::new(),
        description: Vec::new(),
    };
    channel.send(&message, &[file.as_fd()], HANDSHAKE_LIMIT)?;
    pass_memory(channel, memory, |_| false)?;
    Ok(page)
}
