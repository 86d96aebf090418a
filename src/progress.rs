//! What a running migration tells, and what may be changed while it runs.
//!
//! [`Progress`] is the one object that the migration and its watchers share: the current [`Status`], a bounded
//! log of numbered [`Event`]s, and the live [`Parameters`]. A watcher that subscribes late, or falls behind by
//! more than the log holds, gets the whole status first; waiting for the end needs no polling.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::converge::{Limits, Policy};
use crate::transport::{MaxBandwidth, Totals};

/// Events kept for watchers that are a little behind; more than the rounds of any sane migration.
const LOG_EVENTS: usize = 256;

/// Where a migration is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Handshake, connections, switching tracking on.
    #[default]
    Setup,
    /// Sending rounds while the guest runs.
    Precopy,
    /// The guest stands still: last pages, state, handing over.
    Switchover,
    /// The destination runs the VM.
    Completed,
    /// It failed or was cancelled; the VM is where it was.
    Failed,
    /// The VM was handed over, and the destination did not say that it runs: it is paused at the source until somebody
    /// decides.
    Unconfirmed,
}

/// One round: its pages, its bytes, and what the guest did meanwhile.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RoundReport {
    /// From 1. The last ones are sent while the guest stands still.
    pub round: u32,
    /// Pages that were dirty when it began (in the first round: populated).
    pub pages_to_send: u64,
    /// What was sent.
    #[serde(flatten)]
    pub totals: Totals,
    /// From its first page to its acknowledgement.
    pub duration_ms: f64,
    /// Unique pages that the guest dirtied meanwhile.
    pub pages_dirtied: u64,
    /// Of these by vCPU, as counted for the throttle; empty where the source of dirty pages cannot tell, and in a round
    /// in which the guest was stopped.
    pub vcpu_pages_dirtied: Vec<u64>,
}

/// What is known now.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// Where it is.
    pub phase: Phase,
    /// Pages that the VM has, never-populated ones included.
    pub ram_pages: u64,
    /// The current round, 0 before the first.
    pub round: u32,
    /// Pages that the current round began with.
    pub round_pages: u64,
    /// Pages of it that are done, zero pages included.
    pub round_pages_done: u64,
    /// Data bytes sent since the start.
    pub bytes_sent: u64,
    /// Bytes of device and machine state sent since the start.
    pub state_bytes: u64,
    /// Bandwidth as last measured on the wire.
    pub wire_bytes_per_s: f64,
    /// Pages dirtied in the current round so far, per vCPU; empty if the backend cannot tell vCPUs apart.
    pub dirtied_pages: Vec<u64>,
    /// The same as a rate over the last observation window.
    pub dirty_pages_per_s: Vec<f64>,
    /// What is expected, once the first round has shown enough to expect anything.
    pub prediction: Option<Prediction>,
}

/// What is expected of the rest of the migration.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Prediction {
    /// Whether it ends under the policy in force.
    pub converges: bool,
    /// Whether it would end with no vCPU slowed down.
    pub converges_unthrottled: bool,
    /// From the start to the guest running at the destination, if it ends.
    pub total_ms: Option<f64>,
    /// How long the guest will stand still.
    pub downtime_ms: f64,
    /// Guest time that the worst-off vCPU will lose from now on, downtime included.
    pub lost_guest_ms: Option<f64>,
    /// Bytes of the whole migration.
    pub bytes: Option<u64>,
}

