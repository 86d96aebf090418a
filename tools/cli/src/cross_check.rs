//! The kernel's own count beside ours: `ringferry-profile` runs next to a migration or a measurement, and every entry
//! that KVM pushed must be one that the tracker took.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::output::Output;

const PROFILER: &str = "ringferry-profile";

/// Both counts of one vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VcpuCounts {
    pub index: usize,
    /// `kvm_dirty_ring_push` events.
    pub kernel_pushes: u64,
    /// Ring entries that the tracker took.
    pub library_entries: u64,
}

/// Both counts of every vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CrossCheck {
    pub kind: &'static str,
    pub equal: bool,
    pub vcpus: Vec<VcpuCounts>,
}

/// The profiler while it runs. It ends with this value.
#[derive(Debug)]
pub struct RunningProfiler {
    child: Child,
    lines: BufReader<ChildStdout>,
    errors: ChildStderr,
}

#[derive(Deserialize)]
struct Line {
    kind: String,
    vcpu: Option<usize>,
    dirty_pages: Option<u64>,
}

impl RunningProfiler {
    /// Starts the profiler on the VMs of this process, and returns once it counts.
    pub fn start() -> Result<Self> {
        let beside = std::env::current_exe()?.with_file_name(PROFILER);
        let program = if beside.exists() { beside } else { PathBuf::from(PROFILER) };
        let mut child = Command::new(&program)
            // Not by the rings' indices: what is compared is each event.
            .args(["1", "--every-push", "--json", "--pid", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for us.
            .process_group(0)
            .spawn()
            .with_context(|| {
                format!(
                    "no {PROFILER} beside this program or in PATH: build it with cargo build -p ringferry-bpf"
                )
            })?;
        let stdout = child.stdout.take().context("the profiler has no output")?;
        let errors = child.stderr.take().context("the profiler has no standard error")?;
        let mut running = Self { child, lines: BufReader::new(stdout), errors };
        // Its first row says that it is attached.
        ensure!(running.next()?.is_some(), "{PROFILER} cannot run: {}", running.complaint()?);
        Ok(running)
    }

    /// What it said when it ended.
    fn complaint(&mut self) -> Result<String> {
        let mut said = String::new();
        self.errors.read_to_string(&mut said)?;
        let said = said.trim();
        Ok(said.strip_prefix("error: ").unwrap_or(said).to_owned())
    }

    fn next(&mut self) -> Result<Option<Line>> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).with_context(|| format!("the profiler said {line:?}"))
    }

    /// Ends the profiler and compares its counts with what the tracker took: per vCPU, its index and its entries. The VM must
    /// still be there.
    pub fn compare(mut self, taken: impl IntoIterator<Item = (usize, u64)>) -> Result<CrossCheck> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).context("the profiler cannot be asked for its summary")?;
        let taken = taken.into_iter();
        let mut counts: Vec<VcpuCounts> = taken
            .map(|(index, library_entries)| VcpuCounts { index, kernel_pushes: 0, library_entries })
            .collect();
        let mut summaries = 0;
        while let Some(line) = self.next()? {
            if line.kind != "vcpu_dirty_summary" {
                continue;
            }
            summaries += 1;
            let known = counts.iter_mut().find(|counts| Some(counts.index) == line.vcpu);
            match known {
                Some(counts) => counts.kernel_pushes += line.dirty_pages.unwrap_or(0),
                None => bail!("the profiler saw a vCPU {:?} that the VM does not have", line.vcpu),
            }
        }
        ensure!(summaries > 0, "the profiler ended without a summary: {}", self.complaint()?);
        let equal = counts.iter().all(|counts| counts.kernel_pushes == counts.library_entries);
        Ok(CrossCheck { kind: "cross_check", equal, vcpus: counts })
    }
}

impl Drop for RunningProfiler {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // Ended by itself meanwhile: as good.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl CrossCheck {
    /// Prints both counts.
    ///
    /// # Errors
    ///
    /// They differ, or standard output cannot be written.
    pub fn print(&self, output: Output) -> Result<()> {
        if output.json() {
            output.object(self)?;
        } else {
            output.write(self.text().as_bytes())?;
        }
        ensure!(self.equal, "the kernel and the tracker counted differently");
        Ok(())
    }

    fn text(&self) -> String {
        let verdict = if self.equal { "equal" } else { "DIFFERENT" };
        let vcpus = self.vcpus.iter().map(|counts| {
            let VcpuCounts { index, kernel_pushes, library_entries } = counts;
            format!("vCPU {index}: the kernel pushed {kernel_pushes} entries, the tracker took {library_entries}\n")
        });
        format!("{}cross-check with {PROFILER}: {verdict}\n", vcpus.collect::<String>())
    }
}
