//! What is said of dirty tracking where the VMM keeps it.

use crate::track::VcpuFigures;

/// Who takes dirty pages out of the kernel while a VM is lent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::offload) enum Taker {
    /// The offload process follows the rings.
    OffloadProcess,
    /// The VMM's tracker, on rings, and the offload process has a session of it.
    VmmOnRings,
    /// The same on the bitmap.
    VmmOnBitmap,
}

/// What a harvest of a session takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::offload) enum Harvest {
    /// Everything, protected.
    All,
    /// What is protected; the rest is told of.
    Protected,
    /// Everything, while the guest stands still.
    Paused,
    /// Everything, while nothing writes guest memory any more.
    Final,
}

/// A vCPU of the tracker: the VMM's index, and the place of its gate in the page.
pub(in crate::offload) type VcpuPlace = (u32, u32);

impl Taker {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::OffloadProcess => 0,
            Self::VmmOnRings => 1,
            Self::VmmOnBitmap => 2,
        }
    }

    pub(super) fn of(number: u8) -> Option<Self> {
        let all = [Self::OffloadProcess, Self::VmmOnRings, Self::VmmOnBitmap];
        all.into_iter().find(|taker| taker.number() == number)
    }
}

impl Harvest {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::All => 1,
            Self::Protected => 2,
            Self::Paused => 3,
            Self::Final => 4,
        }
    }

    pub(super) fn of(number: u8) -> Option<Self> {
        let all = [Self::All, Self::Protected, Self::Paused, Self::Final];
        all.into_iter().find(|harvest| harvest.number() == number)
    }
}

/// A vCPU's figures on the wire: its index, and these in this order.
macro_rules! figures {
    ($($figure:ident),+ $(,)?) => {
        pub(super) fn words_of(figures: &VcpuFigures) -> [u64; 1 + [$(stringify!($figure)),+].len()] {
            let VcpuFigures { index, $($figure),+ } = *figures;
            [u64::try_from(index).unwrap_or(u64::MAX), $($figure),+]
        }

        pub(super) fn figures_of(words: &[u64]) -> Option<VcpuFigures> {
            let [index, $($figure),+] = *words else { return None };
            Some(VcpuFigures { index: usize::try_from(index).ok()?, $($figure),+ })
        }
    };
}

figures! {
    pages,
    duplicate_entries,
    ring_full_exits,
    harvest_ns,
    ring_entries,
    ring_entries_max,
    overflows,
    throttled_ns,
    stalls,
    stalls_in_kernel,
    stalls_in_user,
    stalls_put_off,
}
