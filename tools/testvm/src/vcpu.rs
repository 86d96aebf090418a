//! A vCPU and its thread: entering the guest, and answering its exits.

use std::collections::VecDeque;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::{Mutex, MutexGuard};
use ringferry::track::{BeforeRun, KVM_EXIT_DIRTY_RING_FULL, VcpuHandle, VcpuThrottle};

use crate::config::{Config, Console, Gates};
use crate::error::{TestVmError, VcpuError};
use crate::exit::{failure, guest_mode, rip};
use crate::kick::{Kick, signal};
use crate::pin;
use crate::run_control::{RunControl, VcpuStatus};
use crate::stats::Stats;
use crate::workload::mailbox::{EXIT_PORT, IDLE_PORT};

/// The first serial port of a PC; its line status register lies at offset 5.
const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
const SERIAL_LINE_STATUS: u16 = 0x3fd;
/// Transmitter empty, nothing received.
const SERIAL_READY: u8 = 0x60;

/// How often a vCPU's thread was called upon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuCounters {
    /// Exits by port input and output.
    pub port_exits: u64,
    /// Exits by accesses to addresses that are not RAM.
    pub mmio_exits: u64,
    /// Exits because the dirty ring was full.
    pub ring_full_exits: u64,
    /// Returns to the VMM because of a kick or a signal.
    pub interrupted: u64,
}

#[derive(Debug, Default)]
struct Counters {
    port_exits: AtomicU64,
    mmio_exits: AtomicU64,
    ring_full_exits: AtomicU64,
    interrupted: AtomicU64,
}

/// What all threads share.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub index: usize,
    /// Locked by the vCPU's thread, except while it is parked.
    pub fd: Mutex<VcpuFd>,
    /// Readable while the thread has `fd`.
    pub stats: Stats,
    kick: Kick,
    tracked: Option<VcpuHandle>,
    throttle: Option<VcpuThrottle>,
    counters: Counters,
}

impl Vcpu {
    /// # Errors
    ///
    /// [`TestVmError`]: `kvm_run` cannot be mapped, or there are no statistics.
    pub fn new(
        index: usize,
        fd: VcpuFd,
        tracked: Option<VcpuHandle>,
        throttle: Option<VcpuThrottle>,
    ) -> Result<Self, TestVmError> {
        let kick = Kick::new(&fd).map_err(|error| TestVmError::Kvm {
            call: "mapping kvm_run",
            error,
            hint: "the address space of this process may be limited (ulimit -v)",
        })?;
        let stats = Stats::open(&fd)?;
        Ok(Self { index, fd: Mutex::new(fd), stats, kick, tracked, throttle, counters: Counters::default() })
    }

    /// Makes the thread look soon at what is wanted of it.
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// The same for a vCPU that is not to run again soon: it need not wait for its throttle either.
    pub fn call_out(&self) {
        self.kick.kick();
        // After the kick: a vCPU that is woken by this sees it.
        if let Some(throttle) = &self.throttle {
            throttle.open();
        }
    }

