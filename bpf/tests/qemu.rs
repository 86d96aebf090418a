//! QEMU with dirty rings, and its own `calc-dirty-rate` in dirty-ring mode, against what the profiler counts.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;
#[path = "../../tests/qemu/mod.rs"]
mod qemu;

use std::fs;
use std::time::{Duration, Instant};

use common::bare::kvm;
use common::profiler;
use qemu::Qemu;
use ringferry_bpf::{Options, Profiler, Session, SessionOptions, Source, VcpuCounts};
use serde_json::{Value, json};

const VCPUS: u32 = 2;
/// As fast as QEMU recycles the rings.
const WORK: &str = "vcpus=2 stats=on vcpu0=pattern:sequential,ws:96MiB vcpu1=pattern:hot-cold,ws:32MiB";
const CALC_TIME_S: u64 = 5;

/// A guest at work, or `None` where there is no QEMU: noted as skipped.
fn start(name: &str, accelerator: &str) -> Option<Qemu> {
    let (named, vcpus) = (format!("guest={name},debug-threads=on"), VCPUS.to_string());
    let args = ["-name", &named, "-accel", accelerator, "-m", "256", "-smp", &vcpus];
    let mut qemu = Qemu::start(name, WORK, &args)?;
    // A line of statistics each second: two of them, and all vCPUs are at work.
    qemu.wait_for("guest at work", |qemu| qemu.serial().matches("stats ms=").count() >= 2);
    Some(qemu)
}

fn execute(qemu: &mut Qemu, command: &Value) -> Value {
    let mut answer: Value = serde_json::from_str(&qemu.execute(&command.to_string())).unwrap();
    answer["return"].take()
}

/// MiB per second of each vCPU, as QEMU says.
fn calc_dirty_rate(qemu: &mut Qemu) -> Vec<u64> {
    let arguments = json!({"calc-time": CALC_TIME_S, "mode": "dirty-ring"});
    execute(qemu, &json!({"execute": "calc-dirty-rate", "arguments": arguments}));
    let deadline = Instant::now() + Duration::from_secs(CALC_TIME_S * 4);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let answer = execute(qemu, &json!({"execute": "query-dirty-rate"}));
        if answer["status"] == "measured" {
            let vcpus = answer["vcpu-dirty-rate"].as_array().unwrap();
            return vcpus.iter().map(|vcpu| vcpu["dirty-rate"].as_u64().unwrap()).collect();
        }
        assert!(Instant::now() < deadline, "{answer}");
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
    let Some(mut qemu) = start("calc-dirty-rate", "kvm,dirty-ring-size=4096") else { return };
    let mut profiler =
        Profiler::attach_with(&Options { only_pid: Some(qemu.child.id()), ..Options::default() }).unwrap();
    assert!(of_qemu(&mut profiler, &qemu).is_empty(), "nothing logs before it is asked to");
    let said = calc_dirty_rate(&mut qemu);
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
    let Some(mut qemu) = start("named", "kvm") else { return };
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
    execute(&mut qemu, &json!({"execute": "migrate-set-parameters", "arguments": limit}));
    execute(&mut qemu, &json!({"execute": "migrate", "arguments": uri}));
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