/// Something that happened.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
#[non_exhaustive]
pub enum Event {
    /// The peers agreed, and tracking is on.
    Started {
        /// Pages of RAM.
        ram_pages: u64,
        /// Of them, populated: what the first round sends.
        populated_pages: u64,
    },
    /// A round began.
    RoundStarted {
        /// Which.
        round: u32,
        /// With how many pages.
        pages_to_send: u64,
    },
    /// A round is in place at the destination.
    RoundEnded(RoundReport),
    /// What is expected has changed by more than a twentieth.
    PredictionChanged(Prediction),
    /// Other vCPUs are slowed down, or differently.
    ThrottleChanged {
        /// How many vCPUs; 0: none any more.
        vcpus: usize,
        /// What each of them may dirty in this round, where throttling goes by pages.
        level_pages: Option<u64>,
        /// The share of its time that each loses, where it goes by time.
        time_share: Option<f64>,
    },
    /// The policy or the limits were changed, or the downtime limit gave way.
    TermsChanged {
        /// The policy's name.
        policy: String,
        /// The downtime limit now in force.
        downtime_limit_ms: f64,
        /// The wish below it.
        #[serde(default)]
        downtime_target_ms: Option<f64>,
    },
    /// vCPUs that are held back may now be stopped for this long at a stretch: longer than usual where short stalls
    /// cannot hold the guest. The heaviest of several, for up to a quarter longer.
    StallsChanged {
        /// The longest stall.
        longest_stall_ms: f64,
    },
    /// The migration would not end if those who are held back kept the usual minimum share.
    MinShareLowered {
        /// The share of their pages that those who are held back keep now, 0 to 1.
        min_share: f64,
    },
    /// No plan keeps the deadline; the fastest one is followed.
    DeadlineOutOfReach,
    /// The guest dirties faster than the link drains, however it is held back: nobody is held back, unless a limit ends it.
    CannotHoldGuest,
    /// The downtime limit cannot be kept, because the switchover takes longer even without a page to send.
    DowntimeLimitOutOfReach {
        /// The limit.
        downtime_limit_ms: f64,
        /// What the switchover takes besides pages.
        fixed_ms: f64,
    },
    /// More was dirty than expected when the guest stood still: it runs on.
    SwitchoverCalledOff {
        /// What was left.
        pages_left: u64,
        /// What would have fitted the downtime limit.
        pages_fit: u64,
    },
    /// The guest is going to stand still for longer than the downtime limit, and will not be called back.
    DowntimeLimitGaveWay {
        /// Why not.
        why: GaveWay,
        /// The limit.
        downtime_limit_ms: f64,
        /// How long it is expected to stand still.
        expected_downtime_ms: f64,
    },
    /// The guest has been stopped, with this much left.
    Switchover {
        /// Dirty pages found when it stood still.
        pages_left: u64,
    },
    /// It is over.
    Ended {
        /// Whether the destination runs the VM.
        completed: bool,
        /// What went wrong, otherwise.
        error: Option<String>,
    },
}

/// Why a downtime limit had to give way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaveWay {
    /// The switchover takes longer even without a page to send.
    OutOfReach,
    /// The switchover was called off as often as it may be.
    CalledOffTooOften,
    /// A limit of rounds, bytes or time ordered the switchover.
    AnotherLimit,
    /// Devices had handed over state that cannot be taken back.
    DeviceStateLeft,
    /// The destination is of a release that cannot forget a switchover.
    OldDestination,
}

/// What a watcher receives.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// The whole status: first of all, and again after a watcher fell behind. Events up to `sequence` are in it.
    Status {
        /// Number of the last event that the status contains.
        sequence: u64,
        /// The status.
        status: Status,
    },
    /// The next event.
    Event {
        /// Counts from 1 without a gap.
        sequence: u64,
        /// What happened.
        event: Event,
    },
}

/// Who is slowed down, when it ends, and how fast it may go.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Terms {
    /// Who is slowed down so that it ends.
    pub policy: Policy,
    /// When it ends.
    pub limits: Limits,
    /// Bytes per second to count on while the guest stands still, as QEMU's avail-switchover-bandwidth; `None`:
    /// what the rounds measure.
    pub switchover_bandwidth: Option<f64>,
}

/// What may be changed while the migration runs.
#[derive(Debug, Default)]
pub struct Parameters {
    terms: Mutex<Terms>,
    /// Raised with each change of `terms`.
    version: AtomicU64,
    max_bandwidth: MaxBandwidth,
    cancelled: AtomicBool,
}

impl Parameters {
    /// Parameters to start with.
    pub fn new(terms: Terms, max_bandwidth: MaxBandwidth) -> Self {
        Self { terms: Mutex::new(terms), max_bandwidth, ..Self::default() }
    }

    /// The terms in force.
    pub fn terms(&self) -> Terms {
        self.terms.lock().clone()
    }

    /// Changes the terms; takes effect with the next observation.
    pub fn change(&self, change: impl FnOnce(&mut Terms)) {
        change(&mut self.terms.lock());
        // Release, pairs with the acquire in `changed_since`: a thread that sees the version finds the terms changed.
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The terms, if they have changed since `version`, which is brought up to date.
    pub(crate) fn changed_since(&self, version: &mut u64) -> Option<Terms> {
        let now = self.version.load(Ordering::Acquire);
        (std::mem::replace(version, now) != now).then(|| self.terms())
    }

    /// The limit over all data connections while the guest runs; the final phase uses all there is.
    pub fn max_bandwidth(&self) -> &MaxBandwidth {
        &self.max_bandwidth
    }

    /// Asks the migration to end as soon as it can, with the VM running where it is. After the handing over it
    /// has no effect.
    pub fn cancel(&self) {
        // Relaxed, here and below: the flag carries no data, and is looked at again within milliseconds.
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked for the end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn cancel_flag(&self) -> &AtomicBool {
        &self.cancelled
    }
}

#[derive(Debug, Default)]
struct Journal {
    status: Status,
    sequence: u64,
    log: VecDeque<Event>,
    ended: bool,
}

/// The state that a migration shares with those who watch and steer it. Clones are the same object.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    journal: Mutex<Journal>,
    changed: Condvar,
    parameters: Parameters,
}

impl Progress {
    /// The progress of a migration that has not started.
    pub fn new(parameters: Parameters) -> Self {
        Self(Arc::new(Inner { journal: Mutex::default(), changed: Condvar::new(), parameters }))
    }

