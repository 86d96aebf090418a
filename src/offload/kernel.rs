//! What the offload process cannot do to the VMM's vCPUs itself, and asks for: resets and logging, which KVM refuses outside
//! the address space of the VM; and the writes that no ring sees, which the VMM's process logs.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::channel::Channel;
use super::error::OffloadError;
use super::protocol::{Message, RUNS_MAX};
use crate::kvm::{Granule, Kernel, KvmError, Protection, ResetCount, UnmapError};
use crate::layout::{PageRun, Region, SlotId};
use crate::page_set::PageSet;
use crate::track::ExternalSource;
use crate::vm::VmError;

/// How long the VMM may take for one request: a reset waits for KVM's locks.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The VMM's kernel, asked across a connection. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct RemoteKernel {
    /// `None` once it has failed: a late answer would be taken for that of the next request.
    channel: Arc<Mutex<Option<Channel>>>,
}

/// Why a request had no answer that is one.
enum Failure {
    Kvm(KvmError),
    Other(io::Error),
}

impl RemoteKernel {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel: Arc::new(Mutex::new(Some(channel))) }
    }

    /// Asks, and gives each answer to `take` until that has what it wants.
    fn ask<T>(
        &self,
        request: &Message,
        slot: SlotId,
        mut take: impl FnMut(Message) -> Option<T>,
    ) -> Result<T, Failure> {
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(channel) = held.as_mut() else {
            return Err(Failure::Other(io::Error::from(io::ErrorKind::NotConnected)));
        };
        let asked = channel.send(request, &[], ANSWER_LIMIT).and_then(|()| {
            loop {
                match channel.receive("an answer", ANSWER_LIMIT)?.0 {
                    Message::Failed { text } => return Ok(Err(Failure::Other(io::Error::other(text)))),
                    Message::SlotGone => return Ok(Err(Failure::Kvm(KvmError::SlotGone(slot)))),
                    Message::SlotDiffers => return Ok(Err(Failure::Kvm(KvmError::SlotDiffers(slot)))),
                    more @ Message::Runs { more: true, .. } => drop(take(more)),
                    answer => {
                        let unexpected = channel.unexpected("an answer", &answer);
                        return take(answer).map(Ok).ok_or(unexpected);
                    }
                }
            }
        });
        asked.unwrap_or_else(|error: OffloadError| {
            *held = None;
            Err(Failure::Other(io::Error::other(error)))
        })
    }

    fn done(&self, request: &Message, slot: SlotId) -> Result<(), Failure> {
        self.ask(request, slot, |answer| (answer == Message::Done).then_some(()))
    }
}

impl Failure {
    fn of_ioctl(self, name: &'static str) -> KvmError {
        match self {
            Self::Kvm(error) => error,
            Self::Other(source) => KvmError::Ioctl { name, source },
        }
    }
}

impl Failure {
    fn of_protection(self) -> UnmapError {
        UnmapError::NotProtectable(Arc::new(match self {
            Self::Kvm(error) => io::Error::other(error),
            Self::Other(error) => error,
        }))
    }
}

impl From<Failure> for VmError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Kvm(error) => error.into(),
            Failure::Other(error) => error.into(),
        }
    }
}

/// No slot: the request names none.
const NO_SLOT: SlotId = SlotId(u32::MAX);

fn bitmap_is_not_lent(name: &'static str) -> KvmError {
    KvmError::Ioctl { name, source: io::Error::from(io::ErrorKind::Unsupported) }
}

impl Kernel for RemoteKernel {
    fn reset_dirty_rings(&self) -> Result<ResetCount, KvmError> {
        let count = |answer| match answer {
            Message::ResetCount { entries, slept } => Some(ResetCount { entries, slept }),
            _ => None,
        };
        let counted = self.ask(&Message::ResetRings, NO_SLOT, count);
        counted.map_err(|failure| failure.of_ioctl("KVM_RESET_DIRTY_RINGS, which the VMM was asked for"))
    }

    fn set_dirty_logging(&self, region: &Region, enabled: bool) -> Result<(), KvmError> {
        let slot = region.slot;
        let switched = self.done(&Message::SetLogging { slot, enabled }, slot);
        switched
            .map_err(|failure| failure.of_ioctl("KVM_SET_USER_MEMORY_REGION, which the VMM was asked for"))
    }

    fn get_dirty_log(&self, _: SlotId, _: u64, _: &mut [u64]) -> Result<(), KvmError> {
        Err(bitmap_is_not_lent("KVM_GET_DIRTY_LOG"))
    }

    fn clear_dirty_log(&self, _: SlotId, _: u64, _: &[u64]) -> Result<(), KvmError> {
        Err(bitmap_is_not_lent("KVM_CLEAR_DIRTY_LOG"))
    }

    fn can_protect(&self, region: &Region) -> Result<Granule, UnmapError> {
        let slot = region.slot;
        let granule = self.ask(&Message::CanProtect { slot }, slot, |answer| match answer {
            Message::Bytes(pages) => Granule::new(pages),
            _ => None,
        });
        granule.map_err(Failure::of_protection)
    }

    fn protect(&self, region: &Region, ranges: &[Protection]) -> Result<(), UnmapError> {
        let slot = region.slot;
        ranges.chunks(RUNS_MAX).try_for_each(|ranges| {
            let request = Message::Protect { slot, ranges: ranges.to_vec() };
            self.done(&request, slot).map_err(Failure::of_protection)
        })
    }
}

/// The writes of the VMM's process that no ring sees.
#[derive(Debug)]
pub(super) struct RemoteWriters {
    pub(super) kernel: RemoteKernel,
    /// All that they may write.
    pub(super) memory: Vec<PageRun>,
}

impl ExternalSource for RemoteWriters {
    fn name(&self) -> &'static str {
        "the VMM's process"
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(self.kernel.done(&Message::StartWriters, NO_SLOT)?)
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let drained = self.kernel.ask(&Message::DrainWriters, NO_SLOT, |answer| match answer {
            Message::Runs { more, runs } => {
                runs.into_iter().for_each(|run| dirty.insert_run(run));
                (!more).then_some(())
            }
            _ => None,
        });
        if let Err(failure) = drained {
            tracing::warn!(error = %VmError::from(failure), "what the VMM wrote is unknown: all counts as written");
            self.memory.iter().for_each(|run| dirty.insert_run(*run));
        }
    }

    fn stop(&mut self) {
        if let Err(failure) = self.kernel.done(&Message::StopWriters, NO_SLOT) {
            tracing::debug!(error = %VmError::from(failure), "the VMM will stop logging by itself");
        }
    }
}
