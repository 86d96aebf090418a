//! What the test guest does per second in the test VMM, by pattern, bytes per page and working set.
//!
//! `cargo bench -p ringferry-testvm --bench guest [PATTERN]`

use std::time::{Duration, Instant};

use ringferry_testvm::workload::command_line::{Content, Pattern, Work};
use ringferry_testvm::{Boot, Config, Guest, TestVm, VcpuStats, guest_image};

const WINDOW: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    println!(
        "{:>5} {:12} {:>7} {:>5} {:>8} {:>9} {:>16} {:>12} {:>9}",
        "vcpus", "pattern", "ws MiB", "bytes", "content", "pace", "steps per s", "longest gap", "emulated"
    );
    for vcpus in [1, 2] {
        let append = format!("vcpus={vcpus} each=ws:1MiB");
        let boot = Boot::Image { image: guest_image(), append };
        let mut vm = TestVm::new(Config { vcpus, memory_bytes: 512 << 20, boot, ..Config::default() })?;
        let mut guest = Guest::new(vm.memory(), vm.tracker())?;
        vm.start()?;
        guest.wait_until_working(Duration::from_secs(20))?;
        for (pattern, name) in Pattern::ALL {
            if only.as_ref().is_some_and(|only| only != name) {
                continue;
            }
            for (mib, bytes_per_page, content, pace_per_s) in [
                (30, 16, Content::Counter, 0),
                (60, 16, Content::Counter, 0),
                (60, 4096, Content::Counter, 0),
                (60, 4096, Content::Random, 0),
                (60, 4096, Content::Text, 0),
                (60, 16, Content::Counter, 12_800),
            ] {
                if !pattern.writes() && (bytes_per_page > 16 || mib != 60) {
                    continue;
                }
                let work = Work {
                    pattern,
                    content,
                    working_set_pages: mib << 8,
                    bytes_per_page,
                    pace_per_s,
                    lock: false,
                };
                for vcpu in 0..vcpus {
                    guest.set_work(vcpu, &work)?;
                }
                // Until every page has been touched once.
                std::thread::sleep(WINDOW / 2);
                guest.restart_longest_gap()?;
                let emulated = |vm: &TestVm| -> Result<u64, Box<dyn std::error::Error>> {
                    Ok(vm.kernel_counters(0)?.get("insn_emulation").copied().unwrap_or(0))
                };
                let before = (steps(&guest, vcpus)?, emulated(&vm)?, Instant::now());
                std::thread::sleep(WINDOW);
                let (after, seconds) = (steps(&guest, vcpus)?, before.2.elapsed().as_secs_f64());
                let stats: Vec<VcpuStats> =
                    (0..vcpus).map(|vcpu| guest.stats(vcpu)).collect::<Result<_, _>>()?;
                let gap = stats.iter().map(|stats| stats.longest_gap).max().unwrap_or_default();
                println!(
                    "{vcpus:>5} {name:12} {mib:>7} {bytes_per_page:>5} {content:>8} {pace_per_s:>9} {:>16.0} {gap:>12.1?} {:>9}",
                    (after - before.0) as f64 / seconds,
                    emulated(&vm)? - before.1,
                    content = format!("{content:?}"),
                );
            }
        }
    }
    Ok(())
}

fn steps(guest: &Guest, vcpus: usize) -> Result<u64, Box<dyn std::error::Error>> {
    let mut sum = 0;
    for vcpu in 0..vcpus {
        sum += guest.stats(vcpu)?.steps();
    }
    Ok(sum)
}
