//! Why a migration is refused or ended, for programs: a number on the wire beside the text for people.

/// Why a peer refuses or ends a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// No version of the protocol is common to both sides.
    Version,
    /// A required feature is missing; the text names it.
    Feature,
    /// The VM that is offered differs from the one that is awaited: RAM, vCPUs, blocks of memory.
    Layout,
    /// The destination is receiving another VM, as many as it takes at a time.
    Busy,
    /// The destination's VMM cannot build the VM.
    Unbuildable,
    /// Somebody asked for the end.
    Cancelled,
    /// A time limit has passed.
    TimedOut,
    /// RAM differs.
    Verification,
    /// A VMM could not do its part.
    Vmm,
    /// The data connections failed.
    Transport,
    /// The peer said what its phase does not allow.
    Protocol,
    /// The migration gave up by its own limits.
    GaveUp,
    /// A reason that this version does not know.
    Other(u16),
}

impl Reason {
    const NUMBERS: [(Self, u16); 12] = [
        (Self::Version, 1),
        (Self::Feature, 2),
        (Self::Layout, 3),
        (Self::Busy, 4),
        (Self::Unbuildable, 5),
        (Self::Cancelled, 6),
        (Self::TimedOut, 7),
        (Self::Verification, 8),
        (Self::Vmm, 9),
        (Self::Transport, 10),
        (Self::Protocol, 11),
        (Self::GaveUp, 12),
    ];

    /// As it is on the wire.
    pub fn number(self) -> u16 {
        match self {
            Self::Other(number) => number,
            known => {
                Self::NUMBERS.iter().find(|(reason, _)| *reason == known).map_or(0, |(_, number)| *number)
            }
        }
    }

    /// From the wire.
    pub fn from_number(number: u16) -> Self {
        let known = Self::NUMBERS.iter().find(|(_, known)| *known == number);
        known.map_or(Self::Other(number), |(reason, _)| *reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_reads_back_as_itself() {
        for number in 0..100 {
            assert_eq!(Reason::from_number(number).number(), number);
        }
        assert_eq!(Reason::from_number(4), Reason::Busy);
    }
}
