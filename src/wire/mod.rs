//! What the bytes mean: frames, messages, limits and versions. Nothing here knows a socket or a page of RAM.
//!
//! Every length that a peer states is compared with a limit of this page before it is believed, so that what a
//! connection can make us hold is bounded by constants, whatever it sends.

pub mod control;
pub mod data;
pub mod error;
pub mod features;
pub mod hello;
pub mod parts;
pub mod reason;
pub mod relay;
pub mod state;

/// Pages of content in one frame. 1024 pages are 4 MiB, and, when each of them is a run of its own, exactly
/// the 1024 pieces that the kernel takes in one `sendmsg` (`UIO_MAXIOV`).
pub const FRAME_DATA_PAGES_MAX: u32 = 1024;

/// Bytes of payload in one frame.
pub const FRAME_PAYLOAD_BYTES_MAX: u32 = FRAME_DATA_PAGES_MAX * 4096;

/// Runs in one frame, those of zero pages included: a run list is at most 32 KiB.
pub const FRAME_RUNS_MAX: u32 = 2048;

/// Bytes that a later version may add to a frame after its run list.
pub const FRAME_EXTENSION_BYTES_MAX: u16 = 4096;

/// Data connections of one migration, so that a handshake cannot ask for a thousand threads.
pub const CHANNELS_MAX: u16 = 64;

/// Bytes of device state in one frame.
pub const STATE_CHUNK_BYTES_MAX: u32 = 256 << 10;

/// How far the source may send device state ahead of what the destination's VMM has taken.
pub const STATE_WINDOW_BYTES: u64 = 16 << 20;
