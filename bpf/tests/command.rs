//! The binary: what it prints, how it ends, and what it says where it cannot work.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::bare::{BareVm, DATA, Pages, Privilege, Work, install_kick_handler, kvm};
use common::{Writer, profiler};
use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::{Winsize, openpty};
use ringferry::PageIndex;
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry_bpf::Options;
use serde_json::Value;

const PROFILE: &str = env!("CARGO_BIN_EXE_ringferry-profile");
/// This test binary, run again with this variable set, is a VMM of its own.
const BE_A_VMM: &str = "RINGFERRY_TEST_BE_A_VMM";

fn profile(arguments: &[&str]) -> Output {
    Command::new(PROFILE).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn possible() -> bool {
    profiler(Options::default()).is_some() && kvm().is_some()
}

/// Not a test of its own: the process that `vmm` starts. It writes until its standard input ends.
#[test]
fn a_vmm_for_the_tests_of_the_command() {
    if std::env::var_os(BE_A_VMM).is_none() {
        return;
    }
    install_kick_handler();
    let vm = BareVm::new(&kvm().unwrap(), &[8192]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::default()).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let writers: Vec<Writer> = (0..2_usize)
        .map(|index| {
            let vcpu = vm.create_vcpu(index, Privilege::User).unwrap();
            let handle = tracker.attach_vcpu(index, vcpu.fd()).unwrap();
            let first = PageIndex(DATA.0 + index as u64 * 4096);
            Writer::start(
                vcpu,
                handle,
                Work::Loop(Pages { first, pages: 20 + 1980 * index as u64, stride: 1, passes: 1 }),
            )
        })
        .collect();
    let session = tracker.start().unwrap();
    println!("\nrunning");
    let end = std::thread::spawn(|| std::io::stdin().read_to_end(&mut Vec::new()));
    while !end.is_finished() {
        common::harvest_for(&session, &vm, 1, Duration::from_millis(20), || {});
    }
    writers.into_iter().for_each(Writer::stop);
    session.stop().unwrap();
}

/// A process with a VM of two vCPUs that write, the second a hundred times as much.
struct Vmm(Child);

impl Vmm {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_vmm_for_the_tests_of_the_command", "--nocapture"])
            .env(BE_A_VMM, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "running"), "the VMM came up");
        Self(child)
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    fn stop(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

fn json(output: &[u8]) -> Vec<Value> {
    text(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

#[test]
fn json_rows_are_as_documented_and_the_summary_is_their_sum() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let output = profile(&["400ms", "3", "--json", "--regions", "-p", &vmm.pid()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines = json(&output.stdout);
    assert_eq!(lines[0]["kind"], "profiler_attached");
    let rows = of_kind(&lines, "vcpu_dirty_rate");
    assert_eq!(rows.len(), 6);
    let mut fields: Vec<&str> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    let mut documented = vec![
        "kind",
        "t_ms",
        "pid",
        "vm",
        "vcpu",
        "tid",
        "source",
        "dirty_pages",
        "dirty_pages_per_s",
        "dirty_bytes_per_s",
        "ring_used",
        "ring_size",
        "ring_full_exits",
        "overflows",
    ];
    documented.sort_unstable();
    assert_eq!(fields, documented);
    for row in &rows {
        assert_eq!(row["source"], "dirty_ring_push");
        assert_eq!(row["pid"].to_string(), vmm.pid());
        assert!(row["tid"].as_u64().unwrap() > 0, "{row}");
        let (pages, bytes) =
            (row["dirty_pages_per_s"].as_f64().unwrap(), row["dirty_bytes_per_s"].as_f64().unwrap());
        assert!((bytes - pages * 4096.0).abs() <= 4096.0, "{row}");
    }
    for summary in of_kind(&lines, "vcpu_dirty_summary") {
        let of_vcpu = rows.iter().filter(|row| row["vcpu"] == summary["vcpu"]);
        let sum: u64 = of_vcpu.map(|row| row["dirty_pages"].as_u64().unwrap()).sum();
        assert!(sum > 0);
        assert_eq!(summary["dirty_pages"].as_u64(), Some(sum));
    }
    assert_eq!(of_kind(&lines, "vcpu_dirty_summary").len(), 2);
    let regions = of_kind(&lines, "vm_regions");
    assert_eq!(regions.len(), 3, "{lines:?}");
    // 20 pages of one vCPU, 2000 of the other.
    assert!(regions[1]["unique_pages"].as_u64().unwrap() <= 2020, "{}", regions[1]);
    assert_eq!(regions[1]["hottest"][0]["address"].as_u64().unwrap() % (2 << 20), 0);
    assert_eq!(of_kind(&lines, "profiler_summary")[0]["dropped_pushes"], 0);
    vmm.stop();
}

#[test]
fn plain_lines_have_a_header_and_csv_has_one_table() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let output = profile(&["100ms", "2", "-p", &vmm.pid(), "--vcpu", "1"]);
    assert!(output.status.success());
    let plain = text(&output.stdout);
    let lines: Vec<&str> = plain.lines().collect();
    assert!(lines[0].starts_with("   TIME     PID VM ") && lines[0].ends_with("SOURCE"), "{plain}");
    assert!(lines[1].contains(&vmm.pid()) && lines[1].ends_with("dirty_ring_push"), "{plain}");
    // Header, two lines, a blank one, and the summary of one vCPU.
    assert_eq!(lines.len(), 6, "{plain}");

    let output = profile(&["500ms", "2", "-p", &vmm.pid(), "--csv", "--top", "1"]);
    let csv = text(&output.stdout);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 3, "{csv}");
    let columns = lines[0].split(',').count();
    assert!(lines[0].starts_with("t_ms,pid,vm,vcpu,tid,source,dirty_pages,"));
    assert!(lines.iter().all(|line| line.split(',').count() == columns), "{csv}");
    // The vCPU with the longer loop dirties more.
    assert!(lines[1..].iter().all(|line| line.split(',').nth(3) == Some("1")), "{csv}");

    let output = profile(&["100ms", "-1", "-p", &vmm.pid()]);
    assert_eq!(text(&output.stdout).lines().count(), 3);
    vmm.stop();
}

#[test]
fn a_vm_that_exits_in_mid_run_ends_the_run_with_a_line_a_summary_and_success() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let pid = vmm.pid();
    let mut profiler = Command::new(PROFILE)
        .args(["100ms", "--json", "-p", &pid])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines =
        BufReader::new(profiler.stdout.take().unwrap()).lines().map(|line| json(line.unwrap().as_bytes()));
    assert!(lines.by_ref().flatten().any(|line| line["kind"] == "vcpu_dirty_rate"));
    vmm.stop();
    let lines: Vec<Value> = lines.flatten().collect();
    let output = profiler.wait_with_output().unwrap();
    assert_eq!(text(&output.stderr), format!("the VM of process {pid} has ended\n"));
    assert_eq!(output.status.code(), Some(0));
    let summary = of_kind(&lines, "vcpu_dirty_summary");
    assert!(summary.len() == 2 && summary.iter().all(|vcpu| vcpu["ended"] == true), "{summary:?}");
}

#[test]
fn an_interrupt_ends_the_run_with_a_summary_that_has_everything() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let mut profiler = Command::new(PROFILE)
        .args(["1h", "60"].map(|text| text.replace("1h", "3600")))
        .args(["--json", "-p", &vmm.pid()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(profiler.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("profiler_attached"));
    std::thread::sleep(Duration::from_millis(300));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(profiler.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert!(profiler.wait().unwrap().success());
    let summary = of_kind(&lines, "vcpu_dirty_summary");
    // No interval had ended: all of it is in the last look.
    assert!(
        summary.len() == 2 && summary.iter().all(|vcpu| vcpu["dirty_pages"].as_u64() > Some(0)),
        "{lines:?}"
    );
    vmm.stop();
}

fn first_line(out: ChildStdout) -> String {
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).unwrap();
    line
}

#[test]
fn metrics_are_served_and_a_silent_client_does_not_stop_them() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let mut profiler = Command::new(PROFILE)
        .args(["100ms", "--csv", "-p", &vmm.pid(), "--prometheus", "127.0.0.1:0"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(profiler.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address =
        line.trim().trim_start_matches("metrics on http://").trim_end_matches("/metrics").to_owned();
    let _silent = TcpStream::connect(&address).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = get("/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    for name in ["vcpu_dirty_bytes_total", "vcpu_dirty_ring_size_entries", "vcpu_dirty_ring_overflows_total"]
    {
        let sample = format!("\nringferry_{name}{{pid=\"{}\",vm=\"", vmm.pid());
        assert!(answer.contains(&sample), "{sample} in {answer}");
    }
    assert!(answer.contains("\nringferry_vm_unobservable{"), "{answer}");
    assert!(get("/").starts_with("HTTP/1.1 404 "));
    profiler.kill().unwrap();
    profiler.wait().unwrap();
    vmm.stop();
}

/// The profiler on a terminal of its own, of 120 × 30 characters.
struct Terminal {
    profiler: Child,
    master: File,
    seen: String,
}

impl Terminal {
    fn start(arguments: &[&str]) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        // Not inherited, unlike the original: or the terminal could not be closed.
        let master = pty.master.try_clone().unwrap();
        drop(pty.master);
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        let profiler = Command::new("setsid")
            .args(["--ctty", PROFILE])
            .args(arguments)
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .unwrap();
        Self { profiler, master: File::from(master), seen: String::new() }
    }

    /// Reads until this text was written since the last call.
    fn wait_for(&mut self, text: &str) {
        let mut part = [0; 4096];
        let end = Instant::now() + Duration::from_secs(20);
        while !self.seen.contains(text) {
            let mut output = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            assert!(Instant::now() < end, "{text:?} never came: {:?}", self.seen);
            if poll(&mut output, 1000_u16).unwrap() == 0 {
                continue;
            }
            let count = self.master.read(&mut part).expect("the profiler goes on");
            self.seen.push_str(&String::from_utf8_lossy(&part[..count]));
        }
        self.seen.clear();
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn ends(&mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if let Some(status) = self.profiler.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.profiler.kill().unwrap();
        panic!("it goes on");
    }
}

#[test]
fn the_live_table_takes_keys_and_leaves_a_summary() {
    if !possible() {
        return;
    }
    let vmm = Vmm::start();
    let mut terminal = Terminal::start(&["200ms", "-p", &vmm.pid()]);
    terminal.wait_for("waiting");
    terminal.wait_for(&vmm.pid());
    terminal.press("p");
    terminal.wait_for("PAUSED");
    terminal.press("p>");
    terminal.wait_for("MiB/s▼");
    terminal.press("r");
    terminal.wait_for("▲");
    terminal.press("/ring_p\r");
    // Blanks are not written but skipped.
    terminal.wait_for("clears)");
    terminal.press("q");
    terminal.wait_for("OBSERVED");
    assert_eq!(terminal.ends(), Some(0));
    vmm.stop();
}

#[test]
fn a_terminal_that_is_closed_ends_the_live_table() {
    if !possible() {
        return;
    }
    let mut terminal = Terminal::start(&["200ms"]);
    terminal.wait_for("quit");
    let Terminal { profiler, master, .. } = terminal;
    drop(master);
    let mut terminal = Terminal { profiler, master: File::open("/dev/null").unwrap(), seen: String::new() };
    assert_eq!(terminal.ends(), Some(0));
}

#[test]
fn an_unknown_process_and_one_without_a_vm_are_failures_with_a_line_that_says_so() {
    let output = profile(&["-p", "4194303"]);
    assert_eq!(
        (output.status.code(), text(&output.stderr).as_str()),
        (Some(1), "error: there is no process 4194303\n")
    );
    if !possible() {
        return;
    }
    let mut sleeper = Command::new("sleep").arg("100").spawn().unwrap();
    let output = profile(&["-p", &sleeper.id().to_string()]);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let expected = format!("error: process {} (sleep) runs no KVM virtual machine\n", sleeper.id());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), expected));
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    for arguments in [
        &["0"][..],
        &["1", "0"],
        &["--json", "--csv"],
        &["-1", "2", "3"],
        &["-p", "0"],
        &["-p", "x"],
        &["--prometheus", "9090"],
        &["--no-such-option"],
    ] {
        assert_eq!(profile(arguments).status.code(), Some(2), "{arguments:?}");
    }
    assert_eq!(profile(&["--help"]).status.code(), Some(0));
}

/// Runs the profiler through `wrapper`, or notes why that cannot be done here.
fn under(wrapper: &str, script: &str) -> Option<Output> {
    if !nix::unistd::geteuid().is_root() {
        ringferry_testvm::skip("only root can take rights and file systems away");
        return None;
    }
    match Command::new(wrapper).args(script.split(' ')).output() {
        Ok(output) => Some(output),
        Err(error) => {
            ringferry_testvm::skip(&format!("{wrapper}: {error} (apt-get install util-linux)"));
            None
        }
    }
}

#[test]
fn without_rights_it_says_which_are_missing() {
    // Without the binary's own directory nobody else may even read it.
    let copy = std::env::temp_dir().join(format!("ringferry-profile-{}", std::process::id()));
    std::fs::copy(PROFILE, &copy).unwrap();
    let nobody = |more: &str| {
        let identity = "--reuid 65534 --regid 65534 --clear-groups";
        under("setpriv", &format!("{identity} {more} -- {} -1", copy.display()).replace("  ", " "))
    };
    let refused = nobody("");
    let half = nobody("--inh-caps +bpf --ambient-caps +bpf");
    let enough = nobody("--inh-caps +bpf,+perfmon --ambient-caps +bpf,+perfmon");
    std::fs::remove_file(&copy).unwrap();
    let (Some(refused), Some(half), Some(enough)) = (refused, half, enough) else { return };
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("CAP_BPF and CAP_PERFMON missing"), "{}", text(&refused.stderr));
    assert_eq!(half.status.code(), Some(1));
    assert!(text(&half.stderr).contains(": CAP_PERFMON missing"), "{}", text(&half.stderr));
    if possible() {
        assert_eq!(enough.status.code(), Some(0), "{}", text(&enough.stderr));
    }
}

#[test]
fn without_type_information_it_says_so_and_without_tracefs_it_works() {
    if !possible() {
        return;
    }
    let in_its_own_mounts = |hide: &str| {
        let script = format!("{hide} && exec {PROFILE} -1");
        if !nix::unistd::geteuid().is_root() {
            ringferry_testvm::skip("only root can hide file systems");
            return None;
        }
        Some(Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap())
    };
    let Some(no_types) = in_its_own_mounts("mount -t tmpfs none /sys/kernel/btf") else { return };
    assert_eq!(no_types.status.code(), Some(1));
    let said = text(&no_types.stderr);
    assert!(said.contains("/sys/kernel/btf/vmlinux") && said.contains("CONFIG_DEBUG_INFO_BTF"), "{said}");
    let Some(no_tracefs) =
        in_its_own_mounts("mount -t tmpfs none /sys/kernel/tracing && mount -t tmpfs none /sys/fs/bpf")
    else {
        return;
    };
    assert_eq!(no_tracefs.status.code(), Some(0), "{}", text(&no_tracefs.stderr));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    if !possible() {
        return;
    }
    let mut profiler = Command::new(PROFILE)
        .args(["50ms", "--csv"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(first_line(profiler.stdout.take().unwrap()).starts_with("t_ms"));
    // With no VM in sight it may have nothing to say, and so not notice.
    let end = Instant::now() + Duration::from_secs(2);
    let vmm = Vmm::start();
    while profiler.try_wait().unwrap().is_none() && Instant::now() < end + Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(20));
    }
    vmm.stop();
    let output = profiler.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}
