//! The gates of a VM in a page that another process has, too.

use std::sync::Arc;

use super::lent_page::{LentGate, LentPage};
use super::vcpu::Vcpu;

/// The gates in the page, each of the vCPU at its place.
#[derive(Debug)]
pub(super) struct LentGates {
    page: Arc<LentPage>,
    vcpus: Vec<Arc<Vcpu>>,
}

impl LentGates {
    /// None yet.
    pub(super) fn new(page: &Arc<LentPage>) -> Self {
        Self { page: Arc::clone(page), vcpus: Vec::new() }
    }

    /// Lends the gate of a vCPU more. Where the page is full, the vCPU keeps its gate, and nobody holds it back.
    pub(super) fn lend(&mut self, vcpu: &Arc<Vcpu>) {
        if let Some(gate) = LentGate::new(&self.page, self.vcpus.len()) {
            vcpu.gate.lend(gate);
            self.vcpus.push(Arc::clone(vcpu));
        }
    }

    /// Where a vCPU's gate is.
    pub(super) fn place(&self, vcpu: &Arc<Vcpu>) -> Option<usize> {
        self.vcpus.iter().position(|known| Arc::ptr_eq(known, vcpu))
    }

    /// Every gate is open, and nobody but this process closes it again.
    pub(super) fn take_back(self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.gate.take_back());
    }
}
