//! The same image boots in QEMU: `qemu-system-x86_64 -accel kvm -kernel IMAGE`, with one vCPU and with two.
//!
//! QEMU's guest RAM is a file that the test maps too, so the guest is looked at, changed and checked just as in the
//! test VMM.
#![expect(unsafe_code, reason = "the RAM of QEMU's guest is shared memory, reachable only by pointer")]

#[path = "../../../tests/qemu/mod.rs"]
mod qemu;

use std::fs::OpenOptions;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use qemu::{LIMIT, Qemu};
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use ringferry_testvm::Guest;
use ringferry_testvm::check::check;
use ringferry_testvm::workload::command_line::{Pattern, Work};

const MEMORY_BYTES: u64 = 128 << 20;
const EXIT_DEVICE: &str = "isa-debug-exit,iobase=0xf4,iosize=4";

/// Starts QEMU on the guest image, or says why it cannot run here.
fn start(name: &str, vcpus: usize, append: &str) -> Option<Qemu> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        ringferry_testvm::skip(&format!("/dev/kvm cannot be opened: {error}"));
        return None;
    }
    let ram = format!("memory-backend-file,id=ram,size={MEMORY_BYTES},share=on,mem-path=ram");
    let (memory, vcpus) = (format!("{}M", MEMORY_BYTES >> 20), vcpus.to_string());
    let machine = ["-accel", "kvm", "-machine", "pc,memory-backend=ram", "-object", &ram, "-m", &memory];
    let rest = ["-smp", &vcpus, "-no-reboot", "-device", EXIT_DEVICE];
    Qemu::start(name, append, &[&machine[..], &rest].concat())
}

/// Its RAM, which on a PC of this size lies in the file as it lies in the guest.
fn memory(qemu: &Qemu) -> GuestMemory {
    let file = OpenOptions::new().read(true).write(true).open(qemu.directory.join("ram"));
    let mapping = Arc::new(MmapRaw::map_raw(&file.expect("QEMU's RAM")).expect("it can be mapped"));
    let pages = PageRun { first: PageIndex(0), pages: MEMORY_BYTES / PAGE_SIZE as u64 };
    let region = Region::new(SlotId(0), pages, mapping.as_mut_ptr());
    // SAFETY: the mapping has that length, is readable, writable and page-aligned, is kept by the value, and
    // nobody makes references into it.
    unsafe { GuestMemory::new(vec![region]) }.expect("one region").kept_by(mapping)
}

fn boots_works_and_proves_it(name: &str, vcpus: usize) {
    let append =
        format!("vcpus={vcpus} stats=on fill=4MiB each=pattern:random,ws:4MiB,bytes:256,content:text");
    let Some(mut qemu) = start(name, vcpus, &append) else { return };
    let memory = memory(&qemu);
    let mut guest = Guest::new(&memory, None).expect("RAM holds the mailbox");
    qemu.wait_for("guest at work", |_| guest.wait_until_working(Duration::ZERO).is_ok());
    assert_eq!(guest.vcpus().expect("it works"), vcpus);
    let zipf = Work { pattern: Pattern::Zipf, ..guest.work(0).expect("it works") };
    guest.set_work(0, &zipf).expect("as large as before");
    let steps = |guest: &Guest, vcpu| guest.stats(vcpu).expect("it works").steps();
    for _ in 0..3 {
        let before: Vec<u64> = (0..vcpus).map(|vcpu| steps(&guest, vcpu)).collect();
        qemu.wait_for("progress", |_| (0..vcpus).all(|vcpu| steps(&guest, vcpu) > before[vcpu] + 10_000));
        qemu.execute(r#"{"execute":"stop"}"#);
        let report = check(&memory).unwrap_or_else(|error| panic!("{error}\n{}", qemu.serial()));
        assert_eq!(report.vcpus.len(), vcpus);
        assert!(report.vcpus.iter().all(|vcpu| vcpu.page_writes > 0 && vcpu.filled_pages > 0), "{report:?}");
        qemu.execute(r#"{"execute":"cont"}"#);
    }
    qemu.wait_for("statistics on the serial port", |qemu| qemu.serial().contains("stats ms="));
}

#[test]
fn qemu_boots_the_guest_with_one_vcpu() {
    boots_works_and_proves_it("one", 1);
}

#[test]
fn qemu_boots_the_guest_with_two_vcpus() {
    boots_works_and_proves_it("two", 2);
}

#[test]
fn a_guest_that_cannot_run_ends_qemu_with_its_reason_on_the_serial_port() {
    let Some(mut qemu) = start("wrong", 1, "each=ws:1TiB") else { return };
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = qemu.child.try_wait().expect("our own child") {
            break status;
        }
        assert!(Instant::now() < deadline, "QEMU still runs\n{}", qemu.serial());
        std::thread::sleep(Duration::from_millis(20));
    };
    // isa-debug-exit makes 2n + 1 of the guest's code.
    assert_eq!(status.code(), Some(3), "{}", qemu.serial());
    assert!(qemu.serial().contains("`1TiB`: expected a size"), "{}", qemu.serial());
}
