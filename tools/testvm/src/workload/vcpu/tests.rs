//! A vCPU on a machine whose clock the test winds: pace, gaps, passes, and changes of work.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::workload::command_line::Config;
use crate::workload::mailbox::{Extent, RESERVED_END};
use crate::workload::ranges::Extents;
use crate::workload::setup::store_work;

const KHZ: u64 = 2_500_000;
const SECOND: u64 = KHZ * 1000;
const MS: u64 = KHZ;

/// RAM that is zero until written, and a clock. Whoever waits sleeps as long as asked, and 60 µs more.
#[derive(Clone, Debug, Default)]
struct Wound {
    ram: Rc<std::cell::RefCell<HashMap<u64, u64>>>,
    now: Rc<Cell<u64>>,
    /// Whether anybody lets it sleep.
    idle_port: bool,
}

impl Wound {
    fn advance(&self, ticks: u64) {
        self.now.set(self.now.get() + ticks);
    }
}

impl Machine for Wound {
    fn load(&self, address: u64) -> u64 {
        self.ram.borrow().get(&address).copied().unwrap_or(0)
    }

    fn store(&mut self, address: u64, value: u64) {
        self.ram.borrow_mut().insert(address, value);
    }

    fn store_pair(&mut self, address: u64, first: u64, second: u64) {
        self.store(address, first);
        self.store(address + 8, second);
    }

    fn ticks(&self) -> u64 {
        // Ten microseconds: a turn takes time.
        self.advance(MS / 100);
        self.now.get()
    }

    fn wait(&mut self, microseconds: u32) {
        if self.idle_port {
            self.advance((u64::from(microseconds) + 60) * MS / 1000);
        }
    }

    fn relax(&self) {
        self.advance(MS / 100);
    }
}

fn start(work: Work, idle_port: bool) -> (Wound, Vcpu<Wound>) {
    let mut machine = Wound { idle_port, ..Wound::default() };
    machine.now.set(1_000 * SECOND);
    let mut config = Config::default();
    config.work[0] = work;
    let pool: Extents = [Extent { first: RESERVED_END / PAGE_BYTES, pages: 100 }].into_iter().collect();
    Plan::new(pool, 1, KHZ, &config).unwrap().publish(&mut machine, &config);
    let vcpu = Vcpu::attach(machine.clone(), 0).unwrap();
    (machine, vcpu)
}

fn stat(machine: &Wound, offset: usize) -> u64 {
    machine.load(stats_address(0) + offset as u64)
}

fn run(machine: &Wound, vcpu: &mut Vcpu<Wound>, ticks: u64) {
    let end = machine.now.get() + ticks;
    while machine.now.get() < end {
        vcpu.turn();
    }
}

fn change(machine: &mut Wound, work: &Work) {
    let sequence_at = control_address(0) + offset_of!(Control, sequence) as u64;
    let sequence = machine.load(sequence_at);
    machine.store(sequence_at, sequence + 1);
    store_work(machine, 0, work);
    machine.store(sequence_at, sequence + 2);
}

fn raise(machine: &mut Wound, offset: usize) {
    let at = control_address(0) + offset as u64;
    machine.store(at, machine.load(at) + 1);
}

const FAST: Work = Work {
    pattern: Pattern::Random,
    content: Content::Zero,
    working_set_pages: 10,
    bytes_per_page: 16,
    pace_per_s: 0,
    lock: false,
};

#[test]
fn a_paced_vcpu_does_what_is_due_and_no_more() {
    for idle_port in [false, true] {
        for (pace_per_s, seconds) in [(1, 10), (7, 4), (100, 4), (12_800, 1), (100_000, 1)] {
            let (machine, mut vcpu) = start(Work { pace_per_s, ..FAST }, idle_port);
            run(&machine, &mut vcpu, seconds * SECOND);
            let writes = stat(&machine, offset_of!(Stats, writes));
            // What falls due while it waits is done when it comes back.
            let slack = pace_per_s / 80 + 2;
            assert!(
                writes.abs_diff(seconds * pace_per_s) <= slack,
                "{pace_per_s}/s: {writes} in {seconds} s"
            );
            let gap = stat(&machine, offset_of!(Stats, longest_gap_ticks));
            assert!(gap < MS, "waiting is no gap: {gap}");
        }
    }
}

#[test]
fn lost_time_is_not_made_up_for() {
    let (machine, mut vcpu) = start(Work { pace_per_s: 10_000, ..FAST }, true);
    run(&machine, &mut vcpu, SECOND / 2);
    machine.advance(SECOND);
    run(&machine, &mut vcpu, SECOND / 2);
    let writes = stat(&machine, offset_of!(Stats, writes));
    assert!((9_700..=10_300).contains(&writes), "{writes}");
}

#[test]
fn an_idle_vcpu_does_nothing_and_looks_every_ten_milliseconds() {
    for idle_port in [false, true] {
        let (mut machine, mut vcpu) = start(Work { pattern: Pattern::Idle, ..FAST }, idle_port);
        let from = machine.now.get();
        for _ in 0..100 {
            vcpu.turn();
        }
        let each = (machine.now.get() - from) / 100;
        assert!((9 * MS..11 * MS).contains(&each), "{each}");
        assert!(stat(&machine, offset_of!(Stats, longest_gap_ticks)) < MS);
        change(&mut machine, &FAST);
        vcpu.turn();
        vcpu.turn();
        assert!(stat(&machine, offset_of!(Stats, writes)) > 0);
    }
}

