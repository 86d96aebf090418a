//! The hand that writes: goes through a working set in its order, over dirty pages fast and over clean ones at the price of
//! a fault.

use super::guest::{Costs, Order, in_memory};
use super::memory::{Memory, Side};
use super::pages::{Entries, Random, Run, count, lowest, words};
use crate::converge::units::{Pages, whole};

/// Tries to hit a clean page by chance, before it is searched for.
const TRIES: u32 = 16;

/// A writer at work.
#[derive(Clone, Debug)]
pub(super) struct Hand {
    side: Side,
    /// What it dirtied first.
    pub entries: Entries,
    random: Random,
    place: (usize, usize),
    /// Within the place.
    position: usize,
    /// Seconds that it has in hand, or owes.
    credit: f64,
    /// What it knows about its set holds since so many protections.
    known_at: Option<u64>,
    /// Of its set.
    all_written: bool,
    /// The parts of a random order: first page, pages, clean pages, share of the writes.
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    first: usize,
    pages: usize,
    clean: usize,
    writes: f64,
}

/// The parts of a set that are written with different chances.
fn parts(order: Order, (first, pages): (usize, usize)) -> Vec<Part> {
    let part = |first, pages, writes| Part { first, pages, clean: 0, writes };
    match order {
        Order::Cyclic => Vec::new(),
        Order::Random => vec![part(first, pages, 1.0)],
        Order::HotCold { hot, writes } => {
            let hot = in_memory(Pages::floor(pages as f64 * hot.clamp(0.0, 1.0))).min(pages);
            let writes = writes.clamp(0.0, 1.0);
            vec![part(first, hot, writes), part(first + hot, pages - hot, 1.0 - writes)]
        }
    }
}

impl Hand {
    /// A hand that has written nothing; what looks random about it follows from `seed`.
    pub fn new(side: Side, seed: usize) -> Self {
        Self {
            side,
            entries: Entries::default(),
            random: Random::new(seed),
            place: (0, 0),
            position: 0,
            credit: 0.0,
            known_at: None,
            all_written: false,
            parts: Vec::new(),
        }
    }

    /// Goes to another working set, and begins somewhere in it.
    pub fn go_to(&mut self, place: (usize, usize), order: Order) {
        self.place = place;
        self.position = if place.1 > 0 { self.random.below(place.1) } else { 0 };
        self.parts = parts(order, place);
        self.parts.retain(|part| part.pages > 0 && part.writes > 0.0);
        self.known_at = None;
    }

    /// Writes for `seconds`; how many pages were clean. `shared`: others write the same pages.
    pub fn write(
        &mut self,
        memory: &mut Memory,
        seconds: f64,
        costs: Costs,
        step: u32,
        shared: bool,
    ) -> usize {
        if self.place.1 == 0 || seconds <= 0.0 {
            return 0;
        }
        if self.known_at != Some(memory.protections) || shared {
            self.known_at = Some(memory.protections);
            self.all_written = false;
            self.count_clean(memory);
        }
        self.credit += seconds;
        let before = self.entries.len();
        if self.parts.is_empty() {
            self.cyclic(memory, costs, step);
        } else {
            self.by_chance(memory, costs, step);
        }
        self.entries.len() - before
    }

    /// Writes to pages that are written already: whole laps change nothing.
    fn over_written(&mut self, costs: Costs) {
        let writes = whole(self.credit / costs.dirty);
        self.credit = (self.credit - writes as f64 * costs.dirty).max(0.0);
        let laps = usize::try_from(writes).unwrap_or(usize::MAX) % self.place.1;
        self.position = (self.position + laps) % self.place.1;
    }

    fn cyclic(&mut self, memory: &mut Memory, costs: Costs, step: u32) {
        let (first, pages) = self.place;
        let mut written_in_a_row = 0;
        while self.credit >= costs.dirty {
            if self.all_written || written_in_a_row >= pages {
                self.all_written = true;
                return self.over_written(costs);
            }
            let at = first + self.position;
            let (word, bit) = (at / 64, at % 64);
            let rest = (64 - bit).min(pages - self.position);
            let written = memory.written(self.side, word) >> bit;
            let free = written_pages(written.trailing_ones()).min(rest);
            let went = if free > 0 {
                let can = affordable(self.credit, costs.dirty).min(free);
                self.credit -= can as f64 * costs.dirty;
                written_in_a_row += can;
                can
            } else {
                if self.credit < costs.clean {
                    return;
                }
                let clean = written_pages(written.trailing_zeros()).min(rest);
                let can = affordable(self.credit, costs.clean).min(clean);
                self.credit -= can as f64 * costs.clean;
                for (word, mask) in words(at, can) {
                    memory.write(self.side, word, mask);
                }
                self.entries.push(Run { first: at, pages: can, step });
                written_in_a_row = 0;
                can
            };
            self.position = (self.position + went) % pages;
        }
    }

    fn by_chance(&mut self, memory: &mut Memory, costs: Costs, step: u32) {
        loop {
            let chance: f64 =
                self.parts.iter().map(|part| part.writes * part.clean as f64 / part.pages as f64).sum();
            if chance <= 0.0 || self.credit <= 0.0 {
                self.credit = self.credit.min(0.0);
                return;
            }
            // So many writes hit pages that are written already before one hits a clean page.
            let misses = if chance < 1.0 {
                ((1.0 - self.random.share()).ln() / (1.0 - chance).ln()).floor()
            } else {
                0.0
            };
            self.credit -= misses * costs.dirty;
            if self.credit <= 0.0 {
                self.credit = 0.0;
                return;
            }
            self.credit -= costs.clean;
            let mut pick = self.random.share() * chance;
            let mut chosen = 0;
            for (index, part) in self.parts.iter().enumerate() {
                let weight = part.writes * part.clean as f64 / part.pages as f64;
                if weight > 0.0 {
                    chosen = index;
                    if pick < weight {
                        break;
                    }
                    pick -= weight;
                }
            }
            match self.clean_page(memory, chosen) {
                Some(page) => {
                    memory.write(self.side, page / 64, 1 << (page % 64));
                    self.entries.push(Run { first: page, pages: 1, step });
                    self.parts[chosen].clean -= 1;
                }
                None => self.parts[chosen].clean = 0,
            }
        }
    }

    /// Any clean page of a part.
    fn clean_page(&mut self, memory: &Memory, part: usize) -> Option<usize> {
        let Part { first, pages, .. } = self.parts[part];
        let mut at = first;
        for _ in 0..TRIES {
            at = first + self.random.below(pages);
            if memory.written(self.side, at / 64) >> (at % 64) & 1 == 0 {
                return Some(at);
            }
        }
        let after = words(at, first + pages - at);
        let before = words(first, at - first);
        let clean = |(word, mask): (usize, u64)| {
            let clean = mask & !memory.written(self.side, word);
            (clean != 0).then(|| word * 64 + written_pages(lowest(clean, 1).trailing_zeros()))
        };
        after.chain(before).find_map(clean)
    }

    fn count_clean(&mut self, memory: &Memory) {
        for part in &mut self.parts {
            let clean = words(part.first, part.pages)
                .map(|(word, mask)| count(mask & !memory.written(self.side, word)));
            part.clean = clean.sum();
        }
    }
}

fn written_pages(bits: u32) -> usize {
    usize::try_from(bits).unwrap_or(64)
}

/// How many writes at `cost` each `credit` is enough for.
fn affordable(credit: f64, cost: f64) -> usize {
    usize::try_from(whole(credit / cost)).unwrap_or(usize::MAX)
}
