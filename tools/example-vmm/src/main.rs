//! A VMM of two vCPUs on kvm-ioctls and vm-memory that knows its dirty pages: what it takes to link Ringferry.
//!
//! The five places that Ringferry touches are numbered; everything else is what any VMM does. The guest is a few
//! bytes of user-mode code per vCPU that write one word to every page of a range, for ever.
#![expect(unsafe_code, reason = "KVM takes guest RAM by host address, and so does the tracker")]

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
use ringferry::{PAGE_SIZE, PageIndex, PageRun, PageSet, Region, SlotId};
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
    tracker.add_memory(&layout(&ram)?)?;
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

    // 5. The migration thread: start, observe as often as it likes, harvest once a round.
    let session = tracker.start()?;
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
    session.stop()?;
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

/// RAM as the tracker knows it: numbers and addresses, none of vm-memory's types.
fn layout(ram: &Arc<GuestRam>) -> Result<ringferry::GuestMemory, Box<dyn Error>> {
    let regions = ram.iter().zip(0..).map(|(region, slot)| {
        let pages = region.len() / PAGE_SIZE as u64;
        Region {
            slot: SlotId(slot),
            pages: PageRun { first: PageIndex(region.start_addr().0 / PAGE_SIZE as u64), pages },
            host: region.as_ptr(),
        }
    });
    // SAFETY:
    // * vm-memory maps each region readable and writable, and the value keeps it mapped by `kept_by`;
    // * vm-memory hands out volatile access only, never references.
    let memory = unsafe { ringferry::GuestMemory::new(regions.collect()) }?;
    Ok(memory.kept_by(Arc::clone(ram) as _))
}

/// A slot per region. The tracker switches `KVM_MEM_LOG_DIRTY_PAGES` on and off by itself.
fn set_slots(vm: &VmFd, ram: &GuestRam) -> Result<(), Box<dyn Error>> {
    for (region, slot) in ram.iter().zip(0..) {
        let memory = kvm_userspace_memory_region {
            slot,
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
