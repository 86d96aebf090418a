//! Each source says what it claims to say: compared with what the library, or KVM's own bitmap, saw of the same guest.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod common;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::bare::{BareVm, CONTROL_PAGES, DATA, Pages, Privilege, Work, install_kick_handler, kvm};
use common::{Guest, Writer, harvest_for, my_counts, profiler};
use ringferry::kvm::RingSize;
use ringferry::track::DirtyTracker;
use ringferry_bpf::{Counting, Options, PAGES_PER_REGION, Profiler, Row, Session, SessionOptions, Source};

fn me() -> u32 {
    u32::try_from(nix::unistd::gettid().as_raw()).unwrap()
}

fn session(options: SessionOptions) -> Option<Session> {
    // Whether it is possible here at all, or noted as skipped.
    profiler(Options::default())?;
    Some(Session::start(SessionOptions { pid: Some(std::process::id()), ..options }).unwrap())
}

/// The row of the VM that this thread made, among those of other tests.
fn my_row(session: &mut Session) -> Row {
    let look = session.look().unwrap();
    let mine = look.vms.iter().find(|vm| vm.vm.creator_tid == me()).expect("the VM is in the inventory");
    let mut rows = look.rows.iter().filter(|row| row.vm_id == mine.vm.id && !row.ended);
    let row = rows.next().expect("its vCPU has a row").clone();
    assert!(rows.next().is_none());
    row
}

#[test]
fn the_inventory_is_what_the_vmm_made() {
    let Some(profiler) = profiler(Options::default()) else { return };
    let Some(mut guest) = Guest::new(Some(1024), Privilege::User) else { return };
    let find = |profiler: &Profiler| {
        let vms = profiler.inventory().unwrap().vms;
        vms.into_iter().find(|vm| vm.creator_tid == me()).expect("the VM is there")
    };
    let vm = find(&profiler);
    assert_eq!(vm.pid, std::process::id());
    assert!(vm.fd.is_some() && vm.has_rings() && !vm.logs());
    let slots: Vec<_> = vm.slots.iter().map(|slot| (slot.slot, slot.first_page, slot.pages)).collect();
    assert_eq!(slots, [(0, 0, CONTROL_PAGES), (1, DATA.0, 8192), (2, DATA.0 + 8192, 8192)]);
    for region in guest.vm.memory().regions() {
        let slot = vm.slots.iter().find(|slot| slot.slot == region.slot.0).unwrap();
        assert_eq!(slot.address, region.host.addr() as u64);
    }
    assert_eq!(vm.vcpus.len(), 1);
    assert_eq!((vm.vcpus[0].vcpu, vm.vcpus[0].ring_entries, vm.vcpus[0].ring_used), (3, 1024, 0));

    guest.session.start().unwrap();
    guest.write(0, 100, 1);
    let vm = find(&profiler);
    assert!(vm.logs());
    // The control slot, with its page tables and mailbox, is not tracked.
    assert_eq!((vm.vcpus[0].ring_used, vm.vcpus[0].tid), (100, Some(me())));
    drop(guest);
    assert!(!profiler.inventory().unwrap().vms.iter().any(|vm| vm.creator_tid == me()));
}

#[test]
fn a_ring_vm_is_unobservable_until_it_logs_and_exact_from_then_on() {
    unobservable_then_exact(false);
}

#[test]
fn the_same_when_every_push_is_counted_where_it_happens() {
    unobservable_then_exact(true);
}

