//! A VM about to arrive.

use std::borrow::BorrowMut;
use std::io::Write;

use ringferry::vm::{Moment, VmError};
use ringferry::{PageSet, Paused, Quiesced, Vm};
use ringferry_testvm::Guest;

use crate::guest::Host;
use crate::machine::Machine;

/// The VM that a migration builds up: before it runs, its guest is told that the gap over the pause is no stall.
#[derive(Debug)]
pub struct Landing<H>(pub H);

impl<H: BorrowMut<Host>> Landing<H> {
    fn vm(&mut self) -> &mut dyn Vm {
        self.0.borrow_mut().vm.as_vm()
    }
}

impl<H: BorrowMut<Host> + Send> Vm for Landing<H> {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.vm().pause()
    }

    fn resume(&mut self, paused: Paused) -> Result<(), VmError> {
        let host = self.0.borrow_mut();
        let vm: &Machine = &host.vm;
        // A foreign guest has no mailbox, and nothing that could be told.
        host.guest = Guest::new(vm.memory(), vm.kvm_tracker()).ok().filter(|guest| guest.plan().is_ok());
        // The VM is this side's alone by now: a figure less is no reason not to run it.
        if let Some(Err(error)) = host.guest.as_mut().map(Guest::count_pause_apart) {
            tracing::warn!(%error, "the guest counts the pause as a stall");
        }
        self.vm().resume(paused)
    }

    fn save_state(&mut self, quiesced: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        self.vm().save_state(quiesced)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.vm().restore_state(state)
    }

    fn kick(&self, index: usize) {
        self.0.borrow().vm.kick(index);
    }

    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        self.vm().quiesce(paused)
    }

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        self.vm().save_device_state(moment, out)
    }

    fn device_state_bytes_left(&mut self) -> u64 {
        self.vm().device_state_bytes_left()
    }

    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        self.vm().load_device_state(piece)
    }

    fn discarded_pages(&mut self, discarded: &mut PageSet) {
        self.vm().discarded_pages(discarded);
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        self.vm().prepare()
    }

    fn release(&mut self) {
        self.vm().release();
    }
}
