//! The same image boots in QEMU: `qemu-system-x86_64 -accel kvm -kernel IMAGE`, with one vCPU and with two.
//!
//! QEMU's guest RAM is a file that the test maps too, so the guest is looked at, changed and checked just as in the
//! test VMM.
#![expect(unsafe_code, reason = "the RAM of QEMU's guest is shared memory, reachable only by pointer")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use ringferry::{GuestMemory, PAGE_SIZE, PageIndex, PageRun, Region, SlotId};
use ringferry_testvm::check::check;
use ringferry_testvm::workload::command_line::{Pattern, Work};
use ringferry_testvm::{Guest, IMAGE};

/// QEMU's firmware takes most of it where KVM emulates it.
const LIMIT: Duration = Duration::from_secs(120);
const MEMORY_BYTES: u64 = 128 << 20;
const EXIT_DEVICE: &str = "isa-debug-exit,iobase=0xf4,iosize=4";

/// A QEMU of our own, and what it needs; both end with the value.
struct Qemu {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    directory: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Qemu {
    /// Starts QEMU on the guest image, or says why it cannot run here.
    fn start(name: &str, vcpus: usize, append: &str) -> Option<Self> {
        if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            ringferry_testvm::skip(&format!("/dev/kvm cannot be opened: {error}"));
            return None;
        }
        let directory =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("the target directory can be written");
        let path = |name: &str| directory.join(name).to_str().expect("the path is UTF-8").to_owned();
        fs::write(path("guest"), IMAGE).expect("the image can be written");
        File::create(path("ram")).and_then(|file| file.set_len(MEMORY_BYTES)).expect("RAM can be made");
        let megabytes = MEMORY_BYTES >> 20;
        let started = Command::new("qemu-system-x86_64")
            .args(["-accel", "kvm", "-machine", "pc,memory-backend=ram", "-smp", &vcpus.to_string()])
            .args([
                "-object",
                &format!("memory-backend-file,id=ram,size={megabytes}M,share=on,mem-path={}", path("ram")),
            ])
            .args(["-m", &megabytes.to_string(), "-kernel", &path("guest"), "-append", append])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-device", EXIT_DEVICE])
            .args(["-serial", &format!("file:{}", path("serial")), "-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                ringferry_testvm::skip(&format!(
                    "qemu-system-x86_64 cannot be started: {error} (apt-get install qemu-system-x86)"
                ));
                return None;
            }
        };
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut qemu = Self { child, input, output, directory };
        qemu.execute("qmp_capabilities");
        Some(qemu)
    }

    /// Its RAM, which on a PC of this size lies in the file as it lies in the guest.
    fn memory(&self) -> GuestMemory {
        let file = OpenOptions::new().read(true).write(true).open(self.directory.join("ram"));
        let mapping = Arc::new(MmapRaw::map_raw(&file.expect("QEMU's RAM")).expect("it can be mapped"));
        let pages = PageRun { first: PageIndex(0), pages: MEMORY_BYTES / PAGE_SIZE as u64 };
        let region = Region { slot: SlotId(0), pages, host: mapping.as_mut_ptr() };
        // SAFETY: the mapping has that length, is readable, writable and page-aligned, is kept by the value, and
        // nobody makes references into it.
        unsafe { GuestMemory::new(vec![region]) }.expect("one region").kept_by(mapping)
    }

    /// Has QEMU do something, and waits until it has. The line is bounded by the size of QEMU's answers.
    fn execute(&mut self, command: &str) {
        writeln!(self.input, r#"{{"execute":"{command}"}}"#).expect("QEMU reads its commands");
        loop {
            let mut line = String::new();
            let bytes = self.output.read_line(&mut line).expect("QEMU's answer is text");
            assert!(bytes > 0, "QEMU ended: {:?}\n{}", self.child.try_wait(), self.serial());
            assert!(!line.contains("\"error\""), "{line}");
            if line.contains("\"return\"") {
                return;
            }
        }
    }

    fn serial(&self) -> String {
        fs::read_to_string(self.directory.join("serial")).unwrap_or_default()
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done(self) {
            let ended = self.child.try_wait().expect("our own child");
            assert!(ended.is_none(), "QEMU ended with {ended:?} before {what}\n{}", self.serial());
            assert!(Instant::now() < deadline, "no {what} in {LIMIT:?}\n{}", self.serial());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn boots_works_and_proves_it(name: &str, vcpus: usize) {
    let append =
        format!("vcpus={vcpus} stats=on fill=4MiB each=pattern:random,ws:4MiB,bytes:256,content:text");
    let Some(mut qemu) = Qemu::start(name, vcpus, &append) else { return };
    let memory = qemu.memory();
    let mut guest = Guest::new(&memory, None).expect("RAM holds the mailbox");
    qemu.wait_for("guest at work", |_| guest.wait_until_working(Duration::ZERO).is_ok());
    assert_eq!(guest.vcpus().expect("it works"), vcpus);
    let zipf = Work { pattern: Pattern::Zipf, ..guest.work(0).expect("it works") };
    guest.set_work(0, &zipf).expect("as large as before");
    let steps = |guest: &Guest, vcpu| guest.stats(vcpu).expect("it works").steps();
    for _ in 0..3 {
        let before: Vec<u64> = (0..vcpus).map(|vcpu| steps(&guest, vcpu)).collect();
        qemu.wait_for("progress", |_| (0..vcpus).all(|vcpu| steps(&guest, vcpu) > before[vcpu] + 10_000));
        qemu.execute("stop");
        let report = check(&memory).unwrap_or_else(|error| panic!("{error}\n{}", qemu.serial()));
        assert_eq!(report.vcpus.len(), vcpus);
        assert!(report.vcpus.iter().all(|vcpu| vcpu.page_writes > 0 && vcpu.filled_pages > 0), "{report:?}");
        qemu.execute("cont");
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
    let Some(mut qemu) = Qemu::start("wrong", 1, "each=ws:1TiB") else { return };
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
