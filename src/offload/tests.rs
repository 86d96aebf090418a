//! Both ends against each other in one process, without a vCPU, and each against a peer that says whatever it likes.

mod kept;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::channel::{Channel, OFFLOAD_PROCESS, VMM};
use super::protocol::{Harvest, Message, PIECE_BYTES_MAX, RUNS_MAX, Role, Taker, VERSION};
use super::*;
use crate::kvm::RingSize;
use crate::layout::{PAGE_SIZE, PageIndex, PageRun, SlotId};
use crate::os::file::memfd;
use crate::page_set::PageSet;
use crate::testing::FakeKernel;
use crate::track::{DirtyTracker, LentPage, TrackError};
use crate::vm::{Moment, Paused, Quiesced, Vm, VmError};

const SOON: Duration = Duration::from_secs(10);
const PAGES: u64 = 64;
const SLOT: SlotId = SlotId(3);

fn ram() -> PageRun {
    PageRun { first: PageIndex(16), pages: PAGES }
}

/// What was done to a VM, and what it answers.
#[derive(Default)]
struct FakeVm {
    stands_still: bool,
    may_run_there: bool,
    ran: bool,
    released: u32,
    device_state: usize,
    machine_state: Vec<u8>,
    loaded: Vec<u8>,
    refuses: Option<&'static str>,
    discarded: Vec<PageRun>,
}

impl FakeVm {
    fn done(&self, action: &'static str) -> Result<(), VmError> {
        if self.refuses == Some(action) { Err(format!("no {action} today").into()) } else { Ok(()) }
    }
}

impl Vm for FakeVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        assert!(!self.stands_still, "paused twice");
        self.done("pause")?;
        self.stands_still = true;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        self.done("resume")?;
        (self.stands_still, self.may_run_there, self.ran) = (false, false, true);
        Ok(())
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        assert!(self.stands_still);
        self.done("save")?;
        Ok(self.machine_state.clone())
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        self.done("restore")?;
        self.machine_state = state.to_vec();
        self.stands_still = true;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, _: usize) {}

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        assert_eq!(self.stands_still, matches!(moment, Moment::Stopped(_)));
        let piece: Vec<u8> = (0..=250).cycle().take(7919).collect();
        for at in (0..self.device_state).step_by(piece.len()) {
            out.write_all(&piece[..piece.len().min(self.device_state - at)])?;
        }
        self.done("device state")
    }

    fn device_state_bytes_left(&mut self) -> u64 {
        self.device_state as u64
    }

    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        self.loaded.extend_from_slice(piece);
        self.done("load")
    }

    fn discarded_pages(&mut self, discarded: &mut PageSet) {
        self.discarded.iter().for_each(|run| discarded.insert_run(*run));
    }

    fn hand_over(&mut self) -> Result<(), VmError> {
        self.done("hand over")?;
        self.may_run_there = true;
        Ok(())
    }

    fn release(&mut self) {
        self.released += 1;
    }
}

/// Guest memory of the test: a slot of a kernel in memory, and a file of that size.
struct Vmm {
    tracker: DirtyTracker,
    memory: [RegionFile; 1],
    never: AtomicBool,
    rings: Rings,
}

fn region() -> RegionFile {
    let file = memfd(c"ram").unwrap();
    file.set_len(PAGES * PAGE_SIZE as u64).unwrap();
    RegionFile { slot: SLOT, pages: ram(), file: file.into(), offset: 0, name: String::new() }
}

impl Vmm {
    fn new() -> Self {
        let kernel = FakeKernel::new();
        let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::from_entries(1024).unwrap());
        tracker.add_memory(&kernel.create_slot(SLOT, ram())).unwrap();
        Self { tracker, memory: [region()], never: AtomicBool::new(false), rings: Rings::Lend }
    }

    fn lend(&self, connection: OwnedFd, vm: &mut FakeVm) -> Result<Ended, OffloadError> {
        let lent = LentVm {
            tracker: &self.tracker,
            rings: self.rings,
            memory: &self.memory,
            vcpus: &[],
            vm_id: "vm-1",
            description: b"a VM",
        };
        lend(connection, vm, &lent, &self.never)
    }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let (near, far) = Channel::pair(VMM).unwrap();
    (near.into_socket(), far)
}

