//! Ctrl-C: asked for once, it ends the work cleanly; asked for twice, it ends the process.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};

/// How soon Ctrl-C is noticed.
const POLL: Duration = Duration::from_millis(10);

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The flag that the first SIGINT or SIGTERM raises. A second one ends the process with exit code 1.
pub fn flag() -> io::Result<&'static AtomicBool> {
    if FLAG.get().is_none() {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, flag.clone())?;
            signal_hook::flag::register(signal, flag.clone())?;
        }
        let _ = FLAG.set(flag);
    }
    FLAG.get().map(AsRef::as_ref).ok_or_else(|| io::Error::other("the signal flag is missing"))
}

/// Does `work`. If the flag is raised meanwhile, `cancel` is called, once, on another thread.
pub fn cancelling<T>(interrupted: &AtomicBool, cancel: impl FnOnce() + Send, work: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        // Dropped when the work is done, even if it panics: the other thread then ends.
        let (_at_work, done) = mpsc::channel::<()>();
        scope.spawn(move || {
            while done.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                // Relaxed: a flag without data, polled.
                if interrupted.load(Ordering::Relaxed) {
                    return cancel();
                }
            }
        });
        work()
    })
}
