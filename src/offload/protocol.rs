//! The messages between a VMM and its offload process, and how much of them is believed.
//!
//! One packet is one message: a kind, then fixed fields in little-endian order, then at most one part of any length. Both ends
//! are built from one release as a rule; the handshake has versions for when they are not.

mod fields;
mod tracking;

use self::fields::{In, Out, TEXT_BYTES_MAX, cut, printable};
pub(super) use self::fields::{Malformed, NAME_BYTES_MAX};
pub(super) use self::tracking::{Harvest, Taker, VcpuPlace};
use self::tracking::{figures_of, words_of};
use crate::kvm::Protection;
use crate::layout::{PageRun, SlotId};
use crate::track::VcpuFigures;

/// The version that is spoken here.
pub(super) const VERSION: u16 = 1;
/// The longest packet. Two of them fit a socket's buffer as Linux has it by default.
pub(super) const PACKET_BYTES_MAX: usize = 64 << 10;
/// Bytes of state in one packet.
pub(super) const PIECE_BYTES_MAX: usize = 60 << 10;
/// Runs of pages in one packet, each of which may be told how it is to be protected.
pub(super) const RUNS_MAX: usize = 3800;
/// The longest description of a VM: as much as a migration carries.
pub(super) const DESCRIPTION_BYTES_MAX: usize = 32 << 10;
/// Regions of memory, at most: what a source may offer a destination.
pub(super) const REGIONS_MAX: usize = 1024;
/// Named blocks of memory, at most.
const BLOCKS_MAX: usize = 64;
/// vCPUs, at most: KVM's limit on x86.
pub(super) const VCPUS_MAX: usize = 4096;

/// What an offload process is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// It sends the VM away.
    Source,
    /// It brings a VM.
    Destination,
}

/// How a migration ended, as the offload process tells its VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The destination runs the VM.
    Moved,
    /// The VM stays with the source.
    Stays,
    /// The VM was handed over, and the destination never said that it runs it.
    Unconfirmed,
    /// The VM runs at this destination.
    Arrived,
}

/// A VM that a source offers, for the destination's VMM to build.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Offer {
    /// Its name; may be empty.
    pub vm_id: String,
    /// What the source's VMM says of it, in its own format.
    pub description: Vec<u8>,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM in guest-physical order.
    pub ram: Vec<PageRun>,
    /// Memory outside guest-physical space: name and pages.
    pub blocks: Vec<(String, PageRun)>,
}

/// One message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Message {
    Hello {
        newest: u16,
        oldest: u16,
        role: Role,
    },
    /// With the page of gates and, at the source, the connection for the kernel's requests.
    Lent {
        version: u16,
        taker: Taker,
        ring_entries: u32,
        vcpus: u32,
        regions: u32,
        vm_id: String,
        description: Vec<u8>,
    },
    /// With its file. One that is not tracked is no slot of KVM's.
    Region {
        slot: SlotId,
        pages: PageRun,
        offset: u64,
        tracked: bool,
        name: String,
    },
    /// With its descriptor.
    Vcpu {
        index: u32,
        position: u32,
    },
    Refuse {
        text: String,
    },
    Offer(Offer),

    ResetRings,
    ResetCount {
        entries: u32,
        slept: bool,
    },
    SetLogging {
        slot: SlotId,
        enabled: bool,
    },
    SlotGone,
    SlotDiffers,
    /// Answered by the pages of a granule.
    CanProtect {
        slot: SlotId,
    },
    Protect {
        slot: SlotId,
        ranges: Vec<Protection>,
    },
    StartWriters,
    DrainWriters,
    StopWriters,

    StartTracking,
    /// And tell which pages were dirtied since the last time.
    Observe {
        telling: bool,
    },
    Harvest(Harvest),
    /// Of the pages that a harvest left behind.
    ProtectBehind {
        runs: Vec<PageRun>,
    },
    GiveBack {
        runs: Vec<PageRun>,
    },
    StopTracking,
    AskFigures,

    Pause,
    Resume,
    Quiesce,
    /// While the guest runs, so many bytes; or the rest, while it stands still.
    SaveDeviceState {
        running: Option<u64>,
    },
    SaveState,
    DeviceStateBytesLeft,
    DiscardedPages,
    Kick {
        index: u32,
    },
    HandOver,
    LoadDeviceState {
        piece: Vec<u8>,
    },
    MachineState {
        piece: Vec<u8>,
    },
    RestoreState,
    Prepare,
    Release,
    /// No more of the state that is being written: it cannot be sent.
    Enough,
    Ended {
        end: End,
        text: String,
    },

    Done,
    Failed {
        text: String,
    },
    Piece {
        bytes: Vec<u8>,
    },
    Runs {
        more: bool,
        runs: Vec<PageRun>,
    },
    Bytes(u64),
    /// By vCPU, and of others; or nothing can be observed.
    Observed {
        vcpus: Option<Vec<u64>>,
        others: u64,
    },
    /// The vCPUs, from now on.
    Vcpus(Vec<VcpuPlace>),
    /// Of one vCPU.
    Figures(VcpuFigures),
}

