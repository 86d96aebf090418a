//! A device beside the vCPUs, as a VMM has them: it writes guest RAM from a thread of its own, and has state.
//!
//! Its queue is a few pages of guest RAM below the first MiB, which no guest of ours uses. Write number n goes to page
//! n modulo [`QUEUE_PAGES`], with a mark that follows from n, and the tracker is told. Quiescing stops the thread.
//! Saving makes one write more, as a virtio device publishes what was in flight; a device that is restored compares the
//! queue with its registers and refuses RAM that is older, as QEMU's virtio does. So a migration that loses
//! any write of the device, that last one included, fails at the destination.
//!
//! Its large state is a stream, made from a seed while it is written and compared while it is read: neither side holds
//! more than a block of it. The registers, which say how long the stream was, are a record of the VM's `state`.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use ringferry::track::DirtyTracker;
use ringferry::{GuestAddress, GuestMemory, PageRun};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bulk::{Bulk, BulkConfig};
use crate::machine::HostMachine;
use crate::run_control::Wanted;
use crate::workload::Machine;
use crate::workload::mailbox::PAGE_BYTES;

/// Guest physical address of the queue.
pub const QUEUE_ADDRESS: u64 = 0x1_0000;
/// Pages of the queue.
pub const QUEUE_PAGES: u64 = 8;

/// First word of the stream.
const STREAM_MAGIC: u64 = u64::from_le_bytes(*b"RFDevice");
/// Bytes of state that are made, and compared, at a time.
const BLOCK_BYTES: usize = 64 << 10;

/// A device to be built. It moves with its VM: a destination needs none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceConfig {
    /// Time between two writes to guest RAM, while the VM runs.
    pub interval: Duration,
    /// What the marks in RAM and the streamed state are made from.
    pub seed: u64,
    /// Length of the streamed state in bytes.
    pub state_bytes: u64,
    /// How many bytes of it leave in each round while the guest runs; the rest leaves while it stands still.
    pub round_bytes: u64,
    /// What it writes besides, at the source.
    pub bulk: Option<BulkConfig>,
}

impl Default for DeviceConfig {
    /// A write each millisecond, and no streamed state.
    fn default() -> Self {
        Self { interval: Duration::from_millis(1), seed: 1, state_bytes: 0, round_bytes: 0, bulk: None }
    }
}

/// Why there can be no device, or why it cannot go on at the destination.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A thread for the device could not be made.
    #[error("starting the device's thread: {0}; the limit on processes (ulimit -u) may be reached")]
    Thread(#[from] io::Error),
    /// RAM lacks a write of the device.
    #[error(
        "the device's queue at {address:#x} holds write {found} where the device made write {expected}: the page was \
         sent before the device had stopped, or before its state was saved"
    )]
    OldQueue {
        /// Guest physical address of the page.
        address: u64,
        /// The number in the page.
        found: u64,
        /// The number by the device's registers.
        expected: u64,
    },
    /// The stream is not a device's.
    #[error("the streamed state does not begin like a test device's; was the source another VMM?")]
    NotStream,
    /// A byte of the stream is not what its place demands.
    #[error(
        "the streamed state is wrong in the {BLOCK_BYTES} bytes from {block_start} on: bytes were lost or moved"
    )]
    Content {
        /// Where the first block that differs begins, in bytes of state.
        block_start: u64,
    },
    /// The stream is longer or shorter than the device's state, or of another device.
    #[error("{found} bytes of streamed state came, {expected} are the device's")]
    Length {
        /// Bytes that came.
        found: u64,
        /// Bytes that belong to the device.
        expected: u64,
    },
}

/// The device's part of the VM's saved state: its configuration, and how many writes it has made.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Registers {
    interval_ns: U64,
    seed: U64,
    state_bytes: U64,
    round_bytes: U64,
    written: U64,
}

/// The device of a VM, with its thread.
#[derive(Debug)]
pub(crate) struct Device {
    config: DeviceConfig,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Bytes of state that the migration under way has taken.
    streamed: u64,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug)]
struct Queue {
    machine: HostMachine,
    tracker: Option<DirtyTracker>,
    seed: u64,
    written: u64,
    wanted: Wanted,
    bulk: Option<Bulk>,
}

impl Device {
    /// A device that stands still, in RAM that is its own to write.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Thread`].
    pub fn new(
        config: DeviceConfig,
        memory: &GuestMemory,
        tracker: Option<DirtyTracker>,
    ) -> Result<Self, DeviceError> {
        let bulk = config.bulk.and_then(|bulk| Bulk::new(bulk, memory, tracker.as_ref()));
        Self::with_queue(config, Queue { bulk, ..Queue::new(memory, tracker, config.seed, 0) })
    }

