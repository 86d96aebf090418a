//! The test guest: a multiboot image that runs the workload on every processor, and nothing else.
//!
//! `boot` brings each processor to 64-bit user mode, where all of this runs: under KVM flavours that emulate
//! everything else, it is native. The first processor reads the command line and the memory map, publishes the
//! plan in the mailbox, and then works like the others.
//!
//! Compiled by `tools/testvm/build.rs`, without cargo: no dependencies, no allocator, no standard library.
#![no_std]
#![no_main]
#![allow(dead_code, reason = "the shared workload has parts that only the host uses")]

mod boot;
mod clock;
mod cpu;
mod memory;
mod multiboot;
mod serial;
#[path = "../src/workload/mod.rs"]
mod workload;

use core::fmt::Display;
use core::sync::atomic::{AtomicBool, Ordering};

use cpu::Bare;
use workload::Machine;
use workload::command_line::Config;
use workload::mailbox::{EXIT_FAILED, EXIT_PORT, MAX_VCPUS, WAIT_MAX_US};
use workload::ranges::RangeError;
use workload::setup::{self, Plan, SetupError};
use workload::vcpu::Vcpu;

/// Which processors are here.
static PRESENT: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];
/// Whether the mailbox holds a plan.
static PUBLISHED: AtomicBool = AtomicBool::new(false);

/// How long the first processor waits for the others.
const START_LIMIT_MS: u64 = 2_000;

/// Where every processor arrives; `information` is zero on all but the first. `processors` and `tsc_khz` are what CPUID
/// says in ring 0; the second is zero if it does not say.
#[unsafe(no_mangle)]
extern "C" fn guest_main(processor: u64, information: u64, processors: u32, tsc_khz: u32) -> ! {
    let index = usize::try_from(processor).unwrap_or(0);
    PRESENT[index].store(true, Ordering::Release);
    let config = if index == 0 { start(information, processors, tsc_khz) } else { wait_for_plan() };
    let Some(mut vcpu) = Vcpu::attach(Bare, index) else { park() };
    if config.is_some_and(|config| config.stats) {
        serial::work_and_report(vcpu);
    }
    loop {
        vcpu.turn();
    }
}

/// Sets everything up.
fn start(information: u64, processors: u32, tsc_khz: u32) -> Option<Config> {
    cpu::mask_interrupt_controllers();
    setup::clear(&mut Bare);
    let information = multiboot::Information::at(information);
    let line = information.command_line();
    match prepare(&information, line, processors, tsc_khz) {
        Ok(config) => Some(config),
        Err(error) => fail(&error),
    }
}

fn prepare<'a>(
    information: &multiboot::Information,
    line: Result<&'a str, SetupError<'a>>,
    processors: u32,
    tsc_khz: u32,
) -> Result<Config, SetupError<'a>> {
    let config = Config::parse(line?).map_err(SetupError::Config)?;
    let pool = information.usable();
    if pool.as_slice().is_empty() {
        return Err(SetupError::Range(RangeError::TooLarge { wanted: 1, pool: 0 }));
    }
    memory::map(&pool);
    let known = config.tsc_khz.or((tsc_khz > 0).then_some(tsc_khz.into()));
    let tsc_khz = known.unwrap_or_else(clock::measure_tsc_khz);
    let wanted = config.vcpus.unwrap_or((processors as usize).clamp(1, MAX_VCPUS));
    let vcpus = wait_for_processors(wanted, tsc_khz);
    if vcpus < wanted {
        println!("guest: only {vcpus} of {wanted} vCPUs started within {START_LIMIT_MS} ms");
    }
    let plan = Plan::new(pool, vcpus, tsc_khz, &config).map_err(SetupError::Range)?;
    println!(
        "guest: running, vcpus={vcpus} tsc_khz={tsc_khz} ram_kib={}",
        plan.pool.pages().saturating_mul(4)
    );
    plan.publish(&mut Bare, &config);
    PUBLISHED.store(true, Ordering::Release);
    Ok(config)
}

/// How many processors are here, without a gap in their numbers, once `wanted` are or time is up.
fn wait_for_processors(wanted: usize, tsc_khz: u64) -> usize {
    let deadline = Bare.ticks() + START_LIMIT_MS * tsc_khz;
    loop {
        let present = PRESENT.iter().take(wanted).take_while(|here| here.load(Ordering::Acquire)).count();
        if present == wanted || Bare.ticks() > deadline {
            return present;
        }
        Bare.relax();
    }
}

fn wait_for_plan() -> Option<Config> {
    while !PUBLISHED.load(Ordering::Acquire) {
        Bare.relax();
    }
    None
}

/// Says why the guest cannot go on, everywhere somebody may look, and ends.
fn fail(reason: &impl Display) -> ! {
    println!("guest: cannot run: {reason}");
    setup::publish_failure(&mut Bare, reason);
    cpu::out32(EXIT_PORT, EXIT_FAILED);
    park()
}

/// Nothing to do for this processor, for ever.
fn park() -> ! {
    loop {
        Bare.wait(WAIT_MAX_US);
        Bare.relax();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    fail(info)
}
