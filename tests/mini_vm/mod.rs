//! The smallest guest that can dirty memory on demand: flat 64-bit code in a control slot, written out byte by
//! byte, and data slots behind it. At CPL 3 it runs natively under every KVM, at CPL 0 our machines emulate it.
#![expect(unsafe_code, reason = "a VMM gives memory to KVM and sends signals")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::OpenOptions;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};
use ringferry::track::{BeforeRun, VcpuHandle};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};

/// Bytes at guest physical 0 for page tables, code and lists. Not tracked.
const CONTROL_BYTES: usize = 8 << 20;
const CODE_LIST: u64 = 0x1000;
const CODE_LOOP: u64 = 0x1100;
/// A page per vCPU whose first word counts the loop's passes.
const MAILBOXES: u64 = 0x2000;
const PML4: u64 = 0x2_0000;
const PDPT: u64 = 0x2_1000;
const PAGE_DIRECTORIES: u64 = 0x2_2000;
/// 512 GiB of guest addresses, mapped to themselves by 1 GiB entries would need hardware support: so this many
/// directories of 2 MiB pages.
const DIRECTORIES: u64 = 64;
/// A mebibyte per vCPU: 131,072 addresses.
const LISTS: u64 = 0x10_0000;
const LIST_BYTES: u64 = 0x8_0000;
/// Where the first data slot begins.
pub const DATA: PageIndex = PageIndex(16 << 20 >> 12);

/// Whether the guest's instructions run on the CPU or in KVM's emulator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0.
    Kernel,
}

/// What the guest does until its next port write.
#[derive(Clone, Debug)]
pub enum Work {
    /// Writes one word to each of these pages.
    List(Vec<PageIndex>),
    /// Writes one word to each of `pages` pages from `first` on, in steps of `stride` pages, `passes` times.
    Loop { first: PageIndex, pages: u64, stride: u64, passes: u64 },
}

/// A VM without vCPUs, its control slot and its data slots in place.
pub struct MiniVm {
    pub fd: VmFd,
    control: MmapRaw,
    data: Vec<MmapRaw>,
    pub memory: GuestMemory,
}

fn map(bytes: usize) -> MmapRaw {
    let mut anonymous = MmapOptions::new();
    anonymous.len(bytes).no_reserve_swap();
    anonymous.map_anon().unwrap().into()
}

fn put(memory: &MmapRaw, at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    assert!(at + bytes.len() <= memory.len());
    // SAFETY: inside the mapping, by the line above; the guest does not run yet, or does not use these bytes.
    unsafe { memory.as_mut_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
}

/// `None` where there is no KVM to use: the test has then been noted as skipped.
pub fn kvm() -> Option<Kvm> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Some(Kvm::new().unwrap()),
        Err(error) => {
            ringferry_testvm::skip(&format!("/dev/kvm: {error}"));
            None
        }
    }
}

impl MiniVm {
    /// Slots 1, 2, … of so many pages each, one after the other from [`DATA`] on. Nothing is tracked yet.
    pub fn new(kvm: &Kvm, data_pages: &[u64]) -> Self {
        let vm = kvm.create_vm().unwrap();
        let control = map(CONTROL_BYTES);
        let set_slot = |slot: u32, first: PageIndex, memory: &MmapRaw| {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: first.address().0,
                memory_size: memory.len() as u64,
                userspace_addr: memory.as_mut_ptr().addr() as u64,
            };
            // SAFETY: the mapping lives as long as the VM's descriptor, beside it in `MiniVm`.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        };
        set_slot(0, PageIndex(0), &control);
        put(
            &control,
            CODE_LIST,
            &[
                0x48, 0x8b, 0x3e, // mov rdi, [rsi]
                0x48, 0x89, 0x07, // mov [rdi], rax
                0x48, 0x83, 0xc6, 0x08, // add rsi, 8
                0x48, 0xff, 0xc9, // dec rcx
                0x75, 0xf1, // jnz to the first line
                0xe6, 0x10, // out 0x10, al
            ],
        );
        put(
            &control,
            CODE_LOOP,
            &[
                0x4c, 0x89, 0xc7, // mov rdi, r8
                0x4c, 0x89, 0xc9, // mov rcx, r9
                0x48, 0x89, 0x07, // mov [rdi], rax
                0x4c, 0x01, 0xd7, // add rdi, r10
                0x48, 0xff, 0xc9, // dec rcx
                0x75, 0xf5, // jnz to mov [rdi]
                0x48, 0xff, 0x45, 0x00, // inc qword [rbp]
                0x48, 0xff, 0xc0, // inc rax
                0x49, 0xff, 0xcb, // dec r11
                0x75, 0xe3, // jnz to the first line
                0xe6, 0x10, // out 0x10, al
            ],
        );
        const PRESENT_WRITABLE_USER: u64 = 7;
        const LARGE: u64 = 1 << 7;
        put(&control, PML4, &(PDPT | PRESENT_WRITABLE_USER).to_le_bytes());
        for directory in 0..DIRECTORIES {
            let table = PAGE_DIRECTORIES + directory * 4096;
            put(&control, PDPT + directory * 8, &(table | PRESENT_WRITABLE_USER).to_le_bytes());
            for entry in 0..512 {
                let address = (directory * 512 + entry) << 21;
                put(&control, table + entry * 8, &(address | LARGE | PRESENT_WRITABLE_USER).to_le_bytes());
            }
        }
        let mut first = DATA;
        let (mut data, mut regions) = (Vec::new(), Vec::new());
        for (slot, &pages) in (1..).zip(data_pages) {
            let memory = map(usize::try_from(pages).unwrap() * PAGE_SIZE);
            set_slot(slot, first, &memory);
            regions.push(Region {
                slot: SlotId(slot),
                pages: PageRun { first, pages },
                host: memory.as_mut_ptr(),
            });
            data.push(memory);
            first = PageIndex(first.0 + pages);
        }
        // SAFETY: the mappings live as long as this VM, and are only accessed through pointers.
        let memory = unsafe { GuestMemory::new(regions) }.unwrap();
        Self { fd: vm, control, data, memory }
    }

