//! A vCPU at work: steps, counts, pace, and the gaps it feels.
//!
//! # The proof
//!
//! A page write is three stores that whoever stops the vCPU sees in this order, each whole:
//!
//! 1. the intent: which page, and the stamp it carries now;
//! 2. the page's header: the new stamp, which is `writes + 1`, and the tag; the body follows, word by word;
//! 3. the counts: `writes`, now the new stamp, and `stamp_sum`, grown by new − old.
//!
//! So in a stopped VM, if no page carries a stamp above `writes`, the stamps of the vCPU's pages add up to
//! `stamp_sum`. If one does, it is the intent's page with `writes + 1`: the write in flight, whose old stamp the
//! intent has. A page that is older than it should be carries a smaller stamp, so the sum gives it away.

use core::mem::offset_of;

use super::Machine;
use super::command_line::{Content, Pattern, Work};
use super::mailbox::{
    Control, Header, PAGE_BYTES, Stats, VcpuState, WAIT_MAX_US, control_address, header_field, stats_address,
    touched_address,
};
use super::page::{HEADER_WORDS, Tag};
use super::pattern::Positions;
use super::ranges::Extents;
use super::setup::{Plan, load_work};

/// Most steps between two looks at clock and control page.
const STEPS_PER_TURN: u64 = 16;
/// A paced vCPU that waits, waits at least so long: a wait costs an exit or two.
const PACE_QUANTUM_US: u64 = 2_000;
/// A paced vCPU makes up for so much lost time; work that was due before is never done.
const CATCH_UP_PER_S: u64 = 50;

/// The lock that all vCPUs share.
const LOCK: u64 = header_field(offset_of!(Header, lock));

/// A vCPU of the guest.
#[derive(Debug)]
pub struct Vcpu<M> {
    machine: M,
    index: usize,
    tsc_khz: u64,
    share: Extents,
    fill_first: u64,
    fill_left: u64,
    filled_pages: u64,
    touched_pages: u64,

    work: Work,
    sequence: u64,
    positions: Positions,
    /// The tag of every page it writes, without the page.
    tag: u64,
    body: bool,
    steps_per_turn: u64,
    /// The next turn takes the lock.
    locks: bool,

    writes: u64,
    stamp_sum: u64,
    passes: u64,
    reads: u64,
    compute_steps: u64,
    steps_left_in_pass: u64,

    clock: Clock,
    pace: Pace,
}

/// What the vCPU knows of its own running.
#[derive(Debug)]
struct Clock {
    /// When it last looked, or meant to come back.
    expected: u64,
    longest_gap: u64,
    gap_epoch: u64,
    resume_epoch: u64,
}

/// How far the vCPU is with what it should do.
#[derive(Debug)]
struct Pace {
    since: u64,
    steps: u64,
}

impl<M: Machine> Vcpu<M> {
    /// vCPU `index` of the guest whose mailbox `machine` holds: at its start, or where it was stopped between
    /// two turns. `None` if there is no running guest, or it has no such vCPU.
    pub fn attach(machine: M, index: usize) -> Option<Self> {
        let plan = Plan::read(&machine).filter(|plan| index < plan.vcpus)?;
        let share = plan.shares[index];
        let work = load_work(&machine, index)?;
        let stats = |offset| machine.load(stats_address(index) + offset as u64);
        let control = |offset| machine.load(control_address(index) + offset as u64);
        let filled_pages = stats(offset_of!(Stats, filled_pages));
        let mut vcpu = Self {
            index,
            tsc_khz: plan.tsc_khz,
            share: plan.share_of(index),
            fill_first: share.fill_first,
            fill_left: share.fill_pages.saturating_sub(filled_pages),
            filled_pages,
            touched_pages: machine.load(touched_address(index)),
            work,
            sequence: control(offset_of!(Control, sequence)),
            positions: Positions::new(work.pattern, 1, 0),
            tag: 0,
            body: false,
            steps_per_turn: 1,
            locks: false,
            writes: stats(offset_of!(Stats, writes)),
            stamp_sum: stats(offset_of!(Stats, stamp_sum)),
            passes: stats(offset_of!(Stats, passes)),
            reads: stats(offset_of!(Stats, reads)),
            compute_steps: stats(offset_of!(Stats, compute_steps)),
            steps_left_in_pass: 0,
            clock: Clock {
                expected: machine.ticks(),
                longest_gap: stats(offset_of!(Stats, longest_gap_ticks)),
                gap_epoch: stats(offset_of!(Stats, gap_epoch)),
                resume_epoch: stats(offset_of!(Stats, resume_epoch)),
            },
            pace: Pace { since: machine.ticks(), steps: 0 },
            machine,
        };
        if !vcpu.begin(work) {
            return None;
        }
        vcpu.set_state();
        Some(vcpu)
    }

    /// The machine it runs on.
    pub fn machine(&mut self) -> &mut M {
        &mut self.machine
    }

