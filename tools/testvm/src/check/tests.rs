//! The workload under the checker: stopped between any two of its stores, and with any page rolled back.

use std::cell::Cell;

use proptest::prelude::*;
use ringferry::GuestMemory;

use super::*;
use crate::config::Config as VmConfig;
use crate::memory::Ram;
use crate::workload::command_line::{Config, Content, Pattern, Work};
use crate::workload::mailbox::{Extent, RESERVED_END, control_address};
use crate::workload::ranges::Extents;
use crate::workload::setup::store_work;
use crate::workload::vcpu::Vcpu;

/// One store: what whoever stops a vCPU sees all of or nothing.
#[derive(Clone, Copy, Debug)]
struct Store {
    /// Who: a vCPU, or the host.
    by: Option<usize>,
    address: u64,
    first: u64,
    second: Option<u64>,
}

impl Store {
    fn page(&self) -> u64 {
        self.address / PAGE_BYTES
    }

    fn apply(&self, machine: &mut HostMachine) {
        machine.store(self.address, self.first);
        if let Some(second) = self.second {
            machine.store(self.address + 8, second);
        }
    }

    /// Whether it says that a page write is done.
    fn is_commit(&self) -> bool {
        self.by.is_some_and(|vcpu| self.address == stats_address(vcpu))
    }

    /// Whether it says that a page write or a page of the fill is done.
    fn is_count(&self) -> bool {
        let filled = |vcpu| stats_address(vcpu) + offset_of!(Stats, filled_pages) as u64;
        self.is_commit() || self.by.is_some_and(|vcpu| self.address == filled(vcpu))
    }
}

/// Guest RAM that remembers every store, with a clock that it advances itself.
#[derive(Debug)]
struct Recorder {
    machine: HostMachine,
    by: Option<usize>,
    log: Vec<Store>,
    now: Cell<u64>,
}

impl Recorder {
    fn new(memory: &GuestMemory, by: Option<usize>) -> Self {
        Self { machine: HostMachine::new(memory), by, log: Vec::new(), now: Cell::new(1) }
    }
}

impl Machine for Recorder {
    fn load(&self, address: u64) -> u64 {
        self.machine.load(address)
    }

    fn store(&mut self, address: u64, value: u64) {
        self.machine.store(address, value);
        self.log.push(Store { by: self.by, address, first: value, second: None });
    }

    fn store_pair(&mut self, address: u64, first: u64, second: u64) {
        assert!(address.is_multiple_of(16));
        self.machine.store_pair(address, first, second);
        self.log.push(Store { by: self.by, address, first, second: Some(second) });
    }

    fn ticks(&self) -> u64 {
        self.now.set(self.now.get() + 700);
        self.now.get()
    }

    fn wait(&mut self, microseconds: u32) {
        self.now.set(self.now.get() + u64::from(microseconds) * 1000);
    }

    fn relax(&self) {
        self.now.set(self.now.get() + 1000);
    }
}

/// What happens to a guest with two vCPUs.
#[derive(Clone, Debug)]
enum Action {
    /// So many turns of each vCPU; `order` says how their stores interleave.
    Turns { turns: [usize; 2], order: Vec<bool> },
    /// The host gives a vCPU other work.
    Work { vcpu: usize, work: Work },
}

const VCPUS: usize = 2;
const RAM_BYTES: u64 = 8 << 20;
const FIRST: u64 = RESERVED_END / PAGE_BYTES;

fn ram() -> Ram {
    Ram::new(&VmConfig { memory_bytes: RAM_BYTES, regions: 3, ..VmConfig::default() }, None).unwrap()
}

fn works() -> impl Strategy<Value = Work> {
    let pattern = prop::sample::select(&Pattern::ALL[..]).prop_map(|(pattern, _)| pattern);
    let content = prop::sample::select(&Content::ALL[..]).prop_map(|(content, _)| content);
    let pace = prop_oneof![Just(0u64), 1..100_000u64];
    (pattern, content, 1..7u64, 0..80u64, pace, any::<bool>()).prop_map(
        |(pattern, content, working_set_pages, bytes_per_page, pace_per_s, lock)| Work {
            pattern,
            content,
            working_set_pages,
            bytes_per_page,
            pace_per_s,
            lock,
        },
    )
}

fn scripts() -> impl Strategy<Value = (Config, Vec<Action>)> {
    let first = (works(), works(), 0..3u64);
    let turns = ([0..5usize, 0..5usize], prop::collection::vec(any::<bool>(), 50));
    let action = prop_oneof![
        3 => turns.prop_map(|(turns, order)| Action::Turns { turns, order }),
        1 => (0..VCPUS, works()).prop_map(|(vcpu, work)| Action::Work { vcpu, work }),
    ];
    (first, prop::collection::vec(action, 1..7)).prop_map(|((zero, one, fill_pages), actions)| {
        let mut config = Config { fill_pages, ..Config::default() };
        (config.work[0], config.work[1]) = (zero, one);
        (config, actions)
    })
}

