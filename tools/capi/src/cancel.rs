//! How another thread ends a migration that this thread serves.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::handle::{Handle, borrow, give, out, take_back};
use crate::status::{Failure, Status, done};

/// Ends a migration from outside. Any thread may use it, several at once.
#[derive(Debug)]
pub struct Cancel {
    asked: Arc<AtomicBool>,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Cancel {
    const MARK: [u8; 8] = *b"rf cancl";
}

impl Cancel {
    /// What the handle asks; of NULL, what nobody ever asks.
    ///
    /// # Safety
    ///
    /// `cancel` is a cancel handle or NULL.
    pub(crate) unsafe fn asked(cancel: *const Self) -> Result<Arc<AtomicBool>, Failure> {
        if cancel.is_null() {
            return Ok(Arc::default());
        }
        // SAFETY: the caller's promise.
        Ok(Arc::clone(&unsafe { borrow(cancel, "cancel") }?.asked))
    }
}

/// A cancel handle that has asked for nothing yet. It serves for one migration.
///
/// # Safety
///
/// `cancel` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_cancel_new(cancel: *mut *mut Cancel) -> Status {
    done(|| {
        let cancel = out(cancel, "cancel")?;
        // SAFETY: the caller's promise.
        unsafe { give(cancel, Cancel { asked: Arc::default() }) };
        Ok(())
    })
}

/// Ends the migration that was given this handle, within 50 ms plus what the callbacks take. A VM that was handed over is not
/// called back, and one that has arrived is not ended.
///
/// # Safety
///
/// `cancel` is a cancel handle or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_cancel_set(cancel: *const Cancel) -> Status {
    done(|| {
        // SAFETY: the caller's promise. Relaxed: a flag without data.
        unsafe { borrow(cancel, "cancel") }?.asked.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// Frees the handle. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_cancel_free(cancel: *mut Cancel) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(cancel, "cancel") }.map(drop))
}
