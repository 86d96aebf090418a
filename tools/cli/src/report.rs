//! The object that a migration ends with. Its field names are a contract with those who read it.

use std::io;

use anyhow::{Result, bail};
use indicatif::{BinaryBytes, HumanCount};
use ringferry::source::SourceReport;
use serde::{Deserialize, Serialize};

use crate::display::gave_way;
use crate::output::Output;
use crate::printable::printable;

/// `migration_report`: what a migration did, to RAM and to the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationReport {
    pub kind: String,
    pub result: String,
    pub guest: String,
    #[serde(flatten)]
    pub source: SourceReport,
    pub guest_consistent: Option<bool>,
    pub vcpus: Vec<VcpuReport>,
}

/// One vCPU's part. Progress is in steps of its workload: page writes, page reads or computations.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VcpuReport {
    pub index: usize,
    pub pages_dirtied: u64,
    pub ring_full_exits: u64,
    pub throttled_ms: f64,
    pub longest_stall_ms: f64,
    /// Times that it was held back at its gate.
    #[serde(default)]
    pub stalls: u64,
    /// Share of the stalls that began in the guest's kernel; `None` if none did where that is known.
    #[serde(default)]
    pub stalls_in_kernel_share: Option<f64>,
    /// Stalls that were put off for a moment because the guest was in its kernel.
    #[serde(default)]
    pub stalls_put_off: u64,
    pub progress_before_per_s: f64,
    pub progress_during_per_s: f64,
    pub progress_after_per_s: Option<f64>,
    pub lost_guest_ms: f64,
    /// Entries taken from its ring, duplicates too; not part of the object.
    #[serde(skip)]
    pub ring_entries: u64,
}

impl MigrationReport {
    /// The report of a completed migration.
    pub fn new(guest: &str, source: SourceReport, vcpus: Vec<VcpuReport>) -> Self {
        Self {
            kind: "migration_report".to_owned(),
            result: "completed".to_owned(),
            guest: guest.to_owned(),
            source,
            guest_consistent: None,
            vcpus,
        }
    }

    /// An error if verification found that the guest, which has moved, lost writes.
    pub fn verdict(&self) -> Result<()> {
        if self.source.ram_digest_match == Some(false) {
            bail!(
                "the guest has moved, and has lost writes: {} pages changed without having been tracked",
                self.source.untracked_pages
            );
        }
        Ok(())
    }

