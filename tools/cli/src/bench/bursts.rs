//! A vCPU that works in bursts, as a guest that collects garbage does: its work is given and taken from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use ringferry_testvm::Guest;
use ringferry_testvm::workload::command_line::{Pattern, Work};

use crate::guest::Host;
use crate::scenario;

const POLL: Duration = Duration::from_millis(5);

/// Gives the work and takes it, until its end.
#[derive(Debug)]
pub struct Bursts {
    over: Arc<AtomicBool>,
    standstill: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bursts {
    /// Starts with a burst.
    pub fn start(host: &Host, of: scenario::Bursts) -> Result<Self> {
        let mut guest = Guest::new(host.vm.memory(), host.vm.kvm_tracker())?;
        let work = guest.work(of.vcpu)?;
        let none = Work { pattern: Pattern::ComputeOnly, ..work };
        let (over, standstill) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (ends, waits) = (Arc::clone(&over), Arc::clone(&standstill));
        let begun = Instant::now();
        let thread = thread::Builder::new().name("bursts".to_owned()).spawn(move || {
            let mut works = true;
            // Relaxed: flags without data.
            while !ends.load(Ordering::Relaxed) {
                thread::sleep(POLL);
                let every = of.every.0.max(POLL);
                let at = begun.elapsed().as_secs_f64() % every.as_secs_f64();
                let wanted = at < of.on.0.as_secs_f64();
                if wanted != works && !waits.load(Ordering::Relaxed) {
                    works = wanted;
                    if let Err(error) = guest.set_work(of.vcpu, if works { &work } else { &none }) {
                        tracing::warn!(%error, "a burst could not be begun or ended");
                    }
                }
            }
        })?;
        Ok(Self { over, standstill, thread: Some(thread) })
    }

    /// Nothing is written into a guest that stands still.
    pub fn standstill(&self, stands: bool) {
        self.standstill.store(stands, Ordering::Relaxed);
    }
}

impl Drop for Bursts {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // One that panicked gives no more work either.
            let _ = thread.join();
        }
    }
}