fn unobservable_then_exact(every_push: bool) {
    let Some(mut session) = session(SessionOptions { every_push, ..Default::default() }) else { return };
    let Some(mut guest) = Guest::new(Some(4096), Privilege::User) else { return };
    guest.write(0, 500, 1);
    let row = my_row(&mut session);
    assert_eq!((row.source, row.dirty_pages, row.share), (Source::Unobservable, None, None));

    guest.session.start().unwrap();
    guest.write(0, 500, 2);
    let row = my_row(&mut session);
    assert_eq!((row.source, row.dirty_pages, row.share), (Source::DirtyRingPush, Some(500), Some(1.0)));
    let ring = row.ring.unwrap();
    assert_eq!((ring.used, ring.size, ring.high_water), (500, 4096, 500));

    // Written once already: nothing new until it is recycled.
    guest.write(0, 500, 2);
    assert_eq!(my_row(&mut session).dirty_pages, Some(0));
    assert_eq!(guest.harvest(), 500);
    guest.write(0, 300, 1);
    let row = my_row(&mut session);
    assert_eq!((row.dirty_pages, row.ring.unwrap().used), (Some(300), 300));
    assert!(row.resets > 0 && row.overflows == 0 && row.ring_full_exits == 0);
    guest.session.stop().unwrap();
    my_row(&mut session);
    assert_eq!(my_row(&mut session).source, Source::Unobservable);

    // Logging again: what was counted before does not count twice.
    guest.session.start().unwrap();
    guest.write(0, 200, 1);
    assert_eq!(my_row(&mut session).dirty_pages, Some(200));
}

#[test]
fn ring_full_exits_are_counted_at_both_ends_and_the_high_water_mark_is_the_soft_limit() {
    let Some(mut profiler) = profiler(Options::default()) else { return };
    let Some(mut guest) = Guest::new(Some(1024), Privilege::User) else { return };
    guest.session.start().unwrap();
    guest.write(0, 8192, 1);
    let counts = my_counts(&mut profiler);
    guest.harvest();
    let taken = guest.tracker.snapshot().vcpus[0];
    // The write that fills the ring faults and is logged. Where its page is protected anew, it faults again after the exit.
    let again = match guest.tracker.recycles_without_protecting() {
        Ok(()) => 0,
        Err(_) => taken.ring_full_exits,
    };
    assert_eq!((taken.pages, taken.duplicate_entries), (8192, again));
    assert_eq!((counts.len(), counts[0].pushes, counts[0].vcpu), (1, 8192 + again, 3));
    // 1024 entries less the 64 that KVM keeps in reserve, less 512 on hosts with page-modification logging.
    assert!([960, 448].contains(&counts[0].high_water_entries), "{counts:?}");
    assert_eq!(counts[0].ring_full_exits, taken.ring_full_exits);
    assert_eq!(counts[0].ring_full_exits, counts[0].pushes / u64::from(counts[0].high_water_entries));
    // Other tests of this process may have such exits as well.
    assert!(profiler.totals().unwrap().userspace_exits_31 >= counts[0].ring_full_exits);
}

#[test]
fn a_bitmap_vm_counts_as_many_pages_as_its_bitmap_had() {
    let Some(mut session) = session(SessionOptions::default()) else { return };
    let Some(mut guest) = Guest::new(None, Privilege::User) else { return };
    guest.write(0, 4096, 1);
    assert_eq!(my_row(&mut session).source, Source::Unobservable);
    guest.session.start().unwrap();
    guest.harvest();
    // From this look on, the vCPU's thread is watched.
    let row = my_row(&mut session);
    assert!(matches!(row.source, Source::SpteFastFault | Source::PmlFull), "{row:?}");
    assert_eq!(row.ring, None);
    my_row(&mut session);
    for (first, pages, stride) in [(0, 4096, 1), (1, 1000, 4), (0, 16000, 1)] {
        guest.write(first, pages, stride);
        let row = my_row(&mut session);
        let in_bitmap = guest.harvest();
        assert_eq!(in_bitmap, pages);
        let counted = row.dirty_pages.expect("observable");
        if row.source == Source::SpteFastFault {
            // The control slot's own pages do not log; a few entries may be made twice.
            assert!((pages..=pages + pages / 50 + 16).contains(&counted), "{counted} of {pages}");
        }
    }
}

