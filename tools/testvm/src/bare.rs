//! The smallest guest that dirties memory exactly as told: a few loops of flat 64-bit code in a control slot,
//! written out byte by byte, and data slots behind it. Its vCPUs run on whichever thread calls them.
//!
//! What it can and the guest image cannot: write a given list of pages and stand still again, write at CPL 0, which
//! our machines emulate, and have 511 GiB of sparse memory.
#![expect(unsafe_code, reason = "a VMM gives memory to KVM, and writes what a guest reads")]

use std::io;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_bindings::{
    CpuId, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO, KVM_MAX_CPUID_ENTRIES, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};
use ringferry::track::{BeforeRun, VcpuHandle};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};

use crate::workload::mailbox::MAX_VCPUS;

// The control slot, at guest physical 0 and not tracked: code, a mailbox page per vCPU, page tables, a list per vCPU.
const CODE_LIST: u64 = 0x1000;
const CODE_LOOP: u64 = 0x1100;
const CODE_CLOCKED: u64 = 0x1200;
const MAILBOXES: u64 = 0x2000;
const PML4: u64 = 0x2_0000;
const PDPT: u64 = 0x2_1000;
/// One per GiB, of 2 MiB pages; one PDPT points to 512.
const PAGE_DIRECTORIES: u64 = 0x10_0000;
const LISTS: u64 = 0x40_0000;
const LIST_BYTES: u64 = 0x10_0000;
const CONTROL_BYTES: usize = 0x140_0000;

/// Pages of the control slot.
pub const CONTROL_PAGES: u64 = (CONTROL_BYTES / PAGE_SIZE) as u64;

/// Where the first data slot begins.
pub const DATA: PageIndex = PageIndex(0x200_0000 / PAGE_SIZE as u64);
/// The most pages that one [`Work::List`] can name.
pub const LIST_PAGES_MAX: usize = 131_072;
/// The most pages of all data slots together.
pub const DATA_PAGES_MAX: u64 = (512 << 30) / PAGE_SIZE as u64 - DATA.0;

/// `mov rdi,[rsi]; mov [rdi],rax; add rsi,8; dec rcx; jnz; out`
const LIST: &[u8] = &[
    0x48, 0x8b, 0x3e, // mov rdi, [rsi]
    0x48, 0x89, 0x07, // mov [rdi], rax
    0x48, 0x83, 0xc6, 0x08, // add rsi, 8
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf1, // jnz to the first line
    0xe6, 0x10, // out 0x10, al
];

/// A store per page and as little else as possible.
const LOOP: &[u8] = &[
    0x4c, 0x89, 0xc7, // mov rdi, r8
    0x4c, 0x89, 0xc9, // mov rcx, r9
    0x48, 0x89, 0x1f, // mov [rdi], rbx
    0x4c, 0x01, 0xd7, // add rdi, r10
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf5, // jnz to mov [rdi]
    0x48, 0xff, 0x45, 0x00, // inc qword [rbp], the passes
    0x48, 0xff, 0xc3, // inc rbx
    0x49, 0xff, 0xcb, // dec r11
    0x74, 0x07, // jz to out
    0x48, 0x83, 0x7d, 0x10, 0x00, // cmp qword [rbp + 16], 0, the stop word
    0x74, 0xdc, // jz to the first line
    0xe6, 0x10, // out 0x10, al
];

/// The same with a look at the clock after each store, keeping the longest gap.
const CLOCKED: &[u8] = &[
    0x4c, 0x89, 0xc7, // mov rdi, r8
    0x4c, 0x89, 0xc9, // mov rcx, r9
    0x48, 0x89, 0x1f, // mov [rdi], rbx
    0x0f, 0x31, // rdtsc
    0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
    0x48, 0x09, 0xd0, // or rax, rdx
    0x48, 0x89, 0xc2, // mov rdx, rax
    0x4c, 0x29, 0xe2, // sub rdx, r12
    0x49, 0x89, 0xc4, // mov r12, rax
    0x48, 0x3b, 0x55, 0x08, // cmp rdx, [rbp + 8]
    0x76, 0x04, // jbe over the next line
    0x48, 0x89, 0x55, 0x08, // mov [rbp + 8], rdx
    0x4c, 0x01, 0xd7, // add rdi, r10
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xd9, // jnz to mov [rdi]
    0x48, 0xff, 0x45, 0x00, // inc qword [rbp]
    0x48, 0xff, 0xc3, // inc rbx
    0x49, 0xff, 0xcb, // dec r11
    0x74, 0x07, // jz to out
    0x48, 0x83, 0x7d, 0x10, 0x00, // cmp qword [rbp + 16], 0
    0x74, 0xc0, // jz to the first line
    0xe6, 0x10, // out 0x10, al
];

