//! `ringferry adjust`: changes the terms of a migration that is under way.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::monitor::{Answer, Line, MonitorArg, Request};
use crate::output::Output;
use crate::printable::printable;
use crate::terms::TermsArgs;

/// How long `run` may take to answer: it answers at once.
const PATIENCE: Duration = Duration::from_secs(10);

const EXAMPLES: &str = "\
Examples, while `ringferry send` is at it:
  ringferry adjust --downtime-limit 1s
  ringferry adjust --policy auto-converge --throttle-max 80
  ringferry adjust --max-bandwidth 50MB/s --deadline 60s";

/// Change the limits or the policy of the migration that is under way
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    monitor: MonitorArg,

    #[command(flatten)]
    terms: TermsArgs,
}

/// Runs the command.
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    let mut line = Line::connect(&args.monitor.path())?;
    line.ask(&Request::Adjust(args.terms))?;
    match line.answer(Some(PATIENCE))? {
        Some(Answer::Adjusted) => {
            if !output.json() {
                output.line("the migration goes on under the new terms")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Answer::Failed(why)) => bail!("{}", printable(&why)),
        _ => bail!("`ringferry run` did not answer: has the VM moved already?"),
    }
}
