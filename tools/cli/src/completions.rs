//! `ringferry completions`: the script that lets a shell complete our commands and options.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::output::Output;

/// Print a shell's completion script
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry completions bash > /etc/bash_completion.d/ringferry
  ringferry completions zsh  > ~/.zfunc/_ringferry
  ringferry completions fish > ~/.config/fish/completions/ringferry.fish")]
pub struct Args {
    /// Which shell
    shell: Shell,
}

/// Prints the script.
pub fn run(args: Args, output: Output) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "ringferry", &mut script);
    output.write(&script)?;
    Ok(ExitCode::SUCCESS)
}