    /// What may be changed while it runs.
    pub fn parameters(&self) -> &Parameters {
        &self.0.parameters
    }

    /// What is known now.
    pub fn status(&self) -> Status {
        self.0.journal.lock().status.clone()
    }

    /// Starts watching: the status first, then each event.
    pub fn watch(&self) -> Watcher {
        Watcher { progress: self.clone(), seen: None }
    }

    /// Waits until the migration has ended, at most for `timeout`; true if it has.
    pub fn wait_for_end(&self, timeout: Duration) -> bool {
        let mut journal = self.0.journal.lock();
        let _ = self.0.changed.wait_while_for(&mut journal, |journal| !journal.ended, timeout);
        journal.ended
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.0.journal.lock().status);
    }

    pub(crate) fn publish(&self, event: Event, change: impl FnOnce(&mut Status)) {
        tracing::info!(?event);
        let mut journal = self.0.journal.lock();
        change(&mut journal.status);
        journal.ended |= matches!(event, Event::Ended { .. });
        journal.sequence += 1;
        journal.log.push_back(event);
        if journal.log.len() > LOG_EVENTS {
            journal.log.pop_front();
        }
        drop(journal);
        self.0.changed.notify_all();
    }
}

/// Follows a migration.
#[derive(Debug)]
pub struct Watcher {
    progress: Progress,
    seen: Option<u64>,
}

impl Watcher {
    /// The next update; `None` if nothing happened within `timeout`, or if the end has been delivered.
    pub fn next(&mut self, timeout: Duration) -> Option<Update> {
        let deadline = Instant::now() + timeout;
        let inner = &*self.progress.0;
        let mut journal = inner.journal.lock();
        loop {
            let oldest = journal.sequence - journal.log.len() as u64 + 1;
            match self.seen {
                Some(seen) if seen == journal.sequence => {
                    if journal.ended || inner.changed.wait_until(&mut journal, deadline).timed_out() {
                        return None;
                    }
                }
                Some(seen) if seen + 1 >= oldest => {
                    let sequence = seen + 1;
                    self.seen = Some(sequence);
                    let event = journal.log.get(usize::try_from(sequence - oldest).ok()?)?.clone();
                    return Some(Update::Event { sequence, event });
                }
                _ => {
                    self.seen = Some(journal.sequence);
                    return Some(Update::Status {
                        sequence: journal.sequence,
                        status: journal.status.clone(),
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(60);

    fn progress() -> Progress {
        Progress::new(Parameters::default())
    }

    fn round(progress: &Progress, round: u32) {
        let event = Event::RoundStarted { round, pages_to_send: 1 };
        progress.publish(event, |status| status.round = round);
    }

    #[test]
    fn a_late_watcher_gets_the_state_first_and_then_every_event() {
        let progress = progress();
        round(&progress, 1);
        round(&progress, 2);
        let mut watcher = progress.watch();
        let Some(Update::Status { sequence: 2, status }) = watcher.next(SOON) else { panic!("no status") };
        assert_eq!(status.round, 2);
        assert_eq!(watcher.next(SOON), None);
        round(&progress, 3);
        assert!(matches!(watcher.next(SOON), Some(Update::Event { sequence: 3, .. })));
    }

    #[test]
    fn a_watcher_that_fell_behind_gets_the_state_again() {
        let progress = progress();
        let mut watcher = progress.watch();
        assert!(matches!(watcher.next(SOON), Some(Update::Status { sequence: 0, .. })));
        let events = u32::try_from(LOG_EVENTS).unwrap() + 1;
        (1..=events).for_each(|number| round(&progress, number));
        let Some(Update::Status { sequence, status }) = watcher.next(SOON) else { panic!("no status") };
        assert_eq!((sequence, status.round), (u64::from(events), events));
    }

    #[test]
    fn the_end_is_joined_without_polling_and_delivered_once() {
        let progress = progress();
        let mut watcher = progress.watch();
        std::thread::scope(|scope| {
            scope.spawn(|| progress.publish(Event::Ended { completed: true, error: None }, |_| {}));
            assert!(progress.wait_for_end(LONG));
        });
        assert!(matches!(watcher.next(LONG), Some(Update::Status { .. })));
        assert_eq!(watcher.next(LONG), None);
    }
}