    /// Prints the report, for programs or for people.
    pub fn print(&self, output: Output) -> io::Result<()> {
        if output.json() { output.object(self) } else { output.write(self.text().as_bytes()) }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let sends = if self.source.totals.zero_copy_sends == 0 && self.source.totals.copied_sends > 0 {
            "the kernel copied every send, as it always does on loopback"
        } else {
            "as the kernel reported them"
        };
        let verdict = |found: Option<bool>, yes: &str, no: &str, unknown: &str| match found {
            Some(true) => yes.to_owned(),
            Some(false) => no.to_owned(),
            None => unknown.to_owned(),
        };
        let mut text = format!(
            "migrated {} of RAM in {:.0} ms, {} rounds, backend {}, {} channel{}\n\
             guest stood still for {:.1} ms (of it {:.1} ms until the vCPUs stopped, {:.1} ms comparing RAM)\n\
             sent {} pages and {} zero pages, {}; {} sends zero-copied, {} copied ({sends})\n\
             {}; {}\n",
            BinaryBytes(self.source.memory_bytes),
            self.source.total_ms,
            self.source.rounds.len(),
            self.source.backend,
            self.source.channels,
            if self.source.channels == 1 { "" } else { "s" },
            self.source.downtime_ms,
            self.source.pause_ms,
            self.source.verify_ms,
            HumanCount(self.source.totals.pages_sent),
            HumanCount(self.source.totals.zero_pages),
            BinaryBytes(self.source.totals.bytes_sent),
            HumanCount(self.source.totals.zero_copy_sends),
            HumanCount(self.source.totals.copied_sends),
            verdict(
                self.source.ram_digest_match,
                "RAM digests are equal",
                "WRITES WERE LOST",
                "RAM digests were not compared"
            ),
            verdict(
                self.guest_consistent,
                "the guest found every write of its own",
                "THE GUEST LOST WRITES",
                "the guest's writes were not checked"
            ),
        );
        if !self.source.downtime_limit_kept {
            let limit = self.source.downtime_limit_ms;
            text.push_str(&format!("the downtime limit of {limit:.0} ms was not kept"));
            if let Some(why) = self.source.downtime_limit_gave_way {
                text.push_str(&format!(": {}", gave_way(why)));
            }
            text.push('\n');
        }
        if self.source.switchovers_called_off > 0 {
            let times = self.source.switchovers_called_off;
            text.push_str(&format!("the guest was stopped and ran on {times} times before\n"));
        }
        for channel in &self.source.channel_reports {
            for loss in &channel.losses {
                text.push_str(&format!(
                    "channel {} was lost after {:.0} ms, in round {}: {}; {} pages were sent again\n",
                    printable(&channel.channel),
                    loss.at_ms,
                    loss.round,
                    printable(&loss.reason),
                    HumanCount(loss.pages_sent_again),
                ));
            }
            if let Some(fallback) = &channel.fallback {
                let channel = printable(&channel.channel);
                text.push_str(&format!("channel {channel}: {}\n", printable(fallback)));
            }
        }
        text.push_str(
            "  vCPU      dirtied  ring full  longest stall   throttled       before       during        after       lost\n",
        );
        for vcpu in &self.vcpus {
            let after = vcpu.progress_after_per_s.map_or_else(|| "-".to_owned(), rate);
            text.push_str(&format!(
                "  {:4} {:>12} {:>10} {:>11.1} ms {:>8.0} ms {:>10}/s {:>10}/s {:>10}/s {:>7.0} ms\n",
                vcpu.index,
                HumanCount(vcpu.pages_dirtied).to_string(),
                HumanCount(vcpu.ring_full_exits).to_string(),
                vcpu.longest_stall_ms,
                vcpu.throttled_ms,
                rate(vcpu.progress_before_per_s),
                rate(vcpu.progress_during_per_s),
                after,
                vcpu.lost_guest_ms,
            ));
        }
        for vcpu in &self.vcpus {
            if let Some(share) = vcpu.stalls_in_kernel_share {
                text.push_str(&format!(
                    "vCPU {}: of {} stalls {:.0} % began in the guest's kernel, {} were put off for a moment because of it\n",
                    vcpu.index,
                    vcpu.stalls,
                    share * 100.0,
                    vcpu.stalls_put_off
                ));
            }
        }
        text
    }
}

/// A rate in steps per second, short.
pub fn rate(per_s: f64) -> String {
    match per_s {
        r if r >= 1e6 => format!("{:.2} M", r / 1e6),
        r if r >= 1e3 => format!("{:.1} k", r / 1e3),
        r => format!("{r:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(source: SourceReport) -> MigrationReport {
        MigrationReport::new("kvm", source, Vec::new())
    }

    #[test]
    fn a_downtime_limit_that_was_not_kept_is_told() {
        let source = SourceReport { downtime_limit_ms: 300.0, downtime_ms: 400.0, ..SourceReport::default() };
        let told = "the downtime limit of 300 ms was not kept";
        assert!(report(source.clone()).text().contains(told));
        let kept = SourceReport { downtime_limit_kept: true, ..source };
        assert!(!report(kept).text().contains(told));
    }

    #[test]
    fn writes_that_tracking_missed_are_a_failure_although_the_guest_has_moved() {
        let lost =
            SourceReport { ram_digest_match: Some(false), untracked_pages: 3, ..SourceReport::default() };
        let lost = report(lost);
        assert!(lost.text().contains("WRITES WERE LOST"));
        let error = lost.verdict().unwrap_err().to_string();
        assert!(error.contains("has moved") && error.contains("3 pages"), "{error}");
        for unharmed in [Some(true), None] {
            let source = SourceReport { ram_digest_match: unharmed, ..SourceReport::default() };
            assert!(report(source).verdict().is_ok());
        }
    }
}
