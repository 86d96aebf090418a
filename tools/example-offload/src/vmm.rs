//! A VMM of one vCPU, as it is without offload: what a migration asks of any VMM is here.
#![expect(unsafe_code, reason = "KVM takes guest RAM by host address, and registers are saved as bytes")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};
use ringferry::kvm::RingSize;
use ringferry::track::{BeforeRun, DirtyTracker, KVM_EXIT_DIRTY_RING_FULL, VcpuHandle};
use ringferry::vm::VmError;
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Paused, Quiesced, Region, SlotId, Vm};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::{AnyError, guest};

/// All of RAM is one slot.
pub const SLOT: SlotId = SlotId(0);
pub const RAM: PageRun = PageRun { first: PageIndex(0), pages: (guest::RAM_BYTES / PAGE_SIZE) as u64 };

struct Vcpu {
    /// Locked by the vCPU's thread while it runs.
    fd: Mutex<VcpuFd>,
    is_paused: AtomicBool,
}

/// The VMM and its VM.
pub struct ExampleVmm {
    vcpu: Arc<Vcpu>,
    pub vcpu_fd: OwnedFd,
    pub tracker: DirtyTracker,
    pub ram_file: OwnedFd,
    ram: Arc<MmapRaw>,
    _vm: VmFd,
}

impl ExampleVmm {
    /// A VM that has not run: a destination, or what `boot` starts.
    pub fn new() -> Result<Self, AnyError> {
        let vm = Kvm::new()?.create_vm()?;
        let tracker = DirtyTracker::enable(&vm, RingSize::MAX)?;
        let ram_file = memfd_create("example-ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&ram_file, guest::RAM_BYTES as u64)?;
        let ram = Arc::new(MmapOptions::new().len(guest::RAM_BYTES).map_raw(&ram_file)?);
        let slot = kvm_userspace_memory_region {
            memory_size: guest::RAM_BYTES as u64,
            userspace_addr: ram.as_ptr().addr() as u64,
            ..kvm_userspace_memory_region::default()
        };
        // SAFETY: the mapping has this length, and is kept as long as the VM.
        unsafe { vm.set_user_memory_region(slot) }?;
        // SAFETY: mapped readable and writable, kept by `kept_by`, and never referenced by Rust but as atomics.
        let memory = unsafe { GuestMemory::new(vec![Region::new(SLOT, RAM, ram.as_mut_ptr())]) }?;
        tracker.add_memory(&memory.kept_by(Arc::clone(&ram) as _))?;

        let fd = vm.create_vcpu(0)?;
        let tracked = tracker.attach_vcpu(0, &fd)?;
        // A second descriptor, which can be lent while the thread has the first.
        // SAFETY: `fd` is open here.
        let vcpu_fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned()?;
        let vcpu = Arc::new(Vcpu { fd: Mutex::new(fd), is_paused: AtomicBool::new(true) });
        let of_thread = Arc::clone(&vcpu);
        thread::spawn(move || run_vcpu(&of_thread, &tracked));
        Ok(Self { vcpu, vcpu_fd, tracker, ram_file, ram, _vm: vm })
    }

    /// Starts the guest.
    pub fn boot(&self) -> Result<(), AnyError> {
        guest::image().into_iter().for_each(|(at, word)| self.word(at).store(word, Ordering::Release));
        guest::enter(&self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))?;
        self.vcpu.is_paused.store(false, Ordering::Release);
        Ok(())
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= guest::RAM_BYTES);
        // SAFETY: inside the mapping, aligned, and only accessed as atomics.
        unsafe { AtomicU64::from_ptr(self.ram.as_mut_ptr().add(offset & !7).cast()) }
    }

    /// How many passes the guest has made, and whether each of its pages has the number of the last pass or the one before.
    pub fn look(&self) -> (u64, bool) {
        let pages = (0..guest::PAGES).map(|page| (guest::FIRST_PAGE + page) * PAGE_SIZE);
        let found: Vec<u64> = pages.map(|page| self.word(page).load(Ordering::Acquire)).collect();
        (found[0], found.is_sorted_by(|one, next| one >= next) && found[0] - found[guest::PAGES - 1] <= 1)
    }
}

fn run_vcpu(vcpu: &Vcpu, tracked: &VcpuHandle) {
    loop {
        while vcpu.is_paused.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(200));
        }
        let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        // The same as without offload: nothing here knows who follows the ring.
        while !vcpu.is_paused.load(Ordering::Acquire) {
            if tracked.before_run() == BeforeRun::Interrupted {
                continue;
            }
            let passed = matches!(fd.run(), Ok(VcpuExit::IoOut(..)));
            let is_full = fd.get_kvm_run().exit_reason == KVM_EXIT_DIRTY_RING_FULL;
            let goes_on = passed || is_full && tracked.ring_full().is_ok();
            if !goes_on {
                return println!("the vCPU stopped");
            }
        }
    }
}

/// What a migration asks of any VMM.
impl Vm for ExampleVmm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.vcpu.is_paused.store(true, Ordering::Release);
        // The guest comes back after each pass. KVM then completes its port write before it looks at this.
        let mut fd = self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        fd.set_kvm_immediate_exit(1);
        let _ = fd.run();
        fd.set_kvm_immediate_exit(0);
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        self.vcpu.is_paused.store(false, Ordering::Release);
        Ok(())
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        let fd = self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        let state = (fd.get_regs()?, fd.get_sregs()?);
        // SAFETY: two structs of the kernel's, of integers without padding that matters, as bytes.
        Ok(unsafe { std::slice::from_raw_parts((&raw const state).cast(), size_of_val(&state)) }.to_vec())
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        if state.len() != size_of::<(kvm_regs, kvm_sregs)>() {
            return Err("the state is another VMM's".into());
        }
        // SAFETY: as long as the structs, which any bytes make.
        let (regs, sregs) = unsafe { state.as_ptr().cast::<(kvm_regs, kvm_sregs)>().read_unaligned() };
        let fd = self.vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        fd.set_sregs(&sregs)?;
        fd.set_regs(&regs)?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    /// The guest comes back after each pass, which is soon enough.
    fn kick(&self, _: usize) {}
}
