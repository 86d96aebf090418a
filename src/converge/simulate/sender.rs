//! The sender: which page of a round goes next.

use super::guest::SendOrder;
use super::memory::Memory;
use super::pages::{Run, count, highest, lowest, words};

/// Goes through a round's pages.
#[derive(Debug)]
pub(super) struct Sender {
    order: SendOrder,
    /// The word to go on with.
    cursor: usize,
    /// Runs in the order of their last writing, the next one last.
    queue: Vec<Run>,
}

impl Sender {
    /// Of rounds in this order.
    pub fn new(order: SendOrder) -> Self {
        Self { order, cursor: 0, queue: Vec::new() }
    }

    /// Whether it wants to know when pages were dirtied.
    pub fn asks_for_age(&self) -> bool {
        matches!(self.order, SendOrder::YoungFirst | SendOrder::OldFirst)
    }

    /// A round begins; `runs` are those of its pages whose age is known.
    pub fn round_started(&mut self, memory: &Memory, mut runs: Vec<Run>) {
        let last = memory.ready.words().saturating_sub(1);
        self.cursor = if self.order == SendOrder::FromTheTop { last } else { 0 };
        match self.order {
            SendOrder::YoungFirst => runs.sort_by_key(|run| run.step),
            SendOrder::OldFirst => runs.sort_by_key(|run| std::cmp::Reverse(run.step)),
            SendOrder::Ascending | SendOrder::FromTheTop => runs.clear(),
        }
        self.queue = runs;
    }

    /// Sends up to `room` pages; how many.
    pub fn send(&mut self, memory: &mut Memory, room: usize) -> usize {
        let mut left = room;
        while left > 0 && memory.ready.len() > 0 {
            left -= match self.queue.pop() {
                Some(run) => self.send_run(memory, run, left),
                None => self.send_word(memory, left),
            };
        }
        room - left
    }

    fn send_run(&mut self, memory: &mut Memory, run: Run, room: usize) -> usize {
        let mut sent = 0;
        for (word, mask) in words(run.first, run.pages) {
            let ready = lowest(memory.ready.word(word) & mask, room - sent);
            memory.sent(word, ready);
            sent += count(ready);
            if sent == room {
                // What was sent of it is not ready any more.
                self.queue.push(run);
                break;
            }
        }
        sent
    }

    fn send_word(&mut self, memory: &mut Memory, room: usize) -> usize {
        let ready = memory.ready.word(self.cursor);
        let up = self.order != SendOrder::FromTheTop;
        let now = match count(ready) {
            n if n <= room => ready,
            _ if up => lowest(ready, room),
            _ => highest(ready, room),
        };
        memory.sent(self.cursor, now);
        if now == ready {
            let words = memory.ready.words();
            self.cursor = if up { (self.cursor + 1) % words } else { (self.cursor + words - 1) % words };
        }
        count(now)
    }
}