/// What a vCPU tells and is told while it loops.
#[repr(C)]
struct Mailbox {
    passes: AtomicU64,
    longest_gap_ticks: AtomicU64,
    stop: AtomicU64,
}

/// Whether the guest's instructions run on the CPU or in KVM's emulator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL 3, native under every KVM.
    User,
    /// CPL 0, which kvm_pvm emulates.
    Kernel,
}

/// What a vCPU does until it stands still.
#[derive(Clone, Debug)]
pub enum Work {
    /// Writes one word to each of these pages, [`LIST_PAGES_MAX`] at most.
    List(Vec<PageIndex>),
    /// Writes one word to each of these pages, over and over.
    Loop(Pages),
    /// The same, with a look at the clock after each.
    ClockedLoop(Pages),
}

/// Pages at equal distances.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pages {
    /// The first.
    pub first: PageIndex,
    /// How many.
    pub pages: u64,
    /// From one to the next.
    pub stride: u64,
    /// How often all of them, unless [`BareVm::stop`] ends it before.
    pub passes: u64,
}

/// Why a vCPU came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// It finished its work.
    Done,
    /// Its ring is full.
    RingFull,
    /// A signal.
    Kicked,
}

/// A VM without vCPUs, its control slot and its data slots in place, and nothing tracked.
#[derive(Debug)]
pub struct BareVm {
    // Dropped first: the slots' memory must outlive it.
    fd: VmFd,
    cpuid: CpuId,
    memory: GuestMemory,
    mappings: Arc<Mappings>,
}

/// What is behind the slots; VM and vCPUs keep it, as each of their descriptors keeps the slots alive.
#[derive(Debug)]
struct Mappings {
    control: Anonymous,
    data: Vec<Anonymous>,
}

/// Anonymous memory that shares none of its aligned 2 MiB with anything else. Else whoever unmaps the other part takes
/// the pages of this one from the guest, and what it then writes is named dirty a second time.
#[derive(Debug)]
struct Anonymous {
    map: MmapRaw,
    /// From the begin of the mapping.
    first: usize,
    bytes: usize,
}

impl Anonymous {
    const ALIGNMENT: usize = 2 << 20;

    fn new(bytes: usize) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.len(bytes.next_multiple_of(Self::ALIGNMENT) + Self::ALIGNMENT).no_reserve_swap();
        let map: MmapRaw = options.map_anon()?.into();
        let at = map.as_mut_ptr().addr();
        Ok(Self { map, first: at.next_multiple_of(Self::ALIGNMENT) - at, bytes })
    }

    fn len(&self) -> usize {
        self.bytes
    }

    fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.first)
    }
}

fn kvm_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn slot_of(slot: u32, first: PageIndex, memory: &Anonymous) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: first.address().0,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_mut_ptr().addr() as u64,
    }
}

