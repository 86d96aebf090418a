//! Writers of guest memory that KVM does not see: the VMM's own logs of them, and logs that other processes share.
#![expect(unsafe_code, reason = "functions are called from C, with pointers, and call back")]

use std::ffi::{CStr, c_char, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use ringferry::track::external::{SharedLog, SharedLogWriter};
use ringferry::track::{ExternalId, ExternalSource};
use ringferry::vm::VmError;
use ringferry::{PageRun, PageSet};

use crate::handle::{Handle, borrow, give, out, take_back};
use crate::slots::{pages_touched, whole_pages};
use crate::status::{Failure, Status, done};
use crate::tracker::Tracker;

/// The log of a writer that KVM does not see, kept by the VMM: a device by DMA, a backend with a log of its own. The callbacks run on
/// whatever thread starts, observes, harvests or ends a session, one at a time, and call no function of the library but
/// rf_marks_add().
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Source {
    /// Given to each callback.
    pub context: *mut c_void,
    /// Begins to log: whatever is written once this has returned will be drained, and what was logged before is forgotten. Returns
    /// NULL, or why it cannot, a text that stays valid.
    pub start: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// Adds every page that was logged to `marks`, and forgets it. Must not be NULL.
    pub drain: Option<unsafe extern "C" fn(context: *mut c_void, marks: *const Marks)>,
    /// Ends logging.
    pub stop: Option<unsafe extern "C" fn(context: *mut c_void)>,
}

// SAFETY: the header says that the callbacks run on any thread, one at a time.
unsafe impl Send for Source {}

/// Takes the pages that a drain callback has found. It is there as long as the callback runs, for the callback's own thread.
#[derive(Debug)]
pub struct Marks {
    thread: ThreadId,
    to: NonNull<PageSet>,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Marks {
    const MARK: [u8; 8] = *b"rf marks";
}

// SAFETY: `to` is followed on `thread` only, which is compared before.
unsafe impl Send for Marks {}
// SAFETY: as above.
unsafe impl Sync for Marks {}

/// A dirty log in shared memory, at the VMM's end.
#[derive(Debug)]
pub struct Log {
    log: Arc<Mutex<SharedLog>>,
    fd: i32,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Log {
    const MARK: [u8; 8] = *b"rf log  ";
}

/// A dirty log in shared memory, at the end of the process that writes guest memory. Any thread may use it, several at once.
#[derive(Debug)]
pub struct LogWriter {
    writer: SharedLogWriter,
}

// SAFETY: the mark is its own.
unsafe impl Handle for LogWriter {
    const MARK: [u8; 8] = *b"rf write";
}

impl ExternalSource for Source {
    fn name(&self) -> &'static str {
        "the VMM's log"
    }

    fn start(&mut self) -> Result<(), VmError> {
        let Some(start) = self.start else { return Ok(()) };
        // SAFETY: what rf_tracker_add_source() was promised.
        let refusal = unsafe { start(self.context) };
        if refusal.is_null() {
            return Ok(());
        }
        // SAFETY: as above.
        Err(unsafe { CStr::from_ptr(refusal) }.to_string_lossy().into())
    }

    fn drain_into(&mut self, dirty: &mut PageSet) {
        let Some(drain) = self.drain else { return };
        let lent = Marks { thread: thread::current().id(), to: NonNull::from(dirty) };
        let mut marks = std::ptr::null_mut();
        let Ok(place) = out(&raw mut marks, "marks") else { return };
        // SAFETY: a local variable; and what rf_tracker_add_source() was promised.
        unsafe {
            give(place, lent);
            drain(self.context, marks.cast_const());
        }
        // SAFETY: `give` gave it, and the header forbids its use after the callback.
        let _ = unsafe { take_back(marks, "marks") };
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop {
            // SAFETY: what rf_tracker_add_source() was promised.
            unsafe { stop(self.context) };
        }
    }
}

/// The pages in which `bytes` bytes at `guest_address` are were written.
///
/// # Safety
///
/// `marks` is what the running callback was given, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_marks_add(marks: *const Marks, guest_address: u64, bytes: u64) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let marks = unsafe { borrow(marks, "marks") }?;
        if marks.thread != thread::current().id() {
            return Err(Failure::Here(Status::Argument, "marks is for the thread of its callback only"));
        }
        if let Some(run) = pages_touched(guest_address, bytes) {
            // SAFETY: `drain_into` has the set on loan and waits for the callback on this thread; nobody else has a reference.
            unsafe { marks.to.as_ptr().as_mut() }.into_iter().for_each(|set| set.insert_run(run));
        }
        Ok(())
    })
}

/// From now on the pages that `source` logs are in every harvest. It is started with the first session and stopped with the last;
/// while one is open, at once: its writer must not have begun before. `number` names it for rf_tracker_remove_source().
///
/// # Safety
///
/// `tracker` is a tracker or NULL, `source` and `number` point to such or are NULL. What the callbacks need lives until
/// rf_tracker_remove_source() has returned, or all handles of the tracker are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_add_source(
    tracker: *const Tracker,
    source: *const Source,
    number: *mut u64,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        // SAFETY: the caller's promise.
        let source = *unsafe { source.as_ref() }.ok_or(Failure::Null("source"))?;
        let number = out(number, "number")?;
        if source.drain.is_none() {
            return Err(Failure::Null("source->drain"));
        }
        let added = add(tracker, Box::new(source))?;
        // SAFETY: the caller's promise.
        unsafe { number.put(added) };
        Ok(())
    })
}

