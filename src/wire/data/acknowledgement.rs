//! What the destination sends back.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{DataError, check_magic, check_tail, tail_of};

const ACKNOWLEDGEMENT_MAGIC: u32 = u32::from_le_bytes(*b"RFda");

/// What the destination sends back when everything up to and including frame `sequence` is in place. 24 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Acknowledgement {
    magic: U32,
    reserved: U32,
    sequence: U64,
    pad: U32,
    checksum: U32,
}

impl Acknowledgement {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// Says that everything up to frame `sequence` is in place.
    pub fn new(sequence: u64) -> Self {
        let mut acknowledgement = Self {
            magic: ACKNOWLEDGEMENT_MAGIC.into(),
            reserved: U32::ZERO,
            sequence: sequence.into(),
            pad: U32::ZERO,
            checksum: U32::ZERO,
        };
        acknowledgement.checksum = tail_of(acknowledgement.as_bytes());
        acknowledgement
    }

    /// Reads and checks one; the frame up to which everything is in place.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic or checksum.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<u64, DataError> {
        let acknowledgement: Self = zerocopy::transmute!(*bytes);
        check_magic("an acknowledgement", ACKNOWLEDGEMENT_MAGIC, acknowledgement.magic)?;
        check_tail("an acknowledgement", bytes)?;
        Ok(acknowledgement.sequence.get())
    }
}