/// Lends `vm` to `act`; what the VMM's end came to.
fn lent<T>(vm: &mut FakeVm, act: impl FnOnce(BorrowedVm) -> T) -> (Result<Ended, OffloadError>, T) {
    let vmm = Vmm::new();
    let (near, far) = sockets();
    thread::scope(|scope| {
        let serving = scope.spawn(|| vmm.lend(near, vm));
        let done = act(BorrowedVm::borrow(far).unwrap());
        (serving.join().unwrap(), done)
    })
}

#[test]
fn a_vm_is_paused_saved_and_handed_over_from_the_other_end() {
    let machine_state: Vec<u8> =
        (0..3 * PIECE_BYTES_MAX + 5).map(|at| (at % 253).try_into().unwrap()).collect();
    let mut vm = FakeVm { machine_state: machine_state.clone(), device_state: 200_000, ..FakeVm::default() };
    let (ended, ()) = lent(&mut vm, |mut borrowed| {
        assert_eq!((borrowed.vm_id.as_str(), borrowed.description.as_slice()), ("vm-1", &b"a VM"[..]));
        assert_eq!(borrowed.memory.pages(), PAGES);
        let vm = &mut borrowed.vm;
        assert_eq!(vm.device_state_bytes_left(), 200_000);
        let mut early = Vec::new();
        vm.save_device_state(Moment::Running { bytes: 1 << 20 }, &mut early).unwrap();
        let paused = vm.pause().unwrap();
        let quiesced = vm.quiesce(&paused).unwrap();
        let mut late = Vec::new();
        vm.save_device_state(Moment::Stopped(&quiesced), &mut late).unwrap();
        assert_eq!((early.len(), &early), (200_000, &late));
        assert!(vm.save_state(&quiesced).unwrap() == machine_state);
        vm.hand_over().unwrap();
        borrowed.end(End::Moved, "").unwrap();
    });
    assert!(matches!(ended, Ok(Ended::Moved)), "{ended:?}");
    assert!(vm.stands_still);
}

#[test]
fn what_the_vmm_cannot_do_is_told_in_its_words_and_what_comes_out_of_order_is_refused() {
    let mut vm = FakeVm { refuses: Some("pause"), ..FakeVm::default() };
    let (ended, ()) = lent(&mut vm, |mut borrowed| {
        let refused = borrowed.vm.pause().unwrap_err().to_string();
        assert_eq!(refused, "the VMM could not pause: no pause today");
        let paused = Paused::declare_every_vcpu_is_outside_kvm_run();
        for refused in [borrowed.vm.quiesce(&paused).map(drop), borrowed.vm.hand_over()] {
            assert!(refused.unwrap_err().to_string().contains("out of order"));
        }
        let quiesced = Quiesced::declare_no_device_writes(&paused);
        assert!(borrowed.vm.save_state(&quiesced).is_err());
        assert!(borrowed.vm.save_device_state(Moment::Stopped(&quiesced), &mut io::sink()).is_err());
        assert!(borrowed.vm.restore_state(b"x").is_err());
        borrowed.end(End::Stays, "it was refused").unwrap();
    });
    assert!(matches!(&ended, Ok(Ended::StaysHere { why }) if why == "it was refused"), "{ended:?}");
    assert!(!vm.stands_still);
}

