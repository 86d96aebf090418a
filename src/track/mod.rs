//! Which pages are dirty, and who dirtied them.
//!
//! [`DirtyTracker`] is what a VMM links, for all of a VM's life, on KVM's dirty rings or on its bitmap; its vCPU threads hold
//! a [`VcpuHandle`] each, and who throttles them a [`VcpuThrottle`]. Whoever wants dirty pages has a [`Session`] of it. What a migration asks is the trait
//! [`DirtySource`], which a session implements.
//!
//! The one rule of this module: a page is handed out only after it was write-protected again, so that whoever
//! reads it then misses no later write. `rings` and `bitmap` say how each backend keeps it.

mod bitmap;
#[cfg(feature = "offload")]
mod borrowed;
mod collect;
mod error;
pub mod external;
mod figures;
mod gate;
mod handle;
#[cfg(feature = "offload")]
mod kept;
#[cfg(feature = "offload")]
mod lending;
#[cfg(feature = "offload")]
mod lent;
#[cfg(feature = "offload")]
mod lent_gates;
mod lent_page;
mod others;
mod pagemap;
mod pending;
mod redirtied;
mod rings;
mod run_timer;
mod session;
mod session_pages;
mod shared;
mod slots;
mod source;
#[cfg(test)]
mod tests;
mod throttle;
mod tracker;
mod unprotected;
mod vcpu;

#[cfg(feature = "offload")]
pub(crate) use self::borrowed::{BorrowedVcpu, borrowed_throttle, serve_full_rings};
pub use self::error::{PagemapError, TrackError};
pub use self::external::ExternalSource;
pub use self::figures::{Figures, FullRings, VcpuFigures};
pub use self::gate::{BeforeRun, GuestMode};
pub use self::handle::{KVM_EXIT_DIRTY_RING_FULL, VcpuHandle};
#[cfg(feature = "offload")]
pub(crate) use self::kept::Keeping;
#[cfg(feature = "offload")]
pub(crate) use self::lending::Lending;
#[cfg(feature = "offload")]
pub(crate) use self::lent_page::{LentPage, ring_bell, signs_of_life};
pub use self::others::ExternalId;
pub use self::pagemap::PagemapTracker;
pub use self::redirtied::Redirtied;
pub use self::session::{Leftover, Session};
pub use self::source::{DirtySource, Observed};
pub use self::throttle::VcpuThrottle;
pub use self::tracker::{DirtyTracker, Initially};
