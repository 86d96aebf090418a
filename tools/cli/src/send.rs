//! `ringferry send`: asks a VM that `ringferry run` holds to migrate, and shows how it goes.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::display::Display;
use crate::interrupt;
use crate::migrate::MigrateArgs;
use crate::monitor::{Answer, Line, MonitorArg, Request};
use crate::output::Output;
use crate::printable::printable;

const EXAMPLES: &str = "\
Examples, each in a terminal of its own:
  ringferry run --memory 1GiB --vcpus 2
  ringferry receive --listen 127.0.0.1:7000
  ringferry send --to 127.0.0.1:7000 --channels 2

Ctrl-C cancels the migration; the guest goes on at the source.";

/// Migrate the VM that `ringferry run` holds to a waiting `ringferry receive`
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where `ringferry receive` waits
    #[arg(long, value_name = "HOST:PORT")]
    to: String,

    #[command(flatten)]
    monitor: MonitorArg,

    #[command(flatten)]
    migrate: MigrateArgs,
}

#[derive(Serialize)]
struct Unconfirmed<'a> {
    kind: &'static str,
    message: &'a str,
}

/// Runs the command.
pub fn run(args: Args, output: Output) -> Result<ExitCode> {
    let interrupted = interrupt::flag()?;
    interrupt::promise("the migration is cancelled, and the guest goes on at the source");
    let mut line = Line::connect(&args.monitor.path())?;
    line.ask(&Request::Migrate { to: args.to, args: args.migrate })?;
    let mut canceller = Line::new(line.writer()?)?;
    let cancel = move || {
        // If the socket is gone, the reader of it says so.
        let _ = canceller.ask(&Request::Cancel);
    };
    interrupt::cancelling(interrupted, cancel, || show_until_the_end(&mut line, output))
}

fn show_until_the_end(line: &mut Line, output: Output) -> Result<ExitCode> {
    let mut display = Display::new(output);
    loop {
        match line.answer(None)? {
            Some(Answer::Update(update)) => display.show(&update),
            // Answers to other requests.
            Some(Answer::Adjusted | Answer::Resolved(_)) => {}
            Some(Answer::Report(report)) => {
                report.print(output)?;
                report.verdict()?;
                return Ok(ExitCode::SUCCESS);
            }
            Some(Answer::Unconfirmed(text)) => {
                let message = printable(&text);
                if output.json() {
                    output.object(&Unconfirmed { kind: "unconfirmed", message: &message })?;
                }
                output.note(message);
                return Ok(ExitCode::FAILURE);
            }
            Some(Answer::Failed(why)) => bail!("{}", printable(&why)),
            None => bail!("`ringferry run` ended before the migration did"),
        }
    }
}
