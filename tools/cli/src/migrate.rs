//! A migration as the command line asks for it: its options, and one run of it with what the guest felt.

use std::time::Duration;

use ringferry::progress::{Parameters, Progress};
use ringferry::source::SourceOptions;
use ringferry::transport::SendOptions;
use serde::{Deserialize, Serialize};

use crate::sizes::{Rate, Time};

/// Options of a migration.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct MigrateArgs {
    /// Data connections, each with its own thread and io_uring
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub channels: u32,

    /// Longest time that the guest may stand still, such as 300ms
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    pub downtime_limit: Time,

    /// Bandwidth over all data connections while the guest runs, such as 100MB/s [default: all there is]
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Rate>,

    /// Rounds after which the guest is stopped whatever is left
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub max_rounds: u32,

    /// Do not compare the RAM of both sides before the handing over
    #[arg(long)]
    pub no_verify: bool,
}
