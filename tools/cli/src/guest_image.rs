//! `ringferry guest-image`: writes the built-in test guest to a file, for QEMU and other VMMs.

use std::io::{IsTerminal, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use ringferry_testvm::IMAGE;

use crate::output::Output;

/// Write the test guest, a multiboot image, to a file
///
/// It boots in `ringferry run` and, unchanged, in QEMU. Its command line is that of `ringferry run`: vcpus=N,
/// fill=SIZE, each=WORK, vcpuN=WORK.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ringferry guest-image guest.img
  qemu-system-x86_64 -accel kvm -smp 2 -m 1G -nographic -kernel guest.img -append 'vcpus=2 each=pattern:random'
  ringferry guest-image - | sha256sum")]
pub struct Args {
    /// Where to write it; - is standard output
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Writes it.
pub fn run(args: Args, output: Output) -> anyhow::Result<ExitCode> {
    if IMAGE.is_empty() {
        bail!("the test guest is an x86-64 program, and this build is for another processor");
    }
    if args.file.as_os_str() != "-" {
        std::fs::write(&args.file, IMAGE)
            .with_context(|| format!("cannot write the guest image to {}", args.file.display()))?;
    } else if stdout().is_terminal() {
        bail!("the guest image is not written to a terminal: name a file, or redirect standard output");
    } else {
        output.binary(IMAGE)?;
    }
    Ok(ExitCode::SUCCESS)
}
