//! A whole migration of the VM of host threads, tracked by `pagemap`: what the demo does where there is no /dev/kvm.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use ringferry::destination::{Destination, DestinationOptions, ListenOptions};
use ringferry::progress::{Parameters, Progress};
use ringferry::source::{Source, SourceOptions};
use ringferry::{DirtySource, Vm};
use ringferry_testvm::check::check;
use ringferry_testvm::{Backing, Boot, Config, Guest, ThreadVm, guest_image};

#[test]
fn a_vm_of_threads_moves_over_tcp_while_it_writes_and_loses_nothing() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        migrate(backing);
    }
}

fn migrate(backing: Backing) {
    const VCPUS: usize = 2;
    let append = "fill=8MiB each=ws:4MiB,pattern:random,bytes:64 vcpu1=pattern:zipf";
    let config = |boot| Config {
        vcpus: VCPUS,
        memory_bytes: 128 << 20,
        regions: 3,
        backing,
        boot,
        ..Config::default()
    };
    let mut vm = ThreadVm::new(config(Boot::Image { image: guest_image(), append: append.into() })).unwrap();
    vm.start().unwrap();
    Guest::new(vm.memory(), None).unwrap().wait_until_working(Duration::from_secs(60)).unwrap();
    let mut tracker = vm.track().unwrap();
    let memory = vm.memory().clone();

    let destination = Destination::bind(ListenOptions::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let options = SourceOptions {
        destination: destination.local_addr().unwrap().to_string(),
        vcpus: 2,
        verify: true,
        ..SourceOptions::default()
    };
    let never = AtomicBool::new(false);
    let mut arrived = ThreadVm::new(config(Boot::Destination)).unwrap();
    let (report, received) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let memory = arrived.memory().clone();
            destination.accept(None, &never)?.receive(
                &mut arrived,
                2,
                &memory,
                &DestinationOptions::default(),
                &never,
            )
        });
        let progress = Progress::new(Parameters::default());
        let report = Source::new(&mut vm, &mut tracker, &memory, options, progress).run();
        (report, receiving.join().unwrap())
    });
    let (report, received) = (report.unwrap().confirmed().unwrap(), received.unwrap());
    assert_eq!((report.ram_digest_match, received.ram_digest_match), (Some(true), Some(true)));
    assert_eq!(tracker.backend(), "pagemap");
    // What was never populated was not sent: image, mailbox, working sets and fill are some 20 MiB of 128.
    assert!(report.rounds[0].totals.pages_sent < 8192, "{:?}", report.rounds[0]);

    // The source still stands where it stopped; the destination runs on from there.
    let before = check(vm.memory()).unwrap();
    let guest = Guest::new(arrived.memory(), None).unwrap();
    while (0..VCPUS).any(|i| guest.stats(i).unwrap().page_writes < before.vcpus[i].page_writes + 1000) {
        thread::sleep(Duration::from_millis(1));
    }
    let paused = arrived.pause().unwrap();
    check(arrived.memory()).unwrap();
    arrived.resume(paused).unwrap();
}
