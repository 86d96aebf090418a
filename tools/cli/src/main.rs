//! The binary `ringferry`: what can be asked, and how an error is told.
//!
//! Each command is a module with `Args` (what clap parses) and `run`. This file owns the list of them, the
//! options that all of them have, and the exit codes: 0 for success, 1 for failure, 2 for wrong usage.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ringferry_testvm::TestVmError;
use tracing::level_filters::LevelFilter;

mod adjust;
mod arrival;
mod background;
mod bars;
mod bench;
mod clients;
mod completions;
mod cross_check;
mod demo;
mod display;
mod doctor;
mod guest;
mod guest_image;
mod interrupt;
mod landing;
mod machine;
mod memory_budget;
mod migrate;
mod monitor;
mod offload;
mod offload_vmm;
mod output;
mod printable;
mod receive;
mod receiving_process;
mod report;
mod resolve;
mod run;
mod sandbox;
mod scenario;
mod send;
mod sizes;
mod terms;
mod told;
mod two_processes;
mod vm_description;

use output::Output;

/// Ferries a running KVM guest's memory to another host, following the per-vCPU dirty rings.
#[derive(Parser, Debug)]
#[command(name = "ringferry", version, arg_required_else_help = true, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print one JSON object per line on standard output instead of text
    #[arg(long, global = true, display_order = 1000)]
    json: bool,

    /// Log to standard error: -v what happens, -vv details, -vvv everything (warnings are always shown)
    #[arg(short, long, global = true, display_order = 1001, action = clap::ArgAction::Count)]
    verbose: u8,
}

const EXAMPLES: &str = "\
Examples:
  ringferry demo                   move a real guest between two processes, and prove it whole
  ringferry doctor                 what this machine can do, and what to do about the rest
  ringferry help demo              the options of one command, with examples

Exit codes: 0 success, 1 failure, 2 wrong usage.";

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::Args),
    Run(run::Args),
    Send(send::Args),
    Adjust(adjust::Args),
    Resolve(resolve::Args),
    Receive(receive::Args),
    Offload(offload::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    GuestImage(guest_image::Args),
    Completions(completions::Args),
}

impl Command {
    /// Whether it holds a VM, which must not stand still or end because of what becomes of its output.
    fn holds_vm(&self) -> bool {
        match self {
            Self::Demo(_) | Self::Run(_) | Self::Receive(_) => true,
            Self::Bench(bench) => bench.holds_vm(),
            _ => false,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = match output(&cli) {
        Ok(output) => output,
        Err(error) => {
            // There is nobody left to tell if standard error is gone.
            let _ = writeln!(io::stderr(), "error: nothing can be printed: {error}");
            return ExitCode::FAILURE;
        }
    };
    log_to_stderr(cli.verbose, output);
    let result = match cli.command {
        Command::Demo(args) => demo::run(args, output),
        Command::Run(args) => run::run(args, output),
        Command::Send(args) => send::run(args, output),
        Command::Adjust(args) => adjust::run(args, output),
        Command::Resolve(args) => resolve::run(&args, output),
        Command::Receive(args) => receive::run(&args, output),
        Command::Offload(args) => offload::run(args, output),
        Command::Bench(args) => bench::run(args, output),
        Command::Doctor(args) => doctor::run(args, output),
        Command::GuestImage(args) => guest_image::run(args, output),
        Command::Completions(args) => completions::run(args, output),
    };
    let code = result.unwrap_or_else(|error| {
        output.error(&error);
        exit_code(&error)
    });
    if output.finish() { code } else { ExitCode::FAILURE }
}

fn output(cli: &Cli) -> io::Result<Output> {
    let output = Output::new(cli.json)?;
    if cli.command.holds_vm() { output.for_vm() } else { Ok(output) }
}

/// Wrong usage is also what only the test VMM knows to be wrong, such as RAM that its regions do not divide, and terms
/// that contradict each other.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let of_vm = matches!(error.downcast_ref(), Some(TestVmError::Config { .. }));
    if of_vm || error.is::<terms::WrongTerms>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

fn log_to_stderr(verbose: u8, output: Output) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_max_level(level).with_ansi(colour);
    // What the subscriber says of its own writes would panic where standard error is gone.
    log.with_writer(move || output.log()).log_internal_errors(false).init();
}