/// Numbers of messages.
mod kind {
    pub const HELLO: u8 = 1;
    pub const LENT: u8 = 2;
    pub const REGION: u8 = 3;
    pub const VCPU: u8 = 4;
    pub const REFUSE: u8 = 5;
    pub const OFFER: u8 = 6;
    pub const RESET_RINGS: u8 = 16;
    pub const RESET_COUNT: u8 = 17;
    pub const SET_LOGGING: u8 = 18;
    pub const SLOT_GONE: u8 = 19;
    pub const SLOT_DIFFERS: u8 = 20;
    pub const START_WRITERS: u8 = 21;
    pub const DRAIN_WRITERS: u8 = 22;
    pub const STOP_WRITERS: u8 = 23;
    pub const CAN_PROTECT: u8 = 24;
    pub const PROTECT: u8 = 25;
    pub const PAUSE: u8 = 32;
    pub const RESUME: u8 = 33;
    pub const QUIESCE: u8 = 34;
    pub const SAVE_DEVICE_STATE: u8 = 35;
    pub const SAVE_STATE: u8 = 36;
    pub const DEVICE_STATE_BYTES_LEFT: u8 = 37;
    pub const DISCARDED_PAGES: u8 = 38;
    pub const KICK: u8 = 39;
    pub const HAND_OVER: u8 = 40;
    pub const LOAD_DEVICE_STATE: u8 = 41;
    pub const MACHINE_STATE: u8 = 42;
    pub const RESTORE_STATE: u8 = 43;
    pub const PREPARE: u8 = 44;
    pub const RELEASE: u8 = 45;
    pub const ENOUGH: u8 = 46;
    pub const ENDED: u8 = 47;
    pub const START_TRACKING: u8 = 48;
    pub const OBSERVE: u8 = 49;
    pub const HARVEST: u8 = 50;
    pub const PROTECT_BEHIND: u8 = 51;
    pub const GIVE_BACK: u8 = 52;
    pub const STOP_TRACKING: u8 = 53;
    pub const ASK_FIGURES: u8 = 54;
    pub const DONE: u8 = 64;
    pub const FAILED: u8 = 65;
    pub const PIECE: u8 = 66;
    pub const RUNS: u8 = 67;
    pub const BYTES: u8 = 68;
    pub const OBSERVED: u8 = 69;
    pub const VCPUS: u8 = 70;
    pub const FIGURES: u8 = 71;
}

