//! When enough is enough: the limits of a migration, each of which may be changed while it runs.

use std::time::Duration;

use super::units::sane;

/// What happens when a migration has taken too long.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AtTimeout {
    /// It is cancelled; the guest stays where it is.
    #[default]
    Cancel,
    /// The guest is switched over with whatever is left, the downtime limit notwithstanding.
    SwitchOver,
}

/// A downtime limit that gives way: `after` this long without an end it doubles, and again `every` interval, up
/// to `cap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvergenceTimeout {
    /// Time from the start to the first doubling.
    pub after: Duration,
    /// Time between doublings; zero counts as a millisecond.
    pub every: Duration,
    /// The limit is never raised above this (nor lowered to it).
    pub cap: Duration,
}

/// The limits of one migration.
#[derive(Clone, PartialEq, Debug)]
pub struct Limits {
    /// Longest time that the guest may stand still at the switchover, everything in it.
    pub downtime: Duration,
    /// A wish below that: the guest is stopped with so little left as long as what is left becomes less.
    pub downtime_target: Option<Duration>,
    /// The downtime limit doubles when the migration does not end.
    pub convergence_timeout: Option<ConvergenceTimeout>,
    /// The whole migration ends by then, from its start to the guest running at the destination, if braking
    /// can do it; the downtime limit is kept. Only `fair-share` can steer towards it.
    pub deadline: Option<Duration>,
    /// Switch over after this many rounds, whatever is left (the 2011 rule).
    pub max_rounds: Option<u32>,
    /// Switch over when this many times the guest's RAM has been sent, whatever is left (the 2011 rule).
    pub max_transfer_factor: Option<f64>,
    /// Give up, or stop waiting, after this long.
    pub timeout: Option<(Duration, AtTimeout)>,
}

impl Default for Limits {
    /// A downtime of 300 ms (QEMU's default), and nothing else.
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            downtime_target: None,
            convergence_timeout: None,
            deadline: None,
            max_rounds: None,
            max_transfer_factor: None,
            timeout: None,
        }
    }
}

/// The limit that has been reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reached {
    /// `max_rounds`.
    MaxRounds,
    /// `max_transfer_factor`.
    MaxTransfer,
    /// `timeout`, to be answered so.
    Timeout(AtTimeout),
}

impl Limits {
    /// The downtime limit at `elapsed` since the start.
    pub fn downtime_at(&self, elapsed: Duration) -> Duration {
        let Some(timeout) = self.convergence_timeout.filter(|timeout| elapsed >= timeout.after) else {
            return self.downtime;
        };
        let every_ns = timeout.every.as_nanos().max(1_000_000);
        let doublings = 1 + (elapsed - timeout.after).as_nanos() / every_ns;
        let factor = u32::try_from(doublings).ok().and_then(|n| 1u32.checked_shl(n)).unwrap_or(u32::MAX);
        self.downtime.saturating_mul(factor).min(timeout.cap).max(self.downtime)
    }

    /// What is aimed at: the wish, if there is one, and at most the limit.
    pub fn aim_at(&self, elapsed: Duration) -> Duration {
        let limit = self.downtime_at(elapsed);
        self.downtime_target.map_or(limit, |target| target.min(limit))
    }

    /// The first limit that has been reached, if any: `rounds` begun, `bytes_sent` of a guest with `ram_bytes`.
    pub fn reached(
        &self,
        elapsed: Duration,
        rounds: u32,
        bytes_sent: u64,
        ram_bytes: u64,
    ) -> Option<Reached> {
        if let Some((timeout, answer)) = self.timeout
            && elapsed >= timeout
        {
            return Some(Reached::Timeout(answer));
        }
        // A factor below 1 would stop the first pass half-way: even then everything is sent once.
        let transfer = self.max_transfer_factor.map(|factor| sane(factor).max(1.0) * ram_bytes as f64);
        if transfer.is_some_and(|most| bytes_sent as f64 > most) {
            return Some(Reached::MaxTransfer);
        }
        if self.max_rounds.is_some_and(|most| rounds >= most.max(1)) {
            return Some(Reached::MaxRounds);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_downtime_limit_doubles_per_interval_up_to_its_cap() {
        let limits = Limits {
            downtime: Duration::from_millis(300),
            convergence_timeout: Some(ConvergenceTimeout { after: s(10), every: s(5), cap: s(2) }),
            ..Limits::default()
        };
        let at = |seconds| limits.downtime_at(s(seconds)).as_millis();
        assert_eq!(
            [at(0), at(9), at(10), at(14), at(15), at(20), at(1_000_000)],
            [300, 300, 600, 600, 1200, 2000, 2000]
        );
    }

    #[test]
    fn the_limits_of_2011_end_a_migration_that_does_not_converge() {
        let limits = Limits { max_rounds: Some(30), max_transfer_factor: Some(3.0), ..Limits::default() };
        assert_eq!(limits.reached(s(1), 29, 300, 100), None);
        assert_eq!(limits.reached(s(1), 30, 300, 100), Some(Reached::MaxRounds));
        assert_eq!(limits.reached(s(1), 2, 301, 100), Some(Reached::MaxTransfer));
    }

    #[test]
    fn a_timeout_says_what_is_to_be_done() {
        let limits = Limits { timeout: Some((s(60), AtTimeout::Cancel)), ..Limits::default() };
        assert_eq!(limits.reached(s(59), 1000, u64::MAX, 1), None);
        assert_eq!(limits.reached(s(60), 1, 0, 1), Some(Reached::Timeout(AtTimeout::Cancel)));
    }

    proptest! {
        #[test]
        fn the_downtime_limit_never_falls_while_time_passes(
            downtime in any::<u32>(), after in any::<u32>(), every in any::<u32>(), cap in any::<u32>(),
            early in any::<u32>(), later in any::<u32>(), factor in any::<f64>(),
        ) {
            let ms = |ms: u32| Duration::from_millis(ms.into());
            let limits = Limits {
                downtime: ms(downtime),
                convergence_timeout: Some(ConvergenceTimeout { after: ms(after), every: ms(every), cap: ms(cap) }),
                max_transfer_factor: Some(factor),
                ..Limits::default()
            };
            let (early, later) = (ms(early.min(later)), ms(early.max(later)));
            prop_assert!(limits.downtime_at(early) <= limits.downtime_at(later));
            prop_assert!(limits.downtime_at(later) <= ms(cap).max(ms(downtime)));
            let _ = limits.reached(later, 0, u64::MAX, 0);
        }
    }
}