    /// The device that `registers` were saved of, standing still.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: its queue in RAM is not what it left, or `stream` was not its state.
    pub fn restored(
        registers: Registers,
        stream: &StreamCheck,
        memory: &GuestMemory,
        tracker: Option<DirtyTracker>,
    ) -> Result<Self, DeviceError> {
        let config = DeviceConfig {
            interval: Duration::from_nanos(registers.interval_ns.get()),
            seed: registers.seed.get(),
            state_bytes: registers.state_bytes.get(),
            round_bytes: registers.round_bytes.get(),
            bulk: None,
        };
        stream.is_all_of(&config)?;
        let queue = Queue::new(memory, tracker, config.seed, registers.written.get());
        queue.check()?;
        Self::with_queue(config, queue)
    }

    fn with_queue(config: DeviceConfig, queue: Queue) -> Result<Self, DeviceError> {
        let shared = Arc::new(Shared { queue: Mutex::new(queue), changed: Condvar::new() });
        let theirs = shared.clone();
        let thread = Builder::new().name("device".to_owned()).spawn(move || theirs.work(config.interval))?;
        Ok(Self { config, shared, thread: Some(thread), streamed: 0 })
    }

    /// Lets the device work.
    pub fn run(&mut self) {
        self.streamed = 0;
        self.shared.want(Wanted::Run);
    }

    /// Stops the device: once this has returned, it writes no RAM.
    pub fn quiesce(&self) {
        self.shared.want(Wanted::Pause);
    }

    /// How many writes the device has made.
    pub fn written(&self) -> u64 {
        self.shared.queue.lock().written
    }

    /// Makes the last write and returns the registers; `None` if the device has not been quiesced.
    pub fn save(&self) -> Option<Registers> {
        let mut queue = self.shared.queue.lock();
        if queue.wanted == Wanted::Run {
            return None;
        }
        queue.write();
        Some(Registers {
            interval_ns: u64::try_from(self.config.interval.as_nanos()).unwrap_or(u64::MAX).into(),
            seed: self.config.seed.into(),
            state_bytes: self.config.state_bytes.into(),
            round_bytes: self.config.round_bytes.into(),
            written: queue.written.into(),
        })
    }

    /// A migration begins: its stream begins at the first byte.
    pub fn begin_stream(&mut self) {
        self.streamed = 0;
    }

    /// Bytes of state that the migration under way has still to take.
    pub fn left(&self) -> u64 {
        self.config.state_bytes.saturating_sub(self.streamed)
    }

    /// Writes the next part of the state: a round's, or all that is left.
    ///
    /// # Errors
    ///
    /// What `out` says.
    pub fn stream(&mut self, all_of_it: bool, out: &mut dyn Write) -> io::Result<()> {
        let DeviceConfig { seed, round_bytes, .. } = self.config;
        let left = self.left();
        let mut part = if all_of_it { left } else { left.min(round_bytes) };
        if part > 0 && self.streamed == 0 {
            let header = StreamHeader { magic: STREAM_MAGIC.into(), seed: seed.into() };
            out.write_all(header.as_bytes())?;
        }
        let mut content = Content::new(seed);
        while part > 0 {
            let block = content.from(self.streamed);
            let length = usize::try_from(part).map_or(block.len(), |part| part.min(block.len()));
            out.write_all(&block[..length])?;
            self.streamed += length as u64;
            part -= length as u64;
        }
        Ok(())
    }
}

