//! What a VMM adds so that a process beside it migrates its VM, numbered.
//!
//! `vmm` is the VMM without that, `guest` what it runs, `process` the process beside it.

mod guest;
mod process;
mod vmm;

use std::error::Error;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use ringferry::Vm;
use ringferry::offload::{self, Ended, LentVm, Listener, Offer, RegionFile, Rings};
use vmm::{ExampleVmm, RAM, SLOT};

type AnyError = Box<dyn Error + Send + Sync>;

/// 1. Guest memory as it is lent: a memfd for each slot.
fn region(vmm: &ExampleVmm) -> Result<RegionFile, AnyError> {
    let file = vmm.ram_file.try_clone()?;
    Ok(RegionFile { slot: SLOT, pages: RAM, file, offset: 0, name: String::new() })
}

/// 2. A process beside this one connects.
fn accept(socket: &str) -> Result<OwnedFd, AnyError> {
    let listener = Listener::bind(Path::new(socket))?;
    println!("waiting");
    listener.accept(Duration::from_secs(60))?.ok_or_else(|| "nobody came".into())
}

/// 3. The source lends its VM to whoever comes. The vCPU's thread notices nothing.
fn source(socket: &str) -> Result<(), AnyError> {
    let mut vmm = ExampleVmm::new()?;
    vmm.boot()?;
    let connection = accept(socket)?;
    let (memory, vcpus, tracker) = ([region(&vmm)?], [(0, vmm.vcpu_fd.try_clone()?)], vmm.tracker.clone());
    let lent = LentVm {
        tracker: &tracker,
        rings: Rings::Lend,
        memory: &memory,
        vcpus: &vcpus,
        vm_id: "",
        description: b"example",
    };
    match offload::lend(connection, &mut vmm, &lent, &AtomicBool::new(false))? {
        Ended::Moved => println!("moved after pass {}", vmm.look().0),
        Ended::StaysHere { why } => println!("runs on here: {why}"),
        Ended::Unconfirmed { why, .. } => println!("somebody has to look: {why}"),
    }
    Ok(())
}

/// 4. The destination builds the VM that comes, and is given its state.
fn destination(socket: &str) -> Result<(), AnyError> {
    let build = |offer: &Offer| {
        if offer.ram != [RAM] || offer.description != b"example" {
            return Err("this is no VM of the example's".into());
        }
        let vmm = ExampleVmm::new()?;
        let memory = vec![region(&vmm)?];
        Ok((vmm, memory))
    };
    let mut vmm = offload::receive(accept(socket)?, build, &AtomicBool::new(false))?.vm;
    let arrived = vmm.look().0;
    thread::sleep(Duration::from_millis(100));
    let _paused = vmm.pause()?;
    let (pass, whole) = vmm.look();
    println!("came with pass {arrived}; goes on: {}; whole: {whole}", pass > arrived);
    Ok(())
}

fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let told = |error: Box<dyn Error>| AnyError::from(error.to_string());
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["source", socket] => source(socket),
        ["destination", socket] => destination(socket),
        ["send", socket, to] => process::send(socket, to).map_err(told),
        ["receive", socket] => process::receive(socket).map_err(told),
        _ => Err("usage: source SOCKET | destination SOCKET | send SOCKET HOST:PORT | receive SOCKET".into()),
    }
}
