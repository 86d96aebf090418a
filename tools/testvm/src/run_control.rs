//! What is wanted of all vCPUs of a VM, and what each of them does.
//!
//! The thread that pauses the VM says what is wanted, kicks, and waits here; a kicked vCPU's thread comes here and stays
//! until it may run again. See `kick` for why no kick is lost.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{TestVmError, VcpuError};

/// How long a pause waits for the slowest vCPU. A kick takes well below a millisecond, and a turn of a VM of threads
/// 10 ms; on a host that is short of CPUs, sixteen vCPU threads may wait long for their turn.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// What a vCPU does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuStatus {
    /// In `KVM_RUN`, or on its way there.
    Running,
    /// Outside `KVM_RUN`, with nothing pending, until the VM runs again.
    Paused,
    /// The guest ended it through the exit port.
    Exited {
        /// What the guest wrote to the port.
        code: u32,
    },
    /// It cannot run any more.
    Failed(VcpuError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Run,
    Pause,
    End,
}

#[derive(Debug)]
pub(crate) struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    status: Vec<VcpuStatus>,
}

impl RunControl {
    /// All vCPUs paused.
    pub fn new(vcpus: usize) -> Self {
        let state = State { wanted: Wanted::Pause, status: vec![VcpuStatus::Paused; vcpus] };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// On a vCPU's thread, outside `KVM_RUN` and with no I/O to complete: stays as long as a pause is wanted.
    /// False if the thread is to end.
    pub fn pass(&self, vcpu: usize) -> bool {
        let mut state = self.state.lock();
        while state.wanted == Wanted::Pause {
            if state.status[vcpu] != VcpuStatus::Paused {
                state.status[vcpu] = VcpuStatus::Paused;
                self.changed.notify_all();
            }
            self.changed.wait(&mut state);
        }
        state.wanted == Wanted::Run
    }

    /// On a vCPU's thread: it will not run again.
    pub fn ended(&self, vcpu: usize, status: VcpuStatus) {
        self.state.lock().status[vcpu] = status;
        self.changed.notify_all();
    }

    /// Says what is wanted from here on. The caller kicks afterwards.
    pub fn want(&self, wanted: Wanted) {
        let mut state = self.state.lock();
        state.wanted = wanted;
        if wanted == Wanted::Run {
            // Here and not on each vCPU's thread: a pause that follows at once must wait for every one of them.
            for status in state.status.iter_mut().filter(|status| **status == VcpuStatus::Paused) {
                *status = VcpuStatus::Running;
            }
        }
        self.changed.notify_all();
    }

    /// Waits until no vCPU runs.
    ///
    /// # Errors
    ///
    /// [`TestVmError::PauseTimeout`]: one still does after ten seconds.
    pub fn wait_until_none_runs(&self) -> Result<(), TestVmError> {
        let end = Instant::now() + PAUSE_LIMIT;
        let mut state = self.state.lock();
        while let Some(vcpu) = state.status.iter().position(|status| *status == VcpuStatus::Running) {
            if self.changed.wait_until(&mut state, end).timed_out() {
                let waited_ms = u64::try_from(PAUSE_LIMIT.as_millis()).unwrap_or(u64::MAX);
                return Err(TestVmError::PauseTimeout { vcpu, waited_ms });
            }
        }
        Ok(())
    }

    /// What each vCPU does.
    pub fn status(&self) -> Vec<VcpuStatus> {
        self.state.lock().status.clone()
    }

    /// Waits until some vCPU is in a state that `wanted` accepts, or the time is over: then `None`.
    pub fn wait_for(
        &self,
        limit: Duration,
        wanted: impl Fn(&VcpuStatus) -> bool,
    ) -> Option<(usize, VcpuStatus)> {
        let end = Instant::now() + limit;
        let mut state = self.state.lock();
        loop {
            if let Some(vcpu) = state.status.iter().position(&wanted) {
                return Some((vcpu, state.status[vcpu].clone()));
            }
            if self.changed.wait_until(&mut state, end).timed_out() {
                return None;
            }
        }
    }
}