    /// Does some work: a few steps, a page of the fill, or a wait of at most [`WAIT_MAX_US`]. Gives the time at
    /// which it began.
    #[inline]
    pub fn turn(&mut self) -> u64 {
        let now = self.look_at_clock();
        self.look_at_control();
        if self.fill_left > 0 {
            self.fill_page();
            return now;
        }
        let steps = if self.work.pattern == Pattern::Idle { 0 } else { self.steps_due(now) };
        if steps == 0 {
            self.wait(now);
            return now;
        }
        self.pace.steps += steps;
        let locked = self.locks;
        if locked {
            self.lock();
        }
        match self.work.pattern {
            Pattern::Idle => {}
            Pattern::ReadOnly => self.read_pages(steps),
            Pattern::ComputeOnly => self.compute(steps),
            _ => {
                for _ in 0..steps {
                    self.write_page();
                }
            }
        }
        self.count_passes(steps);
        if locked {
            self.unlock();
        }
        self.locks = self.work.lock && !locked;
        now
    }

    fn lock(&mut self) {
        self.machine.set_kernel_mode(true);
        while self.machine.swap(LOCK, 1) != 0 {
            while self.machine.load(LOCK) != 0 {
                self.machine.relax();
            }
        }
    }

    fn unlock(&mut self) {
        self.machine.store(LOCK, 0);
        self.machine.set_kernel_mode(false);
    }

    /// The time since the last turn was spent on purpose, and is no gap.
    pub fn forget_time(&mut self) {
        self.clock.expected = self.machine.ticks();
    }

    #[inline]
    fn write_page(&mut self) {
        let page = self.share.page(self.positions.take());
        let address = page * PAGE_BYTES;
        let old = self.machine.load(address);
        let new = self.writes + 1;
        self.set_pair(offset_of!(Stats, intent_page), page, old);
        self.machine.store_pair(address, new, self.tag | page);
        if self.body {
            self.write_body(page, new);
        }
        self.writes = new;
        self.stamp_sum = self.stamp_sum.wrapping_add(new).wrapping_sub(old);
        self.set_pair(offset_of!(Stats, writes), new, self.stamp_sum);
    }

    fn write_body(&mut self, page: u64, stamp: u64) {
        let tag = Tag::new(page, self.index, self.work.content, self.work.bytes_per_page);
        self.machine.store_words(page * PAGE_BYTES + HEADER_WORDS * 8, tag.body(stamp));
    }

    fn read_pages(&mut self, steps: u64) {
        for _ in 0..steps {
            let page = self.share.page(self.positions.take());
            self.machine.load(page * PAGE_BYTES);
        }
        self.reads += steps;
        self.set(offset_of!(Stats, reads), self.reads);
    }

    fn compute(&mut self, steps: u64) {
        for _ in 0..steps {
            // Half a microsecond that neither compiler nor CPU can shorten: each round needs the one before.
            let mut x = self.compute_steps;
            for _ in 0..256 {
                x = core::hint::black_box(x.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1);
            }
            self.compute_steps += 1;
        }
        self.set(offset_of!(Stats, compute_steps), self.compute_steps);
    }

    /// Body before header: a page with the tag is complete.
    fn fill_page(&mut self) {
        let page = self.share.page(self.fill_first + self.filled_pages);
        let tag = Tag::new(page, self.index, Content::Random, PAGE_BYTES);
        self.machine.store_words(page * PAGE_BYTES + HEADER_WORDS * 8, tag.body(0));
        self.machine.store_pair(page * PAGE_BYTES, 0, tag.word());
        self.filled_pages += 1;
        self.fill_left -= 1;
        self.set(offset_of!(Stats, filled_pages), self.filled_pages);
        if self.fill_left == 0 {
            // First touches are slow by nature; gaps are those of the work.
            self.clock.longest_gap = 0;
            self.set(offset_of!(Stats, longest_gap_ticks), 0);
            self.pace = Pace { since: self.machine.ticks(), steps: 0 };
            self.set_state();
        }
    }

    #[inline]
    fn count_passes(&mut self, steps: u64) {
        if steps < self.steps_left_in_pass {
            self.steps_left_in_pass -= steps;
            return;
        }
        let beyond = steps - self.steps_left_in_pass;
        let pages = self.work.working_set_pages;
        self.passes += 1 + beyond / pages;
        self.steps_left_in_pass = pages - beyond % pages;
        self.set(offset_of!(Stats, passes), self.passes);
    }

    /// Takes the time, and notes how long the vCPU has not run.
    #[inline]
    fn look_at_clock(&mut self) -> u64 {
        let epoch_at = control_address(self.index) + offset_of!(Control, resume_epoch) as u64;
        let mut epoch = self.machine.load(epoch_at);
        let mut now = self.machine.ticks();
        // A switchover between those two, or after them: only a time taken after it includes its pause.
        let again = self.machine.load(epoch_at);
        if again != epoch {
            epoch = again;
            now = self.machine.ticks();
        }
        // The clock of another host may be behind.
        let gap = now.saturating_sub(self.clock.expected);
        self.clock.expected = now;
        if epoch != self.clock.resume_epoch {
            self.clock.resume_epoch = epoch;
            self.set(offset_of!(Stats, pause_gap_ticks), gap);
            self.set(offset_of!(Stats, resume_epoch), epoch);
            return now;
        }
        let gap_epoch =
            self.machine.load(control_address(self.index) + offset_of!(Control, gap_epoch) as u64);
        if gap_epoch != self.clock.gap_epoch {
            self.clock.gap_epoch = gap_epoch;
            self.clock.longest_gap = 0;
            self.set(offset_of!(Stats, longest_gap_ticks), 0);
            self.set(offset_of!(Stats, gap_epoch), gap_epoch);
        } else if gap > self.clock.longest_gap {
            self.clock.longest_gap = gap;
            self.set(offset_of!(Stats, longest_gap_ticks), gap);
        }
        now
    }