/// All stores of a guest that lives through `actions`, and how many of them are the setup's.
fn history(config: &Config, actions: &[Action]) -> (Vec<Store>, usize) {
    let ram = ram();
    let mut host = Recorder::new(ram.memory(), None);
    // A hole, and an end of the region in the middle.
    let pool: Extents =
        [Extent { first: FIRST, pages: 9 }, Extent { first: FIRST + 20, pages: 9 }].into_iter().collect();
    Plan::new(pool, VCPUS, HostMachine::TICKS_KHZ, config).unwrap().publish(&mut host, config);
    let mut stores = std::mem::take(&mut host.log);
    let setup = stores.len();
    let mut vcpus: Vec<Vcpu<Recorder>> =
        (0..VCPUS).map(|vcpu| Vcpu::attach(Recorder::new(ram.memory(), Some(vcpu)), vcpu).unwrap()).collect();
    for action in actions {
        match action {
            Action::Turns { turns, order } => {
                for (vcpu, turns) in vcpus.iter_mut().zip(turns) {
                    for _ in 0..*turns {
                        vcpu.turn();
                    }
                }
                let [mut one, mut two] =
                    [0, 1].map(|vcpu: usize| std::mem::take(&mut vcpus[vcpu].machine().log).into_iter());
                for first in order.iter().cycle() {
                    let next = if *first { one.next() } else { two.next() };
                    let Some(store) = next.or_else(|| one.next()).or_else(|| two.next()) else { break };
                    stores.push(store);
                }
            }
            Action::Work { vcpu, work } => {
                let sequence_at = control_address(*vcpu);
                let sequence = host.load(sequence_at);
                host.store(sequence_at, sequence + 1);
                store_work(&mut host, *vcpu, work);
                host.store(sequence_at, sequence + 2);
                stores.append(&mut host.log);
            }
        }
    }
    (stores, setup)
}

fn page_words(machine: &HostMachine, page: u64) -> Vec<u64> {
    (0..PAGE_BYTES / 8).map(|word| machine.load(page * PAGE_BYTES + word * 8)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_guest_stopped_between_any_two_stores_is_consistent((config, actions) in scripts()) {
        let (stores, setup) = history(&config, &actions);
        let ram = ram();
        let mut machine = HostMachine::new(ram.memory());
        let mut commits = 0;
        for (index, store) in stores.iter().enumerate() {
            store.apply(&mut machine);
            if index + 1 < setup {
                continue;
            }
            commits += u64::from(store.is_commit());
            let report = check(ram.memory());
            prop_assert!(report.is_ok(), "after store {} of {}, {:?}: {:?}", index, stores.len(), store, report);
            let writes: u64 = report.unwrap().vcpus.iter().map(|vcpu| vcpu.page_writes).sum();
            prop_assert_eq!(writes, commits);
        }
    }

    #[test]
    fn any_page_that_is_older_than_its_last_write_is_found(
        (config, actions) in scripts(), page in any::<prop::sample::Index>(),
        now in any::<prop::sample::Index>(), then in any::<prop::sample::Index>(),
    ) {
        let (stores, setup) = history(&config, &actions);
        // A page that a vCPU writes, at two moments.
        let written: Vec<u64> = {
            let pages = stores[setup..].iter().filter(|store| store.by.is_some()).map(Store::page);
            let workload: std::collections::BTreeSet<u64> = pages.filter(|page| *page >= FIRST).collect();
            workload.into_iter().collect()
        };
        prop_assume!(!written.is_empty());
        let page = *page.get(&written);
        let moments = setup..=stores.len();
        let now = setup + now.index(moments.clone().count());
        let then = setup + then.index(now - setup + 1);

        let ram = ram();
        let mut machine = HostMachine::new(ram.memory());
        stores[..then].iter().for_each(|store| store.apply(&mut machine));
        let old = page_words(&machine, page);
        stores[then..now].iter().for_each(|store| store.apply(&mut machine));
        let new = page_words(&machine, page);
        prop_assume!(old != new);
        for (word, value) in (0..).zip(&old) {
            machine.store(page * PAGE_BYTES + word * 8, *value);
        }

        // Lost is what the vCPU has since counted as done. A write in flight that is rolled back is one that
        // has not begun, for all one can see.
        let since = || stores[then..now].iter();
        let by = since().find(|store| store.page() == page).and_then(|store| store.by);
        let counted = since().filter(|store| store.by == by).skip_while(|store| store.page() != page).any(Store::is_count);
        let found = check(ram.memory());
        prop_assert_eq!(found.is_err(), counted, "{:?}", found);
    }

    #[test]
    fn counters_that_are_older_than_the_pages_are_found(
        (config, actions) in scripts(), vcpu in 0..VCPUS,
        now in any::<prop::sample::Index>(), then in any::<prop::sample::Index>(),
    ) {
        let (stores, setup) = history(&config, &actions);
        let now = setup + now.index(stores.len() - setup + 1);
        let then = setup + then.index(now - setup + 1);
        let ram = ram();
        let mut machine = HostMachine::new(ram.memory());
        stores[..then].iter().for_each(|store| store.apply(&mut machine));
        let page = stats_address(vcpu) / PAGE_BYTES;
        let old = page_words(&machine, page);
        stores[then..now].iter().for_each(|store| store.apply(&mut machine));
        for (word, value) in (0..).zip(&old) {
            machine.store(page * PAGE_BYTES + word * 8, *value);
        }
        // One write more than the old counters say may be the one in flight; two may not.
        let commits = stores[then..now].iter().filter(|store| store.by == Some(vcpu) && store.is_commit()).count();
        if commits >= 2 {
            prop_assert!(check(ram.memory()).is_err());
        }
    }
}
