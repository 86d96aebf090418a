//! QEMU with dirty rings, and its own `calc-dirty-rate` in dirty-ring mode, against what the profiler counts.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::bare::kvm;
use common::profiler;
use ringferry_bpf::{Options, Profiler, Session, SessionOptions, Source, VcpuCounts};
use ringferry_testvm::IMAGE;
use serde_json::{Value, json};

/// QEMU's firmware takes most of it where KVM emulates it.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const VCPUS: u32 = 2;
/// As fast as QEMU recycles the rings.
const WORK: &str = "vcpus=2 stats=on vcpu0=pattern:sequential,ws:96MiB vcpu1=pattern:hot-cold,ws:32MiB";
const CALC_TIME_S: u64 = 5;

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
    /// A guest at work, or `None` where there is no QEMU: noted as skipped.
    fn start(name: &str, accelerator: &str) -> Option<Self> {
        let directory =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
        fs::write(path("guest"), IMAGE).unwrap();
        let started = Command::new("qemu-system-x86_64")
            .args(["-name", &format!("guest={name},debug-threads=on"), "-accel", accelerator, "-m", "256"])
            .args(["-smp", &VCPUS.to_string(), "-kernel", &path("guest"), "-append", WORK])
            .args(["-nodefaults", "-display", "none", "-serial", &format!("file:{}", path("serial"))])
            .args(["-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                ringferry_testvm::skip(&format!(
                    "qemu-system-x86_64: {error} (apt-get install qemu-system-x86)"
                ));
                return None;
            }
        };
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut qemu = Self { child, input, output, directory };
        qemu.execute(&json!({"execute": "qmp_capabilities"}));
        let deadline = Instant::now() + BOOT_LIMIT;
        // A line of statistics each second: two of them, and all vCPUs are at work.
        while fs::read_to_string(qemu.directory.join("serial")).unwrap().matches("stats ms=").count() < 2 {
            assert!(Instant::now() < deadline, "the guest does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(qemu)
    }

    fn execute(&mut self, command: &Value) -> Value {
        writeln!(self.input, "{command}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "QEMU ended");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{answer}");
            if let Some(result) = answer.get("return") {
                return result.clone();
            }
        }
    }

    /// MiB per second of each vCPU, as QEMU says.
    fn calc_dirty_rate(&mut self) -> Vec<u64> {
        let arguments = json!({"calc-time": CALC_TIME_S, "mode": "dirty-ring"});
        self.execute(&json!({"execute": "calc-dirty-rate", "arguments": arguments}));
        let deadline = Instant::now() + Duration::from_secs(CALC_TIME_S * 4);
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let answer = self.execute(&json!({"execute": "query-dirty-rate"}));
            if answer["status"] == "measured" {
                let vcpus = answer["vcpu-dirty-rate"].as_array().unwrap();
                return vcpus.iter().map(|vcpu| vcpu["dirty-rate"].as_u64().unwrap()).collect();
            }
            assert!(Instant::now() < deadline, "{answer}");
        }
    }
}

fn of_qemu(profiler: &mut Profiler, qemu: &Qemu) -> Vec<VcpuCounts> {
    let mut counts = profiler.counts().unwrap();
    counts.retain(|vcpu| vcpu.pid == qemu.child.id() && !vcpu.ended);
    counts
}

#[test]
fn what_qemu_says_of_its_own_rings_is_what_the_profiler_counts_within_qemus_rounding() {
    // Whether it is possible here at all, or noted as skipped.
    if kvm().is_none() || profiler(Options::default()).is_none() {
        return;
    }
    let Some(mut qemu) = Qemu::start("calc-dirty-rate", "kvm,dirty-ring-size=4096") else { return };
    let mut profiler =
        Profiler::attach_with(&Options { only_pid: Some(qemu.child.id()), ..Options::default() }).unwrap();
    assert!(of_qemu(&mut profiler, &qemu).is_empty(), "nothing logs before it is asked to");
    let said = qemu.calc_dirty_rate();
    let counts = of_qemu(&mut profiler, &qemu);
    assert_eq!((said.len(), counts.len()), (VCPUS as usize, VCPUS as usize));
    for (said, counted) in said.into_iter().zip(counts) {
        // QEMU divides whole MiB by its measured time, and drops the rest twice: up to 1 MiB/s and 1 MiB less. Its
        // time may be longer than asked for, and a moment before and after it is logged as well: here up to 5 %.
        let mib = counted.pushes as f64 / 256.0;
        let rate = mib / CALC_TIME_S as f64;
        eprintln!(
            "vCPU {}: QEMU {said} MiB/s, counted {} pushes, {rate:.2} MiB/s",
            counted.vcpu, counted.pushes
        );
        let low = rate * 0.95 - 1.0 - 1.0 / CALC_TIME_S as f64;
        assert!((low..=rate * 1.0001).contains(&(said as f64)), "{said} and {rate}");
        assert_eq!((counted.overflows, counted.overwritten), (0, 0));
    }
}

#[test]
fn a_qemu_guest_has_its_name_its_threads_and_the_source_of_its_mode() {
    if kvm().is_none() || profiler(Options::default()).is_none() {
        return;
    }
    let Some(mut qemu) = Qemu::start("named", "kvm") else { return };
    let mut session =
        Session::start(SessionOptions { pid: Some(qemu.child.id()), ..Default::default() }).unwrap();
    let look = session.look().unwrap();
    assert_eq!(look.rows.len(), VCPUS as usize);
    for row in &look.rows {
        assert_eq!((row.vm.as_str(), row.source, row.ring), ("named", Source::Unobservable, None));
        let name = fs::read_to_string(format!("/proc/{}/task/{}/comm", row.pid, row.tid.unwrap())).unwrap();
        assert_eq!(name.trim(), format!("CPU {}/KVM", row.vcpu));
    }
    // Migration to nowhere in particular switches the bitmap on for all of memory. Not too slowly: pages are protected, and
    // so become dirty again, at the start of each round.
    let uri = json!({"uri": "exec:cat > /dev/null"});
    let limit = json!({"max-bandwidth": 100 << 20, "downtime-limit": 1});
    qemu.execute(&json!({"execute": "migrate-set-parameters", "arguments": limit}));
    qemu.execute(&json!({"execute": "migrate", "arguments": uri}));
    let deadline = Instant::now() + Duration::from_secs(30);
    let row = loop {
        std::thread::sleep(Duration::from_millis(500));
        let look = session.look().unwrap();
        if let Some(row) = look.rows.iter().find(|row| row.dirty_pages > Some(0)) {
            break row.clone();
        }
        assert!(Instant::now() < deadline, "{:?}", look.rows);
    };
    assert!(matches!(row.source, Source::SpteFastFault | Source::PmlFull), "{row:?}");
}