    /// Deletes a slot from KVM and creates it again at `first`, with the same memory.
    pub fn move_slot(&self, slot: u32, first: PageIndex) -> GuestMemory {
        let memory = &self.data[slot as usize - 1];
        let mut region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: 0,
            userspace_addr: 0,
        };
        // SAFETY: a slot of no size is deleted.
        unsafe { self.fd.set_user_memory_region(region) }.unwrap();
        region.guest_phys_addr = first.address().0;
        region.memory_size = memory.len() as u64;
        region.userspace_addr = memory.as_mut_ptr().addr() as u64;
        // SAFETY: the mapping lives as long as the VM's descriptor, beside it in `MiniVm`.
        unsafe { self.fd.set_user_memory_region(region) }.unwrap();
        let pages = PageRun { first, pages: (memory.len() / PAGE_SIZE) as u64 };
        // SAFETY: as in `new`.
        unsafe { GuestMemory::new(vec![Region { slot: SlotId(slot), pages, host: memory.as_mut_ptr() }]) }
            .unwrap()
    }

    /// A new vCPU, to be attached and then given work.
    pub fn create_vcpu(&self, index: u64, privilege: Privilege) -> MiniVcpu {
        let fd = self.fd.create_vcpu(index).unwrap();
        let dpl = match privilege {
            Privilege::User => 3,
            Privilege::Kernel => 0,
        };
        let code = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 0x30 | u16::from(dpl),
            type_: 11,
            present: 1,
            dpl,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x28 | u16::from(dpl), type_: 3, l: 0, db: 1, ..code };
        let mut sregs = fd.get_sregs().unwrap();
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620;
        sregs.efer = 0xd01;
        fd.set_sregs(&sregs).unwrap();
        MiniVcpu { fd, index, list: self.list_of(index), mailbox: self.mailbox_of(index) }
    }

    fn list_of(&self, index: u64) -> ControlPointer {
        assert!(LISTS + (index + 1) * LIST_BYTES <= CONTROL_BYTES as u64);
        ControlPointer(
            self.control.as_mut_ptr().wrapping_add(usize::try_from(LISTS + index * LIST_BYTES).unwrap()),
        )
    }

    fn mailbox_of(&self, index: u64) -> ControlPointer {
        ControlPointer(
            self.control.as_mut_ptr().wrapping_add(usize::try_from(MAILBOXES + index * 4096).unwrap()),
        )
    }

    /// Passes of the loop that vCPU `index` has finished.
    pub fn passes(&self, index: u64) -> u64 {
        // SAFETY: inside the control slot, aligned; the guest writes it meanwhile, hence volatile.
        unsafe { self.mailbox_of(index).0.cast::<u64>().read_volatile() }
    }

    /// The first word of a page of data, as the guest wrote it.
    pub fn word(&self, page: PageIndex) -> u64 {
        let run = self.memory.host_runs(PageRun { first: page, pages: 1 }).unwrap().next().unwrap();
        // SAFETY: a page of a live mapping, aligned; the guest writes it meanwhile, hence volatile.
        unsafe { run.host.cast::<u64>().read_volatile() }
    }
}

/// Into the control slot, which outlives every vCPU of a test.
#[derive(Clone, Copy)]
struct ControlPointer(*mut u8);

// SAFETY: an address; what it points to is only accessed while no guest uses it, or volatile.
unsafe impl Send for ControlPointer {}

/// Why the guest came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// It finished its work.
    Done,
    /// Its ring is full.
    RingFull,
    /// A signal.
    Kicked,
}

