//! `ringferry offload`: migrates a VM from a process beside its VMM, which passes descriptors over a socket.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ringferry::destination::{Destination, DestinationError, DestinationOptions, Incoming, ListenOptions};
use ringferry::offload::{BorrowedVm, End, Offer, WaitingVmm, connect};
use ringferry::progress::Progress;
use ringferry::source::{Outcome, Source, SourceReport};
use ringferry::track::VcpuFigures;
use ringferry::wire::reason::Reason;
use rustix::thread::set_no_new_privs;
use serde::Serialize;

use crate::display::{Display, follow};
use crate::interrupt;
use crate::migrate::MigrateArgs;
use crate::output::Output;
use crate::report::{MigrationReport, VcpuReport};
use crate::sandbox;
use crate::sizes::Time;
use crate::told::Told;

const EXAMPLES: &str = "\
Examples, each in a terminal of its own:
  ringferry run --offload /run/vm7.offload
  ringferry receive --listen 127.0.0.1:7000
  ringferry offload send --socket /run/vm7.offload --to 127.0.0.1:7000

The VMM may be any that speaks the protocol (kernel-notes/offload.md). If this process dies, the guest runs on at the source.";

/// Migrate a VM from a process beside its VMM
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    side: Side,
}

#[derive(clap::Subcommand, Debug)]
enum Side {
    Send(Box<SendArgs>),
    Receive(ReceiveArgs),
}

/// How the VMM is reached, and what this process gives up.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "VMM")]
struct VmmArgs {
    /// Where the VMM listens, a Unix socket of the type SEQPACKET
    #[arg(long, value_name = "PATH", required_unless_present = "fd", conflicts_with = "fd")]
    socket: Option<PathBuf>,

    /// The descriptor of a connected socket that this process has inherited
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    fd: Option<RawFd>,

    /// Become this user and group once connected, without supplementary groups
    #[arg(long, value_name = "UID:GID", value_parser = user)]
    user: Option<(u32, u32)>,
}

/// Send the VM that a VMM lends to a waiting `ringferry receive`
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry offload send --socket /run/vm7.offload --to 127.0.0.1:7000 --user 65534:65534
  ringferry offload send --fd 3 --to 127.0.0.1:7000    started by the VMM, which left it its socket

Ctrl-C cancels the migration; the guest goes on at the source.")]
struct SendArgs {
    #[command(flatten)]
    vmm: VmmArgs,

    /// Where the destination waits
    #[arg(long, value_name = "HOST:PORT")]
    to: String,

    #[command(flatten)]
    migrate: MigrateArgs,
}

/// Wait for a VM, and receive it for a VMM that builds it
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples, each in a terminal of its own:
  ringferry receive --offload /run/vm7.arrival
  ringferry offload receive --socket /run/vm7.arrival --listen 127.0.0.1:7000")]
struct ReceiveArgs {
    #[command(flatten)]
    vmm: VmmArgs,

    /// Where to wait for the source
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7000")]
    listen: SocketAddr,

    /// Listen on an address that other machines can reach, although nothing is encrypted or authenticated
    #[arg(long)]
    insecure: bool,

    /// How long to wait for a source [default: until Ctrl-C]
    #[arg(long, value_name = "TIME")]
    wait: Option<Time>,
}

/// How often a wait for a source looks whether the VMM still waits.
const POLL: Duration = Duration::from_millis(200);

fn user(text: &str) -> Result<(u32, u32), String> {
    let parsed =
        text.split_once(':').and_then(|(user, group)| Some((user.parse().ok()?, group.parse().ok()?)));
    parsed.ok_or_else(|| "write two numbers, such as 65534:65534".to_owned())
}

#[derive(Serialize)]
struct Unconfirmed<'a> {
    kind: &'static str,
    message: &'a str,
}

/// Runs the command.
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    match args.side {
        Side::Send(args) => send(&args, output),
        Side::Receive(args) => receive(&args, output),
    }
}

