//! What verification finds: a page that was damaged on its way, and one whose write was never tracked.

use std::time::Duration;

use ringferry::layout::PageIndex;
use ringferry::source::SourceOptions;
use ringferry::vm::{Moment, Quiesced, VmError};
use ringferry::{Paused, Vm};

use crate::world::World;

#[test]
fn verification_is_off_unless_somebody_asks_for_it() {
    assert!(!SourceOptions::default().verify);
    let mut world = World::new();
    world.options.verify = false;
    let ended = world.migrate();
    assert_eq!(ended.source.unwrap().ram_digest_match, None);
    assert_eq!(ended.destination.unwrap().ram_digest_match, None);
}

#[test]
fn a_write_that_no_harvest_reported_is_found_by_the_audit() {
    let mut world = World::new();
    // Saving state writes this page, and the tracker does not say so.
    world.source_vm.writes = Some(PageIndex(62));
    let report = world.migrate().source.unwrap();
    assert_eq!((report.ram_digest_match, report.untracked_pages), (Some(false), 1));
}

/// A VMM at the destination that damages RAM while it is being received.
struct Damaging<'w>(&'w mut World);

impl Vm for Damaging<'_> {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.0.destination_vm.pause()
    }

    fn resume(&mut self, paused: Paused) -> Result<(), VmError> {
        self.0.destination_vm.resume(paused)
    }

    fn save_state(&mut self, quiesced: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        self.0.destination_vm.save_state(quiesced)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.0.destination_vm.restore_state(state)
    }

    fn kick(&self, _: usize) {}

    fn save_device_state(&mut self, _: Moment<'_>, _: &mut dyn std::io::Write) -> Result<(), VmError> {
        Ok(())
    }

    fn load_device_state(&mut self, _: &[u8]) -> Result<(), VmError> {
        // After it has arrived, and before it is hashed.
        self.0.destination_ram.write(PageIndex(20), 0xbad);
        Ok(())
    }
}

#[test]
fn ram_that_differs_is_not_handed_over() {
    use std::net::SocketAddr;

    use ringferry::destination::{Destination, DestinationError, DestinationOptions, ListenOptions};

    let listen = ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let destination = Destination::bind(listen).unwrap();
    let address = destination.local_addr().unwrap();
    let (mut source, mut there) = (World::new(), World::new());
    source.source_vm.device_bytes = 10;
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let incoming = destination.accept(Some(Duration::from_secs(20)), &crate::world::NEVER)?;
            let memory = there.destination_ram.memory().clone();
            let options = DestinationOptions::default();
            incoming.receive(&mut Damaging(&mut there), 1, &memory, &options, &crate::world::NEVER)
        });
        (source.send_to(address), receiving.join().unwrap())
    });
    assert!(matches!(received, Err(DestinationError::DigestMismatch { .. })), "{received:?}");
    assert!(sent.unwrap_err().to_string().contains("RAM differs"));
    assert!(source.source_runs() && !there.destination_runs());
}
