//! The outgoing side: the life of a migration, phase by phase, each in a file of its own.
//!
//! ```text
//! setup          the peers agree; data connections stand; the guest runs
//! precopy        rounds of dirty pages; the guest runs
//! stop_and_copy  the guest stands still: device state, the last harvest, the last pages, PREPARED
//! commit         COMMIT, and the destination's word: RUNNING, or a definite no
//! ```
//!
//! Until PREPARE has left, a standstill that is going to last too long is called off, and precopy goes on (`guard`).
//!
//! A phase owns what exists in it: the proof of the pause is a field of the standstill and of nothing else. Until
//! `Commit` has left, the first act of every failure is to let the guest run here; then pages go back to the dirty set,
//! and then the destination is told. After it, only the destination's word counts: see [`Outcome`].
//!
//! [`destination`](crate::destination) mirrors these phases.

mod behind;
mod commit;
mod error;
mod link;
mod migration;
mod options;
mod precopy;
mod report;
mod run_budget;
mod setup;
mod standstill;
mod state_writer;
mod steering;
mod stop_and_copy;
mod verification;

use std::time::Instant;

pub use commit::{Outcome, Unconfirmed};
pub use error::SourceError;
pub use options::{SourceOptions, StandstillLimit};
pub use report::{ChannelReport, LossReport, SourceReport};

use self::migration::Migration;
use self::stop_and_copy::Ended;
use crate::layout::GuestMemory;
use crate::progress::{Event, Phase, Progress};
use crate::track::DirtySource;
use crate::vm::Vm;

/// One migration of one VM.
#[derive(Debug)]
pub struct Source<'a, V: ?Sized, D: ?Sized> {
    migration: Migration<'a, V, D>,
}

impl<'a, V: Vm + ?Sized, D: DirtySource + ?Sized> Source<'a, V, D> {
    /// Prepares a migration; [`run`](Self::run) does it.
    pub fn new(
        vm: &'a mut V,
        tracker: &'a mut D,
        memory: &'a GuestMemory,
        options: SourceOptions,
        progress: Progress,
    ) -> Self {
        Self { migration: Migration::new(vm, tracker, memory, options, progress) }
    }

    /// Migrates the VM. Returns when the destination runs it, when it has failed and the VM runs on here, or when it was
    /// handed over and nobody knows whether it runs there.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; the VM runs on here, unless the VMM itself failed to resume it.
    pub fn run(self) -> Result<Outcome<'a, V, D>, SourceError> {
        let mut migration = self.migration;
        let _watchers_are_told = TellsOfPanic(migration.progress.clone());
        migration.started = Instant::now();
        let handed_over = attempt(&mut migration);
        publish_end(&migration.progress, &handed_over);
        if let Ok(commit::HandedOver::Confirmed) = &handed_over {
            migration.audit();
        }
        Ok(match handed_over? {
            commit::HandedOver::Confirmed => Outcome::HandedOver(Box::new(migration.report)),
            commit::HandedOver::Unconfirmed(paused, cause) => {
                Outcome::Unconfirmed(Unconfirmed::new(migration, paused, cause))
            }
        })
    }
}

/// The phases in their order. Each undoes what it did when it fails.
fn attempt<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
) -> Result<commit::HandedOver, SourceError> {
    let mut link = setup::run(migration).map_err(|error| migration.cancelled_or(error))?;
    let (mut rounds, mut standstill) = precopy::run(migration, &mut link)?;
    loop {
        match stop_and_copy::run(standstill, &mut rounds.steering, migration, &mut link)? {
            Ended::Prepared(prepared) => return commit::run(*prepared, migration, &link),
            Ended::CalledOff { under_way, given_back } => {
                standstill = rounds.go_on(under_way, given_back, migration, &mut link)?;
            }
        }
    }
}

/// Whoever watches waits for the end, and a panic is one.
struct TellsOfPanic(Progress);

impl Drop for TellsOfPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = Some("the thread that migrates panicked".to_owned());
            self.0.publish(Event::Ended { completed: false, error }, |status| status.phase = Phase::Failed);
        }
    }
}

/// Tells the watchers how it ended.
fn publish_end(progress: &Progress, result: &Result<commit::HandedOver, SourceError>) {
    let (phase, error) = match result {
        Ok(commit::HandedOver::Confirmed) => (Phase::Completed, None),
        Ok(commit::HandedOver::Unconfirmed(_, cause)) => (Phase::Unconfirmed, Some(cause.to_string())),
        Err(error) => (Phase::Failed, Some(error.to_string())),
    };
    let completed = phase == Phase::Completed;
    progress.publish(Event::Ended { completed, error }, |status| status.phase = phase);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_panic_ends_the_wait_of_those_who_watch() {
        let progress = Progress::new(crate::progress::Parameters::default());
        let told = TellsOfPanic(progress.clone());
        let panics = std::thread::spawn(move || {
            let _told = told;
            panic!("a bug");
        });
        assert!(panics.join().is_err());
        assert!(progress.wait_for_end(Duration::from_secs(1)));
    }
}
