//! Signals that ask the process to end: the first lets the command end its work cleanly, a second ends the process at
//! once.
//!
//! Ctrl-C (INT), Ctrl-\ (QUIT), `kill` (TERM) and a terminal that is closed (HUP) are the same wish. Whoever has something
//! at stake polls the [flag](flag), and says with [`promise`] what the first signal will come to.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// How soon a signal is noticed.
const POLL: Duration = Duration::from_millis(10);

static RAISED: AtomicBool = AtomicBool::new(false);
static STATE: Mutex<State> =
    Mutex::new(State { listens: false, promise: "the work ends", at_sudden_end: Vec::new() });

struct State {
    /// Whether the thread that takes the signals has been started.
    listens: bool,
    /// What the first signal comes to.
    promise: &'static str,
    /// What must not be left behind by a process that ends at once.
    at_sudden_end: Vec<(u64, Box<dyn FnOnce() + Send>)>,
}

/// A thread that panicked meanwhile has left the state whole: each change is one assignment.
fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The flag that the first signal raises.
///
/// # Errors
///
/// The kernel lets this process take no signals, or gives it no further thread.
pub fn flag() -> io::Result<&'static AtomicBool> {
    let mut state = state();
    if !state.listens {
        let signals = Signals::new([SIGINT, SIGTERM, SIGQUIT].into_iter().chain(hangup()))?;
        thread::Builder::new().name("signals".to_owned()).spawn(move || take(signals))?;
        state.listens = true;
    }
    Ok(&RAISED)
}

/// An error if a signal asked the process to end: for work that ends by failing.
pub fn check() -> Result<()> {
    // Relaxed: a flag without data, polled.
    if RAISED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// From here on, this is what the first signal will come to. It completes "stopping (SIGTERM): …".
pub fn promise(what: &'static str) {
    state().promise = what;
}

/// Things are no longer as they were when a signal came: the next one is a first one again, with a promise of its own.
pub fn forget() {
    // Relaxed: a flag without data, polled.
    RAISED.store(false, Ordering::Relaxed);
}

/// HUP, unless the process was started to outlive its terminal, as `nohup` starts it.
fn hangup() -> Option<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    (ignored & (1 << (SIGHUP - 1)) == 0).then_some(SIGHUP)
}

fn take(mut signals: Signals) {
    for signal in signals.forever() {
        // Relaxed: a flag without data.
        if RAISED.swap(true, Ordering::Relaxed) {
            let left_behind = std::mem::take(&mut state().at_sudden_end);
            left_behind.into_iter().for_each(|(_, clean)| clean());
            // Not `std::process::exit`: it flushes standard output, which may block.
            signal_hook::low_level::exit(128 + signal);
        }
        let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
        let promise = state().promise;
        tracing::warn!("stopping ({name}): {promise}; a second signal ends the process at once");
    }
}

/// Something that a process which ends at once does not leave behind; until this value is dropped.
#[derive(Debug)]
#[must_use = "dropped, it has no effect"]
pub struct AtSuddenEnd(u64);

/// Calls `clean` if a second signal ends the process.
pub fn at_sudden_end(clean: impl FnOnce() + Send + 'static) -> AtSuddenEnd {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    state().at_sudden_end.push((id, Box::new(clean)));
    AtSuddenEnd(id)
}

impl Drop for AtSuddenEnd {
    fn drop(&mut self) {
        state().at_sudden_end.retain(|(id, _)| *id != self.0);
    }
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