    /// Relaxed: counters are read one by one, for reports.
    pub fn counters(&self) -> VcpuCounters {
        VcpuCounters {
            port_exits: self.counters.port_exits.load(Ordering::Relaxed),
            mmio_exits: self.counters.mmio_exits.load(Ordering::Relaxed),
            ring_full_exits: self.counters.ring_full_exits.load(Ordering::Relaxed),
            interrupted: self.counters.interrupted.load(Ordering::Relaxed),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The serial port's other end: the last bytes are kept, all are passed on.
#[derive(Debug)]
pub(crate) struct Serial {
    kept: VecDeque<u8>,
    sink: Option<Console>,
}

impl Serial {
    const KEPT_BYTES: usize = 64 << 10;

    pub fn new(sink: Option<Console>) -> Self {
        Self { kept: VecDeque::new(), sink }
    }

    pub fn kept(&self) -> String {
        let (front, back) = self.kept.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }

    fn write(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let surplus = self.kept.len().saturating_sub(Self::KEPT_BYTES);
        self.kept.drain(..surplus);
        if let Some(Console(sink)) = &mut self.sink
            && sink.write_all(bytes).and_then(|()| sink.flush()).is_err()
        {
            // Whoever listened is gone; the guest is not to suffer.
            self.sink = None;
        }
    }
}

/// Starts the thread that runs `vcpu`; it waits for [`Wanted::Run`](crate::run_control::Wanted::Run) first.
pub(crate) fn spawn(
    vcpu: Arc<Vcpu>,
    control: Arc<RunControl>,
    serial: Arc<Mutex<Serial>>,
    config: &Config,
) -> Result<JoinHandle<()>, TestVmError> {
    let index = vcpu.index;
    let (pinned, gates) = (config.pin_vcpus, config.gates);
    let body = move || {
        if pinned {
            pin::to_cpu(index);
        }
        vcpu.kick.adopt();
        let ended = catch_unwind(AssertUnwindSafe(|| run(&vcpu, &control, &serial, gates)));
        vcpu.kick.leave();
        control.ended(index, ended.unwrap_or(VcpuStatus::Failed(VcpuError::Panicked)));
    };
    let thread = Builder::new().name(format!("vcpu{index}")).spawn(body);
    thread.map_err(|error| TestVmError::Thread { vcpu: index, error })
}

/// What is left of an exit when those with data have been answered.
enum Rest {
    Answered,
    Exit,
    Errno(i32),
    Ended(u32),
}

/// Runs the vCPU until it or the VM ends.
fn run(vcpu: &Vcpu, control: &RunControl, serial: &Mutex<Serial>, gates: Gates) -> VcpuStatus {
    if let Some(tracked) = &vcpu.tracked
        && gates != Gates::Kicked
        && let Err(error) = tracked.time_with(signal())
    {
        tracing::warn!("vCPU {} is held back by kicks only: {error}", vcpu.index);
    }
    let mut fd = vcpu.fd.lock();
    if !MutexGuard::unlocked(&mut fd, || control.pass(vcpu.index)) {
        return VcpuStatus::Paused;
    }
    loop {
        // After a kick, KVM_RUN is to return at once; after any other signal, the throttle still holds.
        if let Some(tracked) = &vcpu.tracked {
            let pass = || match gates {
                Gates::ByMode => tracked.before_run_in(|| guest_mode(&fd)),
                Gates::Kicked | Gates::Timed => tracked.before_run(),
            };
            while !vcpu.kick.is_pending() && pass() == BeforeRun::Interrupted {}
        }
        let rest = match fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => {
                count(&vcpu.counters.port_exits);
                match port {
                    0x3f8 => serial.lock().write(bytes),
                    IDLE_PORT => vcpu.kick.idle(Duration::from_micros(little_endian(bytes).into())),
                    _ => {}
                }
                if port == EXIT_PORT { Rest::Ended(little_endian(bytes)) } else { Rest::Answered }
            }
            Ok(VcpuExit::IoIn(port, bytes)) => {
                count(&vcpu.counters.port_exits);
                bytes.fill(match port {
                    SERIAL_LINE_STATUS => SERIAL_READY,
                    port if SERIAL_PORTS.contains(&port) => 0,
                    _ => 0xff,
                });
                Rest::Answered
            }
            Ok(VcpuExit::MmioRead(_, bytes)) => {
                count(&vcpu.counters.mmio_exits);
                bytes.fill(0xff);
                Rest::Answered
            }
            Ok(VcpuExit::MmioWrite(..)) => {
                count(&vcpu.counters.mmio_exits);
                Rest::Answered
            }
            Ok(_) => Rest::Exit,
            Err(error) => Rest::Errno(error.errno()),
        };
        match rest {
            Rest::Answered => {}
            Rest::Ended(code) => return VcpuStatus::Exited { code },
            // The one place where the thread stops: KVM completes a pending port or memory access before it
            // returns EINTR, so here the registers are those between two instructions.
            Rest::Errno(libc::EINTR | libc::EAGAIN) => {
                count(&vcpu.counters.interrupted);
                vcpu.kick.acknowledge();
                if !MutexGuard::unlocked(&mut fd, || control.pass(vcpu.index)) {
                    return VcpuStatus::Paused;
                }
            }
            Rest::Errno(errno) => {
                return VcpuStatus::Failed(VcpuError::Run { errno, rip: rip(&fd) });
            }
            Rest::Exit if fd.get_kvm_run().exit_reason == KVM_EXIT_DIRTY_RING_FULL => {
                count(&vcpu.counters.ring_full_exits);
                let emptied = match &vcpu.tracked {
                    Some(tracked) => tracked.ring_full().map_err(|error| error.to_string()),
                    None => Err("nobody tracks this VM".to_owned()),
                };
                if let Err(error) = emptied {
                    return VcpuStatus::Failed(VcpuError::RingFull(error));
                }
            }
            Rest::Exit => return VcpuStatus::Failed(failure(&mut fd)),
        }
    }
}

fn little_endian(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    let length = bytes.len().min(4);
    word[..length].copy_from_slice(&bytes[..length]);
    u32::from_le_bytes(word)
}