impl Message {
    /// As a packet.
    pub(super) fn encode(&self) -> Vec<u8> {
        let of = |kind: u8| Out(Vec::with_capacity(64)).u8(kind);
        let out = match self {
            Self::Hello { newest, oldest, role } => {
                of(kind::HELLO).u16(*newest).u16(*oldest).u8(u8::from(*role == Role::Destination))
            }
            Self::Lent { version, taker, ring_entries, vcpus, regions, vm_id, description } => of(kind::LENT)
                .u16(*version)
                .u8(taker.number())
                .u32(*ring_entries)
                .u32(*vcpus)
                .u32(*regions)
                .sized(vm_id.as_bytes())
                .rest(description),
            Self::Region { slot, pages, offset, tracked, name } => {
                let out = of(kind::REGION).u32(slot.0).run(*pages).u64(*offset);
                out.u8((*tracked).into()).sized(name.as_bytes())
            }
            Self::Vcpu { index, position } => of(kind::VCPU).u32(*index).u32(*position),
            Self::Refuse { text } => of(kind::REFUSE).rest(cut(text)),
            Self::Offer(offer) => offer.encode(of(kind::OFFER)),
            Self::ResetRings => of(kind::RESET_RINGS),
            Self::ResetCount { entries, slept } => of(kind::RESET_COUNT).u32(*entries).u8((*slept).into()),
            Self::SetLogging { slot, enabled } => of(kind::SET_LOGGING).u32(slot.0).u8((*enabled).into()),
            Self::SlotGone => of(kind::SLOT_GONE),
            Self::SlotDiffers => of(kind::SLOT_DIFFERS),
            Self::CanProtect { slot } => of(kind::CAN_PROTECT).u32(slot.0),
            Self::Protect { slot, ranges } => of(kind::PROTECT).u32(slot.0).ranges(ranges),
            Self::StartWriters => of(kind::START_WRITERS),
            Self::DrainWriters => of(kind::DRAIN_WRITERS),
            Self::StopWriters => of(kind::STOP_WRITERS),
            Self::StartTracking => of(kind::START_TRACKING),
            Self::Observe { telling } => of(kind::OBSERVE).u8((*telling).into()),
            Self::Harvest(what) => of(kind::HARVEST).u8(what.number()),
            Self::ProtectBehind { runs } => of(kind::PROTECT_BEHIND).runs(runs),
            Self::GiveBack { runs } => of(kind::GIVE_BACK).runs(runs),
            Self::StopTracking => of(kind::STOP_TRACKING),
            Self::AskFigures => of(kind::ASK_FIGURES),
            Self::Pause => of(kind::PAUSE),
            Self::Resume => of(kind::RESUME),
            Self::Quiesce => of(kind::QUIESCE),
            Self::SaveDeviceState { running } => {
                of(kind::SAVE_DEVICE_STATE).u8(running.is_some().into()).u64(running.unwrap_or(0))
            }
            Self::SaveState => of(kind::SAVE_STATE),
            Self::DeviceStateBytesLeft => of(kind::DEVICE_STATE_BYTES_LEFT),
            Self::DiscardedPages => of(kind::DISCARDED_PAGES),
            Self::Kick { index } => of(kind::KICK).u32(*index),
            Self::HandOver => of(kind::HAND_OVER),
            Self::LoadDeviceState { piece } => of(kind::LOAD_DEVICE_STATE).rest(piece),
            Self::MachineState { piece } => of(kind::MACHINE_STATE).rest(piece),
            Self::RestoreState => of(kind::RESTORE_STATE),
            Self::Prepare => of(kind::PREPARE),
            Self::Release => of(kind::RELEASE),
            Self::Enough => of(kind::ENOUGH),
            Self::Ended { end, text } => of(kind::ENDED).u8(end.number()).rest(cut(text)),
            Self::Done => of(kind::DONE),
            Self::Failed { text } => of(kind::FAILED).rest(cut(text)),
            Self::Piece { bytes } => of(kind::PIECE).rest(bytes),
            Self::Runs { more, runs } => of(kind::RUNS).u8((*more).into()).runs(runs),
            Self::Bytes(bytes) => of(kind::BYTES).u64(*bytes),
            Self::Observed { vcpus, others } => {
                let out = of(kind::OBSERVED).u8(vcpus.is_some().into()).u64(*others);
                out.words(vcpus.as_deref().unwrap_or_default())
            }
            Self::Vcpus(vcpus) => {
                vcpus.iter().fold(of(kind::VCPUS), |out, (index, place)| out.u32(*index).u32(*place))
            }
            Self::Figures(figures) => of(kind::FIGURES).words(&words_of(figures)),
        };
        out.0
    }