impl VmmArgs {
    /// The connection to the VMM. From here on this process has no more rights than it was told to keep.
    fn connect(&self) -> Result<OwnedFd> {
        let connection = match (&self.socket, self.fd) {
            (Some(path), _) => connect(path).with_context(|| {
                format!(
                    "connecting to the VMM at {}: does it wait there, and is this the user that it runs as?",
                    path.display()
                )
            })?,
            (None, Some(fd)) => inherited(fd)?,
            (None, None) => bail!("no socket was given"),
        };
        set_no_new_privs(true).context("giving up new privileges")?;
        if let Some((user, group)) = self.user {
            become_user(user, group).with_context(|| format!("becoming user {user}, group {group}"))?;
        }
        sandbox::enter()?;
        Ok(connection)
    }
}

/// In all threads at once, as only the C library does it.
#[expect(unsafe_code, reason = "these calls have no safe interface that covers all threads")]
fn become_user(user: u32, group: u32) -> io::Result<()> {
    let done = |returned: libc::c_int| match returned {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: calls with numbers, and a list of no groups. Refused, they change nothing.
    unsafe {
        done(libc::setgroups(0, std::ptr::null()))?;
        done(libc::setresgid(group, group, group))?;
        done(libc::setresuid(user, user, user))
    }
}

#[expect(unsafe_code, reason = "a descriptor's number is all that a process inherits")]
fn inherited(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: the number is not negative; what is not open is answered with an error, and what is open stays so, as nothing
    // here closes it but what duplicates it now.
    let ours = unsafe { BorrowedFd::borrow_raw(fd) }.as_fd().try_clone_to_owned();
    let ours = ours.with_context(|| format!("descriptor {fd} was not inherited"))?;
    // SAFETY: it is open, by the line above, and whoever started this process gave it to it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(ours)
}

fn send(args: &SendArgs, output: Output) -> Result<ExitCode> {
    let connection = args.vmm.connect()?;
    let interrupted = interrupt::flag()?;
    interrupt::promise("the migration is cancelled, and the guest goes on at the source");
    let progress = args.migrate.progress()?;
    let mut lent = BorrowedVm::borrow(connection)?;
    let before = lent.figures()?;
    match migrate(args, &mut lent, &progress, interrupted, output) {
        Ok(Migrated::Moved(report)) => {
            let vcpus = figures_since(&lent, &before);
            let report = MigrationReport::new("kvm", *report, vcpus);
            // The VM is the destination's, whether its old VMM hears it or not.
            if let Err(error) = lent.end(End::Moved, "") {
                tracing::warn!(%error, "the VMM was not told that its VM has moved");
            }
            report.print(output)?;
            report.verdict()?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(Migrated::Unconfirmed(message)) => {
            lent.end(End::Unconfirmed, &message)?;
            if output.json() {
                output.object(&Unconfirmed { kind: "unconfirmed", message: &message })?;
            }
            output.note(message);
            Ok(ExitCode::FAILURE)
        }
        Err(error) if lent.vmm.has_ended() => {
            bail!(
                "the VMM lends its VM no more: it has cancelled the migration, or ended and its VM with it (the migration \
                 ended with: {error:#})"
            )
        }
        Err(error) => {
            if let Err(untold) = lent.end(End::Stays, &format!("{error:#}")) {
                tracing::warn!(error = %untold, "the VMM was not told why; its guest runs on");
            }
            Err(error)
        }
    }
}

/// Where a migration has left the VM.
enum Migrated {
    Moved(Box<SourceReport>),
    Unconfirmed(String),
}

fn migrate(
    args: &SendArgs,
    lent: &mut BorrowedVm,
    progress: &Progress,
    interrupted: &AtomicBool,
    output: Output,
) -> Result<Migrated> {
    let options = args.migrate.options(&args.to, lent.vcpus, lent.vm_id.clone(), lent.description.clone())?;
    let without_vm = progress.clone();
    lent.vmm.when_it_ends(move || without_vm.parameters().cancel());
    let mut display = Display::new(output);
    let source = Source::new(&mut lent.vm, lent.session.as_mut(), &lent.memory, options, progress.clone());
    let outcome = thread::scope(|scope| {
        scope.spawn(|| follow(progress, |update| display.show(update)));
        interrupt::cancelling(interrupted, || progress.parameters().cancel(), || source.run())
    });
    Ok(match outcome? {
        Outcome::HandedOver(report) => Migrated::Moved(report),
        Outcome::Unconfirmed(unconfirmed) => {
            let message = unconfirmed.to_string();
            // The VMM decides; tracking ends in any case.
            drop(unconfirmed.release());
            Migrated::Unconfirmed(message)
        }
    })
}

/// What the rings say of each vCPU since `before`; what its guest felt, only its VMM could say.
fn figures_since(lent: &BorrowedVm, before: &[VcpuFigures]) -> Vec<VcpuReport> {
    let now = lent.figures().unwrap_or_else(|error| {
        tracing::warn!(%error, "the VMM did not say what its vCPUs did");
        Vec::new()
    });
    let report = |now: &VcpuFigures| {
        let then = before.iter().find(|then| then.index == now.index).copied().unwrap_or_default();
        let since = |of: fn(&VcpuFigures) -> u64| of(now).saturating_sub(of(&then));
        VcpuReport {
            index: now.index,
            pages_dirtied: since(|vcpu| vcpu.pages),
            ring_entries: since(|vcpu| vcpu.pages + vcpu.duplicate_entries),
            ring_full_exits: since(|vcpu| vcpu.ring_full_exits),
            throttled_ms: since(|vcpu| vcpu.throttled_ns) as f64 / 1e6,
            ..VcpuReport::default()
        }
    };
    now.iter().map(report).collect()
}

fn receive(args: &ReceiveArgs, output: Output) -> Result<ExitCode> {
    let connection = args.vmm.connect()?;
    let interrupted = interrupt::flag()?;
    interrupt::promise("no VM is taken; one that is on its way stays at the source");
    let vmm = WaitingVmm::greet(connection)?;
    let destination =
        Destination::bind(ListenOptions { insecure: args.insecure, ..ListenOptions::new(args.listen) })?;
    Told::Listening { address: destination.local_addr()? }.tell(output)?;
    let (vmm, incoming) = await_source(vmm, &destination, args.wait.map(|wait| wait.0), interrupted)?;
    let offer = Offer {
        vm_id: incoming.vm_id().to_owned(),
        description: incoming.description().to_vec(),
        vcpus: incoming.vcpus(),
        ram: incoming.ram().to_vec(),
        blocks: incoming.blocks().iter().map(|block| (block.name.clone(), block.pages)).collect(),
    };
    let mut arriving = match vmm.offer(offer) {
        Ok(arriving) => arriving,
        Err(error) => return Err(incoming.refuse(Reason::Unbuildable, error.to_string()).into()),
    };
    let (vcpus, options) = (incoming.vcpus(), DestinationOptions::default());
    let cancel = Arc::new(AtomicBool::new(false));
    let without_vmm = Arc::clone(&cancel);
    // Relaxed, here and below: a flag without data, polled.
    arriving.vmm.when_it_ends(move || without_vmm.store(true, Ordering::Relaxed));
    let received = interrupt::cancelling(
        interrupted,
        || cancel.store(true, Ordering::Relaxed),
        || incoming.receive(&mut arriving.vm, vcpus, &arriving.memory, &options, &cancel),
    );
    match received {
        Ok(report) => {
            if let Err(error) = arriving.end(End::Arrived, "") {
                tracing::warn!(%error, "the VMM, which runs the VM, was not told so");
            }
            Told::Received(report).tell(output)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if arriving.vmm.has_ended() => {
            bail!("the VMM has ended; the VM stays with its source (the migration ended with: {error})")
        }
        Err(error) => {
            if let Err(untold) = arriving.end(End::Stays, &error.to_string()) {
                tracing::warn!(error = %untold, "the VMM was not told why");
            }
            Err(error.into())
        }
    }
}

/// The first source that comes while the VMM waits.
fn await_source(
    mut vmm: WaitingVmm,
    destination: &Destination,
    wait: Option<Duration>,
    interrupted: &AtomicBool,
) -> Result<(WaitingVmm, Incoming)> {
    let since = std::time::Instant::now();
    loop {
        match destination.accept(Some(POLL), interrupted) {
            Ok(incoming) => return Ok((vmm, incoming)),
            Err(DestinationError::NobodyCame { address, .. }) => {
                if let Some(waited) = wait.filter(|wait| since.elapsed() >= *wait) {
                    return Err(anyhow!(DestinationError::NobodyCame { address, waited }));
                }
            }
            Err(error) => return Err(error.into()),
        }
        vmm.check()?;
    }
}
