//! Rings that another process follows for a while, at both ends.

use super::{Context, Rings, timed_reset};
use crate::track::error::TrackError;

/// Resets in a row that find nothing, until nothing is left to reset. One may be cut short by a stop signal.
const IDLE_RESETS: u32 = 2;
/// Resets at most: each but the last few frees an entry of some ring.
const RESETS_MAX: u32 = 1 << 20;

impl Rings {
    /// How far each ring is taken.
    pub(in crate::track) fn positions(&self) -> Vec<u32> {
        self.rings.iter().map(|ring| ring.ring.position()).collect()
    }

    /// The borrower has gone, in whatever state; nothing is logged any more. Finds each ring's place again and has reset
    /// what the borrower took. `published` says how far it had come for certain.
    pub(in crate::track) fn follow_borrower(
        &mut self,
        cx: Context<'_>,
        published: impl Fn(usize) -> u32,
    ) -> Result<(), TrackError> {
        for (at, ring) in self.rings.iter_mut().enumerate() {
            ring.ring.follow_borrower(published(at));
        }
        let mut idle = 0;
        for _ in 0..RESETS_MAX {
            idle = if timed_reset(cx)?.entries == 0 { idle + 1 } else { 0 };
            if idle == IDLE_RESETS {
                break;
            }
        }
        for ring in self.rings.iter_mut().filter(|ring| ring.ring.is_out_of_step()) {
            ring.overflowed("it came back out of step from the process that followed it");
        }
        Ok(())
    }

    /// Nobody knows how far the rings are taken: the next harvest that finds anything declares everything dirty.
    pub(in crate::track) fn distrust(&mut self) {
        for ring in &mut self.rings {
            ring.overflowed("a process that had frozen may have taken entries of it");
        }
    }
}