    /// Takes over a new control page, if there is one.
    #[inline]
    fn look_at_control(&mut self) {
        let sequence_at = control_address(self.index) + offset_of!(Control, sequence) as u64;
        let sequence = self.machine.load(sequence_at);
        if sequence == self.sequence || sequence % 2 == 1 {
            return;
        }
        let work = load_work(&self.machine, self.index);
        if self.machine.load(sequence_at) != sequence {
            // Changed meanwhile: the next turn looks again.
            return;
        }
        self.sequence = sequence;
        if !work.is_some_and(|work| self.begin(work)) {
            self.set(offset_of!(Stats, refused), sequence);
        }
        self.set(offset_of!(Stats, sequence), sequence);
    }

    /// Does `work` from now on, if the share is large enough for it.
    fn begin(&mut self, work: Work) -> bool {
        let pages = work.working_set_pages;
        if pages == 0 || pages > self.share.pages() || work.bytes_per_page > PAGE_BYTES {
            return false;
        }
        if pages > self.touched_pages {
            // Said before any page beyond is stamped.
            self.touched_pages = pages;
            self.machine.store(touched_address(self.index), pages);
        }
        self.work = work;
        let tag = Tag::new(0, self.index, work.content, work.bytes_per_page);
        self.tag = tag.word();
        self.body = tag.body_words > 0;
        self.steps_per_turn = (PAGE_BYTES / work.bytes_per_page.max(1)).clamp(1, STEPS_PER_TURN);
        self.positions = Positions::new(work.pattern, pages, self.writes + ((self.index as u64) << 56));
        self.steps_left_in_pass = pages;
        self.locks = work.lock;
        self.pace = Pace { since: self.machine.ticks(), steps: 0 };
        true
    }

    /// How many steps to do now; 0: it is too early for the next one.
    #[inline]
    fn steps_due(&mut self, now: u64) -> u64 {
        if self.work.pace_per_s == 0 {
            return self.steps_per_turn;
        }
        // The clock of another host may be behind.
        let Some(elapsed) = now.checked_sub(self.pace.since) else {
            self.pace = Pace { since: now, steps: 0 };
            return 1;
        };
        let due = scale(elapsed, self.work.pace_per_s, self.tsc_khz * 1000).saturating_sub(self.pace.steps);
        let catches_up = if self.work.lock { 0 } else { self.work.pace_per_s / CATCH_UP_PER_S };
        if due > catches_up + 1 {
            self.pace = Pace { since: now, steps: 0 };
            return 1;
        }
        due.min(self.steps_per_turn)
    }

    /// Waits until there is something to do, or to look.
    fn wait(&mut self, now: u64) {
        let per_ms = self.tsc_khz;
        let latest = now + per_ms * u64::from(WAIT_MAX_US) / 1000;
        let until = if self.work.pattern == Pattern::Idle {
            latest
        } else {
            let next = scale(self.pace.steps + 1, per_ms * 1000, self.work.pace_per_s);
            let earliest = now + per_ms * PACE_QUANTUM_US / 1000;
            // One more: both divisions round down.
            (self.pace.since.saturating_add(next) + 1).clamp(earliest, latest)
        };
        self.clock.expected = until;
        // The second time: the VMM may have been called away from the first.
        for _ in 0..2 {
            let left = until.saturating_sub(self.machine.ticks());
            let microseconds = u32::try_from(scale(left, 1000, per_ms)).unwrap_or(WAIT_MAX_US);
            if microseconds == 0 {
                break;
            }
            self.machine.wait(microseconds.min(WAIT_MAX_US));
        }
        // Where nobody takes the CPU. More than ever was left: the clock is another host's now.
        while (1..=latest - now).contains(&until.saturating_sub(self.machine.ticks())) {
            self.machine.relax();
        }
    }

    fn set_state(&mut self) {
        let state = if self.fill_left > 0 { VcpuState::Filling } else { VcpuState::Working };
        self.set(offset_of!(Stats, state), state as u64);
    }

    #[inline]
    fn set(&mut self, offset: usize, value: u64) {
        self.machine.store(stats_address(self.index) + offset as u64, value);
    }

    #[inline]
    fn set_pair(&mut self, offset: usize, first: u64, second: u64) {
        self.machine.store_pair(stats_address(self.index) + offset as u64, first, second);
    }
}

/// `value × numerator / denominator`, saturating; 0 if the denominator is.
#[inline]
fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    let product = u128::from(value) * u128::from(numerator);
    product.checked_div(u128::from(denominator)).map_or(0, |q| u64::try_from(q).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
