//! The state stream: device state in pieces, then the state of the machine, in records that any chunk of the stream may
//! cut.
//!
//! The data connections carry the stream in chunks and put them in order again; this file says what the bytes mean.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest content of one record.
pub const RECORD_BYTES_MAX: usize = super::STATE_CHUNK_BYTES_MAX as usize - RECORD_HEAD_BYTES;

/// Precedes a record.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
struct RecordHead {
    kind: U16,
    reserved: U16,
    bytes: U32,
}

const RECORD_HEAD_BYTES: usize = size_of::<RecordHead>();

/// What a record holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordKind {
    /// State of devices, to be loaded as it comes.
    Device,
    /// A piece of the state of the machine, to be restored as a whole once RAM is complete.
    Machine,
    /// The switchover was called off and the guest runs on at the source: the state of the machine so far is void. Only for
    /// a peer with the feature `call-off`.
    Void,
}

/// Why bytes are not a state stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFormatError {
    /// A kind of record that this version does not know.
    #[error("the state has a record of kind {0}, which this release does not know: update this side")]
    Kind(u16),
    /// A record of a length that none has.
    #[error("the state has a record of {0} bytes, the limit is {RECORD_BYTES_MAX}")]
    TooLong(u32),
    /// The stream ends within a record.
    #[error("the state ends within a record")]
    Truncated,
}

/// A record as it goes into the stream. `content` has at most [`RECORD_BYTES_MAX`] bytes.
pub fn record(kind: RecordKind, content: &[u8]) -> Vec<u8> {
    let number: u16 = match kind {
        RecordKind::Device => 1,
        RecordKind::Machine => 2,
        RecordKind::Void => 3,
    };
    let bytes = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let head = RecordHead { kind: number.into(), reserved: 0.into(), bytes: bytes.into() };
    [head.as_bytes(), content].concat()
}

/// Takes a stream apart, however it is cut.
#[derive(Debug, Default)]
pub struct StateReader {
    head: Vec<u8>,
    /// The record that is being read, and how much of it is missing.
    record: Option<(RecordKind, usize)>,
}

impl StateReader {
    /// Hands the content of `bytes` to `take`, piece by piece.
    ///
    /// # Errors
    ///
    /// [`StateFormatError`], or what `take` says.
    pub fn read<E: From<StateFormatError>>(
        &mut self,
        mut bytes: &[u8],
        mut take: impl FnMut(RecordKind, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if let Some((kind, missing)) = &mut self.record {
                let (piece, rest) = bytes.split_at(bytes.len().min(*missing));
                take(*kind, piece)?;
                *missing -= piece.len();
                if *missing == 0 {
                    self.record = None;
                }
                bytes = rest;
            } else {
                let (head, rest) = bytes.split_at(bytes.len().min(RECORD_HEAD_BYTES - self.head.len()));
                self.head.extend_from_slice(head);
                bytes = rest;
                if let Ok(head) = RecordHead::read_from_bytes(&self.head) {
                    self.head.clear();
                    self.record = begin(head)?;
                }
            }
        }
        Ok(())
    }

    /// The stream has ended.
    ///
    /// # Errors
    ///
    /// [`StateFormatError::Truncated`].
    pub fn finish(&self) -> Result<(), StateFormatError> {
        let whole = self.record.is_none() && self.head.is_empty();
        if whole { Ok(()) } else { Err(StateFormatError::Truncated) }
    }
}

fn begin(head: RecordHead) -> Result<Option<(RecordKind, usize)>, StateFormatError> {
    let kind = match head.kind.get() {
        1 => RecordKind::Device,
        2 => RecordKind::Machine,
        3 => RecordKind::Void,
        unknown => return Err(StateFormatError::Kind(unknown)),
    };
    let too_long = StateFormatError::TooLong(head.bytes.get());
    let bytes = usize::try_from(head.bytes.get()).map_err(|_| too_long)?;
    if bytes > RECORD_BYTES_MAX {
        return Err(too_long);
    }
    Ok((bytes > 0).then_some((kind, bytes)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_kind() -> impl Strategy<Value = RecordKind> {
        prop_oneof![Just(RecordKind::Device), Just(RecordKind::Machine)]
    }

    proptest! {
        #[test]
        fn records_are_read_whole_however_the_stream_is_cut(
            records in prop::collection::vec((any_kind(), prop::collection::vec(any::<u8>(), 0..100)), 0..10),
            cut in 1..50_usize,
        ) {
            let stream: Vec<u8> = records.iter().flat_map(|(kind, content)| record(*kind, content)).collect();
            let (mut reader, mut read) = (StateReader::default(), [Vec::new(), Vec::new()]);
            for piece in stream.chunks(cut) {
                reader.read(piece, |kind, content| {
                    read[usize::from(kind == RecordKind::Machine)].extend_from_slice(content);
                    Ok::<(), StateFormatError>(())
                }).unwrap();
            }
            prop_assert_eq!(reader.finish(), Ok(()));
            for (at, of) in [(0, RecordKind::Device), (1, RecordKind::Machine)] {
                let all: Vec<u8> = records.iter().filter(|(kind, _)| *kind == of).flat_map(|(_, c)| c.clone()).collect();
                prop_assert_eq!(&read[at], &all);
            }
        }

        #[test]
        fn random_bytes_give_pieces_within_the_input_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut held = 0;
            let _ = StateReader::default().read(&bytes, |_, content| {
                held += content.len();
                Ok::<(), StateFormatError>(())
            });
            prop_assert!(held <= bytes.len());
        }
    }

    #[test]
    fn a_stream_that_ends_within_a_record_is_refused() {
        let stream = record(RecordKind::Machine, b"abc");
        let mut reader = StateReader::default();
        reader.read(&stream[..stream.len() - 1], |_, _| Ok::<(), StateFormatError>(())).unwrap();
        assert_eq!(reader.finish(), Err(StateFormatError::Truncated));
    }
}
