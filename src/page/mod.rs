//! What a page is before it is sent: whether it was ever populated, whether it is zero, what it hashes to, and what
//! it becomes on the wire.
//!
//! This is the only module that reads guest memory with the CPU; `transport` lets the kernel read it.

mod clear;
mod digest;
mod encode;
mod ledger;
mod populated;
mod read;

pub use self::clear::{clear, clear_used};
pub use self::digest::{DigestedRam, RamDigest, ram_digest};
pub use self::encode::{Encoder, Piece};
pub use self::ledger::{Audit, RamLedger};
pub use self::populated::{Populated, populated};
pub use self::read::{copy_page, is_zero, zero_pages};
