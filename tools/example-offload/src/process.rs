//! The process beside the VMM: what `ringferry offload` does, without its options.

use std::error::Error;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::offload::{BorrowedVm, End, Offer, WaitingVmm, connect};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceOptions};

/// Sends the VM of the VMM at `socket` to `destination`.
pub fn send(socket: &str, destination: &str) -> Result<(), Box<dyn Error>> {
    let mut lent = BorrowedVm::borrow(connect(Path::new(socket))?)?;
    let options = SourceOptions {
        destination: destination.to_owned(),
        verify: true,
        vcpus: lent.vcpus,
        vm_id: lent.vm_id.clone(),
        description: lent.description.clone(),
        ..SourceOptions::default()
    };
    let source = Source::new(
        &mut lent.vm,
        lent.session.as_mut(),
        &lent.memory,
        options,
        Progress::new(Parameters::default()),
    );
    let (end, text) = match source.run().map(|outcome| outcome.confirmed().map_err(|who| who.to_string())) {
        Ok(Ok(report)) => (End::Moved, format!("{} ms", report.downtime_ms)),
        Ok(Err(nobody_knows)) => (End::Unconfirmed, nobody_knows),
        Err(error) => (End::Stays, error.to_string()),
    };
    println!("{end:?}: {text}");
    Ok(lent.end(end, &text)?)
}

/// Receives a VM for the VMM at `socket`; says where a source has to connect.
pub fn receive(socket: &str) -> Result<(), Box<dyn Error>> {
    let never = AtomicBool::new(false);
    let vmm = WaitingVmm::greet(connect(Path::new(socket))?)?;
    let destination = Destination::bind(ListenOptions::new(([127, 0, 0, 1], 0).into()))?;
    println!("{}", destination.local_addr()?);
    let incoming = destination.accept(None, &never)?;
    let offer = Offer {
        description: incoming.description().to_vec(),
        vcpus: incoming.vcpus(),
        ram: incoming.ram().to_vec(),
        ..Offer::default()
    };
    let mut arriving = vmm.offer(offer)?;
    let (vcpus, options) = (incoming.vcpus(), DestinationOptions::default());
    match incoming.receive(&mut arriving.vm, vcpus, &arriving.memory, &options, &never) {
        Ok(_) => Ok(arriving.end(End::Arrived, "")?),
        Err(error) => {
            arriving.end(End::Stays, &error.to_string())?;
            Err(error.into())
        }
    }
}
