//! Why bytes of the control connection are not a message.

/// Why bytes are not a message.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlFormatError {
    /// The first four bytes are not ours.
    #[error("the peer does not speak Ringferry's control protocol (it began with {0:02x?})")]
    Magic([u8; 4]),
    /// A kind of message that this version does not know and must not skip.
    #[error("the peer sent control message kind {0}, which this release does not know: update this side")]
    Kind(u16),
    /// The announced length is over the limit.
    #[error("control message kind {kind} announces {bytes} bytes, the limit is {limit}")]
    TooLong {
        /// Which message.
        kind: u16,
        /// Announced length.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The checksum does not match.
    #[error("control message kind {0} is damaged (its checksum does not match)")]
    Checksum(u16),
    /// A body that is shorter or longer than its own fields say.
    #[error("{message} has a body of {bytes} bytes, which is not what its fields say")]
    Body {
        /// Which message.
        message: &'static str,
        /// Length found.
        bytes: usize,
    },
    /// A part that its own head does not describe, or one too many.
    #[error("part {number} of a control message is malformed, or one too many")]
    Part {
        /// Which one, from 0.
        number: usize,
    },
    /// A part that has to be understood and is not known here.
    #[error("the peer requires `{name}`, which this release does not know: update this side")]
    UnknownPart {
        /// Its name.
        name: String,
    },
}
