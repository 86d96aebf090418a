//! A guest that moves from this process to a second one of the same program, and is proven whole there: what
//! `demo` shows and `bench migrate` measures.

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use ringferry::progress::Update;
use ringferry::source::SourceError;

use crate::guest::{GuestArgs, Host};
use crate::interrupt;
use crate::migrate::{Decision, MigrateArgs, Migrated};
use crate::printable::printable;
use crate::receiving_process::{Listen, ReceivingProcess};
use crate::report::MigrationReport;

/// How long the guest's rate is measured before and after.
const MEASURE: Duration = Duration::from_secs(1);

/// A guest at work here, and a process that waits for it.
#[derive(Debug)]
pub struct Crossing {
    host: Host,
    receiver: ReceivingProcess,
    /// Where the other process is reached.
    address: String,
    before_per_s: Vec<f64>,
}

impl Crossing {
    /// Boots the guest, starts the other process where `listen` says, and measures how fast the guest is.
    pub fn prepare(guest: &GuestArgs, listen: &Listen) -> Result<Self> {
        interrupt::promise("the guest ends");
        let host = guest.boot()?;
        host.wait_until_warm()?;
        let receiver = ReceivingProcess::start(&guest.vm.host, listen, MEASURE)?;
        let before_per_s = measure(&host)?;
        let address = receiver.address().to_owned();
        Ok(Self { host, receiver, address, before_per_s })
    }

    /// The guest's VM.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Where the other process is reached.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What stands between takes connections here.
    pub fn go_through(&mut self, address: SocketAddr) {
        self.address = address.to_string();
    }

    /// Steps per second of each vCPU before the migration.
    pub fn before_per_s(&self) -> &[f64] {
        &self.before_per_s
    }

    /// The process id of the other side.
    pub fn receiver_pid(&self) -> u32 {
        self.receiver.id()
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
        let address = self.address.clone();
        let (host, receiver) = (&mut self.host, &mut self.receiver);
        // It may run the guest, as long as it lives. A guest that cannot be kept is lost.
        let mut decisions = [Decision::Keep].into_iter();
        let decide = |_: &SourceError| {
            receiver.end_now();
            decisions.next().unwrap_or(Decision::Drop)
        };
        interrupt::promise(
            "the migration is cancelled; the guest goes on at the source, and ends with the command",
        );
        let migrated = interrupt::cancelling(
            interrupted,
            || progress.parameters().cancel(),
            || args.migrate(host, &address, progress, &self.before_per_s, show, decide),
        )?;
        let Migrated::Moved(mut report) = migrated else {
            bail!("the destination did not confirm that the guest runs there, and was ended");
        };
        interrupt::promise("the guest has moved, and ends unchecked");
        let after = self.receiver.checked()?;
        report.guest_consistent = after.guest_consistent;
        for (vcpu, rate) in report.vcpus.iter_mut().zip(&after.progress_after_per_s) {
            vcpu.progress_after_per_s = Some(*rate);
        }
        ensure!(
            after.inconsistency.is_none(),
            "the guest lost writes: {}",
            printable(&after.inconsistency.unwrap_or_default())
        );
        Ok(*report)
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
