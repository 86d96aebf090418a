//! `ringferry bench`: what can be measured.

use std::process::ExitCode;

use clap::Subcommand;

use crate::output::Output;

mod bursts;
mod converge;
mod migrate;
mod send;
mod track;

/// Measure this machine, and what Ringferry makes of it
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry bench send             what the transport moves here, beside plain send and receive
  ringferry bench migrate          a real guest and a shaped link, under one policy or several
  ringferry bench converge         the same decisions for simulated guests and links
  ringferry bench send --help      the options of one of them, with examples")]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand, Debug)]
enum Bench {
    Converge(converge::Args),
    Migrate(migrate::Args),
    Send(send::Args),
    Track(track::Args),
}

impl Args {
    /// Whether it holds a VM of its own while it talks.
    pub fn holds_vm(&self) -> bool {
        matches!(self.bench, Bench::Migrate(_))
    }
}

/// Runs one of them.
///
/// # Errors
///
/// That one's.
pub fn run(args: Args, output: Output) -> anyhow::Result<ExitCode> {
    match args.bench {
        Bench::Converge(args) => converge::run(&args, output),
        Bench::Migrate(args) => migrate::run(&args, output),
        Bench::Send(args) => send::run(args, output),
        Bench::Track(args) => track::run(args, output),
    }
}