#[test]
fn device_state_that_nobody_can_take_any_more_ends_early_and_the_connection_goes_on() {
    struct Broken(usize);
    impl Write for Broken {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.saturating_sub(bytes.len());
            if self.0 == 0 { Err(io::Error::other("the link broke")) } else { Ok(bytes.len()) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut vm = FakeVm { device_state: 64 << 20, ..FakeVm::default() };
    let (ended, ()) = lent(&mut vm, |mut borrowed| {
        let moment = Moment::Running { bytes: 1 };
        let failed = borrowed.vm.save_device_state(moment, &mut Broken(500_000)).unwrap_err();
        assert_eq!(failed.to_string(), "the link broke");
        assert_eq!(borrowed.vm.device_state_bytes_left(), 64 << 20);
        borrowed.end(End::Stays, "").unwrap();
    });
    assert!(matches!(ended, Ok(Ended::StaysHere { .. })), "{ended:?}");
}

#[test]
fn what_no_ring_sees_comes_with_the_harvest_however_many_runs_it_is() {
    let discarded: Vec<PageRun> =
        ram_pages().step_by(2).map(|page| PageRun { first: page, pages: 1 }).collect();
    let mut vm = FakeVm { discarded: discarded.clone(), ..FakeVm::default() };
    let vmm = Vmm::new();
    let (near, far) = sockets();
    thread::scope(|scope| {
        let serving = scope.spawn(|| vmm.lend(near, &mut vm));
        let mut borrowed = BorrowedVm::borrow(far).unwrap();
        borrowed.session.start().unwrap();
        let marked = PageRun { first: PageIndex(20), pages: 3 };
        vmm.tracker.mark_dirty(marked);
        let mut dirty = PageSet::new(borrowed.memory.end());
        borrowed.session.harvest(&mut dirty).unwrap();
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [marked]);
        let mut known = PageSet::new(borrowed.memory.end());
        borrowed.vm.discarded_pages(&mut known);
        assert_eq!(known.runs().collect::<Vec<_>>(), discarded);
        borrowed.session.stop().unwrap();
        borrowed.end(End::Stays, "").unwrap();
        assert!(serving.join().unwrap().is_ok());
    });
}

fn ram_pages() -> impl DoubleEndedIterator<Item = PageIndex> + ExactSizeIterator {
    (0..usize::try_from(PAGES).unwrap()).map(|page| PageIndex(16 + page as u64))
}

#[test]
fn more_runs_than_a_packet_has_come_in_several() {
    let mut pages = PageSet::new(PageIndex(40_000));
    (0..20_000).for_each(|page| pages.insert_run(PageRun { first: PageIndex(page * 2), pages: 1 }));
    let (near, far) = sockets();
    let (near, mut far) = (Channel::new(near, VMM).unwrap(), Channel::new(far, VMM).unwrap());
    thread::scope(|scope| {
        scope.spawn(|| pages::send_runs(&near, &pages).unwrap());
        let (mut received, mut packets) = (PageSet::new(PageIndex(40_000)), 0);
        loop {
            let (Message::Runs { more, runs }, _) = far.receive("Runs", SOON).unwrap() else { panic!() };
            runs.iter().for_each(|run| received.insert_run(*run));
            packets += 1;
            if !more {
                break;
            }
        }
        assert_eq!((received.len(), packets), (20_000, 20_000_usize.div_ceil(RUNS_MAX)));
    });
}

#[test]
fn a_vm_that_arrives_is_built_loaded_restored_and_runs() {
    let (near, far) = sockets();
    let never = AtomicBool::new(false);
    let machine: Vec<u8> = vec![7; 2 * PIECE_BYTES_MAX + 1];
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(
                near,
                |offer| {
                    assert_eq!((offer.vcpus, offer.ram.as_slice()), (2, &[ram()][..]));
                    Ok((FakeVm::default(), vec![region()]))
                },
                &never,
            )
        });
        let offer = Offer { vcpus: 2, ram: vec![ram()], ..Offer::default() };
        let mut arriving = WaitingVmm::greet(far).unwrap().offer(offer).unwrap();
        assert_eq!(arriving.memory.pages(), PAGES);
        arriving.vm.load_device_state(&vec![9; PIECE_BYTES_MAX + 3]).unwrap();
        let paused = arriving.vm.restore_state(&machine).unwrap();
        arriving.vm.prepare().unwrap();
        arriving.vm.resume(paused).unwrap();
        arriving.end(End::Arrived, "").unwrap();
        let arrived = receiving.join().unwrap().unwrap();
        assert!(arrived.told && arrived.vm.ran && arrived.vm.released == 0);
        assert_eq!(arrived.vm.machine_state, machine);
        assert_eq!(arrived.vm.loaded, vec![9; PIECE_BYTES_MAX + 3]);
    });
}

