//! The external sources of a tracker, and what they have logged: all under a lock of its own.
//!
//! A device's log may take milliseconds to be read, and a vCPU with a full ring waits for the tracker's lock. So sources are
//! read before that lock is taken: this one first, the tracker's second, never the other way round. A vCPU's path does
//! not know this one.

use std::fmt;
use std::time::{Duration, Instant};

use super::error::TrackError;
use super::external::ExternalSource;
use crate::layout::PageIndex;
use crate::page_set::PageSet;

/// An observation reads the sources again when so many times as long has passed as they took.
const LOOK_REST: u32 = 20;

/// An external source that was added to a tracker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExternalId(u64);

struct External {
    id: ExternalId,
    source: Box<dyn ExternalSource>,
}

impl External {
    fn start(&mut self) -> Result<(), TrackError> {
        let name = self.source.name();
        self.source.start().map_err(|source| TrackError::External { name, source })
    }
}

/// All external sources of a tracker.
pub(super) struct Others {
    sources: Vec<External>,
    next_id: u64,
    running: bool,
    /// What they logged and no session has yet.
    found: PageSet,
    /// When they were last read, and how long that took.
    last_look: Option<(Instant, Duration)>,
}

impl Others {
    pub(super) fn new() -> Self {
        let found = PageSet::new(PageIndex(0));
        Self { sources: Vec::new(), next_id: 0, running: false, found, last_look: None }
    }

    /// Guest RAM ends at `end` from now on.
    pub(super) fn resize(&mut self, end: PageIndex) {
        self.found.resize(end);
    }

    /// Adds a source, and starts it if the others run.
    pub(super) fn add(&mut self, source: Box<dyn ExternalSource>) -> Result<ExternalId, TrackError> {
        let mut external = External { id: ExternalId(self.next_id), source };
        if self.running {
            external.start()?;
        }
        self.next_id += 1;
        let id = external.id;
        self.sources.push(external);
        Ok(id)
    }

    /// Takes a source out, whose writer has stopped; what it has logged is kept. `None` if it is gone already.
    pub(super) fn remove(&mut self, id: ExternalId) -> Option<Box<dyn ExternalSource>> {
        let at = self.sources.iter().position(|external| external.id == id)?;
        let mut source = self.sources.remove(at).source;
        if self.running {
            source.drain_into(&mut self.found);
            source.stop();
        }
        Some(source)
    }

    /// Starts every source; none is left on when one cannot.
    pub(super) fn start(&mut self) -> Result<(), TrackError> {
        self.found.clear();
        for at in 0..self.sources.len() {
            if let Err(error) = self.sources[at].start() {
                self.sources[..at].iter_mut().for_each(|external| external.source.stop());
                return Err(error);
            }
        }
        self.running = true;
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        self.sources.iter_mut().for_each(|external| external.source.stop());
        self.found.clear();
        self.running = false;
        self.last_look = None;
    }

    /// Reads every source, if they run.
    pub(super) fn drain(&mut self) {
        if self.running && !self.sources.is_empty() {
            let began = Instant::now();
            self.sources.iter_mut().for_each(|external| external.source.drain_into(&mut self.found));
            self.last_look = Some((began, began.elapsed()));
        }
    }

    /// The same for an observation, unless that was done a moment ago.
    pub(super) fn drain_if_rested(&mut self) {
        if self.last_look.is_none_or(|(at, took)| at.elapsed() >= took * LOOK_REST) {
            self.drain();
        }
    }

    /// Moves what was found into `dirty`, which is as large.
    pub(super) fn move_into(&mut self, dirty: &mut PageSet) {
        if !self.found.is_empty() {
            dirty.union(&self.found);
            self.found.clear();
        }
    }
}

impl fmt::Debug for Others {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.sources.iter().map(|external| (external.id.0, external.source.name()));
        f.debug_map().entries(names).finish()
    }
}