/// Takes a source or a log out again, once its writer has stopped; what it has logged stays dirty. RF_ARGUMENT if it is gone already.
///
/// # Safety
///
/// `tracker` is a tracker or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_remove_source(tracker: *const Tracker, number: u64) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        let mut sources = tracker.shared.sources.lock();
        let place = usize::try_from(number).ok().and_then(|at| sources.get_mut(at));
        let id = place.and_then(Option::take);
        let removed = id.and_then(|id| tracker.shared.tracker.remove_external(id));
        removed.map(drop).ok_or(Failure::With(Status::Argument, "no source has this number", number))
    })
}

fn add(tracker: &Tracker, source: Box<dyn ExternalSource>) -> Result<u64, Failure> {
    let mut sources: parking_lot::MutexGuard<'_, Vec<Option<ExternalId>>> = tracker.shared.sources.lock();
    sources.push(Some(tracker.shared.tracker.add_external(source)?));
    Ok(sources.len() as u64 - 1)
}

/// Creates a log of `bytes` bytes of guest memory from `guest_address` on, multiples of 4096, that another process writes: a jailed
/// device, a backend. Each process that is not trusted with the marks of another gets a log of its own.
///
/// # Safety
///
/// `log` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_create(guest_address: u64, bytes: u64, log: *mut *mut Log) -> Status {
    done(|| {
        let log = out(log, "log")?;
        let shared = SharedLog::new(whole_pages(guest_address, bytes)?).map_err(said)?;
        let fd = shared.file().as_raw_fd();
        // SAFETY: the caller's promise.
        unsafe { give(log, Log { log: Arc::new(Mutex::new(shared)), fd }) };
        Ok(())
    })
}

/// The descriptor to pass to the other process (SCM_RIGHTS), for rf_log_writer_open(). It is the log's, and closed with it.
///
/// # Safety
///
/// `log` is a log or NULL, `fd` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_fd(log: *const Log, fd: *mut i32) -> Status {
    done(|| {
        let fd = out(fd, "fd")?;
        // SAFETY: the caller's promise.
        let log = unsafe { borrow(log, "log") }?;
        // SAFETY: the caller's promise.
        unsafe { fd.put(log.fd) };
        Ok(())
    })
}

/// From now on the pages that the log's writer marks are in every harvest, as for rf_tracker_add_source(). The log may be freed
/// afterwards: the tracker has it.
///
/// # Safety
///
/// `tracker` and `log` are such or NULL, `number` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_tracker_add_log(
    tracker: *const Tracker,
    log: *const Log,
    number: *mut u64,
) -> Status {
    done(|| {
        let number = out(number, "number")?;
        // SAFETY: the caller's promise.
        let tracker = unsafe { borrow(tracker, "tracker") }?;
        // SAFETY: the caller's promise.
        let log = unsafe { borrow(log, "log") }?;
        let added = add(tracker, Box::new(Arc::clone(&log.log)))?;
        // SAFETY: the caller's promise.
        unsafe { number.put(added) };
        Ok(())
    })
}

/// Frees the handle. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_free(log: *mut Log) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(log, "log") }.map(drop))
}

/// Opens a log that the VMM has passed on, in the process that writes guest memory. The descriptor is duplicated.
///
/// # Safety
///
/// `writer` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_writer_open(fd: i32, writer: *mut *mut LogWriter) -> Status {
    done(|| {
        let writer = out(writer, "writer")?;
        if fd < 0 {
            return Err(Failure::Here(Status::Argument, "fd is no descriptor"));
        }
        // SAFETY: not -1, and used in this call only; if it is closed, duplicating it fails.
        let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().map_err(said)?;
        let opened = SharedLogWriter::open(file).map_err(said)?;
        // SAFETY: the caller's promise.
        unsafe { give(writer, LogWriter { writer: opened }) };
        Ok(())
    })
}

/// The pages in which `bytes` bytes at `guest_address` are were written: call it after the write, from any thread. It takes no lock
/// and makes no system call; a fence and a load while no session is open. Pages that the log is not for are left out.
///
/// # Safety
///
/// `writer` is a writer or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_writer_mark(
    writer: *const LogWriter,
    guest_address: u64,
    bytes: u64,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let writer = unsafe { borrow(writer, "writer") }?;
        let run: Option<PageRun> = pages_touched(guest_address, bytes);
        run.into_iter().for_each(|run| writer.writer.mark(run));
        Ok(())
    })
}

/// Frees the handle. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_log_writer_free(writer: *mut LogWriter) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(writer, "writer") }.map(drop))
}

fn said(error: std::io::Error) -> Failure {
    let status = match error.kind() {
        std::io::ErrorKind::InvalidInput => Status::Argument,
        _ => Status::Kernel,
    };
    Failure::Said(status, error.to_string())
}