#[test]
fn the_unique_working_set_and_its_regions_are_the_pages_that_were_written() {
    let Some(mut session) = session(SessionOptions { regions: true, ..Default::default() }) else { return };
    let Some(mut guest) = Guest::new(Some(16384), Privilege::User) else { return };
    guest.session.start().unwrap();
    session.look().unwrap();
    // Every 16th page, twice, with a harvest between: each page is pushed twice.
    guest.write(0, 1000, 16);
    assert_eq!(guest.harvest(), 1000);
    guest.write(0, 1000, 16);
    let look = session.look().unwrap();
    let vm = look.vms.iter().find(|vm| vm.vm.creator_tid == me()).unwrap();
    let set = vm.working_set.as_ref().expect("asked for");
    assert_eq!((set.unique_pages, set.pushes), (1000, 2000));
    let expected: BTreeSet<u64> =
        (0..1000).map(|i| (DATA.0 + i * 16) / PAGES_PER_REGION * PAGES_PER_REGION).collect();
    let found: BTreeSet<u64> = set.regions.iter().map(|region| region.first_page).collect();
    assert_eq!(found, expected);
    assert!(set.regions[0].unique_pages == 32 && set.regions[0].pushes == 64, "{:?}", set.regions[0]);
    assert_eq!(look.totals.dropped_region_pushes, 0);
    // The interval is over: a page that was written before is not in the next set.
    guest.harvest();
    guest.write(5, 1, 1);
    let look = session.look().unwrap();
    let vm = look.vms.iter().find(|vm| vm.vm.creator_tid == me()).unwrap();
    assert_eq!(vm.working_set.as_ref().unwrap().unique_pages, 1);
}

#[test]
fn a_vcpu_for_which_there_is_no_room_is_counted_as_dropped_and_never_mixed_with_another() {
    let Some(mut profiler) = profiler(Options { vcpus_max: Some(1), ..Options::default() }) else { return };
    let Some(mut guest) = Guest::new(Some(4096), Privilege::User) else { return };
    let Some(mut other) = Guest::new(Some(4096), Privilege::User) else { return };
    guest.session.start().unwrap();
    other.session.start().unwrap();
    guest.write(0, 100, 1);
    other.write(0, 70, 1);
    let dropped = profiler.totals().unwrap().dropped_pushes;
    let counted: u64 = profiler.counts().unwrap().iter().map(|vcpu| vcpu.pushes).sum();
    assert_eq!(profiler.counts().unwrap().len(), 1);
    // Other tests of this process push as well: none may be missing from the sum of both.
    assert!(dropped >= 70 && counted + dropped >= 170, "{counted} counted, {dropped} dropped");
}

#[test]
fn a_vcpu_in_the_memory_of_one_that_is_gone_is_not_taken_for_it() {
    let Some(mut profiler) = profiler(Options::default()) else { return };
    for run in 1..=30_u64 {
        let Some(mut guest) = Guest::new(Some(1024), Privilege::User) else { return };
        guest.session.start().unwrap();
        guest.write(0, run, 1);
        drop(guest);
    }
    // 30 VMs of one thread, each dead before the next one: in all likelihood they shared an address.
    let counts = my_counts(&mut profiler);
    assert_eq!(counts.iter().map(|vcpu| vcpu.pushes).sum::<u64>(), 30 * 31 / 2);
    let mut pushes: Vec<u64> = counts.iter().map(|vcpu| vcpu.pushes).collect();
    pushes.sort_unstable();
    assert_eq!(pushes, (1..=30).collect::<Vec<u64>>(), "each VM has its own line");
}

/// Counts the warnings that this thread traces.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl io::Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Warnings {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn of_overflows(&self) -> u64 {
        self.text()
            .lines()
            .filter(|line| line.contains("WARN") && line.contains("dirty ring overflowed"))
            .count() as u64
    }
}