fn put(control: &Anonymous, at: u64, bytes: &[u8]) {
    let at = index(at);
    assert!(at + bytes.len() <= control.len());
    // SAFETY: inside the mapping, by the line above; no guest that uses these bytes runs.
    unsafe { control.as_mut_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
}

impl BareVm {
    /// Slots 1, 2, … of so many pages each, one after the other from [`DATA`] on; slot 0 is the control slot.
    ///
    /// # Errors
    ///
    /// What KVM refused, or more pages than [`DATA_PAGES_MAX`].
    pub fn new(kvm: &Kvm, data_pages: &[u64]) -> io::Result<Self> {
        let end = DATA.0 + data_pages.iter().sum::<u64>();
        if end > DATA.0 + DATA_PAGES_MAX || data_pages.is_empty() || data_pages.contains(&0) {
            return Err(invalid("a bare VM has one slot or more, and less than 512 GiB"));
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error)?;
        let fd = kvm.create_vm().map_err(kvm_error)?;
        let control = Anonymous::new(CONTROL_BYTES)?;
        for (at, code) in [(CODE_LIST, LIST), (CODE_LOOP, LOOP), (CODE_CLOCKED, CLOCKED)] {
            put(&control, at, code);
        }
        map_to_themselves(&control, (end * PAGE_SIZE as u64).div_ceil(1 << 30));
        let mut first = DATA;
        let (mut data, mut regions) = (Vec::new(), Vec::new());
        for (slot, &pages) in (1..).zip(data_pages) {
            let memory = Anonymous::new(index(pages) * PAGE_SIZE)?;
            let run = PageRun { first, pages };
            regions.push(Region::new(SlotId(slot), run, memory.as_mut_ptr()));
            data.push(memory);
            first = run.end();
        }
        // SAFETY: the mappings live as long as this VM, and are only accessed through pointers.
        let memory = unsafe { GuestMemory::new(regions) }.map_err(io::Error::other)?;
        let vm = Self { fd, cpuid, memory, mappings: Arc::new(Mappings { control, data }) };
        vm.set_slot(slot_of(0, PageIndex(0), &vm.mappings.control))?;
        for (region, memory) in vm.memory.regions().iter().zip(&vm.mappings.data) {
            vm.set_slot(slot_of(region.slot.0, region.pages.first, memory))?;
        }
        Ok(vm)
    }

    fn set_slot(&self, slot: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the mapping belongs to this VM and outlives its descriptor; or the slot has no size, and goes.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(kvm_error)
    }

    /// The VM's descriptor, for a tracker.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The data slots.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Deletes a data slot from KVM and creates it again at `first`, with the same memory.
    ///
    /// # Errors
    ///
    /// No such slot, or what KVM refused.
    pub fn move_slot(&self, slot: SlotId, first: PageIndex) -> io::Result<GuestMemory> {
        let memory = index(u64::from(slot.0)).checked_sub(1).and_then(|at| self.mappings.data.get(at));
        let memory = memory.ok_or_else(|| invalid("no such data slot"))?;
        let there = slot_of(slot.0, first, memory);
        self.set_slot(kvm_userspace_memory_region { memory_size: 0, ..there })?;
        self.set_slot(there)?;
        let pages = PageRun { first, pages: (memory.len() / PAGE_SIZE) as u64 };
        // SAFETY: as in `new`.
        unsafe { GuestMemory::new(vec![Region::new(slot, pages, memory.as_mut_ptr())]) }
            .map_err(io::Error::other)
    }

    /// A new vCPU, to be attached to a tracker and then given work.
    ///
    /// # Errors
    ///
    /// What KVM refused, or more than [`MAX_VCPUS`].
    pub fn create_vcpu(&self, number: usize, privilege: Privilege) -> io::Result<BareVcpu> {
        if number >= MAX_VCPUS {
            return Err(invalid("a bare VM has 16 vCPUs at most"));
        }
        let fd = self.fd.create_vcpu(number as u64).map_err(kvm_error)?;
        // Without it, a guest has 36 bits of physical address.
        fd.set_cpuid2(&self.cpuid).map_err(kvm_error)?;
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
        let mut sregs = fd.get_sregs().map_err(kvm_error)?;
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PML4, 0x620, 0xd01);
        fd.set_sregs(&sregs).map_err(kvm_error)?;
        Ok(BareVcpu { fd, number, mappings: Arc::clone(&self.mappings) })
    }

    fn mailbox(&self, number: usize) -> &Mailbox {
        assert!(number < MAX_VCPUS);
        let at = self.mappings.control.as_mut_ptr().wrapping_add(index(MAILBOXES) + number * PAGE_SIZE);
        // SAFETY:
        // * Inside the control mapping, which lives as long as `self`, page-aligned and initialised.
        // * Only atomic access, by us and, in single aligned instructions, by the guest.
        unsafe { &*at.cast::<Mailbox>() }
    }

    /// Passes that vCPU `number` has finished since it was created.
    pub fn passes(&self, number: usize) -> u64 {
        self.mailbox(number).passes.load(Ordering::Relaxed)
    }

    /// The longest time between two writes of a clocked loop, in ticks of the guest's clock.
    pub fn longest_gap_ticks(&self, number: usize) -> u64 {
        self.mailbox(number).longest_gap_ticks.load(Ordering::Relaxed)
    }

    /// Forgets the longest gap so far.
    pub fn restart_longest_gap(&self, number: usize) {
        self.mailbox(number).longest_gap_ticks.store(0, Ordering::Relaxed);
    }

    /// Ends the loop of vCPU `number` with its current pass.
    pub fn stop(&self, number: usize) {
        self.mailbox(number).stop.store(1, Ordering::Relaxed);
    }

    /// Lets it loop when it is run again.
    pub fn unstop(&self, number: usize) {
        self.mailbox(number).stop.store(0, Ordering::Relaxed);
    }

    /// The first word of a page of data, as the guest wrote it; `None` if the page is no data.
    pub fn word(&self, page: PageIndex) -> Option<u64> {
        let run = self.memory.host_runs(PageRun { first: page, pages: 1 }).ok()?.next()?;
        // SAFETY: a page of a live mapping, aligned; the guest writes it meanwhile, hence atomic.
        Some(unsafe { AtomicU64::from_ptr(run.host.cast()) }.load(Ordering::Relaxed))
    }
}

/// Page tables that map the first `gib` GiB to themselves, for user and supervisor.
fn map_to_themselves(control: &Anonymous, gib: u64) {
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    put(control, PML4, &(PDPT | PRESENT_WRITABLE_USER).to_le_bytes());
    for directory in 0..gib {
        let table = PAGE_DIRECTORIES + directory * 4096;
        put(control, PDPT + directory * 8, &(table | PRESENT_WRITABLE_USER).to_le_bytes());
        for entry in 0..512 {
            let address = (directory * 512 + entry) << 21;
            put(control, table + entry * 8, &(address | LARGE | PRESENT_WRITABLE_USER).to_le_bytes());
        }
    }
}

