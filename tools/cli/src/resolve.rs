//! `ringferry resolve`: decides where a VM is of which nobody knows whether its destination runs it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::migrate::Decision;
use crate::monitor::{Answer, Line, MonitorArg, Request};
use crate::output::Output;
use crate::printable::printable;

/// How long `run` may take to answer: it gives back what it had sent of the VM's RAM, and resumes it.
const PATIENCE: Duration = Duration::from_secs(60);

const EXAMPLES: &str = "\
Examples, after a migration that ended unconfirmed:
  ringferry resolve --keep         the destination does not run the VM: it runs on here
  ringferry resolve --drop         the destination runs the VM: it is gone here

`ringferry receive` says \"the VM runs here\" as soon as it does. A VM that is kept here although it runs there exists twice.";

/// Say where a VM is whose migration ended unconfirmed
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
#[group(id = "decision", required = true, multiple = false, args = ["keep", "drop"])]
pub struct Args {
    /// It does not run at the destination, and never will: it runs on here
    #[arg(long)]
    keep: bool,

    /// It runs at the destination: it is gone here, and `ringferry run` ends
    #[arg(long)]
    drop: bool,

    #[command(flatten)]
    monitor: MonitorArg,
}

/// Runs the command.
pub fn run(args: &Args, output: Output) -> Result<ExitCode> {
    let decision = if args.keep { Decision::Keep } else { Decision::Drop };
    let mut line = Line::connect(&args.monitor.path())?;
    line.ask(&Request::Resolve(decision))?;
    match line.answer(Some(PATIENCE))? {
        Some(Answer::Resolved(decision)) => {
            if !output.json() {
                output.line(decision)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Answer::Failed(why)) => bail!("{}", printable(&why)),
        _ => bail!("`ringferry run` did not answer"),
    }
}