pub struct MiniVcpu {
    pub fd: VcpuFd,
    index: u64,
    list: ControlPointer,
    mailbox: ControlPointer,
}

impl MiniVcpu {
    /// What the guest does from the next run on; each write stores `value` (the loop counts it up every pass).
    pub fn set_work(&mut self, work: &Work, value: u64) {
        let mut regs = self.fd.get_regs().unwrap();
        (regs.rflags, regs.rax) = (0x3002, value);
        regs.rbp = MAILBOXES + self.index * 4096;
        let _ = self.mailbox;
        match work {
            Work::List(pages) => {
                assert!(!pages.is_empty() && pages.len() * 8 <= usize::try_from(LIST_BYTES).unwrap());
                for (i, page) in pages.iter().enumerate() {
                    // SAFETY: inside this vCPU's list, by the assertion; the guest is not running.
                    unsafe { self.list.0.cast::<u64>().add(i).write_volatile(page.address().0) };
                }
                regs.rip = CODE_LIST;
                regs.rsi = LISTS + self.index * LIST_BYTES;
                regs.rcx = pages.len() as u64;
            }
            Work::Loop { first, pages, stride, passes } => {
                regs.rip = CODE_LOOP;
                regs.r8 = first.address().0;
                regs.r9 = *pages;
                regs.r10 = stride * PAGE_SIZE as u64;
                regs.r11 = *passes;
            }
        }
        self.fd.set_regs(&regs).unwrap();
    }

    /// One `KVM_RUN`.
    pub fn run(&mut self) -> Exit {
        match self.fd.run().map(drop) {
            Err(error) if error.errno() == libc::EINTR => return Exit::Kicked,
            outcome => outcome.unwrap(),
        }
        match self.fd.get_kvm_run().exit_reason {
            KVM_EXIT_IO => Exit::Done,
            KVM_EXIT_DIRTY_RING_FULL => Exit::RingFull,
            reason => panic!("the guest left with exit reason {reason}: {:?}", self.fd.get_regs()),
        }
    }

    /// Runs until the work is done or `stop` is set by somebody who then kicks.
    pub fn run_until(&mut self, handle: &VcpuHandle, stop: &AtomicBool) {
        loop {
            // Acquire: what the stopper did before is seen after.
            if stop.load(Ordering::Acquire) {
                return;
            }
            if handle.before_run() == BeforeRun::Interrupted {
                continue;
            }
            match self.run() {
                Exit::Done => return,
                Exit::RingFull => handle.ring_full().unwrap(),
                Exit::Kicked => {}
            }
        }
    }

    pub fn run_to_end(&mut self, handle: &VcpuHandle) {
        self.run_until(handle, &AtomicBool::new(false));
    }
}

/// A thread that can be kicked, from when it entered until it left.
#[derive(Default)]
pub struct Kickable(AtomicI32);

extern "C" fn ignore(_: libc::c_int) {}

/// The signal that vCPU threads are kicked with does nothing but interrupt.
pub fn install_kick_handler() {
    let handler: extern "C" fn(libc::c_int) = ignore;
    // SAFETY: a zeroed sigaction with a handler that does nothing, which is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
}

impl Kickable {
    pub fn enter(&self) {
        // SAFETY: no arguments, no memory.
        self.0.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    pub fn leave(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Sends the signal, if the thread is there: whether it is.
    pub fn kick(&self) -> bool {
        let tid = self.0.load(Ordering::Acquire);
        if tid != 0 {
            // SAFETY: numbers only; a thread that is gone is an error that we ignore.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
        }
        tid != 0
    }
}

/// A process that stops and continues this one, a few hundred times a second.
pub struct Stopper {
    pid: libc::pid_t,
    ended: bool,
}

impl Stopper {
    pub fn stop_this_process_for(duration: Duration) -> Self {
        let stopped = libc::timespec { tv_sec: 0, tv_nsec: 200_000 };
        let running = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let times = duration.as_micros() / 1200;
        // SAFETY: the child only makes async-signal-safe calls, and ends with a continue and without unwinding.
        unsafe {
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                let parent = libc::getppid();
                for _ in 0..times {
                    libc::kill(parent, libc::SIGSTOP);
                    libc::nanosleep(&raw const stopped, std::ptr::null_mut());
                    libc::kill(parent, libc::SIGCONT);
                    libc::nanosleep(&raw const running, std::ptr::null_mut());
                }
                libc::_exit(0);
            }
            Self { pid, ended: false }
        }
    }

    fn wait(&mut self, flags: libc::c_int) -> bool {
        // SAFETY: our own child, waited for once.
        self.ended =
            self.ended || unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), flags) } == self.pid;
        self.ended
    }

    pub fn has_ended(&mut self) -> bool {
        self.wait(libc::WNOHANG)
    }
}

impl Drop for Stopper {
    fn drop(&mut self) {
        // Not killed: it might have stopped us a moment ago.
        self.wait(0);
    }
}