#[test]
fn a_stall_is_the_longest_gap_until_the_host_begins_anew() {
    for work in [FAST, Work { pace_per_s: 1_000, ..FAST }, Work { pattern: Pattern::ReadOnly, ..FAST }] {
        let (mut machine, mut vcpu) = start(work, true);
        let longest = |machine: &Wound| stat(machine, offset_of!(Stats, longest_gap_ticks));
        run(&machine, &mut vcpu, 30 * MS);
        machine.advance(300 * MS);
        run(&machine, &mut vcpu, 30 * MS);
        assert!((298 * MS..302 * MS).contains(&longest(&machine)), "{}", longest(&machine));
        raise(&mut machine, offset_of!(Control, gap_epoch));
        run(&machine, &mut vcpu, 20 * MS);
        assert_eq!(stat(&machine, offset_of!(Stats, gap_epoch)), 1);
        assert!(longest(&machine) < MS);
    }
}

#[test]
fn the_pause_of_a_switchover_is_counted_apart() {
    let (mut machine, mut vcpu) = start(FAST, true);
    run(&machine, &mut vcpu, 20 * MS);
    machine.advance(700 * MS);
    raise(&mut machine, offset_of!(Control, resume_epoch));
    run(&machine, &mut vcpu, 20 * MS);
    assert_eq!(stat(&machine, offset_of!(Stats, resume_epoch)), 1);
    assert!(stat(&machine, offset_of!(Stats, pause_gap_ticks)) >= 700 * MS);
    assert!(stat(&machine, offset_of!(Stats, longest_gap_ticks)) < MS);
}

#[test]
fn a_clock_that_goes_back_stops_nobody() {
    let paces = [0, 10, 10_000];
    let patterns = [Pattern::Random, Pattern::Idle];
    for (pace_per_s, pattern) in paces.into_iter().flat_map(|pace| patterns.map(|pattern| (pace, pattern))) {
        let (machine, mut vcpu) = start(Work { pace_per_s, pattern, ..FAST }, false);
        run(&machine, &mut vcpu, 100 * MS);
        let before = stat(&machine, offset_of!(Stats, writes));
        machine.now.set(machine.now.get() - 500 * SECOND);
        run(&machine, &mut vcpu, 100 * MS);
        let done = stat(&machine, offset_of!(Stats, writes)) - before;
        assert!(pattern == Pattern::Idle || done >= pace_per_s * 8 / 100, "{done} at {pace_per_s}");
        assert!(stat(&machine, offset_of!(Stats, longest_gap_ticks)) < MS);
    }
}

#[test]
fn work_that_cannot_be_done_is_refused_and_the_old_goes_on() {
    for work in [
        Work { working_set_pages: 101, ..FAST },
        Work { working_set_pages: 0, ..FAST },
        Work { bytes_per_page: 4097, ..FAST },
    ] {
        let (mut machine, mut vcpu) = start(FAST, true);
        change(&mut machine, &work);
        vcpu.turn();
        assert_eq!(stat(&machine, offset_of!(Stats, sequence)), 2);
        assert_eq!(stat(&machine, offset_of!(Stats, refused)), 2);
        assert!(stat(&machine, offset_of!(Stats, writes)) > 0);
        assert_eq!(machine.load(touched_address(0)), 10);
    }
}

#[test]
fn work_half_written_is_not_taken() {
    let (mut machine, mut vcpu) = start(FAST, true);
    let sequence_at = control_address(0) + offset_of!(Control, sequence) as u64;
    machine.store(sequence_at, 1);
    store_work(&mut machine, 0, &Work { working_set_pages: 50, ..FAST });
    vcpu.turn();
    assert_eq!(machine.load(touched_address(0)), 10);
    machine.store(sequence_at, 2);
    vcpu.turn();
    assert_eq!(machine.load(touched_address(0)), 50);
}

proptest! {
    #[test]
    fn counts_are_those_of_the_steps_done(
        pages in 1..40u64, turns in 0..60usize, bytes_per_page in 0..=PAGE_BYTES, again in 0..30usize,
    ) {
        let work = Work { working_set_pages: pages, bytes_per_page, pattern: Pattern::Sequential, ..FAST };
        let (machine, mut vcpu) = start(work, true);
        (0..turns).for_each(|_| { vcpu.turn(); });
        let writes = stat(&machine, offset_of!(Stats, writes));
        prop_assert_eq!(stat(&machine, offset_of!(Stats, passes)), writes / pages);
        // In turn: page p carries the last stamp that is p + 1 modulo the number of pages.
        let share = Plan::read(&machine).unwrap().share_of(0);
        for position in 0..pages {
            let stamp = machine.load(share.page(position) * PAGE_BYTES);
            let expected = if writes > position { writes - (writes - 1 - position) % pages } else { 0 };
            prop_assert_eq!(stamp, expected);
        }
        // Attached anew, it goes on where it stopped.
        let mut vcpu = Vcpu::attach(machine.clone(), 0).unwrap();
        (0..again).for_each(|_| { vcpu.turn(); });
        prop_assert!(stat(&machine, offset_of!(Stats, writes)) >= writes + again as u64);
    }
}
