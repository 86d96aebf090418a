//! The offload process shows its VMM that it lives, and looks whether the VMM does.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::channel::Watch;
use super::error::OffloadError;
use crate::track::{LentPage, VcpuHandle, serve_full_rings};

/// Whether the VMM lives, and who wants to know if not.
struct WatchedVmm {
    watch: Watch,
    act: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl WatchedVmm {
    fn act(&self) -> MutexGuard<'_, Option<Box<dyn FnOnce() + Send>>> {
        self.act.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn when_it_ends(&self, act: impl FnOnce() + Send + 'static) {
        *self.act() = Some(Box::new(act));
    }

    fn has_ended(&self) -> bool {
        self.watch.has_gone()
    }

    fn look(&self) {
        if self.has_ended() {
            let act = self.act().take();
            if let Some(act) = act {
                act();
            }
        }
    }
}

impl fmt::Debug for WatchedVmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchedVmm").field("watch", &self.watch).finish_non_exhaustive()
    }
}

/// The VMM, and whether it lives. As long as the value does, a thread recycles full rings, looks whether the VMM lives, and shows
/// it that this process lives.
#[derive(Debug)]
pub struct Vmm {
    ends: Arc<AtomicBool>,
    page: Arc<LentPage>,
    vmm: Arc<WatchedVmm>,
    thread: Option<JoinHandle<()>>,
}

impl Vmm {
    /// Does something once, soon after the VMM has ended: to give up a migration that has no VM any more.
    pub fn when_it_ends(&self, act: impl FnOnce() + Send + 'static) {
        self.vmm.when_it_ends(act);
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.vmm.has_ended()
    }

    pub(super) fn watch(
        page: Arc<LentPage>,
        vcpus: Vec<VcpuHandle>,
        watch: Watch,
    ) -> Result<Self, OffloadError> {
        let ends = Arc::new(AtomicBool::new(false));
        let vmm = Arc::new(WatchedVmm { watch, act: Mutex::default() });
        let (of_thread, its_page, its_vmm) = (Arc::clone(&ends), Arc::clone(&page), Arc::clone(&vmm));
        let thread = std::thread::Builder::new()
            .name("ringferry-rings".to_owned())
            .spawn(move || serve_full_rings(&its_page, &vcpus, &of_thread, || its_vmm.look()))
            .map_err(OffloadError::Thread)?;
        Ok(Self { ends, page, vmm, thread: Some(thread) })
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Relaxed: a flag without data, read within 100 ms.
        self.ends.store(true, Ordering::Relaxed);
        crate::track::ring_bell(&self.page);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}