#[test]
fn a_vm_that_cannot_be_built_is_refused_with_the_vmms_reason() {
    let (near, far) = sockets();
    let never = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiving = scope
            .spawn(|| receive(near, |_| Err::<(FakeVm, _), VmError>("no room".into()), &never).map(drop));
        let refused = WaitingVmm::greet(far).unwrap().offer(Offer::default()).unwrap_err();
        assert!(refused.to_string().contains("no room"), "{refused}");
        assert!(receiving.join().unwrap().unwrap_err().to_string().contains("no room"));
    });
}

/// What an offload process may ask, in any order.
fn request() -> impl Strategy<Value = Message> {
    prop_oneof![
        3 => Just(Message::Pause),
        1 => Just(Message::Resume),
        3 => Just(Message::Quiesce),
        3 => Just(Message::HandOver),
        1 => any::<bool>().prop_map(|running| Message::SaveDeviceState { running: running.then_some(9) }),
        1 => Just(Message::SaveState),
        1 => Just(Message::DeviceStateBytesLeft),
        1 => Just(Message::DiscardedPages),
        1 => any::<u32>().prop_map(|index| Message::Kick { index }),
        1 => Just(Message::LoadDeviceState { piece: vec![1] }),
        1 => Just(Message::MachineState { piece: vec![1] }),
        1 => Just(Message::RestoreState),
        1 => Just(Message::Prepare),
        1 => Just(Message::Release),
        1 => Just(Message::Enough),
        1 => Just(Message::StartTracking),
        1 => Just(Message::StopTracking),
        1 => any::<bool>().prop_map(|telling| Message::Observe { telling }),
        1 => Just(Message::Harvest(Harvest::All)),
        1 => Just(Message::Harvest(Harvest::Final)),
        1 => Just(Message::ProtectBehind { runs: vec![PageRun { first: PageIndex(u64::MAX), pages: 9 }] }),
        1 => Just(Message::GiveBack { runs: vec![PageRun { first: PageIndex(3), pages: u64::MAX }] }),
        1 => Just(Message::AskFigures),
    ]
}

/// What is asked only of a VMM that keeps its rings.
fn is_of_tracking(request: &Message) -> bool {
    use Message::{AskFigures, GiveBack, Harvest, Observe, ProtectBehind, StartTracking, StopTracking};
    matches!(
        request,
        StartTracking
            | StopTracking
            | Observe { .. }
            | Harvest(_)
            | ProtectBehind { .. }
            | GiveBack { .. }
            | AskFigures
    )
}

