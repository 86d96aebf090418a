//! The guest stands still: the proof of it, its budget, and the way back.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::SourceError;
use super::link::Link;
use super::migration::Migration;
use crate::converge::guard::Guard;
use crate::page_set::PageSet;
use crate::progress::GaveWay;
use crate::track::DirtySource;
use crate::transport::control::{ControlError, Wait};
use crate::vm::{Paused, Vm};

/// The guest stands still.
#[derive(Debug)]
pub(super) struct Standstill {
    pub paused: Paused,
    pub since: Instant,
    pub budget: Duration,
    /// Pages that were dirty, or not sent yet, when it was stopped.
    pub left: PageSet,
    /// Pages that were harvested since, and are unprotected: once the guest runs on, they are dirty again.
    pub unprotected: PageSet,
    /// The size of the round of which pages are still on their way.
    pub round_pages: Option<u64>,
    pub guard: Guard,
    /// Why it is not called off when the guard says that it takes too long.
    pub held: Option<GaveWay>,
}

impl Standstill {
    /// The wait that ends with the budget.
    pub fn wait<'c>(&self, cancel: &'c AtomicBool) -> Wait<'c> {
        Wait { deadline: self.since + self.budget, cancel }
    }

    /// The guest runs here again; then the rest is undone.
    pub fn undo<V: Vm + ?Sized, D: DirtySource + ?Sized>(
        self,
        migration: &mut Migration<'_, V, D>,
        link: &Link,
        error: SourceError,
    ) -> SourceError {
        let error = migration.resume_first(self.paused, error);
        let error = match error {
            SourceError::Control(ControlError::Timeout { expected }) => {
                SourceError::StandstillOver { budget: self.budget, waiting_for: expected }
            }
            error => error,
        };
        migration.give_up(link, error)
    }
}
