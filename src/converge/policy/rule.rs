//! What a policy is asked, and what it answers.

use std::fmt;
use std::time::Duration;

use crate::converge::model::{Conditions, Forecast, Round, Writers};
use crate::converge::stop::Limits;
use crate::converge::throttle::{LONGEST_STALL, Quota};
use crate::converge::tuning::Tuning;
use crate::converge::units::Pages;

/// What a policy sees when it is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub now: Duration,
    pub limits: &'a Limits,
    pub tuning: &'a Tuning,
    /// Whether dirty pages come with the vCPU that dirtied them.
    pub per_vcpu: bool,
    pub writers: Writers<'a>,
    /// What is left of the current round.
    pub round: Round,
    /// From 1.
    pub number: u32,
    /// Seconds since the round started.
    pub elapsed_s: f64,
    /// Pages per second that have lately been added to what is left to be sent, dirtied anew or for the first time.
    pub adds_per_s: Option<f64>,
    /// Pages that are dirty and none of the round's; nobody dirties them now.
    pub besides: f64,
    /// From a vCPU's overdraft to its gate being closed on it.
    pub gate_s: f64,
    /// Pages that are dirty again are struck off the round.
    pub strikes_off: bool,
}

impl View<'_> {
    /// Pages that are unsent or dirty. Those that are both are struck off, or else counted once here if they are all.
    pub fn left(&self) -> f64 {
        let (unsent, dirty) = (self.round.pages, self.writers.all.last().1);
        self.besides + if self.strikes_off { unsent + dirty } else { unsent.max(dirty) }
    }
}

/// What a policy wants.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    /// By vCPU.
    pub quotas: Vec<Option<Quota>>,
    /// What comes of it; `None` if it does not end, or the link is not known.
    pub forecast: Option<Forecast>,
    /// λ: a vCPU that would dirty no more is not held back.
    pub level: Option<Pages>,
    /// The guest is being held back until the rest fits.
    pub braking: Option<Braking>,
    /// Nobody is stopped for longer at a stretch.
    pub longest_stall: Duration,
    /// Except the heaviest of several, by this factor.
    pub stretch: f64,
    /// The share of their pages that those who are held back keep, if nobody set it.
    pub min_share: Option<f64>,
    /// No plan keeps the deadline.
    pub misses_deadline: bool,
    /// The guest dirties faster than the link drains, however it is held back.
    pub cannot_hold: bool,
}

/// A guest that is held back until the rest fits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Braking {
    /// Pages per second that all writers add to what is left in the end.
    pub adds_per_s: f64,
    /// The share of its time that the worst-off vCPU loses.
    pub lost_share: f64,
    /// vCPUs' worth of time that all lose together.
    pub lost_vcpus: f64,
}

impl Default for Decision {
    fn default() -> Self {
        Self {
            quotas: Vec::new(),
            forecast: None,
            level: None,
            braking: None,
            longest_stall: LONGEST_STALL,
            stretch: 1.0,
            min_share: None,
            misses_deadline: false,
            cannot_hold: false,
        }
    }
}

impl Decision {
    /// The same quota for every vCPU.
    pub fn alike(view: &View<'_>, quota: Option<Quota>, forecast: Option<Forecast>) -> Self {
        Self { quotas: vec![quota; view.writers.vcpus.len()], forecast, ..Self::default() }
    }
}

/// What a policy does in one migration.
pub(crate) trait Rule: fmt::Debug + Send {
    /// Whether pages of a round that are dirty again are struck off it, because they have to be sent once more in any case.
    /// So the hottest pages are left for the end. The older policies do not: they are there to be compared with.
    fn strikes_off_redirtied(&self) -> bool {
        false
    }

    /// A round has ended at `now`, with so many bytes dirtied in it and `transferred_bytes` since the migration's start.
    fn round_ended(&mut self, now: Duration, dirtied_bytes: f64, transferred_bytes: f64) {
        let _ = (now, dirtied_bytes, transferred_bytes);
    }

    /// Who is held back from now on, and what comes of it. `conditions` are known once the link is.
    fn decide(&mut self, view: &View<'_>, conditions: Option<&Conditions>) -> Decision;
}

/// A policy's parameters.
pub(crate) trait Parameters {
    /// What the policy does in a migration that starts now.
    fn rule(self) -> Box<dyn Rule>;
}