    /// From a packet.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn decode(packet: &[u8]) -> Result<Self, Malformed> {
        let mut fields = In(packet);
        let message = Self::read(&mut fields)?;
        if fields.0.is_empty() { Ok(message) } else { Err("too long") }
    }

    fn read(fields: &mut In<'_>) -> Result<Self, Malformed> {
        Ok(match fields.u8()? {
            kind::HELLO => {
                let (newest, oldest) = (fields.u16()?, fields.u16()?);
                let role = if fields.flag()? { Role::Destination } else { Role::Source };
                Self::Hello { newest, oldest, role }
            }
            kind::LENT => Self::Lent {
                version: fields.u16()?,
                taker: Taker::of(fields.u8()?).ok_or("a taker that nobody knows")?,
                ring_entries: fields.u32()?,
                vcpus: bounded(fields.u32()?, VCPUS_MAX)?,
                regions: bounded(fields.u32()?, REGIONS_MAX)?,
                vm_id: fields.name()?,
                description: fields.rest(DESCRIPTION_BYTES_MAX)?.to_vec(),
            },
            kind::REGION => Self::Region {
                slot: SlotId(fields.u32()?),
                pages: fields.run()?,
                offset: fields.u64()?,
                tracked: fields.flag()?,
                name: fields.name()?,
            },
            kind::VCPU => Self::Vcpu { index: fields.u32()?, position: fields.u32()? },
            kind::REFUSE => Self::Refuse { text: printable(fields.rest(TEXT_BYTES_MAX)?) },
            kind::OFFER => Self::Offer(Offer::read(fields)?),
            kind::RESET_RINGS => Self::ResetRings,
            kind::RESET_COUNT => Self::ResetCount { entries: fields.u32()?, slept: fields.flag()? },
            kind::SET_LOGGING => Self::SetLogging { slot: SlotId(fields.u32()?), enabled: fields.flag()? },
            kind::SLOT_GONE => Self::SlotGone,
            kind::SLOT_DIFFERS => Self::SlotDiffers,
            kind::CAN_PROTECT => Self::CanProtect { slot: SlotId(fields.u32()?) },
            kind::PROTECT => Self::Protect { slot: SlotId(fields.u32()?), ranges: fields.all_ranges()? },
            kind::START_WRITERS => Self::StartWriters,
            kind::DRAIN_WRITERS => Self::DrainWriters,
            kind::STOP_WRITERS => Self::StopWriters,
            kind::START_TRACKING => Self::StartTracking,
            kind::OBSERVE => Self::Observe { telling: fields.flag()? },
            kind::HARVEST => Self::Harvest(Harvest::of(fields.u8()?).ok_or("a harvest that nobody knows")?),
            kind::PROTECT_BEHIND => Self::ProtectBehind { runs: fields.all_runs()? },
            kind::GIVE_BACK => Self::GiveBack { runs: fields.all_runs()? },
            kind::STOP_TRACKING => Self::StopTracking,
            kind::ASK_FIGURES => Self::AskFigures,
            kind::PAUSE => Self::Pause,
            kind::RESUME => Self::Resume,
            kind::QUIESCE => Self::Quiesce,
            kind::SAVE_DEVICE_STATE => {
                let (runs, bytes) = (fields.flag()?, fields.u64()?);
                Self::SaveDeviceState { running: runs.then_some(bytes) }
            }
            kind::SAVE_STATE => Self::SaveState,
            kind::DEVICE_STATE_BYTES_LEFT => Self::DeviceStateBytesLeft,
            kind::DISCARDED_PAGES => Self::DiscardedPages,
            kind::KICK => Self::Kick { index: fields.u32()? },
            kind::HAND_OVER => Self::HandOver,
            kind::LOAD_DEVICE_STATE => {
                Self::LoadDeviceState { piece: fields.rest(PIECE_BYTES_MAX)?.to_vec() }
            }
            kind::MACHINE_STATE => Self::MachineState { piece: fields.rest(PIECE_BYTES_MAX)?.to_vec() },
            kind::RESTORE_STATE => Self::RestoreState,
            kind::PREPARE => Self::Prepare,
            kind::RELEASE => Self::Release,
            kind::ENOUGH => Self::Enough,
            kind::ENDED => {
                let end = End::of(fields.u8()?).ok_or("an end that nobody knows")?;
                Self::Ended { end, text: printable(fields.rest(TEXT_BYTES_MAX)?) }
            }
            kind::DONE => Self::Done,
            kind::FAILED => Self::Failed { text: printable(fields.rest(TEXT_BYTES_MAX)?) },
            kind::PIECE => Self::Piece { bytes: fields.rest(PIECE_BYTES_MAX)?.to_vec() },
            kind::RUNS => Self::Runs { more: fields.flag()?, runs: fields.all_runs()? },
            kind::BYTES => Self::Bytes(fields.u64()?),
            kind::OBSERVED => {
                let (by_vcpu, others) = (fields.flag()?, fields.u64()?);
                Self::Observed { vcpus: by_vcpu.then(|| fields.all_words()).transpose()?, others }
            }
            kind::VCPUS => Self::Vcpus(fields.all_pairs()?),
            kind::FIGURES => {
                Self::Figures(figures_of(&fields.all_words()?).ok_or("figures of another kind")?)
            }
            _ => return Err("a kind that nobody knows"),
        })
    }

    /// For errors.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Lent { .. } => "Lent",
            Self::Region { .. } => "Region",
            Self::Vcpu { .. } => "Vcpu",
            Self::Refuse { .. } => "Refuse",
            Self::Offer(_) => "Offer",
            Self::ResetRings => "ResetRings",
            Self::ResetCount { .. } => "ResetCount",
            Self::SetLogging { .. } => "SetLogging",
            Self::SlotGone => "SlotGone",
            Self::SlotDiffers => "SlotDiffers",
            Self::CanProtect { .. } => "CanProtect",
            Self::Protect { .. } => "Protect",
            Self::StartWriters => "StartWriters",
            Self::DrainWriters => "DrainWriters",
            Self::StopWriters => "StopWriters",
            Self::StartTracking => "StartTracking",
            Self::Observe { .. } => "Observe",
            Self::Harvest(_) => "Harvest",
            Self::ProtectBehind { .. } => "ProtectBehind",
            Self::GiveBack { .. } => "GiveBack",
            Self::StopTracking => "StopTracking",
            Self::AskFigures => "AskFigures",
            Self::Pause => "Pause",
            Self::Resume => "Resume",
            Self::Quiesce => "Quiesce",
            Self::SaveDeviceState { .. } => "SaveDeviceState",
            Self::SaveState => "SaveState",
            Self::DeviceStateBytesLeft => "DeviceStateBytesLeft",
            Self::DiscardedPages => "DiscardedPages",
            Self::Kick { .. } => "Kick",
            Self::HandOver => "HandOver",
            Self::LoadDeviceState { .. } => "LoadDeviceState",
            Self::MachineState { .. } => "MachineState",
            Self::RestoreState => "RestoreState",
            Self::Prepare => "Prepare",
            Self::Release => "Release",
            Self::Enough => "Enough",
            Self::Ended { .. } => "Ended",
            Self::Done => "Done",
            Self::Failed { .. } => "Failed",
            Self::Piece { .. } => "Piece",
            Self::Runs { .. } => "Runs",
            Self::Bytes(_) => "Bytes",
            Self::Observed { .. } => "Observed",
            Self::Vcpus(_) => "Vcpus",
            Self::Figures(_) => "Figures",
        }
    }
}

