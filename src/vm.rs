//! The few things that only the VMM can do, and the proofs of what it has done.
//!
//! The proofs are types, and each is made from the one before it: [`Paused`] (no vCPU runs), [`Quiesced`] (no device
//! writes guest memory either), [`Settled`] (the state is saved, so that nothing writes guest memory any more). The last
//! harvest of dirty pages demands the last of them, because saving state writes guest memory itself: virtio queues are
//! flushed, vhost is stopped, an interrupt controller puts its tables into RAM. Any other order does not compile.

use std::error::Error;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::page_set::PageSet;

/// Why the VMM could not do what was asked; whatever error type it has, boxed.
pub type VmError = Box<dyn Error + Send + Sync>;

/// Proof that every vCPU of the VM is outside `KVM_RUN` and stays there.
///
/// On hosts with PML, entries reach the ring only when a vCPU leaves guest mode, so any earlier look can miss pages. It
/// cannot be cloned; handing it to [`Vm::resume`] gives it up.
#[derive(Debug)]
#[must_use = "a paused VM stands still until the proof is handed to `Vm::resume`"]
pub struct Paused {
    /// Which pause of all in this process: pages that were handed out unprotected in one may be written before the next.
    pub(crate) number: u64,
}

impl Paused {
    /// The VMM declares that every vCPU is outside `KVM_RUN`, and that none enters it again while the value
    /// exists. A false declaration loses guest writes.
    pub fn declare_every_vcpu_is_outside_kvm_run() -> Self {
        static PAUSES: AtomicU64 = AtomicU64::new(0);
        // Relaxed: numbers that differ, and order nothing.
        Self { number: PAUSES.fetch_add(1, Ordering::Relaxed) }
    }

    /// The VMM declares that there is nothing else that writes guest memory: no device at work, no state still to be
    /// saved. For a VMM that takes its last harvest itself, after it has done both.
    pub fn declare_nothing_else_writes(&self) -> Settled<'_> {
        Quiesced::declare_no_device_writes(self).state_is_saved()
    }
}

/// Proof that no device writes guest memory: the VMM's own threads, vhost, DMA stand still. Only saving their state may
/// still write it.
#[derive(Debug)]
#[must_use = "devices were stopped to save state"]
pub struct Quiesced<'p>(&'p Paused);

impl<'p> Quiesced<'p> {
    /// The VMM declares that no device writes guest memory while the VM is paused. A false declaration loses what the
    /// device writes.
    pub fn declare_no_device_writes(paused: &'p Paused) -> Self {
        Self(paused)
    }

    /// The proof of the pause.
    pub fn paused(&self) -> &'p Paused {
        self.0
    }

    /// All state has been saved: from here on nothing writes guest memory. State cannot be saved any more:
    ///
    /// ```compile_fail,E0382
    /// # fn f(vm: &mut dyn ringferry::Vm, quiesced: ringferry::vm::Quiesced<'_>) {
    /// let settled = quiesced.state_is_saved();
    /// vm.save_state(&quiesced).unwrap(); // it would write guest memory after the last harvest
    /// # }
    /// ```
    pub fn state_is_saved(self) -> Settled<'p> {
        Settled(self.0)
    }
}

/// Proof that nothing writes guest memory until the VM is resumed.
#[derive(Clone, Copy, Debug)]
pub struct Settled<'p>(&'p Paused);

impl<'p> Settled<'p> {
    /// The proof of the pause.
    pub fn paused(self) -> &'p Paused {
        self.0
    }
}

/// When a device's state is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Moment<'q> {
    /// While the guest runs, once a round: what can leave early, as a VFIO device's pre-copy data. The guest is not
    /// steered meanwhile, so that a VMM writes no more than about `bytes` at a time.
    Running {
        /// What the link carries in a moment.
        bytes: u64,
    },
    /// While the guest stands still: the rest.
    Stopped(&'q Quiesced<'q>),
}

/// What the migration asks of the VMM that owns the VM.
///
/// A simple VMM implements the five methods without a body. The others are for VMMs that have devices with threads of
/// their own, gigabytes of device state, a balloon, or resources that can fail to be had at the destination.
pub trait Vm: Send {
    /// Stops every vCPU and returns once all are outside `KVM_RUN`, throttled ones included.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM is then running, as before the call.
    fn pause(&mut self) -> Result<Paused, VmError>;

    /// Lets every vCPU run again, and every device that [`quiesce`](Self::quiesce) stopped.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM is then still paused.
    fn resume(&mut self, paused: Paused) -> Result<(), VmError>;

    /// Everything that the guest can observe besides RAM (vCPU and device state), in the VMM's own format. May write
    /// guest memory: the last harvest comes afterwards.
    ///
    /// # Errors
    ///
    /// The VMM's own.
    fn save_state(&mut self, quiesced: &Quiesced<'_>) -> Result<Vec<u8>, VmError>;

    /// The inverse of [`save_state`](Self::save_state), at the destination, where RAM is in place and, if that was asked
    /// for, verified. May write guest memory.
    ///
    /// # Errors
    ///
    /// The VMM's own: unknown format, missing feature, refused by the kernel.
    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError>;

    /// Forces vCPU `index` out of `KVM_RUN` soon, as an overdrawn throttle asks. Must not block.
    fn kick(&self, index: usize);

    /// Stops every device that writes guest memory, while the vCPUs stand still.
    ///
    /// # Errors
    ///
    /// The VMM's own; the devices may be in any state that [`resume`](Self::resume) can set going again.
    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        Ok(Quiesced::declare_no_device_writes(paused))
    }

    /// Writes device state that the destination can load in pieces, before RAM is complete: asked once a round while the
    /// guest runs, and a last time before [`save_state`](Self::save_state). `out` takes any amount, and blocks while the
    /// destination is behind.
    ///
    /// # Errors
    ///
    /// The VMM's own, or what `out` said: to be passed on.
    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        let _ = (moment, out);
        Ok(())
    }

    /// Bytes of device state that [`save_device_state`](Self::save_device_state) would write if the guest were stopped now,
    /// as far as is known: the plan counts them, and waits as long as they become fewer.
    fn device_state_bytes_left(&mut self) -> u64 {
        0
    }

    /// At the destination: the next piece of what [`save_device_state`](Self::save_device_state) wrote, in order, cut at
    /// any place. Must not touch guest memory, which is being received.
    ///
    /// # Errors
    ///
    /// The VMM's own; the migration ends, and the VM stays with the source.
    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        let _ = piece;
        Err("this VMM has no device whose state comes in pieces".into())
    }

    /// Adds pages whose content the guest has given up (balloon, free page reporting): they are not sent unless they are
    /// dirtied later. Asked once, after tracking has begun. From then on a page whose content changes must be dirty; of one
    /// that changes because the VMM discards it, the VMM tells `transport::Discards`.
    fn discarded_pages(&mut self, discarded: &mut PageSet) {
        let _ = discarded;
    }

    /// At the source, while the guest stands still: the next word lets the destination run the VM. From here on it may run
    /// there, whatever becomes of this process, and only [`resume`](Self::resume) says that it does not.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM stays here.
    fn hand_over(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// At the destination, when the state is restored: takes everything whose taking can fail (locks on images, taps,
    /// backends), so that [`resume`](Self::resume) has nothing left to fail at.
    ///
    /// # Errors
    ///
    /// The VMM's own; the VM stays with the source.
    fn prepare(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// At the destination: the VM will not run here. Gives back what [`prepare`](Self::prepare) took, without delay: the
    /// source lets the guest run again once it is done.
    fn release(&mut self) {}
}
