//! Where a callback of the VMM writes the state that it saves.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::ffi::c_void;
use std::io::Write;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ThreadId};

use crate::handle::{Handle, borrow, elements, give, out, take_back};
use crate::status::{Failure, Status, done};

/// Takes the state that a callback saves. It is there as long as the callback runs, for the callback's own thread.
#[derive(Debug)]
pub struct StateOut {
    thread: ThreadId,
    /// The `&mut dyn Write` of `lend_to`.
    to: NonNull<c_void>,
    failed: AtomicBool,
}

// SAFETY: the mark is its own.
unsafe impl Handle for StateOut {
    const MARK: [u8; 8] = *b"rf state";
}

// SAFETY: `to` is followed on `thread` only, which is compared before.
unsafe impl Send for StateOut {}
// SAFETY: as above.
unsafe impl Sync for StateOut {}

/// Lets `callback` write to `to`. Whether each of its writes was taken comes with its answer.
pub(crate) fn lend_to<R>(
    mut to: &mut dyn Write,
    callback: impl FnOnce(*mut StateOut) -> R,
) -> Result<(R, bool), Failure> {
    let to = NonNull::from(&mut to).cast();
    let lent = StateOut { thread: thread::current().id(), to, failed: AtomicBool::new(false) };
    let mut handle = std::ptr::null_mut();
    // SAFETY: a local variable.
    unsafe { give(out(&raw mut handle, "out")?, lent) };
    let answer = callback(handle);
    // SAFETY: `give` gave it, and the header forbids its use after the callback.
    let lent = unsafe { take_back(handle, "out") }?;
    Ok((answer, lent.is_some_and(|lent| !lent.failed.into_inner())))
}

/// Writes the next `length` bytes of the state. It may wait while the destination is behind. After an error no more is taken:
/// the callback returns a text, and its migration ends.
///
/// # Safety
///
/// `out` is what the running callback was given, or NULL. `bytes` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_state_write(out: *const StateOut, bytes: *const c_void, length: usize) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { borrow(out, "out") }?;
        // SAFETY: the caller's promise.
        let bytes = unsafe { elements(bytes.cast::<u8>(), length, "bytes") }?;
        if out.thread != thread::current().id() {
            return Err(Failure::Here(Status::Argument, "out is for the thread of its callback only"));
        }
        // SAFETY: `lend_to` lives on this thread's stack as long as the callback does. Nobody else has a reference: this
        // thread is here, and `write_all` calls nothing of C's.
        let to = unsafe { out.to.cast::<&mut dyn Write>().as_mut() };
        to.write_all(bytes).map_err(|error| {
            // Relaxed: read by this thread.
            out.failed.store(true, Ordering::Relaxed);
            Failure::Said(Status::Offload, format!("the state is not taken: {error}"))
        })
    })
}