fn bounded(count: u32, most: usize) -> Result<u32, Malformed> {
    if usize::try_from(count).is_ok_and(|count| count <= most) { Ok(count) } else { Err("too many") }
}

impl End {
    fn number(self) -> u8 {
        match self {
            Self::Moved => 1,
            Self::Stays => 2,
            Self::Unconfirmed => 3,
            Self::Arrived => 4,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::Moved, Self::Stays, Self::Unconfirmed, Self::Arrived]
            .into_iter()
            .find(|end| end.number() == number)
    }
}

impl Offer {
    fn encode(&self, out: Out) -> Out {
        let count = |parts: usize| u32::try_from(parts).unwrap_or(u32::MAX);
        let out = out.u32(self.vcpus).sized(self.vm_id.as_bytes());
        let out = out.u32(count(self.ram.len())).runs(&self.ram).u32(count(self.blocks.len()));
        let named = |out: Out, (name, pages): &(String, PageRun)| out.run(*pages).sized(name.as_bytes());
        self.blocks.iter().fold(out, named).rest(&self.description)
    }

    fn read(fields: &mut In<'_>) -> Result<Self, Malformed> {
        let (vcpus, vm_id) = (bounded(fields.u32()?, VCPUS_MAX)?, fields.name()?);
        let regions = usize::try_from(bounded(fields.u32()?, REGIONS_MAX)?).map_err(|_| "too many")?;
        let ram = fields.runs(regions)?;
        let mut blocks = Vec::new();
        for _ in 0..bounded(fields.u32()?, BLOCKS_MAX)? {
            let pages = fields.run()?;
            blocks.push((fields.name()?, pages));
        }
        let description = fields.rest(DESCRIPTION_BYTES_MAX)?.to_vec();
        Ok(Self { vm_id, description, vcpus, ram, blocks })
    }
}

#[cfg(test)]
mod tests;