/// Takes what is lent, as bare messages.
fn take_all_that_is_lent(channel: &mut Channel) -> Vec<OwnedFd> {
    let hello = Message::Hello { newest: VERSION, oldest: VERSION, role: Role::Source };
    channel.send(&hello, &[], SOON).unwrap();
    let (lent, descriptors) = channel.receive("Lent", SOON).unwrap();
    assert!(matches!(lent, Message::Lent { regions: 1, vcpus: 0, .. }), "{lent:?}");
    let (region, _) = channel.receive("Region", SOON).unwrap();
    assert!(matches!(region, Message::Region { tracked: true, .. }), "{region:?}");
    descriptors
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn whatever_is_asked_and_whenever_it_ends_the_guest_runs_here_or_may_run_there(
        requests in prop::collection::vec(request(), 0..25),
        rings in prop::sample::select(vec![Rings::Lend, Rings::Keep]),
        last_words in prop::option::of(prop::collection::vec(any::<u8>(), 1..40)),
    ) {
        let vmm = Vmm { rings, ..Vmm::new() };
        let mut vm = FakeVm { device_state: 1000, ..FakeVm::default() };
        let (near, far) = sockets();
        let may_run_there = thread::scope(|scope| {
            let serving = scope.spawn(|| vmm.lend(near, &mut vm));
            let mut channel = Channel::new(far, VMM).unwrap();
            let _descriptors = take_all_that_is_lent(&mut channel);
            let mut may_run_there = false;
            for request in requests {
                if rings == Rings::Lend && is_of_tracking(&request) {
                    continue;
                }
                channel.send(&request, &[], SOON).unwrap();
                if matches!(
                    request,
                    Message::Kick { .. }
                        | Message::MachineState { .. }
                        | Message::Enough
                        | Message::GiveBack { .. }
                ) {
                    continue;
                }
                let answer = loop {
                    match channel.receive("an answer", SOON).unwrap().0 {
                        Message::Piece { .. } | Message::Vcpus(_) => {}
                        answer => break answer,
                    }
                };
                match (request, answer) {
                    (Message::HandOver, Message::Done) => may_run_there = true,
                    (Message::Resume, Message::Done) => may_run_there = false,
                    _ => {}
                }
            }
            if let Some(bytes) = last_words {
                // It may have been read as a message, or not: what it was is no request that changes anything.
                let harmless = [&[0], &bytes[..]].concat();
                let _ = rustix::net::send(&channel, &harmless, rustix::net::SendFlags::NOSIGNAL);
            }
            drop(channel);
            let ended = serving.join().unwrap();
            match &ended {
                Ok(Ended::Unconfirmed { .. }) => assert!(may_run_there, "{ended:?}"),
                Err(_) => assert!(!may_run_there, "{ended:?}"),
                other => panic!("{other:?}"),
            }
            may_run_there
        });
        prop_assert_eq!(vm.stands_still, may_run_there);
        // And it can be lent again.
        prop_assert!(vmm.tracker.lend().is_ok());
    }

    #[test]
    fn whatever_a_vmm_says_it_is_borrowed_from_whole_or_not_at_all(
        changed in prop_oneof![0..3_usize, Just(9)],
        bytes in prop::collection::vec(any::<u8>(), 0..60),
        regions in 0..3_u32,
        vcpus in 0..2_u32,
        entries in prop_oneof![Just(1024_u32), any::<u32>()],
        pages in prop_oneof![Just(PAGES), any::<u64>()],
        offset in prop_oneof![Just(0_u64), any::<u64>()],
        with_descriptors in any::<bool>(),
    ) {
        let (near, far) = sockets();
        let says = thread::scope(|scope| {
            let vmm = scope.spawn(move || {
                let mut channel = Channel::new(near, OFFLOAD_PROCESS).unwrap();
                channel.receive("Hello", SOON).unwrap();
                let file = File::from(region().file);
                let (_page, page) = LentPage::create(c"page", 1).unwrap();
                let (kernel, _other) = sockets();
                let lent = Message::Lent {
                    version: VERSION,
                    taker: Taker::OffloadProcess,
                    ring_entries: entries,
                    vcpus,
                    regions,
                    vm_id: String::new(),
                    description: Vec::new(),
                };
                let region = Message::Region {
                    slot: SLOT,
                    pages: PageRun { first: PageIndex(16), pages },
                    offset,
                    tracked: true,
                    name: String::new(),
                };
                let vcpu = Message::Vcpu { index: 0, position: 0 };
                let packets = [lent.encode(), region.encode(), vcpu.encode()];
                for (at, packet) in packets.iter().enumerate() {
                    let packet = if at == changed { &bytes } else { packet };
                    let message = Message::decode(packet);
                    let descriptors: &[_] = match (with_descriptors, at) {
                        (false, _) => &[],
                        (true, 0) => &[page.as_fd(), kernel.as_fd()],
                        (true, _) => &[file.as_fd()],
                    };
                    if let Ok(message) = message {
                        let _ = channel.send(&message, descriptors, SOON);
                    } else if !packet.is_empty() {
                        let _ = rustix::net::send(&channel, packet, rustix::net::SendFlags::NOSIGNAL);
                    }
                }
            });
            let borrowed = BorrowedVm::borrow(far);
            vmm.join().unwrap();
            borrowed.map(|borrowed| borrowed.memory.regions().iter().map(|region| region.pages).collect::<Vec<_>>())
        });
        if let Ok(mapped) = says {
            // No more than the file has, where it was said to be.
            prop_assert!(mapped.len() == 1 && with_descriptors, "{mapped:?}");
            prop_assert!((1..=PAGES).contains(&mapped[0].pages), "{mapped:?}");
        }
    }
}
