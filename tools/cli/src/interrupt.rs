//! Ctrl-C: asked for once, it ends the work cleanly; asked for twice, it ends the process.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

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
