//! A vCPU has two ends: the one of its thread, and the gate, which belongs to whoever throttles.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use ringferry::track::{BeforeRun, TrackError, VcpuHandle, VcpuThrottle};

use crate::handle::{Handle, borrow, give, out, take_back};
use crate::status::{Status, call, done};
use crate::tracker::Tracker;

/// A vCPU, for its thread. Only one thread uses it at a time. It shares no lock with the VMM and, but for
/// rf_vcpu_attach(), allocates nothing.
#[derive(Debug)]
pub struct Vcpu {
    run: VcpuHandle,
    gate: VcpuThrottle,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Vcpu {
    const MARK: [u8; 8] = *b"rf  vcpu";
}

/// The gate that a vCPU passes before it enters the guest, for whoever throttles. Any thread may use it, several at once.
#[derive(Debug)]
pub struct Gate {
    throttle: VcpuThrottle,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Gate {
    const MARK: [u8; 8] = *b"rf  gate";
}

/// The exit reason for a full dirty ring, KVM_EXIT_DIRTY_RING_FULL.
pub const RF_EXIT_DIRTY_RING_FULL: u32 = 31;

/// The longest that one closing of a gate lasts, in microseconds: a vCPU that waits longer looks hung to its guest.
pub const RF_GATE_CLOSED_MAX_US: u64 = 10_000;

const _: () = assert!(RF_EXIT_DIRTY_RING_FULL == ringferry::track::KVM_EXIT_DIRTY_RING_FULL);
const _: () = assert!(RF_GATE_CLOSED_MAX_US as u128 == VcpuThrottle::CLOSED_MAX.as_micros());

/// Follows a vCPU, at start-up or when it is plugged in. Call it after KVM_CREATE_VCPU and before the vCPU first runs. `index`
/// is the VMM's own number of the vCPU.
///
/// # Safety
///
/// `tracker` is a tracker or NULL; `vcpu` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_attach(
    tracker: *const Tracker,
    index: u32,
    vcpu_fd: i32,
    vcpu: *mut *mut Vcpu,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let vcpu = out(vcpu, "vcpu")?;
        let (tracker, index) = (&tracker.shared.tracker, index as usize);
        let run = tracker.attach_vcpu(index, &vcpu_fd)?;
        let gate = tracker.vcpu(index).ok_or(TrackError::VcpuUnknown(index))?;
        // SAFETY: the caller's promise.
        unsafe { give(vcpu, Vcpu { run, gate }) };
        Ok(())
    })
}

/// A vCPU is unplugged: harvests what its ring still holds and forgets it; its index is free. Call it once the vCPU has left
/// KVM_RUN for good, or until it is attached again. The vCPU's handles stay to be freed.
///
/// # Safety
///
/// `tracker` is a tracker or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_detach(tracker: *const Tracker, index: u32) -> Status {
    // SAFETY: the caller's promise.
    done(|| Ok(unsafe { borrow(tracker, "tracker") }?.shared.tracker.detach_vcpu(index as usize)?))
}

/// Call it before each KVM_RUN: RF_OK is the word to enter the guest. It costs a load when nobody throttles, else a futex
/// wait of at most 10 ms.
///
/// RF_INTERRUPTED means that a signal came, or that the gate was closed anew: look whether the VMM wants something of this
/// vCPU, and call again. To call a vCPU out for good, tell its thread so, send the signal, and open the gate, in this order.
/// A vCPU that completes pending I/O with `immediate_exit` set does not enter the guest, and passes no gate.
///
/// The call is compulsory with rings: a vCPU whose ring is full again and again without it ends in RF_RING_LOST.
///
/// # Safety
///
/// `vcpu` is a vCPU or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_before_run(vcpu: *const Vcpu) -> Status {
    // SAFETY: the caller's promise.
    let before_run = || unsafe { borrow(vcpu, "vcpu") }.map(|vcpu| vcpu.run.before_run());
    // Not by way of `call` as long as there is nothing to say: this is the one function whose nanoseconds count.
    match catch_unwind(AssertUnwindSafe(before_run)) {
        Ok(Ok(BeforeRun::Run)) => Status::Ok,
        Ok(Ok(BeforeRun::Interrupted)) => Status::Interrupted,
        Ok(Err(failure)) => call(|| Err(failure)),
        Err(panic) => call(|| resume_unwind(panic)),
    }
}

/// Call it when KVM_RUN has returned with RF_EXIT_DIRTY_RING_FULL: it recycles the ring, here and now. Then run the vCPU
/// again; if it comes back with the same reason, call again.
///
/// After an error the vCPU cannot run on. Nothing dirty is lost.
///
/// # Safety
///
/// `vcpu` is a vCPU or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_ring_full(vcpu: *const Vcpu) -> Status {
    // SAFETY: the caller's promise.
    done(|| Ok(unsafe { borrow(vcpu, "vcpu") }?.run.ring_full()?))
}

/// Frees the handle. What the ring still holds is harvested all the same, also when the vCPU is gone. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_free(vcpu: *mut Vcpu) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(vcpu, "vcpu") }.map(drop))
}

/// The gate of a vCPU. Call it before the vCPU's thread begins, and hand the gate to the throttle. Each call gives another
/// handle to the same gate.
///
/// # Safety
///
/// `vcpu` is a vCPU or NULL; `gate` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_vcpu_gate(vcpu: *const Vcpu, gate: *mut *mut Gate) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let throttle = unsafe { borrow(vcpu, "vcpu") }?.gate.clone();
        let gate = out(gate, "gate")?;
        // SAFETY: the caller's promise.
        unsafe { give(gate, Gate { throttle }) };
        Ok(())
    })
}

/// Keeps the vCPU out of the guest for so many microseconds from now, RF_GATE_CLOSED_MAX_US at most; what was set before no
/// longer counts. The gate opens by itself. A vCPU that is inside notices when it comes out: kick it, by a signal or
/// whatever the VMM has.
///
/// # Safety
///
/// `gate` is a gate or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_gate_close(gate: *const Gate, microseconds: u64) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        unsafe { borrow(gate, "gate") }?.throttle.close_for(Duration::from_micros(microseconds));
        Ok(())
    })
}

/// Lets the vCPU into the guest at once.
///
/// # Safety
///
/// `gate` is a gate or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_gate_open(gate: *const Gate) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        unsafe { borrow(gate, "gate") }?.throttle.open();
        Ok(())
    })
}

/// How long the vCPU has waited at the gate altogether, in nanoseconds.
///
/// # Safety
///
/// `gate` is a gate or NULL; `nanoseconds` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_gate_throttled_ns(gate: *const Gate, nanoseconds: *mut u64) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let throttled = unsafe { borrow(gate, "gate") }?.throttle.throttled();
        let nanoseconds = out(nanoseconds, "nanoseconds")?;
        // SAFETY: the caller's promise.
        unsafe { nanoseconds.put(u64::try_from(throttled.as_nanos()).unwrap_or(u64::MAX)) };
        Ok(())
    })
}

/// Frees the handle; the gate stays as it is. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_gate_free(gate: *mut Gate) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(gate, "gate") }.map(drop))
}