#[test]
fn forced_overflows_are_the_same_number_in_the_kernel_in_the_library_and_in_the_trace() {
    let Some(mut profiler) = profiler(Options::default()) else { return };
    // At CPL 0, where this KVM emulates: it looks at the limit after up to 1024 instructions, 205 writes of this guest.
    let Some(mut guest) = Guest::new(Some(512), Privilege::Kernel) else { return };
    let Some(mut by_index) = common::profiler(Options { counting: Counting::Indices, ..Options::default() })
    else {
        return;
    };
    let warnings = Warnings::default();
    let writer = warnings.clone();
    let mut just_full = 0;
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        guest.session.start().unwrap();
        for _ in 0..20 {
            // One for each attempt, and so a high-water mark for each.
            let Some(mut attempt) = common::profiler(Options::default()) else { return };
            // Limit 448, size 512: over it, unless KVM happens to look in between. It looks after 256 writes, and here
            // first of all after 100.
            guest.write(0, 100, 1);
            guest.write(100, 500, 1);
            let counts = my_counts(&mut attempt);
            drop(attempt);
            // Full to the last entry, none overwritten: only the kernel can tell that from an overflow.
            just_full += u64::from(counts[0].high_water_entries == 512);
            // Once more to see what was overwritten, and to be in step again.
            guest.harvest();
            guest.write(0, 50, 1);
            guest.harvest();
            guest.harvest();
            let counts = my_counts(&mut profiler);
            let figures = guest.tracker.snapshot();
            let context = format!("{counts:?} {}", warnings.text());
            assert_eq!(counts[0].overflows + just_full, figures.vcpus[0].overflows, "{context}");
            assert_eq!(warnings.of_overflows(), figures.vcpus[0].overflows, "{context}");
            let overwritten = counts[0].overflows..=counts[0].overflows * 88;
            assert!(overwritten.contains(&counts[0].overwritten), "{context}");
            let of_indices = my_counts(&mut by_index)[0];
            assert_eq!(of_indices.pushes, counts[0].pushes);
            assert_eq!(of_indices.overflows, counts[0].overflows, "{of_indices:?} {context}");
            assert_eq!(of_indices.overwritten, counts[0].overwritten, "{of_indices:?} {context}");
        }
    });
    match my_counts(&mut profiler)[0].overflows {
        0 => ringferry_testvm::skip("this KVM emulates no kernel-mode guest, so its rings do not overflow"),
        overflows => assert!(overflows >= 5, "{overflows} of 20"),
    }
}

#[test]
fn a_vcpu_that_has_pushed_nothing_yet_is_not_taken_for_one_that_has_ended() {
    let Some(mut indices) = profiler(Options { counting: Counting::Indices, ..Options::default() }) else {
        return;
    };
    let Some(mut guest) = Guest::new(Some(1024), Privilege::User) else { return };
    let told = |profiler: &mut Profiler| -> Vec<_> {
        my_counts(profiler).iter().map(|vcpu| (vcpu.pushes, vcpu.ended)).collect()
    };
    assert_eq!(told(&mut indices), [(0, false)]);
    // Recycled, too, without any push.
    guest.session.start().unwrap();
    guest.harvest();
    assert_eq!(told(&mut indices), [(0, false)]);
    guest.write(0, 10, 1);
    assert_eq!(told(&mut indices), [(10, false)]);
    drop(guest);
    assert_eq!(told(&mut indices), [(10, true)]);
}

#[test]
fn both_ways_of_counting_agree_in_every_figure() {
    let Some(mut pushes) = profiler(Options::default()) else { return };
    let Some(mut indices) = profiler(Options { counting: Counting::Indices, ..Options::default() }) else {
        return;
    };
    let Some(mut guest) = Guest::new(Some(1024), Privilege::User) else { return };
    guest.session.start().unwrap();
    for (first, pages, stride) in [(0, 700, 1), (0, 5000, 2), (7, 100, 100), (0, 16000, 1)] {
        guest.write(first, pages, stride);
        let (by_push, by_index) = (my_counts(&mut pushes)[0], my_counts(&mut indices)[0]);
        assert_eq!(by_index.pushes, by_push.pushes);
        assert_eq!((by_index.ring_full_exits, by_index.resets), (by_push.ring_full_exits, by_push.resets));
        assert_eq!((by_index.overflows, by_index.overwritten), (0, 0));
        guest.harvest();
        // Between two looks at them the indices tell the most at each exit and each recycling.
        assert_eq!(my_counts(&mut indices)[0].high_water_entries, by_push.high_water_entries);
    }
    let id = my_counts(&mut pushes)[0].ring;
    drop(guest);
    let (by_push, by_index) = (my_counts(&mut pushes), my_counts(&mut indices));
    assert!(by_push[0].ended && by_index[0].ended);
    assert_eq!((by_index.len(), by_index[0].ring, by_index[0].pushes), (1, id, by_push[0].pushes));
}

