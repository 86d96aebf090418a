//! A VMM of two vCPUs on kvm-ioctls and vm-memory that knows its dirty pages: what it takes to link Ringferry.
//!
//! The five places that Ringferry touches are numbered; everything else is what any VMM does. The guest is a few
//! bytes of user-mode code per vCPU that write one word to every page of a range, for ever.
#![expect(unsafe_code, reason = "KVM takes guest RAM by host address")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use ringferry::kvm::RingSize;
use ringferry::track::external::RegionLog;
use ringferry::track::{BeforeRun, DirtyTracker, KVM_EXIT_DIRTY_RING_FULL, Observed, VcpuHandle};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageSet, SlotId};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

type GuestRam = vm_memory::GuestMemoryMmap<RegionLog>;

const RAM_BYTES: usize = 64 << 20;
const VCPUS: u64 = 2;
/// Each vCPU writes this many pages, from its own address on.
const PAGES_PER_VCPU: u64 = 1024;
const CODE: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x10_000;

fn working_set(vcpu: u64) -> u64 {
    (16 << 20) + vcpu * (16 << 20)
}

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new().map_err(|error| format!("opening /dev/kvm: {error}"))?;
    let vm = kvm.create_vm()?;

    // 1. After the VM, before the first vCPU: rings for every vCPU to come.
    let tracker = DirtyTracker::enable(&vm, RingSize::MAX)?;

    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)])?);
    set_slots(&vm, &ram)?;

    // 2. Each memory slot, and what the VMM itself writes through vm-memory.
    tracker.add_memory(&GuestMemory::from_vm_memory_0_18(Arc::clone(&ram), slot_of)?)?;
    for region in ram.iter() {
        let first = PageIndex(region.start_addr().0 / PAGE_SIZE as u64);
        tracker.add_external(Box::new(MmapRegion::bitmap(region).source(first)))?;
    }

    load_guest(&ram)?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for index in 0..VCPUS {
        let vcpu = vm.create_vcpu(index)?;
        enter_user_mode(&vcpu, index)?;
        // 3. Each vCPU, hot-plugged ones too: a handle for its thread.
        let tracked = tracker.attach_vcpu(usize::try_from(index)?, &vcpu)?;
        let stop = Arc::clone(&stop);
        threads.push(thread::spawn(move || run_vcpu(vcpu, &tracked, &stop)));
    }

    // 5. Whoever wants dirty pages has a session: a migration observes as often as it likes and harvests once a round. The VMM's
    // old dirty log is a session too, whoever else harvests meanwhile.
    let session = tracker.start()?;
    let dirty_log = tracker.start()?;
    thread::sleep(Duration::from_millis(200));
    if let Observed::PerVcpu { vcpus, others } = session.observe()? {
        println!("observed pages per vCPU: {vcpus:?}, of others: {others}");
    }
    ram.write_obj(1_u64, GuestAddress(0x8000))?; // a device model's write
    let mut dirty = PageSet::new(PageIndex((RAM_BYTES / PAGE_SIZE) as u64));
    session.harvest(&mut dirty)?;
    println!("harvested {} pages; the VMM's own write is in: {}", dirty.len(), dirty.contains(PageIndex(8)));
    for index in 0..VCPUS {
        let first = GuestAddress(working_set(index)).0 / PAGE_SIZE as u64;
        let all = (first..first + PAGES_PER_VCPU).all(|page| dirty.contains(PageIndex(page)));
        println!("vCPU {index}: every page of its working set is in: {all}");
    }
    stop.store(true, Ordering::Release);
    for thread in threads {
        thread.join().map_err(|_| "a vCPU's thread panicked")?.map_err(|error| error.to_string())?;
    }
    let runs = dirty_log.take_slot_runs(slot_of(0))?.map(|run| run.pages);
    println!("the dirty log, meanwhile: {} pages", runs.sum::<u64>());
    for vcpu in tracker.snapshot().vcpus {
        println!("vCPU {}: {} pages, {} ring-full exits", vcpu.index, vcpu.pages, vcpu.ring_full_exits);
    }
    Ok(())
}

/// A vCPU's thread. It takes no lock of the VMM's, and allocates nothing.
fn run_vcpu(
    mut vcpu: VcpuFd,
    tracked: &VcpuHandle,
    stop: &AtomicBool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    while !stop.load(Ordering::Acquire) {
        // 4. Around KVM_RUN: one relaxed load before, and an answer to exit reason 31 after.
        if tracked.before_run() == BeforeRun::Interrupted {
            continue;
        }
        // The guest comes back at the end of each pass, by a port write.
        let passed = matches!(vcpu.run()?, VcpuExit::IoOut(..));
        match vcpu.get_kvm_run().exit_reason {
            KVM_EXIT_DIRTY_RING_FULL => tracked.ring_full()?,
            _ if passed => {}
            reason => return Err(format!("unexpected exit reason {reason}").into()),
        }
    }
    Ok(())
}

/// The slot of region `index`.
fn slot_of(index: usize) -> SlotId {
    SlotId(u32::try_from(index).unwrap_or(u32::MAX))
}

/// A slot per region. The tracker switches `KVM_MEM_LOG_DIRTY_PAGES` on and off by itself.
fn set_slots(vm: &VmFd, ram: &GuestRam) -> Result<(), Box<dyn Error>> {
    for (index, region) in ram.iter().enumerate() {
        let memory = kvm_userspace_memory_region {
            slot: slot_of(index).0,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        // SAFETY: the mapping has this length, and `main` keeps it as long as the VM.
        unsafe { vm.set_user_memory_region(memory) }?;
    }
    Ok(())
}

/// The guest: page tables that map RAM to itself for user mode, and a loop.
fn load_guest(ram: &GuestRam) -> Result<(), Box<dyn Error>> {
    let code = [
        0x48, 0x89, 0xf7, // mov rdi, rsi
        0x48, 0x89, 0xd1, // mov rcx, rdx
        0x48, 0x89, 0x07, // mov [rdi], rax
        0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
        0x48, 0xff, 0xc9, // dec rcx
        0x75, 0xf1, // jnz to mov [rdi]
        0x48, 0xff, 0xc0, // inc rax
        0xe6, 0x10, // out 0x10, al
        0xeb, 0xe4, // jmp to the first line
    ];
    ram.write_slice(&code, GuestAddress(CODE))?;
    const USER: u64 = 7;
    ram.write_obj(PAGE_TABLES + 0x1000 + USER, GuestAddress(PAGE_TABLES))?;
    ram.write_obj(PAGE_TABLES + 0x2000 + USER, GuestAddress(PAGE_TABLES + 0x1000))?;
    for entry in 0..(RAM_BYTES as u64) >> 21 {
        let large = (entry << 21) | 0x80 | USER;
        ram.write_obj(large, GuestAddress(PAGE_TABLES + 0x2000 + entry * 8))?;
    }
    Ok(())
}

/// 64-bit user mode, which runs natively under every KVM.
fn enter_user_mode(vcpu: &VcpuFd, index: u64) -> Result<(), Box<dyn Error>> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 0x2b, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PAGE_TABLES, 0x620, 0xd01);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags, regs.rax) = (CODE, 0x3002, 1);
    (regs.rsi, regs.rdx) = (working_set(index), PAGES_PER_VCPU);
    Ok(vcpu.set_regs(&regs)?)
}