impl Drop for Device {
    /// Ends the thread and joins it.
    fn drop(&mut self) {
        self.shared.want(Wanted::End);
        if let Some(thread) = self.thread.take() {
            // A device that panicked writes nothing any more either.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn want(&self, wanted: Wanted) {
        // The lock is held during each write: whoever has it knows that none is under way.
        self.queue.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// On the device's thread, until the device ends.
    fn work(&self, interval: Duration) {
        let mut queue = self.queue.lock();
        loop {
            match queue.wanted {
                Wanted::End => return,
                Wanted::Pause => self.changed.wait(&mut queue),
                Wanted::Run => {
                    queue.write();
                    queue.write_in_bulk();
                    self.changed.wait_for(&mut queue, interval);
                }
            }
        }
    }
}

impl Queue {
    fn new(memory: &GuestMemory, tracker: Option<DirtyTracker>, seed: u64, written: u64) -> Self {
        Self { machine: HostMachine::new(memory), tracker, seed, written, wanted: Wanted::Pause, bulk: None }
    }

    fn write(&mut self) {
        let number = self.written.wrapping_add(1);
        let address = page_of(number);
        self.machine.store(address, number);
        self.machine.store(address + 8, mark(self.seed, number));
        self.written = number;
        // After the stores: a harvest that takes the mark is followed by a read of what was stored.
        if let Some(tracker) = &self.tracker {
            tracker.mark_dirty(PageRun { first: GuestAddress(address).page(), pages: 1 });
        }
    }

    fn write_in_bulk(&mut self) {
        if let Some(bulk) = &mut self.bulk {
            bulk.write(&mut self.machine);
        }
    }

    /// Compares each page of the queue with the last write that went there.
    fn check(&self) -> Result<(), DeviceError> {
        let oldest = self.written.saturating_sub(QUEUE_PAGES - 1).max(1);
        for expected in oldest..=self.written {
            let address = page_of(expected);
            let (found, found_mark) = (self.machine.load(address), self.machine.load(address + 8));
            if (found, found_mark) != (expected, mark(self.seed, expected)) {
                return Err(DeviceError::OldQueue { address, found, expected });
            }
        }
        Ok(())
    }
}

/// Guest physical address of the page that write `number` goes to.
fn page_of(number: u64) -> u64 {
    QUEUE_ADDRESS + number % QUEUE_PAGES * PAGE_BYTES
}

/// The second word of write `number`: no other device's, and no other write's.
fn mark(seed: u64, number: u64) -> u64 {
    mix(seed ^ number.rotate_left(32))
}

/// A bijection whose results look random: the middle of splitmix64.
fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word ^ word >> 27
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StreamHeader {
    magic: U64,
    seed: U64,
}

/// The streamed state, a block at a time: random bytes, of which the first eight of each block say which it is.
#[derive(Debug)]
struct Content {
    seed: u64,
    block: Vec<u8>,
}

impl Content {
    fn new(seed: u64) -> Self {
        let words = (0..BLOCK_BYTES as u64 / 8).map(|index| mix(seed.wrapping_add(index)));
        Self { seed, block: words.flat_map(u64::to_le_bytes).collect() }
    }

    /// The bytes from `offset` to the end of its block.
    fn from(&mut self, offset: u64) -> &[u8] {
        let block_start = offset - offset % BLOCK_BYTES as u64;
        self.block[..8].copy_from_slice(&mark(self.seed, block_start).to_le_bytes());
        // A remainder of a usize is one.
        &self.block[usize::try_from(offset - block_start).unwrap_or(0)..]
    }
}

/// The destination's end of the stream.
#[derive(Debug, Default)]
pub(crate) struct StreamCheck {
    /// The header, as far as it is here.
    header: Vec<u8>,
    /// Once the header is complete.
    content: Option<Content>,
    /// Bytes of state that came.
    bytes: u64,
}

impl StreamCheck {
    /// Compares the next piece, cut at any place.
    ///
    /// # Errors
    ///
    /// [`DeviceError::NotStream`], [`DeviceError::Content`].
    pub fn take(&mut self, mut piece: &[u8]) -> Result<(), DeviceError> {
        let content = match &mut self.content {
            Some(content) => content,
            none => {
                let missing = size_of::<StreamHeader>() - self.header.len();
                let (head, rest) = piece.split_at(missing.min(piece.len()));
                self.header.extend_from_slice(head);
                piece = rest;
                let Ok(header) = StreamHeader::read_from_bytes(&self.header) else { return Ok(()) };
                if header.magic.get() != STREAM_MAGIC {
                    return Err(DeviceError::NotStream);
                }
                none.insert(Content::new(header.seed.get()))
            }
        };
        while !piece.is_empty() {
            let expected = content.from(self.bytes);
            let (part, rest) = piece.split_at(piece.len().min(expected.len()));
            if part != &expected[..part.len()] {
                let block_start = self.bytes - self.bytes % BLOCK_BYTES as u64;
                return Err(DeviceError::Content { block_start });
            }
            self.bytes += part.len() as u64;
            piece = rest;
        }
        Ok(())
    }

    /// Whether what came is all of a device's state, and nothing else.
    fn is_all_of(&self, device: &DeviceConfig) -> Result<(), DeviceError> {
        let same = self.content.as_ref().is_none_or(|content| content.seed == device.seed);
        if !same || self.bytes != device.state_bytes {
            return Err(DeviceError::Length { found: self.bytes, expected: device.state_bytes });
        }
        Ok(())
    }

    /// That nothing came, for a VM without a device.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Length`].
    pub fn is_empty(&self) -> Result<(), DeviceError> {
        self.is_all_of(&DeviceConfig { seed: 0, state_bytes: 0, ..DeviceConfig::default() })
    }
}
