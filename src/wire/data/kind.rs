//! What frames there are.

/// What a frame is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// Runs of pages and the content of those that have one. The argument is the bytes that the link holds under way
    /// as far as the source knows, so that the destination can make its buffer as large. 1 on the wire.
    Pages,
    /// The connection that the argument names is dead to the source. Acknowledged once the destination's end of it can
    /// write no page any more. 2 on the wire.
    Retire,
    /// Device state that begins at the argument in the stream of all of it. 3 on the wire.
    State,
    /// A kind of a later version, which may be skipped.
    Unknown(u16),
}

impl FrameKind {
    pub(super) fn number(self) -> u16 {
        match self {
            Self::Pages => 1,
            Self::Retire => 2,
            Self::State => 3,
            Self::Unknown(number) => number,
        }
    }

    pub(super) fn of(number: u16) -> Self {
        match number {
            1 => Self::Pages,
            2 => Self::Retire,
            3 => Self::State,
            number => Self::Unknown(number),
        }
    }
}
