//! Which pages are dirty, and who dirtied them.

use crate::page_set::PageSet;
use crate::vm::Paused;

/// Why tracking failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrackError {}

/// One place that dirty pages come from.
pub trait DirtySource: Send {
    /// The name that reports show: `ring`, `bitmap`, `pagemap`.
    fn backend(&self) -> &'static str;

    /// Begins tracking; every page is clean from here on.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    fn start(&mut self) -> Result<(), TrackError>;

    /// Unique pages dirtied by each vCPU since they were last recycled. Costs the guest nothing.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    fn observe(&mut self) -> Result<Vec<u64>, TrackError>;

    /// Adds to `dirty` all pages dirtied since the last harvest, each write-protected again by the time this
    /// returns, so that their content may be read.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// [`harvest`](Self::harvest) when nothing runs any more: the last and complete view.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    fn harvest_final(&mut self, paused: &Paused, dirty: &mut PageSet) -> Result<(), TrackError>;

    /// Marks pages dirty again that were harvested and never arrived.
    fn give_back(&mut self, pages: &PageSet);

    /// Ends tracking.
    ///
    /// # Errors
    ///
    /// [`TrackError`].
    fn stop(&mut self) -> Result<(), TrackError>;
}
