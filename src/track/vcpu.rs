//! What tracker and handle know of one vCPU.

use super::figures::{VcpuCounters, VcpuFigures};
use super::gate::Gate;

/// One vCPU: its gate, and its figures.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) gate: Gate,
    pub(super) counters: VcpuCounters,
}

impl Vcpu {
    pub(super) fn new(index: usize) -> Self {
        Self { index, gate: Gate::default(), counters: VcpuCounters::default() }
    }

    /// A vCPU of another process, with a gate that both share.
    #[cfg(feature = "offload")]
    pub(super) fn borrowed(index: usize, gate: Gate) -> Self {
        Self { index, gate, counters: VcpuCounters::default() }
    }

    pub(super) fn figures(&self) -> VcpuFigures {
        self.counters.figures(self.index, &self.gate)
    }
}
