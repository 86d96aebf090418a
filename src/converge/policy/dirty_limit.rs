//! `dirty-limit`: every vCPU at the same fixed rate, as QEMU's policy of that name.

use super::rule::{Decision, Parameters, Rule, View};
use crate::PAGE_SIZE;
use crate::converge::model::{Brake, Conditions};
use crate::converge::{PagesPerSlice, Quota};

/// Parameters of `dirty-limit`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyLimit {
    /// Bytes that each vCPU may dirty per second. QEMU's `vcpu-dirty-limit`: 1 MB/s unless told otherwise.
    pub bytes_per_s: u64,
}

impl Default for DirtyLimit {
    fn default() -> Self {
        Self { bytes_per_s: 1_000_000 }
    }
}

impl Parameters for DirtyLimit {
    fn rule(self) -> Box<dyn Rule> {
        Box::new(self)
    }
}

impl Rule for DirtyLimit {
    fn decide(&mut self, view: &View<'_>, conditions: Option<&Conditions>) -> Decision {
        let pages_per_s = self.bytes_per_s as f64 / PAGE_SIZE as f64;
        let quota = Quota::Pages(PagesPerSlice::over(pages_per_s, 1.0));
        let forecast = conditions.and_then(|conditions| {
            view.writers.forecast(conditions, view.round, Brake::Rate(pages_per_s), |_, _| None)
        });
        Decision::alike(view, Some(quota), forecast)
    }
}