/// A vCPU.
#[derive(Debug)]
pub struct BareVcpu {
    // Dropped first: it keeps the VM's slots alive.
    fd: VcpuFd,
    number: usize,
    mappings: Arc<Mappings>,
}

impl BareVcpu {
    /// The vCPU's descriptor, for a tracker.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Frequency of the guest's clock in kHz; 0 if KVM does not say.
    pub fn tsc_khz(&self) -> u32 {
        self.fd.get_tsc_khz().unwrap_or(0)
    }

    /// What the guest does from the next run on; each write stores `value`, which loops count up every pass.
    ///
    /// # Errors
    ///
    /// What KVM refused, or a list that is empty or too long.
    pub fn set_work(&mut self, work: &Work, value: u64) -> io::Result<()> {
        let mut regs = self.fd.get_regs().map_err(kvm_error)?;
        (regs.rflags, regs.rax, regs.rbx) = (0x3002, value, value);
        regs.rbp = MAILBOXES + (self.number * PAGE_SIZE) as u64;
        let pages = match work {
            Work::List(pages) => {
                if pages.is_empty() || pages.len() > LIST_PAGES_MAX {
                    return Err(invalid("a list has 1 to 131072 pages"));
                }
                let list = LISTS + self.number as u64 * LIST_BYTES;
                for (at, page) in (list..).step_by(8).zip(pages) {
                    put(&self.mappings.control, at, &page.address().0.to_le_bytes());
                }
                regs.rip = CODE_LIST;
                regs.rsi = list;
                regs.rcx = pages.len() as u64;
                return self.fd.set_regs(&regs).map_err(kvm_error);
            }
            Work::Loop(pages) => {
                regs.rip = CODE_LOOP;
                pages
            }
            Work::ClockedLoop(pages) => {
                regs.rip = CODE_CLOCKED;
                pages
            }
        };
        regs.r8 = pages.first.address().0;
        (regs.r9, regs.r10, regs.r11) = (pages.pages, pages.stride * PAGE_SIZE as u64, pages.passes);
        regs.r12 = 0;
        self.fd.set_regs(&regs).map_err(kvm_error)
    }

    /// One `KVM_RUN`.
    ///
    /// # Errors
    ///
    /// What KVM refused, or an exit that this guest has no reason for.
    pub fn run(&mut self) -> io::Result<Exit> {
        match self.fd.run().map(drop) {
            Err(error) if error.errno() == libc::EINTR => return Ok(Exit::Kicked),
            outcome => outcome.map_err(kvm_error)?,
        }
        match self.fd.get_kvm_run().exit_reason {
            KVM_EXIT_IO => Ok(Exit::Done),
            KVM_EXIT_DIRTY_RING_FULL => Ok(Exit::RingFull),
            reason => Err(io::Error::other(format!("the guest left with exit reason {reason}"))),
        }
    }

    /// Runs until the work is done, or another thread sets `stop` and then kicks.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), or that the ring could not be recycled.
    pub fn run_until(&mut self, tracked: Option<&VcpuHandle>, stop: &AtomicBool) -> io::Result<()> {
        // Acquire: what the stopper did before is seen after.
        while !stop.load(Ordering::Acquire) {
            if tracked.is_some_and(|handle| handle.before_run() == BeforeRun::Interrupted) {
                continue;
            }
            match (self.run()?, tracked) {
                (Exit::Done, _) => break,
                (Exit::Kicked, _) => {}
                (Exit::RingFull, Some(handle)) => handle.ring_full().map_err(io::Error::other)?,
                (Exit::RingFull, None) => return Err(io::Error::other("a full ring that nobody recycles")),
            }
        }
        Ok(())
    }

    /// Runs until the work is done.
    ///
    /// # Errors
    ///
    /// As [`run_until`](Self::run_until).
    pub fn run_to_end(&mut self, tracked: Option<&VcpuHandle>) -> io::Result<()> {
        self.run_until(tracked, &AtomicBool::new(false))
    }
}

const _: () = {
    assert!(offset_of!(Mailbox, longest_gap_ticks) == 8 && offset_of!(Mailbox, stop) == 16);
    assert!(MAILBOXES + (MAX_VCPUS * PAGE_SIZE) as u64 <= PML4);
    assert!(PAGE_DIRECTORIES + 512 * 4096 <= LISTS);
    assert!(LISTS + MAX_VCPUS as u64 * LIST_BYTES <= CONTROL_BYTES as u64);
    assert!(CONTROL_BYTES as u64 <= DATA.0 * PAGE_SIZE as u64);
    assert!(LIST_PAGES_MAX as u64 * 8 == LIST_BYTES);
};
