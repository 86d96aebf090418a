//! Migrations between two processes under random faults: never do both sides run the VM, never does neither, unless the
//! one that held it was asked to end, and whoever has it in the end has every write of the guest's.
//!
//! `tools/faults` runs many of them; a few run with all other tests.

mod fault;
pub mod random;
mod side;
mod trial;
mod wire;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use self::fault::{Fault, Moment};
use self::random::Random;
use self::trial::{Found, Trial};
use crate::guest::kvm;

/// Migrations, if the environment does not say how many.
const RUNS: u64 = 8;

#[test]
fn whatever_happens_to_a_migration_one_side_has_the_vm_and_every_write_of_its_guest() {
    if !kvm() {
        return;
    }
    let from_environment = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 1_000_000 * 1000;
    let runs = from_environment("RINGFERRY_FAULTS_RUNS").unwrap_or(RUNS);
    let seed = from_environment("RINGFERRY_FAULTS_SEED").unwrap_or_else(now);
    println!("{runs} migrations from seed {seed} on");
    let usual = Trial::start(&mut Random::new(seed)).undisturbed();
    println!("an undisturbed one takes {} ms", usual.as_millis());
    let mut table: BTreeMap<String, BTreeMap<Found, u64>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for seed in seed..seed + runs {
        let (fault, found, all_well) = one(seed, usual);
        *table.entry(fault.to_string()).or_default().entry(found).or_default() += 1;
        if !all_well {
            wrong.push(seed);
        }
    }
    print(&table);
    assert!(wrong.is_empty(), "what must hold was violated, with the seeds {wrong:?}: see above");
}

/// One migration; false if something was violated that must hold.
fn one(seed: u64, usual: Duration) -> (Fault, Found, bool) {
    let mut random = Random::new(seed);
    let (fault, moment) = (Fault::any(&mut random), Moment::any(&mut random));
    let mut trial = Trial::start(&mut random);
    trial.strike(fault, moment, usual);
    let (found, wrong, transcript) = trial.settle(fault);
    if !wrong.is_empty() {
        let wrong = wrong.join("; ");
        println!("seed {seed}, {fault:?} at {moment:?}, the VM was found {found:?}: {wrong}\n{transcript}");
    }
    (fault, found, wrong.is_empty())
}

fn print(table: &BTreeMap<String, BTreeMap<Found, u64>>) {
    let names: Vec<String> = Found::ALL.iter().map(|(_, name)| format!("{name:>12}")).collect();
    println!("{:20}{}", "where the VM was", names.concat());
    for (fault, found) in table {
        let counts = Found::ALL.iter().map(|(place, _)| found.get(place).copied().unwrap_or(0));
        let counts: Vec<String> = counts.map(|count| format!("{count:>12}")).collect();
        println!("{fault:20}{}", counts.concat());
    }
}
