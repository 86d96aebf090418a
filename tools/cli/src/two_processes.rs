//! A guest that moves from this process to a second one of the same program, and is proven whole there: what
//! `demo` shows and `bench migrate` measures.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ringferry::progress::Update;

use crate::guest::{AfterMigration, GuestArgs, Host, VmArgs};
use crate::interrupt;
use crate::migrate::MigrateArgs;
use crate::receive::Told;
use crate::report::MigrationReport;

/// How long the guest's rate is measured before and after.
const MEASURE: Duration = Duration::from_secs(1);

/// A guest at work here, and a process that waits for it.
#[derive(Debug)]
pub struct Crossing {
    host: Host,
    receiver: ReceivingProcess,
    before_per_s: Vec<f64>,
}

impl Crossing {
    /// Boots the guest, starts the other process where `listen` says, and measures how fast the guest is.
    pub fn prepare(guest: &GuestArgs, listen: &Listen) -> Result<Self> {
        let host = guest.boot()?;
        host.wait_until_warm()?;
        let receiver = ReceivingProcess::start(&guest.vm, listen)?;
        let before_per_s = measure(&host)?;
        Ok(Self { host, receiver, before_per_s })
    }

    /// Steps per second of each vCPU before the migration.
    pub fn before_per_s(&self) -> &[f64] {
        &self.before_per_s
    }

    /// The process id of the other side.
    pub fn receiver_pid(&self) -> u32 {
        self.receiver.child.id()
    }

    /// Steps per second of each vCPU now, for a guest that is still here.
    pub fn still_here_per_s(&self) -> Result<Vec<f64>> {
        measure(&self.host)
    }

    /// Moves the guest. `interrupted` cancels it.
    pub fn migrate(
        &mut self,
        args: &MigrateArgs,
        interrupted: &AtomicBool,
        show: impl FnMut(&Update) + Send,
    ) -> Result<MigrationReport> {
        let progress = &args.progress()?;
        let address = &self.receiver.address;
        let mut report = interrupt::cancelling(
            interrupted,
            || progress.parameters().cancel(),
            || args.migrate(&mut self.host, address, progress, &self.before_per_s, show),
        )?;
        let after = self.receiver.checked()?;
        report.guest_consistent = after.guest_consistent;
        for (vcpu, rate) in report.vcpus.iter_mut().zip(&after.progress_after_per_s) {
            vcpu.progress_after_per_s = Some(*rate);
        }
        ensure!(
            after.inconsistency.is_none(),
            "the guest lost writes: {}",
            after.inconsistency.unwrap_or_default()
        );
        Ok(report)
    }
}

/// Steps per second of each vCPU over a second.
fn measure(host: &Host) -> Result<Vec<f64>> {
    let begin = host.marks()?;
    thread::sleep(MEASURE);
    host.check_vcpus()?;
    let marks = begin.zip(host.marks()?);
    Ok(marks.map_or_else(Vec::new, |(begin, end)| end.per_s_since(&begin)))
}

/// Where the other process waits.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Its address.
    pub address: SocketAddr,
    /// The network namespace that it lives in, if it is not ours.
    pub namespace: Option<String>,
}

impl Default for Listen {
    /// Loopback, any free port.
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 0)), namespace: None }
    }
}

/// A second process of this program that waits for the VM. It ends with this value.
#[derive(Debug)]
struct ReceivingProcess {
    child: Child,
    lines: BufReader<ChildStdout>,
    address: String,
}

impl ReceivingProcess {
    fn start(vm: &VmArgs, listen: &Listen) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program that runs")?;
        let mut command = match &listen.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .args(["receive", "--json", "--wait", "60s", "--listen", &listen.address.to_string()])
            .args(["--memory", &vm.memory.to_string(), "--vcpus", &vm.vcpus.to_string()])
            .args(["--guest", vm.kind().name()])
            .args(["--regions", &vm.regions.to_string()])
            .args(["--backing", &value_name(&vm.backing), "--huge-pages", &value_name(&vm.huge_pages)])
            .args(["--run-for", &format!("{}ms", MEASURE.as_millis())]);
        if vm.pin_vcpus {
            command.arg("--pin-vcpus");
        }
        if !listen.address.ip().is_loopback() {
            command.arg("--insecure");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Ctrl-C is for this process, which tells the other one.
            .process_group(0)
            .spawn()
            .context("cannot start the receiving process")?;
        let stdout = child.stdout.take().context("the receiving process has no output")?;
        let mut started = Self { child, lines: BufReader::new(stdout), address: String::new() };
        match started.next()? {
            Told::Listening { address } => started.address = address.to_string(),
            told => bail!("the receiving process said {told:?} before it listened"),
        }
        Ok(started)
    }

    fn next(&mut self) -> Result<Told> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the receiving process ended early ({})", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the receiving process said {line:?}"))
    }

    /// Waits until the guest has run and been checked there.
    fn checked(&mut self) -> Result<AfterMigration> {
        loop {
            if let Told::Checked(after) = self.next()? {
                return Ok(after);
            }
        }
    }
}

impl Drop for ReceivingProcess {
    fn drop(&mut self) {
        // It ends by itself after a migration; after a failed one there is nothing to wait for.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn value_name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