#[test]
fn attached_in_mid_run_both_ways_count_what_comes_after_also_when_logging_stops_and_starts() {
    let Some(mut guest) = Guest::new(Some(4096), Privilege::User) else { return };
    guest.session.start().unwrap();
    guest.write(0, 300, 1);
    for expected in [[500, 800], [100, 300]] {
        let by = |counting| profiler(Options { counting, ..Options::default() });
        let Some(mut pushes) = by(Counting::EveryPush) else { return };
        let Some(mut indices) = by(Counting::Indices) else { return };
        let [first, both] = expected;
        guest.write(1000, first, 2);
        assert_eq!((my_counts(&mut pushes)[0].pushes, my_counts(&mut indices)[0].pushes), (first, first));
        guest.session.stop().unwrap();
        guest.write(1000, first, 2);
        guest.session.start().unwrap();
        guest.write(1000, both - first, 2);
        assert_eq!((my_counts(&mut pushes)[0].pushes, my_counts(&mut indices)[0].pushes), (both, both));
        let of_indices = my_counts(&mut indices)[0];
        assert_eq!((of_indices.overflows, of_indices.overwritten), (0, 0), "{of_indices:?}");
        guest.harvest();
    }
}

#[test]
fn a_nearly_full_ring_that_is_recycled_while_its_vcpu_runs_on_is_no_overflow() {
    // Far apart: each entry takes the kernel 0.1 µs to recycle, and the vCPU pushes more than fits meanwhile.
    const PAGES: u64 = 80_000;
    const STRIDE: u64 = 16;
    let Some(kvm) = kvm() else { return };
    let by = |counting| profiler(Options { counting, ..Options::default() });
    let Some(mut pushes) = by(Counting::EveryPush) else { return };
    install_kick_handler();
    let vm = BareVm::new(&kvm, &[PAGES * STRIDE]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::MAX).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
    let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
    let Some(mut indices) = by(Counting::Indices) else { return };
    let session = tracker.start().unwrap();
    let writer = Writer::start(
        vcpu,
        handle,
        Work::Loop(Pages { first: DATA, pages: PAGES, stride: STRIDE, passes: 1 }),
    );
    let used = |profiler: &Profiler| {
        let vms = profiler.inventory().unwrap().vms;
        let mine = vms.iter().find(|vm| vm.creator_tid == me()).expect("the VM is there");
        mine.vcpus[0].ring_used
    };
    // How much is pushed before the kernel begins to recycle depends on the machine: it is met in some of the rounds.
    for nearly_full in (60_000..65_000).step_by(500) {
        let end = Instant::now() + Duration::from_secs(2);
        while used(&indices) < nearly_full && Instant::now() < end {}
        harvest_for(&session, &vm, 1, Duration::ZERO, || {});
    }
    writer.stop();
    session.stop().unwrap();
    let (by_push, by_index) = (my_counts(&mut pushes)[0], my_counts(&mut indices)[0]);
    assert_eq!((by_push.pushes, by_push.overflows), (by_index.pushes, 0));
    assert_eq!((by_index.overflows, by_index.overwritten), (0, 0), "{by_index:?}");
    assert!(by_index.high_water_entries <= 65_536, "{by_index:?}");
}

#[test]
fn the_library_and_the_profiler_agree_whether_a_ring_overflowed() {
    let Some(mut profiler) = profiler(Options::default()) else { return };
    let Some(mut guest) = Guest::new(Some(1024), Privilege::Kernel) else { return };
    guest.session.start().unwrap();
    guest.write(0, 8192, 1);
    guest.session.stop().unwrap();
    let (kernel, library) =
        (my_counts(&mut profiler)[0].overflows, guest.tracker.snapshot().vcpus[0].overflows);
    // How often is for each to say: each finds out by itself when the ring is in step again, and what comes before that is
    // the same overflow.
    assert_eq!(library > 0, kernel > 0, "library {library}, kernel {kernel}");
}
